"""Recordings under CUDA's own allocator (`cudaMallocAsync`): what cannot be recorded is refused before it is tried, and
tensors of a recording that fails all the same stay for ever.

That allocator cannot take back memory of a recording that came to nothing: trying to ends the process. What stays is no
more than addresses, as nothing of the recording was run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ANSWERS = {torch.ops.aten.is_nonzero, torch.ops.aten.item}
_MOVES = {torch.ops.aten.copy_, torch.ops.aten.to, torch.ops.aten._to_copy}
_present: ContextVar[tuple[Kept, ...]] = ContextVar("recordings of this thread", default=())


def failed() -> None:
    """Say that what a recording does has failed, before the frames that hold its tensors are left."""
    for kept in _present.get():
        kept.fail()


class Kept(TorchDispatchMode):
    """Where what is done within fails, all tensors that were made within stay for ever. RuntimeError for an operation
    that waits for the device, before it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[ref] = []
        self.own: set[int] = set()
        """Memory that was made within. Views of other memory do not stay: they would hold a KV cache for ever."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's compiler is not asked at every operation, which would take longer than the operation."""
        return False

    def __enter__(self) -> Kept:
        self.before = _present.set((*_present.get(), self))
        return super().__enter__()

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)
        _present.reset(self.before)
        if error is not None:
            self.fail()

    def fail(self) -> None:
        living, self.made = [made() for made in self.made], []
        for tensor in living:
            if tensor is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(function, args, kwargs):
            raise RuntimeError(f"{function} waits for the device, which no graph can hold")
        try:
            result = function(*args, **kwargs)
        except BaseException:
            self.fail()
            raise
        given = {_memory(x) for x in _tensors([*args, *kwargs.values()])} if _returns_views(function) else ()
        for x in _tensors(result if isinstance(result, (tuple, list)) else (result,)):
            memory = _memory(x)
            if memory not in given:
                self.own.add(memory)
            if memory in self.own:
                self.made.append(ref(x))
        return result


def _tensors(values: Iterable) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x)


@lru_cache(maxsize=1024)
def _returns_views(function) -> bool:
    """Whether an operation may return what it was given, or a part of it."""
    return any(result.alias_info is not None for result in function._schema.returns)


def _memory(x: Tensor) -> int:
    """What names the memory of a tensor and its views, while it lives."""
    return x.untyped_storage()._cdata


def _waits(function, args: tuple, kwargs: dict) -> bool:
    """Whether an operation needs to know numbers of the device, or moves them to the host or from there."""
    kind = _kind(function)
    if kind == "places":  # by numbers it knows the size of its result, by a mask not
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if kind != "moves":
        return kind == "waits"
    given = [*args, *kwargs.values()]
    places = [x.device for x in given if isinstance(x, Tensor)] + [x for x in given if isinstance(x, torch.device)]
    return len({place.type for place in places}) > 1


@lru_cache(maxsize=1024)
def _kind(function) -> str:
    """What is to be asked of an operation's arguments; waits: nothing, it always does."""
    tags = {tag.name for tag in getattr(function, "tags", ())}
    if function.overloadpacket is torch.ops.aten.index:
        return "places"
    if tags & {"data_dependent_output", "dynamic_output_shape"} or function.overloadpacket in _ANSWERS:
        return "waits"
    return "moves" if function.overloadpacket in _MOVES else "stays"
