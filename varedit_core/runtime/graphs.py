"""Functions recorded as CUDA graphs: many small kernels wait for their launches, a graph is launched once.

Knows tensors and streams only. What a graph reads by address (weights, stores) must stay where it is: whoever records
compares `State` before every replay and records anew where something has moved. Under CUDA's own allocator
(`cudaMallocAsync`) what a graph makes is given back within it, and a recording that fails lets go of nothing (`kept`).
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .graph_memory import drivers_own, reserved, trim
from .kept import Kept

logger = logging.getLogger(__name__)


_NOT_RECORDED = (RuntimeError, ValueError)
"""Memory ran out, or a function asks for what no graph can hold; Triton calls its addresses wrong then. Whoever cancels
raises something else."""


class Captured:
    """A function of tensors as a CUDA graph.

    function: called once, with static copies of `inputs`, while it is recorded; it must have run before, since kernels
    are compiled and chosen then, must not wait for the device, and must find everything else in place. like: a tensor
    like its result, or None as the result. device: of all that it touches. pool: memory shared with other graphs, of
    which never two run at once; None: the driver's, which all graphs share. failure: why it could not be recorded, a
    line; None where it was.
    """

    refused = False
    """Whether nothing is recorded any more: under CUDA's own allocator a recording failed, and once is enough."""

    def __init__(
        self, function: Callable[..., Tensor | None], inputs: tuple[Tensor, ...], like: Tensor | None,
        device: torch.device, pool: tuple[int, int] | None,
    ) -> None:  # fmt: skip
        self.device, self.failure, self.replayed, self.nbytes = device, None, False, 0
        try:
            self.inputs = tuple(x.clone() for x in inputs)
            # Not of the recording: under CUDA's own allocator nothing that a graph has made may outlive a run.
            self.output = None if like is None else torch.empty_like(like, device=device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(device):
                stream = _recording_stream(torch.cuda.current_device())
                self.device = stream.device
                _prepare(stream)
                before = torch.cuda.memory_reserved()
                self._record(function, pool, stream)
                self.nbytes = 0 if pool is None else max(0, torch.cuda.memory_reserved() - before)
            _living.add(self)
        except _NOT_RECORDED as error:
            self.failure = (str(error).strip() or type(error).__name__).splitlines()[0]

    def _record(
        self, function: Callable[..., Tensor | None], pool: tuple[int, int] | None, stream: torch.cuda.Stream
    ) -> None:
        """Record the function on a stream. Its own error is raised even where the end of the recording fails, too."""
        here, own = torch.cuda.current_stream(), None
        try:
            # Other threads of the process may use the device meanwhile.
            with (
                _no_garbage(),
                torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    with Kept() if pool is None else nullcontext():
                        result = function(*self.inputs)
                        if result is not None:
                            self.output.copy_(result)
                        del result
                except BaseException as error:
                    own = error
                    raise
        except BaseException as error:
            torch.cuda.set_stream(here)
            _settle(pool or torch.cuda.graph_pool_handle(), stream)
            _failed.append(self.graph)
            if pool is None and isinstance(error, _NOT_RECORDED):
                Captured.refused = True
            raise (own or error) from None
        finally:
            own = None  # errors hold this frame

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """The function's result for inputs of these shapes; it holds until the next call."""
        for static, x in zip(self.inputs, inputs):
            static.copy_(x)
        if self.replayed or not drivers_own():
            self.graph.replay()
        else:  # the driver takes memory now
            before, self.replayed = reserved(self.device.index), True
            self.graph.replay()
            self.nbytes = max(0, reserved(self.device.index) - before)
        return self.output


@contextmanager
def _no_garbage() -> Iterator[None]:
    """No garbage is collected within: letting go of what others have made on the device may spoil a recording."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _settle(pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Undo what torch leaves behind where not even the end of a recording succeeds.

    Many versions then take the pool to be recorded for ever, so that nothing else is recorded with it and no memory
    that waits for a stream is given back, and the device's random numbers as well, so that drawing any is an error.
    """
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the second up to 2.6 or so
    end = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
    try:
        if end is not None:
            end(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    except RuntimeError:  # it had ended
        pass
    here = torch.cuda.current_stream()
    try:  # a recording of nothing, of which the end frees the random numbers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it holds nothing
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                pass
    except RuntimeError as error:
        logger.debug("a recording of nothing failed, too: %s", error)
    finally:
        torch.cuda.set_stream(here)


_living: WeakSet[Captured] = WeakSet()
_failed: list[torch.cuda.CUDAGraph] = []  # torch may go on asking these whether a stream is theirs


def recorded_bytes(device: torch.device) -> int:
    """Memory that torch or the driver holds for recorded functions of a device, about: nobody else can have it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if drivers_own():
        return reserved(index)
    return sum(graph.nbytes for graph in _living if graph.device.index == index)


def can_record() -> bool:
    """Whether functions can be recorded, with the allocator that torch has."""
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_allocator_backend() == "native" or (drivers_own() and not Captured.refused)


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """The device's stream for recording. Always the same: cuBLAS keeps 32 MiB for every stream it ever worked on."""
    return torch.cuda.Stream(device)


def _prepare(stream: torch.cuda.Stream) -> None:
    """Let cuBLAS take its memory for a stream: taken within a recording it would be that graph's."""
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        x = torch.ones(16, 16, dtype=torch.bfloat16, device=stream.device)
        F.linear(x, x, x[0])
        torch.mm(x, x)
    here.wait_stream(stream)


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """Work for the device goes to this stream within; None: to the present one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Answer:
    """A yes or no of the device. It is copied to the host after all work that the device has so far."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.moment = value, None
        if value.is_cuda:
            self.value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self.moment = torch.cuda.current_stream(value.device).record_event()

    def __call__(self) -> bool:
        """Wait for it, but not for work that came later."""
        if self.moment is not None:
            self.moment.synchronize()
        return bool(self.value)


class State:
    """The state of a network that recorded work depends on: where weights lie and how often each was written in place.

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
            (t.data_ptr(), t.is_inference() or t._version)
            for part in self.tensors
            for t in part.values()
            if t is not None
        ]
        return tuple(map(id, present)), tuple(weights)


class Recordings:
    """Functions of one device by name, each recorded when it is run for the second time.

    One that cannot be recorded is run as it is from then on, until `forget`: a line in the log says so once.
    """

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Captured] = {}
        self.forget()

    def __len__(self) -> int:
        return len(self.recorded)

    def __contains__(self, name: Hashable) -> bool:
        """Whether it is known how a function runs: recorded, or not to be recorded."""
        return name in self.recorded or name in self.failed

    @property
    def nbytes(self) -> int:
        """Memory of the device that recorded functions hold, about."""
        return sum(graph.nbytes for graph in self.recorded.values())

    def forget(self) -> None:
        """Give back what recorded functions hold."""
        devices = {graph.device.index for graph in self.recorded.values()} if drivers_own() else ()
        self.seen: dict[Hashable, Tensor | None] = {}
        """What a function gave that is not recorded yet, without its numbers."""
        self.failed: set[Hashable] = set()
        self.recorded = {}
        self.pool = None
        for index in devices:
            trim(index)

    def keep(self, wanted: Callable[[Hashable], bool]) -> None:
        """Forget all functions but those whose names are wanted."""
        self.failed = {name for name in self.failed if wanted(name)}
        self.seen, self.recorded = (
            {name: known for name, known in names.items() if wanted(name)} for names in (self.seen, self.recorded)
        )

    def __call__(
        self, name: Hashable, function: Callable[..., Tensor | None], inputs: tuple[Tensor, ...], device: torch.device
    ) -> Tensor | None:
        """The result of a function of this name, in memory of its own. See `Captured`."""
        if name not in self.recorded and name in self.seen:
            self._record(name, function, inputs, device)
        if name in self.recorded:
            result = self.recorded[name](*inputs)
            return None if result is None else result.clone()  # the next replay writes there again
        result = function(*inputs)
        if name not in self.failed:
            self.seen[name] = None if result is None else torch.empty_like(result, device="meta")
        return result

    def _record(
        self, name: Hashable, function: Callable[..., Tensor | None], inputs: tuple[Tensor, ...], device: torch.device
    ) -> None:
        """Record a function that has run before, if it can be."""
        if not drivers_own():  # whose graphs cannot share one
            self.pool = self.pool or torch.cuda.graph_pool_handle()
        pool, self.pool = self.pool, None  # torch's pinned memory takes that of a failed recording to be recorded still
        made = Captured(function, inputs, self.seen[name], device, pool)
        del self.seen[name]
        if made.failure is None:
            self.recorded[name], self.pool = made, pool
            return
        if not self.failed:
            logger.warning("work that cannot be recorded runs without, which is slower: %s", made.failure)
        self.failed.add(name)


class Recorder:
    """A function of a network, recorded for every shape of input that comes a second time; CUDA only, else just called.

    function: of tensors of one device, to a tensor. most: inputs of more numbers, together, are never recorded, as they
    keep the device busy without. state: of the network, by default where its weights lie. With more than SHAPES shapes
    it begins anew, and so it does where the state changed.
    """

    SHAPES = 8

    def __init__(
        self,
        network: nn.Module,
        function: Callable[..., Tensor],
        most: float = float("inf"),
        state: Callable[[nn.Module], Hashable] | None = None,
    ) -> None:
        self.network, self.function, self.most = network, function, most
        self.state, self.recordings = state or State(), Recordings()
        self.held: Hashable = None

    def forget(self) -> None:
        """Give back what recorded work holds."""
        self.held = None
        self.recordings.forget()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, in memory of its own."""
        if not inputs[0].is_cuda or not can_record() or sum(x.numel() for x in inputs) > self.most:
            return self.function(*inputs)
        state, shapes = self.state(self.network), tuple(tuple(x.shape) for x in inputs)
        if state != self.held or (shapes not in self.recordings and len(self.recordings) == self.SHAPES):
            self.recordings.forget()
            self.held = state
        return self.recordings(shapes, self.function, inputs, inputs[0].device)
