"""Stores of keys and values for small devices: in 8 bits, or in host memory. The first block is as in `kv` in both.

Both compute from staging memory: a block's history is brought there in front of the pass's own keys and values, which
are put away from there. Shape suffixes as in `kv`: R rows, H heads, n tokens of a pass, D head size; r rows at once.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.kv_cache import KeyValueStore, Pass
from ..tokenizer.schedule import Schedule
from .kernels import pack_heads, unpack_heads
from .kernels.plain import PackedHeads

logger = logging.getLogger(__name__)

EXACT_FROM = 24.0
"""Heads whose learned query scale is larger keep their keys exact.

An attention weight is off by the error of its logit, and that is the query scale times the error of a key of unit
length along the query: 0.0006 in 8 bits at head size 128 (0.00015 in bf16). At 24 it is 1.4 %, twice what the codes of
values cost; scales go up to 100. The demo model has 5 of 21 heads beyond 24: with their keys exact, logits are wrong
by 0.05 to 0.5 % of their spread, scale by scale, without by 0.16 to 0.7 %, and with all keys exact by 0.02 to 0.5 %.
"""


def exact_heads(query_scales: Sequence[Sequence[float]]) -> list[list[int]]:
    """The heads of every block whose keys are not coded, by the query scales [depth][H]; none of the first block's."""
    large = [[head for head, scale in enumerate(scales) if scale > EXACT_FROM] for scales in query_scales]
    return [[], *large[1:]]


def query_scales(transformer: nn.Module, device) -> list[list[float]]:
    """The learned query scales [depth][H] of all blocks, as numbers; waits for the device."""
    return torch.stack([block.sa.query_scale(torch.device(device)) for block in transformer.blocks]).tolist()


class _Elsewhere(KeyValueStore):
    """All blocks but the first elsewhere. Subclasses bring a block's history with `room_elsewhere` or
    `seen_elsewhere` and keep a pass's own part with `put_away`."""

    shares_source = False

    @staticmethod
    def plain_blocks(depth: int) -> int:
        return 1

    def keep(self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: Pass) -> Tensor:
        q = super().keep(block, first, qkv, query_scale, step)
        # Here, not in `seen_elsewhere`: nobody looks at what the source's pass leaves in the last block.
        if not first and not self.is_last(step):
            self.put_away(block, step)
        return q

    def put_away(self, block: int, step: Pass) -> None:
        """Keep a pass's own keys and values of a block, which lie in staging memory."""
        raise NotImplementedError


