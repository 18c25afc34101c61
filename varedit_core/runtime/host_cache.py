"""The KV cache in host memory, for small devices: exact, and slower.

Shape suffixes as in `kv_caches`; r rows at once.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.config import TransformerConfig
from ..tokenizer.schedule import Schedule
from .kv_caches import ElsewhereCache, RowPass, kept_tokens

logger = logging.getLogger(__name__)


class HostCache(ElsewhereCache):
    """All blocks but the first in host memory: exact. While a block is computed, the next one's history is copied.

    Kept token by token, keys and values side by side, so that a pass's share of a row is one piece and one copy. On
    CUDA that memory is locked, and copies run on streams of their own. at_once: as in `EightBitCache`.
    """

    recordable = False

    def __init__(
        self,
        config: TransformerConfig,
        schedule: Schedule,
        rows: int,
        dtype: torch.dtype,
        device,
        copies: int = 1,
        at_once: int | None = None,
        memory: HostMemory | None = None,
    ) -> None:
        super().__init__(config, schedule, rows, dtype, device, copies)
        whole = self.length + schedule.tokens[-1]
        staged = (min(at_once or rows, rows), whole, 2, config.heads, config.head_size)
        self.slots = [_Slot(torch.empty(staged, dtype=dtype, device=device), self.front) for _ in range(2)]
        size = (config.depth - 1, rows, self.length, 2, config.heads, config.head_size)
        count = math.prod(size) * dtype.itemsize
        self.memory = memory if memory and len(memory.bytes) == count else HostMemory(count, torch.device(device))
        self.host = list(self.memory.bytes.view(dtype).view(size))
        self.moved = {"to device": 0, "to host": 0}
        """Bytes of the KV cache copied so far."""
        device = torch.device(device)
        self.inward, self.outward, self.here = _Lane(device), _Lane(device), _Lane(device, current=True)

    @classmethod
    def of(cls, transformer: nn.Module, rows_at_once: int | None, *sizes, copies: int = 1, memory=None) -> HostCache:
        return cls(transformer.config, *sizes, copies, at_once=rows_at_once, memory=memory)

    @classmethod
    def nbytes(
        cls, config: TransformerConfig, schedule: Schedule, rows: int, dtype: torch.dtype, *,
        at_once: int | None = None, **more: int,
    ) -> int:  # fmt: skip
        """Also at_once: most rows of a pass."""
        tokens = kept_tokens(config, schedule) + schedule.tokens[-1]
        staged = 2 * 2 * min(at_once or rows, rows) * config.width * tokens
        return super().nbytes(config, schedule, rows, dtype) + staged * dtype.itemsize

    @classmethod
    def host_nbytes(cls, config: TransformerConfig, schedule: Schedule, rows: int, dtype: torch.dtype) -> int:
        return 2 * rows * config.width * (config.depth - 1) * kept_tokens(config, schedule) * dtype.itemsize

    def room(self, block: int, first: bool, step: RowPass) -> tuple[Tensor, Tensor]:
        if first:
            for slot in self.slots:
                slot.holds = None  # what a pass that was left in its middle has fetched
            self._fetch(1, step)
        return super().room(block, first, step)

    def room_elsewhere(self, block: int, step: RowPass) -> tuple[Tensor, Tensor]:
        slot = self._slot(block)
        if slot.holds != self._name(block, step):
            self._fetch(block, step)
        self._fetch(block + 1, step)
        with self.here.after(slot.fetched, slot.saved):
            return self._parts(slot, step, *self.span(False, step)[0])

    def seen_elsewhere(self, block: int, step: RowPass) -> tuple[Tensor, Tensor]:
        return self._parts(self._slot(block), step, *self.span(False, step)[1])

    def put_away(self, block: int, step: RowPass) -> None:
        slot, own = self._slot(block), slice(step.begin, step.end)
        with self.outward.after(self.here.mark()):
            for place, row in enumerate(range(step.rows.start, step.rows.stop)):
                self._copy(self.host[block - 1][row, own], slot.kept[place, own], "to host")
        slot.saved = self.outward.mark()

    def release(self) -> None:
        super().release()
        for lane in (self.inward, self.outward):
            lane.wait()
        self.slots, self.host = [], []

    def _fetch(self, block: int, step: RowPass) -> None:
        """Begin to copy a block's history to its slot. It waits for the device's work so far, which may read the slot,
        and for the last copy to the host, which may be that history."""
        if block > len(self.host):
            return
        slot, history = self._slot(block), slice(0, step.begin)
        if step.begin:
            with self.inward.after(self.here.mark(), self.outward.mark()):
                for place, row in enumerate(range(step.rows.start, step.rows.stop)):
                    self._copy(slot.kept[place, history], self.host[block - 1][row, history], "to device")
            slot.fetched = self.inward.mark()
        slot.holds = self._name(block, step)

    def _copy(self, to: Tensor, what: Tensor, way: str) -> None:
        to.copy_(what, non_blocking=True)
        self.moved[way] += what.nbytes

    def _parts(self, slot: _Slot, step: RowPass, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [r, H, n, D] of the tokens begin to end."""
        keys, values = slot.staged[: step.rows.stop - step.rows.start].permute(2, 0, 3, 1, 4)
        return self._from(keys, begin, end), self._from(values, begin, end)

    def _slot(self, block: int) -> _Slot:
        return self.slots[block % 2]

    def _name(self, block: int, step: RowPass) -> tuple:
        return block, step.index, step.rows.start, step.rows.stop


@dataclass(eq=False)
class _Slot:
    """Staging memory [r, front + m, 2, H, D] of one block at a time. front: room for the last scale, before what is
    kept. holds: whose history. fetched, saved: marks of the last copies to it and from it."""

    staged: Tensor
    front: int
    holds: tuple | None = None
    fetched: torch.cuda.Event | None = None
    saved: torch.cuda.Event | None = None

    @property
    def kept(self) -> Tensor:
        return self.staged[:, self.front :]


class _Lane:
    """A CUDA stream, the current one or another; on other devices nothing, as all is done in turn."""

    def __init__(self, device: torch.device, current: bool = False) -> None:
        self.device, self.current = device, current
        self.own = torch.cuda.Stream(device) if device.type == "cuda" and not current else None

    @property
    def stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.current and self.device.type == "cuda" else self.own

    @contextmanager
    def after(self, *marks: torch.cuda.Event | None) -> Iterator[None]:
        """Work within runs here, once the marks are passed."""
        stream = self.stream
        for mark in marks:
            if mark is not None:
                stream.wait_event(mark)
        with torch.cuda.stream(stream) if stream else nullcontext():
            yield

    def wait(self) -> None:
        """Wait until all work here is done."""
        if self.own:
            self.own.synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """A mark behind all work here so far."""
        return self.stream and self.stream.record_event()


class HostMemory:
    """Host memory for a store; for one on CUDA locked in place, which takes seconds: the next store may take it over.

    Not locked by torch's own allocator, which takes up to twice as much: it rounds sizes up to powers of two.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.bytes = torch.empty(count, dtype=torch.uint8)
        if device.type != "cuda":
            return
        runtime, address = torch.cuda.cudart(), self.bytes.data_ptr()
        if int(runtime.cudaHostRegister(address, count, 0)) == 0:
            weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False
            return
        logger.warning("host memory cannot be locked, so that the KV cache is copied more slowly")
        with suppress(RuntimeError):  # the next call of the device raises what has failed here
            torch.ones(1, device=device).neg_()
