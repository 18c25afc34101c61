"""Launches of Triton kernels that cost the host little, and that a graph of any allocator can hold.

Triton looks at every argument of every launch, which takes longer than a small kernel runs, and asks the driver about
every pointer. The driver does not know memory yet that a recording under `cudaMallocAsync` has handed out, so that the
recording would fail. Here a kernel's compiled form is looked up once by what Triton specialises it for, and launched
with plain addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from ..kept import failed

_WHOLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
"""Whether compiled kernels take compile-time arguments, too, and skip them."""
_HIP = torch.version.hip is not None  # there Triton also specialises for how large a tensor is


class Kernel:
    """A Triton function, launched as `kernel[grid](*arguments, **options)`.

    arguments: tensors of one CUDA device and numbers, by position. options: the compile-time arguments in their order,
    then those of the launch (num_warps, num_stages).
    """

    def __init__(self, function) -> None:
        self.function = function
        self.compiled: dict[tuple, tuple] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Tensor | int | float, **options) -> None:
            try:
                self._launch(grid, arguments, options)
            except BaseException:
                failed()
                raise

        return launch

    def _launch(self, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        first = arguments[0]
        if not first.is_cuda or _HIP:  # Triton's interpreter, or another platform's launches
            self.function[grid](*arguments, **options)
            return
        device = first.device.index
        key = (device, *map(_kind, arguments), *options.values())
        known = self.compiled.get(key)
        with nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
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
        kernel = self.function[grid](*arguments, **options)
        if all(hasattr(kernel, name) for name in ("run", "function", "packed_metadata")):  # else of a later Triton
            names = self.function.arg_names[len(arguments) :] if _WHOLE else ()
            self.compiled[key] = kernel, tuple(options[name] for name in names)


def kernel(**options) -> Callable[[Callable], Kernel]:
    """`triton.jit` of a function that is launched. options: as of `triton.jit`."""
    return lambda function: Kernel(triton.jit(**options)(function))


def _kind(argument: Tensor | int | float) -> object:
    """What Triton may compile a kernel anew for: types, whether addresses and numbers are multiples of 16, and 1."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return 1 if argument == 1 else (argument % 16 == 0, -(2**31) <= argument < 2**31)
    return type(argument)
