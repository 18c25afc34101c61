"""The KV cache as edits use it: preallocated, never holding the last scale, its work done by kernels where they run.

Each block keeps [source][scale 1]...[scale K-1], one block behind the other in one piece of memory. Nobody reads the
last scale's keys and values after it, so its pass leaves them in front of the block's source, where the block before
keeps its scales, which nobody needs then. Shape suffixes: R rows (images, then their unconditional twins), H heads, n
tokens of the pass, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..controls.window import Bands
from ..model.config import TransformerConfig
from ..model.functional import split_heads
from ..model.kv_cache import SOURCE, KVCache, Pass, pooled
from ..model.layers import Attention
from ..tokenizer.schedule import Schedule
from .kernels import banded_attention, heads_into, split_attention


@dataclass(frozen=True, eq=False)
class RowPass(Pass):
    """A pass of some rows of a cache.

    rows: which; with a step, so many consecutive rows of the cache share each row of the pass. tokens: which of the
    scale's tokens [n] they are; None: all. bands: what they see, in all blocks but the first, and in that; None:
    everything.
    """

    rows: slice = field(kw_only=True)
    tokens: Tensor | None = None
    bands: tuple[Bands, Bands] | None = None

    @property
    def shared(self) -> int:
        """How many consecutive rows of the cache share a row of the pass."""
        return self.rows.step or 1

    @property
    def every(self) -> slice:
        """All rows of the cache that the pass serves."""
        return slice(self.rows.start, self.rows.stop)


class DeviceCache(KVCache):
    """The KV cache of every block on the device, in the compute dtype.

    config: of the transformer. rows: R. copies: how many consecutive rows share one source; the prefill then has R /
    copies rows. All is allocated here; `nbytes` counts it. `HostCache` and `EightBitCache` keep all blocks but the
    first elsewhere or in fewer bits.
    """

    shares_source = recordable = True
    """Whether copies may be more than 1, and whether passes that use it may be recorded in graphs."""

    def __init__(
        self, config: TransformerConfig, schedule: Schedule, rows: int, dtype: torch.dtype, device, copies: int = 1
    ) -> None:
        self.schedule, self.head_size, self.rows, self.copies = schedule, config.head_size, rows, copies
        self.source, self.front = source_tokens(config, schedule), schedule.tokens[-1]
        """Tokens of the source, and of the room for the last scale in front of what a block keeps."""
        self.length = kept_tokens(config, schedule)
        kw = dict(dtype=dtype, device=device)
        blocks, step = self.plain_blocks(config.depth), self.step(config, schedule)
        size = (rows, config.heads, self.front + blocks * step, config.head_size)
        keys, values = torch.empty(size, **kw), torch.empty(size, **kw)
        self.nbytes_kept = keys.nbytes + values.nbytes
        """Bytes of the KV cache on the device, without the pooled references."""
        # Of every block: room for the last scale in front, then what is kept.
        parts = [slice(block * step, block * step + self.front + self.length) for block in range(blocks)]
        self.keys, self.values = ([x[:, :, part] for part in parts] for x in (keys, values))
        # The first block's source, pooled for every scale.
        referred = sum(schedule.tokens) if config.source else 0
        references = torch.empty(2, rows // copies, config.heads, referred, config.head_size, **kw)
        ends = accumulate(schedule.tokens)
        self.references = [references[:, :, :, end - count : end] for count, end in zip(schedule.tokens, ends)]

    @classmethod
    def of(
        cls,
        transformer: nn.Module,
        rows_at_once: int | None,
        schedule: Schedule,
        rows: int,
        dtype: torch.dtype,
        device,
        copies: int = 1,
        memory=None,
    ) -> DeviceCache:
        """The cache for edits with a transformer. rows_at_once: most rows of a pass, where they are not all. memory:
        host memory of a cache before it, for one that has a use for it."""
        return cls(transformer.config, schedule, rows, dtype, device, copies)

    @staticmethod
    def plain_blocks(depth: int) -> int:
        """How many blocks, from the first on, are kept in the compute dtype on the device."""
        return depth

    @staticmethod
    def step(config: TransformerConfig, schedule: Schedule) -> int:
        """Tokens from one block to the next: source and scales, with room for the last scale after the source."""
        return source_tokens(config, schedule) + max(sum(schedule.tokens[:-1]), schedule.tokens[-1])

    @classmethod
    def nbytes(cls, config: TransformerConfig, schedule: Schedule, rows: int, dtype: torch.dtype, **more: int) -> int:
        """Bytes on the device with the pooled references of the first block. more: what only other caches are asked."""
        references = sum(schedule.tokens) if config.source else 0
        blocks = cls.plain_blocks(config.depth)
        tokens = schedule.tokens[-1] + blocks * cls.step(config, schedule) + references
        return 2 * rows * config.width * tokens * dtype.itemsize

    @classmethod
    def host_nbytes(cls, config: TransformerConfig, schedule: Schedule, rows: int, dtype: torch.dtype) -> int:
        """Bytes in host memory beside those of `nbytes`."""
        return 0

    def passes(self, device) -> list[RowPass]:
        """The prefill (no tokens without a source), then one pass for each scale, of all rows."""
        sharing = [self.copies, *[1] * len(self.schedule)]
        steps = [(step, slice(0, self.rows, n)) for step, n in zip(super().passes(device), sharing)]
        return [RowPass(step.index, step.rotary, step.begin, rows=rows) for step, rows in steps]

    def is_last(self, step: Pass) -> bool:
        """Whether nobody will read the pass's keys and values after it."""
        return step.index == len(self.schedule) - 1

    def attend(
        self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: RowPass, attention: Attention
    ) -> Tensor:
        q = self.keep(block, first, qkv, query_scale, step)
        keys, values = self.seen(block, first, step)
        if step.bands is not None:
            if step.source_bias:
                raise ValueError(
                    "window and source_attention do not go together; set window to 0, or source_attention to 1"
                )
            return _banded(q, keys, values, step.bands[first], attention)
        if step.source_bias:
            return attention(q, keys, values, scale=1.0, mask=self._bias(first, step, q))
        found = split_attention(q, keys, values, scale=1.0) if getattr(attention, "recordable", False) else None
        return attention(q, keys, values, scale=1.0) if found is None else found

    def keep(self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: RowPass) -> Tensor:
        """Normalise and rotate a pass's q and k, put k and v where they belong; returns q [R, H, n, D]."""
        keys, values = self.room(block, first, step)
        if not (first and step.index == SOURCE):
            q = heads_into(qkv, query_scale, step.rotary, keys, values)
        else:
            # Row by row, as all that is made in fp32 on the way takes memory.
            rows = range(len(qkv))
            q = torch.cat([self._refer(qkv[r], keys[r], values[r], r, query_scale, step) for r in rows])
        if step.shared > 1:
            begin, end = self.span(first, step)[0]
            for kept in (self.keys[block], self.values[block]):
                others = self._from(kept[step.every], begin, end).unflatten(0, (-1, self.copies))
                others[:, 1:] = others[:, :1]
        return q

    def _bias(self, first: bool, step: RowPass, q: Tensor) -> Tensor:
        """What is added to the logits of all that `seen` gives, [1, 1, 1, keys]: one row serves every query."""
        (own, _), (begin, end) = self.span(first, step)
        start = self._start(first, step)
        bias = q.new_zeros(1, 1, 1, end - begin)
        bias[..., start - begin : self.source - begin] = step.source_bias
        return bias

    def _refer(self, qkv: Tensor, keys: Tensor, values: Tensor, row: int, query_scale: Tensor, step: RowPass) -> Tensor:
        """`keep` for one row of the first block's source, pooled for every scale from keys not rounded yet."""
        q, k, v = split_heads(qkv[None], query_scale, step.rotary)
        keys.copy_(k[0])
        values.copy_(v[0])
        for reference, grid in zip(self.references, self.schedule.grids):
            for kind, x in enumerate(pooled(k, v, self.schedule.grids[-1], grid)):
                reference[kind, step.rows.start // self.copies + row].copy_(x[0])
        return q.to(qkv.dtype)

    def room(self, block: int, first: bool, step: RowPass) -> tuple[Tensor, Tensor]:
        """Where the pass's own keys and values [R, H, n, D] of a block go.

        In the first block the source is the scale-aligned reference: pooled to the scale's own grid (VAREdit, arXiv
        2508.15772, section 3.3). It is staged in front of the first scale, so that no copy of the rest is made.
        """
        if not first and block >= len(self.keys):
            return self.room_elsewhere(block, step)
        kept = self.keys[block][step.rows], self.values[block][step.rows]
        if first and self.source and step.index != SOURCE:
            for part, reference in zip(kept, self.references[step.index]):
                rows = slice(step.rows.start // self.copies, None)
                staged = self._from(part, self._start(first, step), self.source)
                staged = staged.unflatten(0, (-1, self.copies // step.shared))
                staged.copy_(reference[rows][: len(staged), None].expand_as(staged))
        return tuple(self._from(part, *self.span(first, step)[0]) for part in kept)

    def seen(self, block: int, first: bool, step: RowPass) -> tuple[Tensor, Tensor]:
        """All keys and values of a block that the pass may attend to: source, earlier scales, itself; the last scale's
        own come first."""
        if not first and block >= len(self.keys):
            return self.seen_elsewhere(block, step)
        kept = self.keys[block][step.rows], self.values[block][step.rows]
        return tuple(self._from(part, *self.span(first, step)[1]) for part in kept)

    def span(self, first: bool, step: RowPass) -> tuple[tuple[int, int], tuple[int, int]]:
        """Begin and end of a pass's own tokens, and of all that it sees; the last scale's lie before the start."""
        start = self._start(first, step)
        if self.is_last(step):
            before = start - (step.end - step.begin)
            return (before, start), (before, step.begin)
        return (step.begin, step.end), (start, step.end)

    def room_elsewhere(self, block: int, step: RowPass) -> tuple[Tensor, Tensor]:
        """`room` for a block beyond the plain ones."""
        raise NotImplementedError

    def seen_elsewhere(self, block: int, step: RowPass) -> tuple[Tensor, Tensor]:
        """`seen` for a block beyond the plain ones, which keeps nothing of the last scale."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of everything; of use where an exception still holds the frame that holds the cache."""
        self.keys, self.values, self.references, self.nbytes_kept = [], [], [], 0

    def _from(self, kept: Tensor, begin: int, end: int) -> Tensor:
        """Tokens begin to end of what a block keeps, with room for the last scale in front."""
        return kept[:, :, self.front + begin : self.front + end]

    def _start(self, first: bool, step: RowPass) -> int:
        """Where what a pass sees begins."""
        referred = first and self.source and step.index != SOURCE
        return self.source - self.schedule.tokens[step.index] if referred else 0


class ElsewhereCache(DeviceCache):
    """All blocks but the first elsewhere, brought to staging memory and put away from there: a block's history lies in
    front of the pass's own keys and values then.

    Subclasses bring it with `room_elsewhere` or `seen_elsewhere` and keep a pass's own part with `put_away`.
    """

    shares_source = False

    @staticmethod
    def plain_blocks(depth: int) -> int:
        return 1

    def keep(self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: RowPass) -> Tensor:
        q = super().keep(block, first, qkv, query_scale, step)
        # Here, not in `seen_elsewhere`: nobody looks at what the prefill leaves in the last block.
        if not first and not self.is_last(step):
            self.put_away(block, step)
        return q

    def put_away(self, block: int, step: RowPass) -> None:
        """Keep a pass's own keys and values of a block, which lie in staging memory."""
        raise NotImplementedError


def source_tokens(config: TransformerConfig, schedule: Schedule) -> int:
    """Tokens of the source: as many as of the last scale, or none where the transformer reads no source."""
    return schedule.tokens[-1] if config.source else 0


def kept_tokens(config: TransformerConfig, schedule: Schedule) -> int:
    """Tokens that later ones attend to: of the source and of all scales but the last."""
    return source_tokens(config, schedule) + sum(schedule.tokens[:-1])


def _banded(q: Tensor, keys: Tensor, values: Tensor, bands: Bands, attention: Attention) -> Tensor:
    if getattr(attention, "recordable", False):
        found = banded_attention(q, keys, values, bands.pieces, bands.tokens, scale=1.0)
        if found is not None:
            return found
    parts = []
    for own, pieces in zip(q.split(bands.tokens, dim=2), bands.listed):
        k, v = (torch.cat([x[:, :, piece] for piece in pieces], dim=2) for x in (keys, values))
        parts.append(attention(own, k, v, scale=1.0))
    return torch.cat(parts, dim=1)