class EightBitStore(_Elsewhere):
    """All blocks but the first in 8 bits with one scale a token and head: half the memory of bf16, an approximation.

    The tokens of the pass at work are exact, only the history is rounded. query_scales: [depth][H], numbers of the
    host; keys of heads with large ones are not rounded at all (see EXACT_FROM), without them those of every head are.
    at_once: most rows of a pass, where they are not all.
    """

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
        query_scales: Sequence[Sequence[float]] | None = None,
        at_once: int | None = None,
    ) -> None:
        super().__init__(schedule, depth, rows, heads, head_size, dtype, device, copies)
        kw = dict(dtype=dtype, device=device)
        whole = self.length + schedule.tokens[-1]
        self.staged = [torch.empty(2, min(at_once or rows, rows), heads, whole, head_size, **kw)]
        self.packed = [
            _packed((rows, heads, self.length, head_size), exact, **kw)
            for exact in exact_heads(query_scales or [[0.0] * heads] * depth)[1:]
        ]

    @classmethod
    def of(
        cls, transformer: nn.Module, rows_at_once: int | None, *sizes, copies: int = 1, memory=None
    ) -> EightBitStore:
        return cls(*sizes, copies=copies, query_scales=query_scales(transformer, sizes[-1]), at_once=rows_at_once)

    @classmethod
    def nbytes(
        cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype, *,
        heads: int, at_once: int | None = None, exact_keys: int | None = None, **more: int,
    ) -> int:  # fmt: skip
        """Also heads: H. exact_keys: of how many heads, all blocks together, keys are not coded; None: as if of all.
        at_once: most rows of a pass."""
        length = schedule.kept
        blocks, size = depth - cls.plain_blocks(depth), width // heads
        exact = blocks * heads if exact_keys is None else exact_keys
        head = (2 * blocks * heads - exact) * (size + 4) + exact * size * dtype.itemsize
        staged = 2 * min(at_once or rows, rows) * width * (length + schedule.tokens[-1]) * dtype.itemsize
        return super().nbytes(schedule, depth, rows, width, dtype) + rows * length * head + staged + 4 * blocks * heads

    def room_elsewhere(self, block: int, step: Pass) -> tuple[Tensor, Tensor]:
        return self._staged(*self.span(False, step)[0])

    def seen_elsewhere(self, block: int, step: Pass) -> tuple[Tensor, Tensor]:
        unpack_heads(self.packed[block - 1], self.rows, step.begin, self._kept_part)
        return self._staged(*self.span(False, step)[1])

    def put_away(self, block: int, step: Pass) -> None:
        pack_heads(self._kept_part, self.packed[block - 1], self.rows, step.begin, step.end)

    def release(self) -> None:
        super().release()
        self.staged, self.packed = [], []

    @property
    def _kept_part(self) -> Tensor:
        """Staging memory without the room for the last scale in front."""
        return self.staged[0][:, :, :, self.front :]

    def _staged(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = self.staged[0][:, : self.rows.stop - self.rows.start]
        return self._from(keys, begin, end), self._from(values, begin, end)


def _packed(size: tuple[int, int, int, int], exact: Sequence[int], dtype: torch.dtype, device) -> PackedHeads:
    rows, heads, length, head_size = size
    coded = [head for head in range(heads) if head not in exact]
    places = len(coded) + heads
    return PackedHeads(
        torch.empty(rows, places, length, head_size, dtype=torch.int8, device=device),
        torch.empty(rows, places, length, dtype=torch.float32, device=device),
        torch.empty(rows, len(exact), length, head_size, dtype=dtype, device=device),
        torch.tensor([*coded, *exact], dtype=torch.int32).to(device),
    )


class HostStore(_Elsewhere):
    """All blocks but the first in host memory: exact. While a block is computed, the next one's history is copied.

    Kept token by token, keys and values side by side, so that a pass's share of a row is one piece and one copy. On
    CUDA that memory is locked, and copies run on streams of their own. at_once: as in `EightBitStore`.
    """

    recordable = False

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
        at_once: int | None = None,
        memory: HostMemory | None = None,
    ) -> None:
        super().__init__(schedule, depth, rows, heads, head_size, dtype, device, copies)
        whole = self.length + schedule.tokens[-1]
        staged = (min(at_once or rows, rows), whole, 2, heads, head_size)
        self.slots = [_Slot(torch.empty(staged, dtype=dtype, device=device), self.front) for _ in range(2)]
        size = (depth - 1, rows, self.length, 2, heads, head_size)
        count = math.prod(size) * dtype.itemsize
        self.memory = memory if memory and len(memory.bytes) == count else HostMemory(count, torch.device(device))
        self.host = list(self.memory.bytes.view(dtype).view(size))
        self.moved = {"to device": 0, "to host": 0}
        """Bytes of keys and values copied so far."""
        device = torch.device(device)
        self.inward, self.outward, self.here = _Lane(device), _Lane(device), _Lane(device, current=True)

    @classmethod
    def of(cls, transformer: nn.Module, rows_at_once: int | None, *sizes, copies: int = 1, memory=None) -> HostStore:
        return cls(*sizes, copies=copies, at_once=rows_at_once, memory=memory)

    @classmethod
    def nbytes(
        cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype, *,
        at_once: int | None = None, **more: int,
    ) -> int:  # fmt: skip
        """Also at_once: most rows of a pass."""
        staged = 2 * 2 * min(at_once or rows, rows) * width * (schedule.kept + schedule.tokens[-1])
        return super().nbytes(schedule, depth, rows, width, dtype) + staged * dtype.itemsize

    @classmethod
    def host_nbytes(cls, schedule: Schedule, depth: int, rows: int, width: int, dtype: torch.dtype) -> int:
        return 2 * rows * width * (depth - 1) * schedule.kept * dtype.itemsize

    def room(self, block: int, first: bool, step: Pass) -> tuple[Tensor, Tensor]:
        if first:
            for slot in self.slots:
                slot.holds = None  # what a pass that was left in its middle has fetched
            self._fetch(1, step)
        return super().room(block, first, step)

    def room_elsewhere(self, block: int, step: Pass) -> tuple[Tensor, Tensor]:
        slot = self._slot(block)
        if slot.holds != self._name(block, step):
            self._fetch(block, step)
        self._fetch(block + 1, step)
        with self.here.after(slot.fetched, slot.saved):
            return self._parts(slot, *self.span(False, step)[0])

    def seen_elsewhere(self, block: int, step: Pass) -> tuple[Tensor, Tensor]:
        return self._parts(self._slot(block), *self.span(False, step)[1])

    def put_away(self, block: int, step: Pass) -> None:
        slot, own = self._slot(block), slice(step.begin, step.end)
        with self.outward.after(self.here.mark()):
            for place, row in enumerate(range(self.rows.start, self.rows.stop)):
                self._copy(self.host[block - 1][row, own], slot.kept[place, own], "to host")
        slot.saved = self.outward.mark()

    def release(self) -> None:
        super().release()
        for lane in (self.inward, self.outward):
            lane.wait()
        self.slots, self.host = [], []

    def _fetch(self, block: int, step: Pass) -> None:
        """Begin to copy a block's history to its slot: behind all that was asked of the device so far, which may read
        the slot, and behind the last copy to the host, in case that is the history."""
        if block > len(self.host):
            return
        slot, history = self._slot(block), slice(0, step.begin)
        if step.begin:
            with self.inward.after(self.here.mark(), self.outward.mark()):
                for place, row in enumerate(range(self.rows.start, self.rows.stop)):
                    self._copy(slot.kept[place, history], self.host[block - 1][row, history], "to device")
            slot.fetched = self.inward.mark()
        slot.holds = self._name(block, step)

    def _copy(self, to: Tensor, what: Tensor, way: str) -> None:
        to.copy_(what, non_blocking=True)
        self.moved[way] += what.nbytes

    def _parts(self, slot: _Slot, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [r, H, n, D] of the tokens begin to end."""
        keys, values = slot.staged[: self.rows.stop - self.rows.start].permute(2, 0, 3, 1, 4)
        return self._from(keys, begin, end), self._from(values, begin, end)

    def _slot(self, block: int) -> _Slot:
        return self.slots[block % 2]

    def _name(self, block: int, step: Pass) -> tuple:
        return block, step.index, self.rows.start, self.rows.stop


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
        """What is asked for within runs here, when the marks are passed."""
        stream = self.stream
        for mark in marks:
            if mark is not None:
                stream.wait_event(mark)
        with torch.cuda.stream(stream) if stream else nullcontext():
            yield

    def wait(self) -> None:
        """Until all that was asked for here is done."""
        if self.own:
            self.own.synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """The end of all that was asked for here so far."""
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
        logger.warning("host memory cannot be locked, so that keys and values are copied more slowly")
        with suppress(RuntimeError):  # the next call of the device raises what has failed here
            torch.ones(1, device=device).neg_()
