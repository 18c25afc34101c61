"""One scale of an edit: what controls, previews and callers read and change.

Shape suffixes: B rows, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of one scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokenizer.quantizer import codes, from_tokens, linear_resize
from ..tokenizer.source import Source
from .checks import checked

if TYPE_CHECKING:
    from .batch import EditBatch


class Scale:
    """One scale of a batch of edits, between its logits and the running sum.

    index, count: which of how many that run. grid: its token grid. logits: [rows, tokens, token bits, 2] of the head,
    before temperature and guidance; the unconditional rows follow the conditional ones where guidance is on. log_odds:
    fp32 [B, d, h, w] of each bit being 1, after both; change it before reading `bits` to steer the draw. `bits` are
    drawn when first read; assign to force them, `lock` to hold some to the source's. total: the running sum before this
    scale. source: the source, to which the edit may be held. finite: whether the logits of all scales so far are
    numbers, one boolean on the device. To cancel an edit, stop iterating over its scales.
    """

    def __init__(
        self, index: int, batch: EditBatch, source: Source, total: Tensor, logits: Tensor, log_odds: Tensor,
        uniform: Tensor, finite: Tensor,
    ) -> None:  # fmt: skip
        self.schedule, self.index, self.count = batch.schedule, index, len(batch.plan)
        self.grid, self.source, self.total = self.schedule.grids[index], source, total
        self.logits, self._log_odds, self.finite = logits, log_odds, finite
        _, temperature, self._top_p = batch.plan[index]
        self.temperature = temperature or 1.0
        """What divided the log-odds."""
        self.uniform = uniform if temperature else None
        self.whole = logits.shape[1] == self.grid[0] * self.grid[1]
        """Whether all of its tokens were computed."""
        self.last = index + 1 == len(self.schedule)
        """Whether it is the finest of the schedule."""
        self.free: Tensor | None = None
        """Where bits are free, boolean [B or 1, 1 or d, h, w]; None: everywhere. Elsewhere the source's stand."""
        self.edited: Tensor | None = None
        """The same for latents of the result, at the finest scale: elsewhere they are the source's tokens exactly."""
        self._source_bits: Tensor | None = None
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
        self._log_odds = checked("log_odds", value, False, [tuple(self._log_odds.shape)])

    def on_grid(self, x_BnD: Tensor) -> Tensor:
        """A value a token bit [B, tokens, token bits] -> the same on the latent grid [B, d, h, w]."""
        return from_tokens(x_BnD, self.grid, self.log_odds.shape[-2] // self.grid[0])

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
            greedy = self.uniform is None
            self._bits = self._within(self.log_odds > 0 if greedy else self.uniform < self.probability)
        return self._bits

    @bits.setter
    def bits(self, value: Tensor) -> None:
        value = checked("bits", value, True, [tuple(self.log_odds.shape)])
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
        size = self._log_odds.shape
        shapes = [(rows, bits, *size[2:]) for rows in {size[0], 1} for bits in {size[1], 1}]
        for mask in (free,) if edited is None or not self.last else (free, edited):
            checked("a lock", mask, True, shapes)
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
