"""The keys and values of one edit: preallocated, explicit, and never holding the last scale.

Each block keeps [source][scale 1]...[scale K-1]. Nobody reads the last scale's keys and values after it, so
its pass only borrows them. Shape suffixes: R rows (images, then their unconditional twins), H heads,
n tokens of the pass, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operations import Attention
from .quantizer import area_resize
from .schedule import Schedule

SOURCE = -1
"""Index of the source's pass among the passes of an edit; the scales count from 0."""


@dataclass(frozen=True)
class Pass:
    """The tokens of one pass through the blocks: the source (index SOURCE) or one scale.

    rotary: [2, n, D / 2]. begin: where its tokens lie in the store.
    """

    index: int
    rotary: Tensor
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.rotary.shape[1]


class KeyValueStore:
    """Keys and values of every block, in the compute dtype.

    depth, heads, head_size: of the transformer. rows: R. All is allocated here, but for the pooled references of the
    first block, which the source's pass adds; `nbytes` counts both. The stores of `stores` keep all blocks but
    the first elsewhere or in fewer bits.
    """

    def __init__(
        self, schedule: Schedule, depth: int, rows: int, heads: int, head_size: int, dtype: torch.dtype, device
    ) -> None:
        self.schedule, self.head_size = schedule, head_size
        self.source = schedule.tokens[-1]
        self.length = self.source + sum(schedule.tokens[:-1])
        size = (rows, heads, self.length, head_size)
        self.keys = [torch.empty(size, dtype=dtype, device=device) for _ in range(self.plain_blocks(depth))]
        self.values = [torch.empty(size, dtype=dtype, device=device) for _ in range(self.plain_blocks(depth))]
        self.references: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def plain_blocks(depth: int) -> int:
        """How many blocks, from the first on, are kept in the compute dtype on the device."""
        return depth

    @classmethod
    def nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype) -> int:
        """Bytes on the device with the pooled references of the first block; width = heads * head_size."""
        length = schedule.tokens[-1] + sum(schedule.tokens[:-1])
        stored = cls.plain_blocks(depth) * length + sum(schedule.tokens)
        return 2 * rows * width * stored * dtype.itemsize

    @classmethod
    def host_nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype) -> int:
        """Bytes in host memory beside those of `nbytes`."""
        return 0

    def passes(self, device) -> list[Pass]:
        """The source's pass, then one a scale, with their rotary tables on `device`."""
        rotary = self.schedule.rotary(self.head_size, device)
        begins = [0, self.source]
        for count in self.schedule.tokens[:-1]:
            begins.append(begins[-1] + count)
        return [Pass(index, table, begin) for index, (table, begin) in enumerate(zip(rotary, begins), start=SOURCE)]

    def attend(
        self, block: int, first: bool, q: Tensor, k: Tensor, v: Tensor, step: Pass, attention: Attention
    ) -> Tensor:
        """Attention of a pass's q over all it may see, its own k and v [R, H, n, D] kept -> [R, n, H * D]."""
        keys, values = self.extend(block, first, k, v, step)
        return attention(q, keys, values, scale=1.0)

    def extend(self, block: int, first: bool, k: Tensor, v: Tensor, step: Pass) -> tuple[Tensor, Tensor]:
        """Keep a pass's k and v [R, H, n, D] and return all it may attend to: source, earlier scales, itself.

        In the first block the source is the scale-aligned reference: pooled to the scale's own grid (VAREdit, arXiv
        2508.15772, section 3.3). It is staged in front of the first scale, so that no copy of the rest is made.
        """
        last = step.index == len(self.schedule) - 1
        if not first and block >= len(self.keys):
            return self.elsewhere(block, k, v, step, last)
        keys, values, start = self.keys[block], self.values[block], 0
        if first and step.index == SOURCE:
            kind = keys.dtype
            self.references = [tuple(p.to(kind) for p in pooled(k, v, self.schedule, g)) for g in self.schedule.grids]
        elif first:
            k_reference, v_reference = self.references[step.index]
            start = self.source - k_reference.shape[2]
            keys[:, :, start : self.source] = k_reference
            values[:, :, start : self.source] = v_reference
        if last:
            return _append(keys[:, :, start:], k), _append(values[:, :, start:], v)
        keys[:, :, step.begin : step.end] = k
        values[:, :, step.begin : step.end] = v
        return keys[:, :, start : step.end], values[:, :, start : step.end]

    def elsewhere(self, block: int, k: Tensor, v: Tensor, step: Pass, last: bool) -> tuple[Tensor, Tensor]:
        """`extend` for a block beyond the plain ones, which keeps nothing of the last scale."""
        raise NotImplementedError

    def keep_rows(self, count: int) -> None:
        """Drop all rows but the first `count` and give their memory back, block by block."""
        for tensors in (self.keys, self.values):
            for block, tensor in enumerate(tensors):
                tensors[block] = tensor[:count].clone()
        self.references = [(k[:count].clone(), v[:count].clone()) for k, v in self.references]

    def release(self) -> None:
        """Let go of everything; of use where an exception still holds the frame that holds the store."""
        self.keys, self.values, self.references = [], [], []


def pooled(k: Tensor, v: Tensor, schedule: Schedule, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The scale-aligned reference: the source's k and v [R, H, n, D] area-pooled to a scale's grid.

    Pooled from k and v as they arrive (k still in fp32).
    """

    def pool(x: Tensor) -> Tensor:
        maps = x.transpose(2, 3).flatten(1, 2).unflatten(2, schedule.grids[-1])
        return area_resize(maps, grid).flatten(2).unflatten(1, (x.shape[1], x.shape[3])).transpose(2, 3)

    return pool(k), pool(v)


def _append(stored: Tensor, x: Tensor) -> Tensor:
    return torch.cat((stored, x.to(stored.dtype)), dim=2)
