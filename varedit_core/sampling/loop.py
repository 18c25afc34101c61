"""The loop: next-scale prediction of an edit (VAREdit, arXiv 2508.15772, section 3; Infinity, algorithm 1).

Knows networks, scales and draws; knows nothing of files, pictures or user interfaces. Whoever wants to look,
force, mask, count or stop does so on the `Scale` that the loop yields.

Shape suffixes: B images, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..defaults import DEFAULT_SETTINGS, NEUTRAL, NO_SHORTCUTS, SIZES, SamplingSettings, Shortcuts
from ..model.kv_cache import Pass
from ..model.layers import Attention, sdpa
from ..model.transformer import Condition, Transformer
from ..runtime.approximations import passes, reached, token_masks
from ..runtime.graphs import on
from ..runtime.workspace import Shape, Workspace
from ..tokenizer.quantizer import area_resize, codes, from_tokens, latent_grids, linear_resize, to_tokens
from ..tokenizer.schedule import AREAS, Grid, Schedule
from ..tokenizer.source import Source


@dataclass(frozen=True)
class Promises:
    """What a caller vouches for, so that the loop asks and waits less.

    checks: it calls `Scale.check` of the last scale itself, when it has given the device other work. fresh: picture or
    texts are others than those of the workspace's last edit. beside: the stream on which it has the texts made, of which
    the present one knows nothing yet.
    """

    checks: bool = False
    fresh: bool = False
    beside: torch.cuda.Stream | None = None

    def settled(self) -> Promises:
        """The same for several edits: the texts are there, and nothing is known of the picture."""
        if self.beside is not None:
            torch.cuda.current_stream(self.beside.device).wait_stream(self.beside)
        return Promises(self.checks)


class Scale:
    """One scale of an edit, between its logits and the running sum.

    index, count: which of how many that run. grid: its token grid. logits: [rows, tokens, token bits, 2] of the head,
    before temperature and guidance; the unconditional rows follow the conditional ones where guidance is on.
    log_odds: fp32 [B, d, h, w] of each bit being 1, after both; change it before reading `bits` to steer
    the draw. `bits` are drawn when first read; assign to force them, `lock` to hold some to the source's. total: the
    running sum before this scale. source: what the edit may be held to. Leave the loop to cancel.
    """

    def __init__(
        self,
        index: int,
        schedule: Schedule,
        logits: Tensor,
        log_odds: Tensor,
        uniform: Tensor | None,
        top_p: float,
        total: Tensor,
        source: Source,
    ) -> None:
        self.schedule, self.index, self.count, self.grid = schedule, index, len(schedule), schedule.grids[index]
        self.logits, self._log_odds = logits, log_odds
        self._uniform, self._top_p, self.total, self.source = uniform, top_p, total, source
        self.last = index + 1 == len(schedule)
        """Whether it is the finest of the schedule."""
        self.free: Tensor | None = None
        """Where bits are free, boolean [B or 1, 1 or d, h, w]; None: everywhere. Elsewhere the source's stand."""
        self.edited: Tensor | None = None
        """The same for latents of the result, at the finest scale: elsewhere they are the source's tokens exactly."""
        self.temperature = 1.0
        """What divided the log-odds."""
        self._source_bits: Tensor | None = None
        self.finite: Tensor | None = None
        """Whether the logits of all scales so far are numbers: one boolean on the device."""
        self._bits: Tensor | None = None
        self._sum: Tensor | None = None

    def check(self) -> None:
        """Raise ValueError where the logits up to and with this scale were undefined numbers; waits for the device."""
        if not (self.finite is None or self.finite.is_meta or self.finite):  # a dry run on `meta` has no answer
            raise ValueError(
                "the network's logits are undefined numbers; use bf16 or fp32, and check the weights and the text"
            )

    @property
    def drawn(self) -> bool:
        """Whether its bits are drawn or given already."""
        return self._bits is not None

    @property
    def log_odds(self) -> Tensor:
        """Log-odds [B, d, h, w] of each bit being 1, fp32. ValueError where they are set after the draw."""
        return self._log_odds

    @log_odds.setter
    def log_odds(self, value: Tensor) -> None:
        if self._bits is not None:
            raise ValueError(
                f"the bits of scale {self.index + 1} are drawn already; change log_odds before reading bits"
            )
        self._log_odds = value

    def on_grid(self, x_BlD: Tensor) -> Tensor:
        """A value a token bit [B, tokens, token bits] -> the same on the latent grid [B, d, h, w]."""
        return from_tokens(x_BlD, self.grid, self.log_odds.shape[-2] // self.grid[0])

    @property
    def probability(self) -> Tensor:
        """Probability [B, d, h, w] that the draw gives 1, after top-p."""
        p, cut = self.log_odds.sigmoid(), 1 - self._top_p
        if not cut:
            return p
        return torch.where(torch.sigmoid(-self.log_odds) <= cut, 1.0, torch.where(p <= cut, 0.0, p))

    @property
    def bits(self) -> Tensor:
        """Boolean bits [B, d, h, w]."""
        if self._bits is None:
            greedy = self._uniform is None
            self._bits = self._within(self.log_odds > 0 if greedy else self._uniform < self.probability)
        return self._bits

    @bits.setter
    def bits(self, value: Tensor) -> None:
        if value.dtype != torch.bool:
            raise ValueError(f"bits must be boolean, got {value.dtype}; compare your values with a threshold first")
        if value.shape != self.log_odds.shape:
            raise ValueError(
                f"scale {self.index + 1} takes bits of shape {tuple(self.log_odds.shape)}, got {tuple(value.shape)}"
            )
        self._bits, self._sum = self._within(value.to(self.log_odds.device)), None

    @property
    def source_bits(self) -> Tensor:
        """The bits [B, d, h, w] that bring the running sum nearest to the source here."""
        if self._source_bits is None:
            self._source_bits = self.source.bits(self.total, self.index)
        return self._source_bits

    def lock(self, free: Tensor, edited: Tensor | None = None) -> None:
        """Hold the scale to the source where `free`, boolean [B or 1, 1 or d, h, w], is false, whatever is drawn or
        assigned. What is locked at the finest scale, or not in `edited` there, becomes the source's tokens exactly."""
        self.free = free if self.free is None else self.free & free
        if self.last:
            free = free if edited is None else free & edited
            self.edited, self._sum = free if self.edited is None else self.edited & free, None
        if self._bits is not None:
            self.bits = self._bits

    def _within(self, bits: Tensor) -> Tensor:
        return bits if self.free is None else torch.where(self.free, bits, self.source_bits)

    @property
    def running_sum(self) -> Tensor:
        """Sum [B, d, H, W] of the codes up to and with this scale: what the decoder reads."""
        if self._sum is None:
            self._sum = self.total + linear_resize(codes(self.bits), self.total.shape[-2:])
            if self.edited is not None:
                self._sum = torch.where(self.edited, self._sum, self.source.total)
        return self._sum


Control = Callable[[Scale], None]
"""What looks at, or changes, every scale before whoever runs the loop sees it (see `controls`)."""


@torch.no_grad()
def sample(
    transformer: Transformer,
    features_BdHW: Tensor,
    texts: Sequence[Tensor],
    schedule: Schedule,
    settings: SamplingSettings = DEFAULT_SETTINGS,
    negatives: Sequence[Tensor | None] | None = None,
    attention: Attention = sdpa,
    workspace: Workspace | None = None,
    copies: int = 1,
    shortcuts: Shortcuts = NO_SHORTCUTS,
    mask: Tensor | None = None,
    promises: Promises = Promises(),
    steer: Sequence[Control] = (),
    given: Sequence[Tensor] = (),
    feather: int = NEUTRAL.feather,
    source_attention: float = NEUTRAL.source_attention,
    source_total: Tensor | None = None,
    draws: Sequence[int] | None = None,
) -> Iterator[Scale]:
    """Edit B images, or make them of the texts alone where the transformer reads no source (`TransformerConfig.source`);
    yields every `Scale` before its bits are drawn. The last `running_sum` is the result.

    features_BdHW: unquantised features of the source images on the last latent grid; where no source is read they give
    the shape, and with a mask what stays. texts: features [L_i, T] of each image's instruction. negatives: features of
    each negative prompt, None for the learned unconditional ones. workspace: where keys and values are kept (see `workspace`); by default memory of this edit
    alone, let go of however the loop ends. copies: edits of each image, from one pass over it; those of an image
    follow each other, B then counts them all. shortcuts: work to leave out. mask: [B or 1, y, x] of any size, above 0
    where the picture may change. feather: so many tokens around it are drawn, too, and so many latents around it stay the
    edit's; all others are the source's in the end. steer: called with every scale, in order, before it is yielded. given: bits of the first
    scales, of every image or of every copy; of every image, its copies share the passes, too. source_attention: what
    the source's keys weigh in self-attention. source_total: the sources' sums of codes [B, d, H, W], where they are known
    (see `Source`). draws: what is added to the seed for each row, by default its number. Raises ValueError, at the first step, where the inputs do not belong together, and at the end where the logits were
    undefined numbers.
    """
    if source_attention != 1 and not transformer.config.source:
        raise ValueError("this transformer reads no source, so source_attention has nothing to weigh; leave it at 1")
    if shortcuts.drafted:
        raise ValueError("drafted scales need a second transformer; use drafting.draft_and_refine")
    patch = _patch(transformer, features_BdHW, schedule)
    grids, device = latent_grids(schedule, patch), features_BdHW.device
    plan = shortcuts.planned(settings.per_scale(len(schedule)))
    guided = max((k + 1 for k, (guidance, _, _) in enumerate(plan) if guidance != 1), default=0)
    negatives = negatives or [None] * len(features_BdHW)
    with on(promises.beside):
        texts = _texts(transformer, texts, negatives, len(features_BdHW), guided > 0, device)
    if mask is not None and len(mask) == len(features_BdHW):
        mask = mask.repeat_interleave(copies, dim=0)
    together = len(given) if copies > 1 and given and len(given[0]) == len(features_BdHW) else 0
    given = _given(given, grids, len(features_BdHW), copies)
    if copies > 1 and workspace is not None and not workspace.kind.shares_source:
        features_BdHW, promises = features_BdHW.repeat_interleave(copies, dim=0), promises.settled()
        texts, copies = [text for text in texts for _ in range(copies)], 1
    work = workspace or Workspace(kept=False)
    shape = Shape.of(schedule, texts, copies, transformer.dtype, device)
    rows = len(texts) * copies

    def source(features: Tensor) -> Tensor:
        tokens = to_tokens(area_resize(features.float(), grids[-1]), patch)
        return _all_rows(transformer.embed(tokens, len(schedule) - 1), len(texts))

    try:
        work.begin(transformer, texts, shape, attention, promises.beside)
        if transformer.config.source:
            work.expect((features_BdHW, *texts), promises.fresh)
            work.read_source(source, features_BdHW)
        features = features_BdHW.float()
        features = features.repeat_interleave(copies, dim=0) if copies > 1 else features
        if source_total is not None and len(source_total) < len(features):
            source_total = source_total.repeat_interleave(len(features) // len(source_total), dim=0)
        total, batch = torch.zeros_like(features), len(features)
        masks, held = _masks(mask, schedule, features, shortcuts, feather), Source(features, grids, source_total)
        bias = math.log(source_attention) if source_attention else -math.inf
        depends = (shortcuts, mask, feather, bias)
        steps = work.scale_passes(lambda: passes(work.passes, schedule, shortcuts, masks, bias), *depends)[1:]
        generators = [torch.Generator().manual_seed((settings.seed + i) % 2**64) for i in draws or range(batch)]
        for k, (guidance, temperature, top_p) in enumerate(plan):
            if k == guided and rows > batch:
                rows = batch
            shared = copies if k < together else 1
            tokens = _Tokens(transformer, work.condition, grids[k], patch, k, steps[k].tokens, rows // shared, shared)
            asked = (rows if guidance != 1 else batch) // shared
            logits = work.run(tokens, steps[k], rows // shared, asked, *[total] * (k > 0), shared=shared)
            logits = logits.repeat_interleave(shared, 0) if shared > 1 else logits
            odds = _everywhere(_guided_log_odds(logits, batch, guidance), steps[k], schedule.tokens[k])
            log_odds = from_tokens(odds, schedule.grids[k], patch)
            # Drawn on the CPU, also where a greedy scale ignores them: one seed, one image, on every device.
            uniform = _uniform(log_odds, generators)
            if temperature:
                log_odds = log_odds / temperature
            scale = Scale(k, schedule, logits, log_odds, uniform if temperature else None, top_p, total, held)
            scale.count, scale.temperature = len(plan), temperature or 1.0
            scale.finite = work.finite if k + 1 < len(plan) else work.finite.clone()  # the next edit begins anew
            if masks:
                scale.lock(on_latents(masks[k], patch), reached(mask.to(total.device), grids[-1], feather))
            if k < len(given):
                scale.bits = given[k]
            for control in steer:
                control(scale)
            yield scale
            total = scale.running_sum
        if not promises.checks:
            scale.check()
    finally:
        work.end()


@dataclass(frozen=True)
class _Tokens:
    """What makes a scale's input of the running sum: the first scale's of none. No tensor of an edit is held in it but
    those that stay in place. shared: images of so many consecutive rows have one pass."""

    transformer: Transformer
    condition: Condition
    grid: Grid
    patch: int
    index: int
    which: Tensor | None
    rows: int
    shared: int = 1

    def __call__(self, *total_BdHW: Tensor) -> Tensor:
        if not total_BdHW:
            return self.transformer.start(self.condition)[:: self.shared][: self.rows]
        (total,) = total_BdHW
        tokens = to_tokens(linear_resize(total[:: self.shared], self.grid), self.patch)
        tokens = tokens if self.which is None else tokens[:, self.which]
        return _all_rows(self.transformer.embed(tokens, self.index), self.rows)


def _uniform(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A number from 0 to 1 for every element of [B, d, h, w], image i's from generator i, brought to its device."""
    drawn = torch.empty(like.shape, pin_memory=like.is_cuda)  # from pageable memory the copy would wait for the device
    for image, generator in zip(drawn, generators):
        torch.rand(image.shape, generator=generator, out=image)
    return drawn.to(like.device, non_blocking=True)


def _given(given: Sequence[Tensor], grids: Sequence[Grid], images: int, copies: int) -> list[Tensor]:
    """Bits of the first scales, as they came. ValueError where they are not of these grids and images."""
    for k, (bits, grid) in enumerate(zip(given, grids)):
        if bits.shape[-2:] != grid or len(bits) not in (images, images * copies):
            raise ValueError(
                f"the tokens of scale {k + 1} have the shape {list(bits.shape)} but the edit needs {images} of a grid of "
                f"{grid[0]}x{grid[1]}; use the same size, shape and number of pictures as in the edit that made them"
            )
    if len(given) > len(grids):
        raise ValueError(f"there are tokens of {len(given)} scales but the edit has {len(grids)}; use the size they are of")
    return [bits.repeat_interleave(copies, 0) if len(bits) < images * copies else bits for bits in given]


def _masks(
    mask: Tensor | None, schedule: Schedule, features: Tensor, shortcuts: Shortcuts, feather: int
) -> list[Tensor] | None:
    """Masks of every scale's tokens. ValueError for a mask that is none, or a shortcut that lacks one."""
    if mask is None:
        if shortcuts.inside:
            raise ValueError("computing only inside a mask needs one; give a mask, or leave inside at 0")
        return None
    if mask.ndim != 3 or len(mask) not in (1, len(features)):
        raise ValueError(
            f"the mask has the shape {list(mask.shape)} for {len(features)} images; give one [1, y, x], or one for each"
        )
    if not (mask > 0).any():
        raise ValueError("the mask is empty; paint where the picture may change, or leave it out")
    return token_masks(mask.to(features.device), schedule, feather)


def on_latents(mask_B1hw: Tensor, patch: int) -> Tensor:
    """A mask of tokens as one of latent positions."""
    return mask_B1hw.repeat_interleave(patch, -1).repeat_interleave(patch, -2)


def _everywhere(odds_BnD: Tensor, step: Pass, count: int) -> Tensor:
    """Log-odds of all of a scale's tokens; 0 for those that were not computed, whose bits are locked."""
    if step.tokens is None:
        return odds_BnD
    return odds_BnD.new_zeros(len(odds_BnD), count, odds_BnD.shape[2]).index_copy_(1, step.tokens, odds_BnD)


def _guided_log_odds(logits: Tensor, batch: int, guidance: float) -> Tensor:
    """guidance * conditional + (1 - guidance) * unconditional, as log-odds [B, tokens, token bits]."""
    odds = logits[..., 1] - logits[..., 0]
    return odds if len(odds) == batch else guidance * odds[:batch] + (1 - guidance) * odds[batch:]


def _all_rows(x_BnC: Tensor, count: int) -> Tensor:
    return x_BnC.repeat(count // len(x_BnC), 1, 1)


def _texts(transformer, texts, negatives, batch: int, guided: bool, device) -> list[Tensor]:
    if len(texts) != batch or len(negatives) != batch:
        raise ValueError(
            f"{batch} images need {batch} instructions and negative prompts, got {len(texts)} and {len(negatives)}"
        )
    rows = list(texts)
    if guided:
        rows += [transformer.unconditional(len(t), device) if n is None else n for t, n in zip(texts, negatives)]
    for text in rows:
        if text.ndim != 2 or text.shape[1] != transformer.config.text_width or not len(text):
            raise ValueError(
                f"the text features have the shape {tuple(text.shape)} but the transformer reads [tokens, "
                f"{transformer.config.text_width}]; use the text encoder it was trained with"
            )
    return [text.to(device) for text in rows]


def _patch(transformer: Transformer, features: Tensor, schedule: Schedule) -> int:
    (height, width), (rows, columns) = features.shape[-2:], schedule.grids[-1]
    patch = height // rows
    if (
        patch < 1
        or (height, width) != (rows * patch, columns * patch)
        or features.shape[1] * patch * patch != transformer.config.token_bits
    ):
        raise ValueError(
            f"source features of shape {tuple(features.shape)} do not fit a {rows}x{columns} grid of tokens of "
            f"{transformer.config.token_bits} bits; encode the image at {schedule.pixels[1]}x{schedule.pixels[0]} with the model's tokenizer"
        )
    levels = transformer.config.levels
    if len(schedule) > levels:
        named = [side for side, area in SIZES.items() if AREAS[area] <= levels]
        raise ValueError(
            f"this size has {len(schedule)} scales but the model was made for {levels}; use one of at most {levels}"
            + (f", such as {named[-1]}" if named else "")
        )
    return patch
