"""What holds an edit to its source, and what it tells of itself: small functions over the loop's `Scale`.

`steering` makes those that `defaults.Controls` asks for, `request.edits` runs the loop with them; whoever runs it may
add its own. Masks are locked by the loop itself (`sampling.sample`). Shape suffixes: B images, R regions, d bits a
latent position, (H, W) latent grid of the last scale, (h, w) of one scale, (y, x) pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..defaults import AUTO_MASK, Controls
from ..sampling.loop import Control, Scale
from ..tokenizer.quantizer import area_resize, linear_resize

PRESERVED = 2.0
"""Logits that `preserve` at one half adds to the source's bits."""
LATE = 2
"""So many of the last scales are locked by a mask that the edit finds by itself."""
MOVED = 0.6
"""Distance of latents, in codes, from which they count as changed, at an auto mask of one half."""
DIFFERENT = 0.3
"""The same of decoded pixels, which are in [-1, 1]."""
GLOBAL = 0.9
"""Share of latents that changed, from which an edit is one of the whole picture."""


def steering(controls: Controls) -> list[Control]:
    """The controls of an edit, in the order in which they come to a scale; an `AutoMask` is the last one."""
    made: list[Control] = []
    if controls.preserve:
        made.append(lambda scale: preserve(scale, controls.preserve))
    if controls.strength < 1:
        made.append(lambda scale: hold(scale, controls.strength))
    if controls.auto_mask:
        made.append(AutoMask(controls.auto_mask))
    return made


def hold(scale: Scale, strength: float) -> None:
    """Strength: hold the first (1 - strength) of all scales to the source, and of the scale where this ends a part of
    the bits, always the same ones."""
    held = (1 - strength) * len(scale.source.grids) - scale.index
    if held <= 0:
        return
    shape = scale.log_odds.shape[1:]
    if held >= 1:
        scale.lock(torch.zeros(1, 1, *shape[1:], dtype=torch.bool, device=scale.log_odds.device))
    else:
        which = torch.rand(shape, generator=torch.Generator().manual_seed(scale.index))
        scale.lock((which >= held)[None].to(scale.log_odds.device))


def preserve(scale: Scale, amount: float) -> None:
    """Add to the log-odds of every bit that the source has, amount / (1 - amount) times `PRESERVED` logits."""
    if amount == 1:
        return hold(scale, 0.0)
    if not scale.drawn:
        pull = PRESERVED * amount / (1 - amount)
        scale.log_odds = scale.log_odds + pull / scale.temperature * scale.source_bits.float().mul_(2).sub_(1)


class Regions:
    """Several instructions in one edit: B * R * copies rows, those of a picture's regions behind each other, become one
    edit, in which each region follows its own.

    masks_BRyx: of any size, above 0 where a region is; where several are, the last one counts. A token of more than one
    region, as coarse ones are, weighs their log-odds by their areas.
    """

    def __init__(self, masks_BRyx: Tensor, copies: int = 1) -> None:
        self.own, self.copies = exclusive(masks_BRyx), copies

    def __call__(self, scale: Scale) -> None:
        if scale.drawn:
            return
        count = self.own.shape[1]
        odds = scale.log_odds.unflatten(0, (-1, count, self.copies))
        weight = self._weights(scale.log_odds).to(odds)[:, :, None, None]
        mixed = torch.where(weight > 0, odds * weight, 0.0).sum(1, keepdim=True)
        scale.log_odds = mixed.expand_as(odds).flatten(0, 2)

    def _weights(self, like: Tensor) -> Tensor:
        """Shares [B, R, h, w] of the regions at each latent position of a scale; beside them those of the nearest."""
        shares = area_resize(self.own, tuple(like.shape[-2:]))
        while not (some := shares.sum(1, keepdim=True) > 0).all():
            if not some.any():
                return torch.full_like(shares, 1 / shares.shape[1])
            shares = torch.where(some, shares, F.max_pool2d(shares, 3, stride=1, padding=1))
        return shares / shares.sum(1, keepdim=True)


def exclusive(masks_BRyx: Tensor) -> Tensor:
    """Masks [B, R, y, x] of which later ones cover earlier ones, as zeros and ones that do not overlap."""
    covered = (masks_BRyx > 0).float()
    later = covered.flip(1).cumsum(1).flip(1) - covered
    return covered * (later == 0)


