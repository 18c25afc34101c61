"""Stores of keys and values for small devices: in 8 bits, or in host memory. The first block is as in `kv` in both.

Shape suffixes as in `kv`: R rows, H heads, n tokens of a pass, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kv import KeyValueStore, Pass
from .schedule import Schedule


class EightBitStore(KeyValueStore):
    """All blocks but the first in 8 bits with one scale a token and head: half the memory of bf16, an approximation.

    The tokens of the pass at work are exact, only the history is rounded.
    """

    def __init__(
        self, schedule: Schedule, depth: int, rows: int, heads: int, head_size: int, dtype: torch.dtype, device
    ) -> None:
        super().__init__(schedule, depth, rows, heads, head_size, dtype, device)
        size = (2, rows, heads, self.length)
        self.codes = [torch.empty(*size, head_size, dtype=torch.int8, device=device) for _ in range(depth - 1)]
        self.scales = [torch.empty(*size, 1, dtype=torch.float32, device=device) for _ in range(depth - 1)]

    @staticmethod
    def plain_blocks(depth: int) -> int:
        return 1

    @classmethod
    def nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype) -> int:
        length = schedule.tokens[-1] + sum(schedule.tokens[:-1])
        head_sizes = 32  # no published head is smaller; the scales of larger ones take less
        coded = 2 * rows * width * (depth - 1) * length * (1 + 4 / head_sizes)
        unpacked = 2 * 2 * rows * width * (length + schedule.tokens[-1]) * dtype.itemsize
        return super().nbytes(schedule, depth, rows, width, dtype) + int(coded) + unpacked

    def elsewhere(self, block: int, k: Tensor, v: Tensor, step: Pass, last: bool) -> tuple[Tensor, Tensor]:
        codes, scales = self.codes[block - 1], self.scales[block - 1]
        found = []
        for part, x in enumerate((k, v)):
            history = codes[part, :, :, : step.begin].to(v.dtype) * scales[part, :, :, : step.begin].to(v.dtype)
            found.append(torch.cat((history, x.to(v.dtype)), dim=2))
            if not last:
                scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
                codes[part, :, :, step.begin : step.end] = (x.float() / scale).round().to(torch.int8)
                scales[part, :, :, step.begin : step.end] = scale
        return found[0], found[1]

    def keep_rows(self, count: int) -> None:
        super().keep_rows(count)
        for tensors in (self.codes, self.scales):
            for block, tensor in enumerate(tensors):
                tensors[block] = tensor[:, :count].clone()

    def release(self) -> None:
        super().release()
        self.codes, self.scales = [], []


class HostStore(KeyValueStore):
    """All blocks but the first in host memory, brought to the device block by block: exact and slow.

    Kept token by token, so that a pass's share is one piece and one copy.
    """

    def __init__(
        self, schedule: Schedule, depth: int, rows: int, heads: int, head_size: int, dtype: torch.dtype, device
    ) -> None:
        super().__init__(schedule, depth, rows, heads, head_size, dtype, device)
        self.rows = rows
        whole = self.length + schedule.tokens[-1]
        self.staged = [torch.empty(whole, rows, heads, head_size, dtype=dtype, device=device) for _ in range(2)]
        size = (self.length, rows, heads, head_size)
        self.host = [[torch.empty(size, dtype=dtype) for _ in range(2)] for _ in range(depth - 1)]

    @staticmethod
    def plain_blocks(depth: int) -> int:
        return 1

    @classmethod
    def nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype) -> int:
        whole = sum(schedule.tokens) + schedule.tokens[-1]
        return super().nbytes(schedule, depth, rows, width, dtype) + 2 * rows * width * whole * dtype.itemsize

    @classmethod
    def host_nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype) -> int:
        length = schedule.tokens[-1] + sum(schedule.tokens[:-1])
        return 2 * rows * width * (depth - 1) * length * dtype.itemsize

    def elsewhere(self, block: int, k: Tensor, v: Tensor, step: Pass, last: bool) -> tuple[Tensor, Tensor]:
        found = []
        for staged, host, x in zip(self.staged, self.host[block - 1], (k, v)):
            staged = staged[:, : self.rows]
            staged[: step.begin].copy_(host[: step.begin])
            staged[step.begin : step.end] = x.permute(2, 0, 1, 3)
            if not last:
                host[step.begin : step.end].copy_(staged[step.begin : step.end])
            found.append(staged[: step.end].permute(1, 2, 0, 3))
        return found[0], found[1]

    def keep_rows(self, count: int) -> None:
        super().keep_rows(count)
        self.rows = count
        self.staged = [staged[:, :count].clone() for staged in self.staged]
        for pair in self.host:
            for part, tensor in enumerate(pair):
                pair[part] = tensor[:, :count].clone()

    def release(self) -> None:
        super().release()
        self.staged, self.host = [], []
