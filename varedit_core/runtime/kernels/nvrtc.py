"""Kernels in CUDA C, compiled by NVRTC, the compiler that PyTorch brings along; for GPUs where Triton is missing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..graph_memory import driver
from ..kept import failed

_NO_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class Kernel:
    """A function of a source in CUDA C, compiled for every device when it is first launched there.

    constants: what the source finds defined. Parameters are pointers, `long long` and `float`. RuntimeError where it
    cannot be compiled or launched.
    """

    def __init__(self, source: str, name: str, **constants: object) -> None:
        self.source = "".join(f"#define {key} {value}\n" for key, value in constants.items()) + source
        self.name = name
        self.compiled: dict[int, ctypes.c_void_p] = {}

    def __call__(self, grid: Sequence[int], threads: int, *arguments: Tensor | int | float) -> None:
        """Launch blocks of so many threads on the present stream. arguments: the first is a tensor of the device."""
        try:
            device = arguments[0].device.index
            with torch.cuda.device(device):
                if device not in self.compiled:
                    self.compiled[device] = _loaded(cubin(self.source, torch.cuda.get_device_capability()), self.name)
                values = [_value(x) for x in arguments]
                places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
                stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
                sizes = (*grid, 1, 1)[:3]
                _checked("cuLaunchKernel", self.compiled[device], *sizes, threads, 1, 1, 0, stream, places, None)
        except BaseException:
            failed()
            raise


def cubin(source: str, capability: tuple[int, int]) -> bytes:
    """A source compiled for devices of a compute capability. RuntimeError with the compiler's words where it fails."""
    compiler, program, size = _compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"varedit.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode(), b"--std=c++17"]
        status = compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        names = ("nvrtcGetProgramLogSize", "nvrtcGetProgramLog") if status else ("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        getattr(compiler, names[0])(program, ctypes.byref(size))
        made = ctypes.create_string_buffer(size.value)
        getattr(compiler, names[1])(program, made)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise RuntimeError(f"NVRTC says {made.value.decode(errors='replace').strip() or status}")
    return made.raw


def _compiler() -> ctypes.CDLL:
    folder, major = Path(torch.__file__).with_name("lib"), (torch.version.cuda or "12").split(".")[0]
    names = [str(path) for path in sorted(folder.glob("nvrtc64_*_0.dll"), reverse=True)]
    if os.name != "nt":  # the second is linked with the first, wherever that lies
        names = [f"libnvrtc.so.{major}", str(folder / "libcaffe2_nvrtc.so")]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            missing = error
    raise RuntimeError(f"PyTorch's compiler for CUDA is not here: {missing if names else folder}")


def _loaded(code: bytes, name: str) -> ctypes.c_void_p:
    """A function of compiled code in the present context, for the rest of the process."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _checked("cuModuleLoadData", ctypes.byref(module), code)
    _checked("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    return function


def _checked(name: str, *arguments: object) -> None:
    cuda = driver()
    status = getattr(cuda, name)(*arguments) if cuda is not None else "no driver"
    if status == _NO_MEMORY:
        raise torch.cuda.OutOfMemoryError(f"{name}: CUDA out of memory")
    if status:
        raise RuntimeError(f"{name} says {status}")


def _value(argument: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_longlong | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_longlong(argument) if isinstance(argument, int) else ctypes.c_float(argument)