class AutoMask:
    """Finds where an edit changes its picture, and locks the rest, in one run.

    After all but the last `LATE` scales: latents whose running sum is farther from the source's own than `MOVED`
    (scaled with `amount`), and their neighbours, stay free.
    """

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self.region: Tensor | None = None
        """Boolean [B, 1, H, W], once found."""

    def __call__(self, scale: Scale) -> None:
        begin = max(1, len(scale.source.grids) - LATE)
        if scale.index < begin:
            return
        if scale.index == begin:
            moved = (scale.total - scale.source.until(begin - 1)).norm(dim=1, keepdim=True)
            self.region = F.max_pool2d((moved > threshold(MOVED, self.amount)).float(), 3, stride=1, padding=1) > 0
        grid = tuple(scale.log_odds.shape[-2:])
        scale.lock(F.adaptive_max_pool2d(self.region.float(), grid) > 0)


def threshold(base: float, amount: float) -> float:
    """What counts as changed at an auto mask of `amount`: the base at one half, half of it at 1."""
    return base / (2 * amount)


def changed(edited_B3yx: Tensor, source_B3yx: Tensor, amount: float = AUTO_MASK) -> Tensor:
    """How much pixels in [-1, 1] differ, [B, y, x]: 0 no, 1 the threshold of the auto mask or more. Both decoded, so
    that what the tokenizer alone changes does not count."""
    difference = (edited_B3yx - source_B3yx).abs().amax(1, keepdim=True)
    blurred = F.avg_pool2d(difference, 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    return (blurred / threshold(DIFFERENT, amount)).clamp(0, 1)


def differing(edited_3yx: Tensor, source_3yx: Tensor, free_dHW: Tensor, amount: float) -> Tensor:
    """Where an edit changed a picture, boolean [y, x]: both decoded, in 8-bit levels, and of `free` only what is near.
    Everywhere, where `GLOBAL` of the latents or more are free: such an edit is one of the whole picture."""
    if free_dHW.any(0).float().mean() >= GLOBAL:
        return torch.ones(edited_3yx.shape[-2:], dtype=torch.bool, device=edited_3yx.device)
    edited, source = (levels[None].float() / 127.5 - 1 for levels in (edited_3yx, source_3yx))
    far = changed(edited, source, amount)[0] >= 1
    near = F.interpolate(free_dHW.any(0)[None, None].float(), far.shape)[0, 0] > 0
    return far & near.to(far.device)


class Certainty:
    """How sure the model was: the mean over bits and scales of |2p - 1| of its own probabilities with the instruction,
    before temperature and guidance."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def __call__(self, scale: Scale) -> None:
        own = scale.logits[: len(scale.log_odds)].softmax(-1)[..., 1]
        if own.shape[1] == scale.grid[0] * scale.grid[1]:  # else part of the scale was left out
            sure = scale.on_grid((2 * own - 1).abs()).mean(1, keepdim=True)
            self._sum, self._count = self._sum + linear_resize(sure, scale.source.grids[-1]), self._count + 1

    @property
    def map(self) -> Tensor:
        """[B, H, W] from 0 to 1."""
        return (self._sum / self._count)[:, 0]


class Candidates:
    """Scores beginnings of edits, each from its logits and bits.

    likelihood: log-probability of the bits with the instruction. instruction: how much more likely they are with it than
    without, which wants guidance. near, far: distance of the running sum from the source's own, the smaller or the larger
    the better.
    """

    def __init__(self, score: str) -> None:
        self.score, self.bits = score, []
        self.scores: Tensor | float = 0.0

    def __call__(self, scale: Scale) -> None:
        bits = scale.bits
        self.bits.append(bits)
        if self.score in ("near", "far"):
            distance = (scale.running_sum - scale.source.until(scale.index)).square().mean((1, 2, 3))
            self.scores = distance if self.score == "far" else -distance
            return
        if scale.logits.shape[1] != scale.grid[0] * scale.grid[1]:
            raise ValueError(f"the score {self.score} needs whole scales; lower best_at or inside, so that these do not meet")
        sign = bits.float() * 2 - 1
        odds = [scale.on_grid(x[..., 1] - x[..., 0]) for x in scale.logits.split(len(bits))]
        terms = [F.logsigmoid(sign * x).sum((1, 2, 3)) for x in odds]
        if self.score == "instruction" and len(terms) == 1:
            raise ValueError("the score instruction compares with no instruction; use a guidance other than 1")
        self.scores = self.scores + (terms[0] - terms[1] if self.score == "instruction" else terms[0])

    def best(self, count: int, regions: int = 1) -> list[Tensor]:
        """Bits [B, d, h, w] of every scale of the best of each `count` candidates, by the sum of its regions' scores."""
        which = self.scores.unflatten(0, (-1, regions, count)).sum(1).argmax(1)
        rows = which + torch.arange(len(which), device=which.device) * count * regions
        return [bits[rows] for bits in self.bits]
