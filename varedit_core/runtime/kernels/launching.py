"""Launches of Triton kernels that cost the host little, and that a graph of any allocator can hold.

Triton looks at every argument of every launch, which takes longer than a small kernel runs, and asks the driver about
every pointer. The driver does not know memory yet that a recording under `cudaMallocAsync` has handed out, so that the
recording would fail. Here a kernel's compiled form is looked up once by what Triton specialises it for, and launched
with plain addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import repeat

import torch
import triton
from torch import Tensor

from ..kept import failed

_WHOLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
"""Whether compiled kernels take compile-time arguments, too, and skip them."""
_HIP = torch.version.hip is not None  # there Triton also specialises for how large a tensor is
_in_turn = threading.Lock()
_ahead: ContextVar[_Ahead | None] = ContextVar("ahead", default=None)


class Kernel:
    """A Triton function, launched as `kernel[grid](*arguments, **options)`.

    arguments: tensors of one CUDA device and numbers, by position. options: the compile-time arguments in their order,
    then those of the launch (num_warps, num_stages).
    """

    def __init__(self, function) -> None:
        self.function = function
        self.compiled: dict[tuple, tuple] = {}
        self.compiler = threading.RLock()
        """Held by who compiles it; others wait instead of compiling it, too."""
        self.alike = [parameter.do_not_specialize for parameter in getattr(function, "params", ())]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Tensor | int | float, **options) -> None:
            try:
                self._launch(grid, arguments, options)
            except BaseException:
                failed()
                raise

        return launch

    def _launch(self, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        first, ahead = arguments[0], _ahead.get()
        if not first.is_cuda or (_HIP and ahead is None):  # Triton's interpreter, or another platform's launches
            self.function[grid](*arguments, **options)
            return
        device = first.device.index
        key = (device, *map(_kind, arguments, self.alike or repeat(False)), *options.values())
        known = self.compiled.get(key)
        with nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
            if ahead is not None:
                if known is None:
                    ahead.compile(self, key, lambda: self.function.warmup(*arguments, grid=grid, **options))
                return
            if known is None:
                self._first(key, grid, arguments, options)
                return
            kernel, constants = known
            addresses = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
            stream = torch._C._cuda_getCurrentRawStream(device)
            sizes = (*grid, 1, 1)[:3]
            kernel.run(
                *sizes, stream, kernel.function, kernel.packed_metadata, None, None, None, *addresses, *constants
            )

    def _first(self, key: tuple, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        """Compile for such arguments, and launch as Triton does."""
        with self.compiler:
            kernel = self.function[grid](*arguments, **options)
        if all(hasattr(kernel, name) for name in ("run", "function", "packed_metadata")):  # else of a later Triton
            names = self.function.arg_names[len(arguments) :] if _WHOLE else ()
            self.compiled[key] = kernel, tuple(options[name] for name in names)


class _Ahead:
    """Kernels that are compiled and not launched; nobody else compiles them before `locks` is left."""

    def __init__(self, locks: ExitStack) -> None:
        self.locks, self.kernels, self.known = locks, set(), set()

    def compile(self, kernel: Kernel, key: tuple, compiled: Callable[[], object]) -> None:
        if kernel not in self.kernels:
            self.kernels.add(kernel)
            self.locks.enter_context(kernel.compiler)
        if (kernel, key) not in self.known:
            self.known.add((kernel, key))
            compiled()


@contextmanager
def compile_only() -> Iterator[None]:
    """Within, this thread's launches only have their kernels compiled: side by side where Triton can (3.5 on), and all
    are there at the end. What they would have computed is undefined."""
    with _in_turn, ExitStack() as locks, _side_by_side():
        before = _ahead.set(_Ahead(locks))
        try:
            yield
        finally:
            _ahead.reset(before)


@contextmanager
def _side_by_side() -> Iterator[None]:
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        yield
        return
    with ThreadPoolExecutor() as pool, AsyncCompileMode(pool, ignore_errors=True):
        yield


def kernel(**options) -> Callable[[Callable], Kernel]:
    """`triton.jit` of a function that is launched. options: as of `triton.jit`."""
    return lambda function: Kernel(triton.jit(**options)(function))


def _kind(argument: Tensor | int | float, alike: bool = False) -> object:
    """What Triton may compile a kernel anew for: types, whether addresses and numbers are multiples of 16, and 1.
    alike: only types."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        narrow = -(2**31) <= argument < 2**31
        return narrow if alike else 1 if argument == 1 else (argument % 16 == 0, narrow)
    return type(argument)
