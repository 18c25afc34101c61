"""What the machine can do at best, measured: the rates that an edit is set against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .clock import Marks

REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """matmul_tflops: dense product of large matrices in `dtype`. fp8_tflops: the same in 8 bits with a scale a row.
    copy_gbs: copy within the device's memory, bytes read plus bytes written. host_to_device_gbs: from pinned memory.

    TFLOP/s and GB/s of powers of ten; None where the device has no such thing.
    """

    dtype: str
    matmul_tflops: float
    copy_gbs: float
    fp8_tflops: float | None = None
    host_to_device_gbs: float | None = None


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure a device; a CPU with sizes that take it a moment, in fp32, as edits run there."""
    if device.type != "cuda":
        return Ceilings("fp32", _matmul(device, torch.float32, 1024), _copy(device, 2**26))
    fp8 = _fp8(device, 8192)
    return Ceilings("bf16", _matmul(device, torch.bfloat16, 8192), _copy(device, 2**31), fp8, _upload(device, 2**30))


def _median(function: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call on the device's own time line, after three warm-ups."""
    values = []
    for turn in range(3 + REPEATS):
        marks = Marks(device)
        marks()
        function()
        marks()
        values += marks.gaps() if turn >= 3 else []
    return statistics.median(values)


def _matmul(device: torch.device, dtype: torch.dtype, side: int) -> float:
    # Random numbers: a product of zeros draws less power and runs faster than any real one.
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return round(2 * side**3 / _median(lambda: a @ b, device) / 1e12, 3)


def _fp8(device: torch.device, side: int) -> float | None:
    try:
        a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        rows, columns = torch.ones(side, 1, device=device), torch.ones(1, side, device=device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

        return round(2 * side**3 / _median(product, device) / 1e12, 1)
    except (RuntimeError, AttributeError, TypeError):  # older GPUs and builds of torch
        return None


def _copy(device: torch.device, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return round(2 * size / _median(lambda: target.copy_(source), device) / 1e9, 1)


def _upload(device: torch.device, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return round(size / _median(lambda: target.copy_(source, non_blocking=True), device) / 1e9, 1)
