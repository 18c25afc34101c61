"""Functions recorded as CUDA graphs: work in many small kernels waits for their launches, and a graph is launched once.

Knows tensors and streams only. What a graph reads by address (weights, stores) must stay where it is: whoever records
compares `State` before every replay and records anew where something has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from weakref import WeakSet

import torch
from torch import Tensor, nn


class Captured:
    """A function of tensors as a CUDA graph.

    function: called with static copies of `inputs`, once before it is recorded (kernels are compiled and chosen then);
    it must not wait for the device and must find everything else in place. first: the result of that call; it stands,
    as a second one may find changed what the first has read. device: of all that it touches. pool: memory shared with
    other graphs, of which never two run at once. complete: whether it could be recorded; not where memory ran out.
    """

    def __init__(
        self, function: Callable[..., Tensor | None], inputs: tuple[Tensor, ...], device: torch.device, pool=None
    ) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            here, stream = torch.cuda.current_stream(), _recording_stream(torch.cuda.current_device())
            stream.wait_stream(here)
            try:
                with torch.cuda.stream(stream):
                    self.first = function(*self.inputs)
            finally:  # what was asked of the stream still runs
                here.wait_stream(stream)
            if self.first is not None:
                self.first.record_stream(here)
            before = torch.cuda.memory_reserved()
            try:
                # Other threads of the process may use the device meanwhile.
                with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self.output = function(*self.inputs)
                self.complete = True
            except torch.cuda.OutOfMemoryError:
                self.complete = False
            self.device, self.nbytes = here.device, max(0, torch.cuda.memory_reserved() - before)
        _living.add(self)

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """The function's result for other inputs of the same shapes; it holds until the next call of any graph of the
        pool."""
        self.first = None
        for static, x in zip(self.inputs, inputs):
            static.copy_(x)
        self.graph.replay()
        return self.output


_living: WeakSet[Captured] = WeakSet()


def recorded_bytes(device: torch.device) -> int:
    """Memory that torch holds for recorded functions of a device, about: nobody else can have it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(graph.nbytes for graph in _living if graph.device.index == index)


@lru_cache(maxsize=1)
def can_record() -> bool:
    """Whether functions can be recorded: Triton refuses memory of a graph that CUDA's own allocator made."""
    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "native"


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """The device's stream for recording. Always the same: cuBLAS keeps 32 MiB for every stream that it ever worked on."""
    return torch.cuda.Stream(device)


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """What is asked of the device within goes to the stream; None: to the present one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Answer:
    """A yes or no of the device, on its way to the host behind all that was asked of the device so far."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.moment = value, None
        if value.is_cuda:
            self.value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self.moment = torch.cuda.current_stream(value.device).record_event()

    def __call__(self) -> bool:
        """Wait for it, but not for what was asked of the device since."""
        if self.moment is not None:
            self.moment.synchronize()
        return bool(self.value)


class State:
    """What recorded work depends on in a network: where its weights lie and how often each was written in place.

    Changes when weights move, are replaced, or a LoRA is applied. Remembers the last network's layers, since walking
    through them takes longer than looking at their weights.
    """

    def __init__(self) -> None:
        self.children: list[dict] = []
        self.tensors: list[dict] = []
        self.held: list[nn.Module | None] = []  # so that no other layer gets the place in memory that names one

    def __call__(self, network: nn.Module) -> Hashable:
        present = [network, *(child for children in self.children for child in children.values())]
        if len(present) != len(self.held) or any(a is not b for a, b in zip(present, self.held)):
            modules = list(network.modules())
            self.children = [m._modules for m in modules if m._modules]
            self.tensors = [part for m in modules for part in (m._parameters, m._buffers) if part]
            present = self.held = [network, *(child for children in self.children for child in children.values())]
        weights = [
            (t.data_ptr(), t.is_inference() or t._version) for part in self.tensors for t in part.values() if t is not None
        ]
        return tuple(map(id, present)), tuple(weights)


class Recorder:
    """A function of a network, recorded for every shape of input that comes a second time; CUDA only, else just called.

    function: of tensors of one device, to a tensor. most: inputs of more numbers, together, are never recorded, as they
    keep the device busy without. With more than SHAPES shapes it begins anew.
    """

    SHAPES = 8

    def __init__(self, network: nn.Module, function: Callable[..., Tensor], most: float = float("inf")) -> None:
        self.network, self.function, self.most = network, function, most
        self.state = State()
        self.forget()

    def forget(self) -> None:
        """Give back what recorded work holds."""
        self.held: Hashable = None
        self.seen: set[tuple] = set()
        self.recorded: dict[tuple, Captured] = {}
        self.pool = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, in memory of its own."""
        if not inputs[0].is_cuda or not can_record() or sum(x.numel() for x in inputs) > self.most:
            return self.function(*inputs)
        state, key = self.state(self.network), tuple(tuple(x.shape) for x in inputs)
        if state != self.held or (key not in self.recorded and len(self.recorded) == self.SHAPES):
            self.forget()
            self.held = state
        if key not in self.seen:
            self.seen.add(key)
            return self.function(*inputs)
        if key not in self.recorded:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            made = Captured(self.function, inputs, inputs[0].device, self.pool)
            if made.complete:
                self.recorded[key] = made
            return made.first
        return self.recorded[key](*inputs).clone()
