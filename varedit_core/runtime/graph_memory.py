"""Memory of recorded work under CUDA's own allocator (`cudaMallocAsync`), where the driver keeps it, not torch."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache

import torch

logger = logging.getLogger(__name__)

_RESERVED = 2  # CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT


def drivers_own() -> bool:
    """Whether torch leaves memory to CUDA's own allocator, as ComfyUI has it by default."""
    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def reserved(device: int) -> int:
    """Bytes that the driver holds for graphs of a device; 0 where it does not tell."""
    value = ctypes.c_uint64(0)
    return value.value if _asked("cuDeviceGetGraphMemAttribute", device, _RESERVED, ctypes.byref(value)) else 0


def trim(device: int) -> None:
    """Give back what the driver holds for graphs of a device that are not running."""
    _asked("cuDeviceGraphMemTrim", device)


def _asked(name: str, device: int, *arguments: object) -> bool:
    """Call a function of the driver for a device; whether it went well."""
    cuda, handle = driver(), ctypes.c_int(0)
    if cuda is None or not hasattr(cuda, name) or cuda.cuDeviceGet(ctypes.byref(handle), device):
        return False
    status = getattr(cuda, name)(handle, *arguments)
    if status:
        logger.debug("%s says %d", name, status)
    return not status


def driver() -> ctypes.CDLL | None:
    """CUDA's driver, where it is."""
    try:
        return _loaded()
    except OSError as error:
        logger.debug("no CUDA driver to ask: %s", error)
        return None


@cache
def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
