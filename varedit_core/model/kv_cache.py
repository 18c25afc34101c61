"""The keys and values of one edit: preallocated, explicit, and never holding the last scale.

Each block keeps [source][scale 1]...[scale K-1], one block behind the other in one piece of memory. Nobody reads the
last scale's keys and values after it, so its pass leaves them in front of the block's source, where the block before
keeps its scales, which nobody needs then. Shape suffixes: R rows (images, then their unconditional twins), H heads,
n tokens of the pass, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..runtime.kernels import banded_attention, heads_into, split_attention
from ..runtime.kernels.plain import split_heads
from ..tokenizer.quantizer import area_resize
from ..tokenizer.schedule import Schedule
from .layers import Attention

SOURCE = -1
"""Index of the source's pass among the passes of an edit; the scales count from 0."""


@dataclass(frozen=True, eq=False)
class Bands:
    """Queries that see only some keys: each `tokens` consecutive ones their own pieces of what `KeyValueStore.seen`
    gives. pieces: int32 [bands, P, 2], begin and end of each; empty ones fill up; listed: the same on the host."""

    tokens: int
    pieces: Tensor
    listed: tuple[tuple[slice, ...], ...]


@dataclass(frozen=True, eq=False)
class Pass:
    """The tokens of one pass through the blocks: the source (index SOURCE) or one scale. Equal to itself only.

    rotary: [2, n, D / 2]. begin: where its tokens lie in the store. tokens: which of the scale's tokens [n] they are;
    None: all. bands: what they see, in all blocks but the first, and in that; None: everything. source_bias: what is
    added to the logits of the source's keys.
    """

    index: int
    rotary: Tensor
    begin: int
    tokens: Tensor | None = None
    bands: tuple[Bands, Bands] | None = None
    source_bias: float = 0.0

    @property
    def end(self) -> int:
        return self.begin + self.rotary.shape[1]


class KeyValueStore:
    """Keys and values of every block, in the compute dtype.

    depth, heads, head_size: of the transformer. rows: R. copies: how many consecutive rows share one source, whose pass
    then has R / copies rows. All is allocated here; `nbytes` counts it. The stores of `stores` keep all blocks but the
    first elsewhere or in fewer bits.
    """

    shares_source = recordable = True
    """Whether copies may be more than 1, and whether passes that use it may be recorded in graphs."""

    def __init__(
        self,
        schedule: Schedule,
        depth: int,
        rows: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device,
        copies: int = 1,
    ) -> None:
        self.schedule, self.head_size, self.copies = schedule, head_size, copies
        self.rows = slice(0, rows)
        """Those of the pass at work."""
        self.shared = 1
        """How many consecutive rows share the scale's pass at work."""
        self.source, self.front = schedule.source_tokens, schedule.tokens[-1]
        """Tokens of the source, and of the room for the last scale in front of what a block keeps."""
        self.length = schedule.kept
        kw = dict(dtype=dtype, device=device)
        blocks, step = self.plain_blocks(depth), self.step(schedule)
        size = (rows, heads, self.front + blocks * step, head_size)
        keys, values = torch.empty(size, **kw), torch.empty(size, **kw)
        self.nbytes_kept = keys.nbytes + values.nbytes
        """Bytes of keys and values on the device, without the pooled references."""
        # Of every block: room for the last scale in front, then what is kept.
        parts = [slice(block * step, block * step + self.front + self.length) for block in range(blocks)]
        self.keys, self.values = ([x[:, :, part] for part in parts] for x in (keys, values))
        # The first block's source, pooled for every scale.
        referred = sum(schedule.tokens) if schedule.source else 0
        pooled = torch.empty(2, rows // copies, heads, referred, head_size, **kw)
        ends = accumulate(schedule.tokens)
        self.references = [pooled[:, :, :, end - count : end] for count, end in zip(schedule.tokens, ends)]

    @classmethod
    def of(
        cls, transformer: nn.Module, rows_at_once: int | None, *sizes, copies: int = 1, memory=None
    ) -> KeyValueStore:
        """The store for edits with a transformer. sizes: of the constructor, up to `device`. memory: host memory of a
        store before it, for one that has a use for it."""
        return cls(*sizes, copies=copies)

    @staticmethod
    def plain_blocks(depth: int) -> int:
        """How many blocks, from the first on, are kept in the compute dtype on the device."""
        return depth

    @staticmethod
    def step(schedule: Schedule) -> int:
        """Tokens from one block to the next: source and scales, and at least room for the last scale after the source."""
        return schedule.source_tokens + max(sum(schedule.tokens[:-1]), schedule.tokens[-1])

    @classmethod
    def nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype, **more: int) -> int:
        """Bytes on the device with the pooled references of the first block; width = heads * head_size.

        more: what only stores of `stores` are asked.
        """
        pooled = sum(schedule.tokens) if schedule.source else 0
        stored = schedule.tokens[-1] + cls.plain_blocks(depth) * cls.step(schedule) + pooled
        return 2 * rows * width * stored * dtype.itemsize

    @classmethod
    def host_nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype) -> int:
        """Bytes in host memory beside those of `nbytes`."""
        return 0

    def passes(self, device) -> list[Pass]:
        """The source's pass (of no tokens where there is none), then one a scale, with their rotary tables on `device`."""
        rotary = self.schedule.rotary(self.head_size, device)
        begins = [0, self.source]
        for count in self.schedule.tokens[:-1]:
            begins.append(begins[-1] + count)
        return [Pass(index, table, begin) for index, (table, begin) in enumerate(zip(rotary, begins), start=SOURCE)]

    def is_last(self, step: Pass) -> bool:
        """Whether nobody will read the pass's keys and values after it."""
        return step.index == len(self.schedule) - 1

    def attend(
        self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: Pass, attention: Attention
    ) -> Tensor:
        """Self-attention of a pass over all it may see, its own keys and values kept.

        qkv: [R, n, 3 * H * D], thirds q, k, v. query_scale: [H]. Returns [R, n, H * D].
        """
        q = self.keep(block, first, qkv, query_scale, step)
        keys, values = self.seen(block, first, step)
        if step.bands is not None:
            if step.source_bias:
                raise ValueError("window and source_attention do not go together; set window to 0, or source_attention to 1")
            return _banded(q, keys, values, step.bands[first], attention)
        if step.source_bias:
            return attention(q, keys, values, scale=1.0, mask=self._bias(first, step, q))
        found = split_attention(q, keys, values, scale=1.0) if getattr(attention, "recordable", False) else None
        return attention(q, keys, values, scale=1.0) if found is None else found

    def keep(self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: Pass) -> Tensor:
        """Normalise and rotate a pass's q and k, put k and v where they belong; returns q [R, H, n, D]."""
        keys, values = self.room(block, first, step)
        if not (first and step.index == SOURCE):
            q = heads_into(qkv, query_scale, step.rotary, keys, values)
        else:
            # Row by row, as all that is made in fp32 on the way takes memory.
            rows = range(len(qkv))
            q = torch.cat([self._refer(qkv[r], keys[r], values[r], r, query_scale, step) for r in rows])
        if self._once(step) > 1:
            begin, end = self.span(first, step)[0]
            for kept in (self.keys[block], self.values[block]):
                others = self._from(kept[self.rows], begin, end).unflatten(0, (-1, self.copies))
                others[:, 1:] = others[:, :1]
        return q

    def _bias(self, first: bool, step: Pass, q: Tensor) -> Tensor:
        """What is added to the logits of all that `seen` gives, [1, 1, 1, keys]: one row serves every query."""
        (own, _), (begin, end) = self.span(first, step)
        start = self._start(first, step)
        bias = q.new_zeros(1, 1, 1, end - begin)
        bias[..., start - begin : self.source - begin] = step.source_bias
        return bias

    def _refer(self, qkv: Tensor, keys: Tensor, values: Tensor, row: int, query_scale: Tensor, step: Pass) -> Tensor:
        """`keep` for one row of the first block's source, pooled for every scale from keys not rounded yet."""
        q, k, v = split_heads(qkv[None], query_scale, step.rotary)
        keys.copy_(k[0])
        values.copy_(v[0])
        for reference, grid in zip(self.references, self.schedule.grids):
            for kind, x in enumerate(pooled(k, v, self.schedule, grid)):
                reference[kind, self.rows.start // self.copies + row].copy_(x[0])
        return q.to(qkv.dtype)

    def room(self, block: int, first: bool, step: Pass) -> tuple[Tensor, Tensor]:
        """Where the pass's own keys and values [R, H, n, D] of a block go.

        In the first block the source is the scale-aligned reference: pooled to the scale's own grid (VAREdit, arXiv
        2508.15772, section 3.3). It is staged in front of the first scale, so that no copy of the rest is made.
        """
        if not first and block >= len(self.keys):
            return self.room_elsewhere(block, step)
        kept = self._kept(block, step)
        if first and self.source and step.index != SOURCE:
            for part, reference in zip(kept, self.references[step.index]):
                rows = slice(self.rows.start // self.copies, None)
                staged = self._from(part, self._start(first, step), self.source)
                staged = staged.unflatten(0, (-1, self.copies // self.shared))
                staged.copy_(reference[rows][: len(staged), None].expand_as(staged))
        return tuple(self._from(part, *self.span(first, step)[0]) for part in kept)

    def seen(self, block: int, first: bool, step: Pass) -> tuple[Tensor, Tensor]:
        """All keys and values of a block that the pass may attend to: source, earlier scales, itself; the last scale's
        own come first."""
        if not first and block >= len(self.keys):
            return self.seen_elsewhere(block, step)
        return tuple(self._from(part, *self.span(first, step)[1]) for part in self._kept(block, step))

    def span(self, first: bool, step: Pass) -> tuple[tuple[int, int], tuple[int, int]]:
        """Begin and end of a pass's own tokens, and of all that it sees; those of the last scale lie before the start."""
        start = self._start(first, step)
        if self.is_last(step):
            before = start - (step.end - step.begin)
            return (before, start), (before, step.begin)
        return (step.begin, step.end), (start, step.end)

    def room_elsewhere(self, block: int, step: Pass) -> tuple[Tensor, Tensor]:
        """`room` for a block beyond the plain ones."""
        raise NotImplementedError

    def seen_elsewhere(self, block: int, step: Pass) -> tuple[Tensor, Tensor]:
        """`seen` for a block beyond the plain ones, which keeps nothing of the last scale."""
        raise NotImplementedError

    def keep_rows(self, count: int) -> None:
        """From now on passes have the first `count` rows only."""
        self.rows = slice(0, count)

    def share(self, count: int) -> None:
        """From now on so many consecutive rows share a scale's pass: 1, or all copies of a source."""
        self.shared = count

    def release(self) -> None:
        """Let go of everything; of use where an exception still holds the frame that holds the store."""
        self.keys, self.values, self.references, self.nbytes_kept = [], [], [], 0

    def _kept(self, block: int, step: Pass) -> tuple[Tensor, Tensor]:
        rows = slice(self.rows.start, self.rows.stop, self._once(step))
        return self.keys[block][rows], self.values[block][rows]

    def _once(self, step: Pass) -> int:
        """How many consecutive rows a pass serves."""
        return self.copies if step.index == SOURCE else self.shared

    def _from(self, kept: Tensor, begin: int, end: int) -> Tensor:
        """Tokens begin to end of what a block keeps, with room for the last scale in front."""
        return kept[:, :, self.front + begin : self.front + end]

    def _start(self, first: bool, step: Pass) -> int:
        """Where what a pass sees begins."""
        referred = first and self.source and step.index != SOURCE
        return self.source - self.schedule.tokens[step.index] if referred else 0


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


def pooled(k: Tensor, v: Tensor, schedule: Schedule, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The scale-aligned reference: the source's k and v [R, H, n, D] area-pooled to a scale's grid.

    Pooled from k and v as they arrive (k still in fp32).
    """

    def pool(x: Tensor) -> Tensor:
        maps = x.transpose(2, 3).flatten(1, 2).unflatten(2, schedule.grids[-1])
        return area_resize(maps, grid).flatten(2).unflatten(1, (x.shape[1], x.shape[3])).transpose(2, 3)

    return pool(k), pool(v)

