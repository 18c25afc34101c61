"""Time on a device: moments marked on its own time line, and seconds that wait for all of its work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


def synchronize(device: torch.device) -> None:
    """Wait for all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


class Marks:
    """Moments of a device: CUDA events, which make nobody wait, or the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moments: list = []

    def __call__(self) -> None:
        if self.device.type != "cuda":
            self._moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._moments.append(event)

    def gaps(self) -> list[float]:
        """Seconds from each moment to the next; waits for the device."""
        synchronize(self.device)
        pairs = list(zip(self._moments, self._moments[1:]))
        cuda = self.device.type == "cuda"
        return [a.elapsed_time(b) / 1e3 for a, b in pairs] if cuda else [b - a for a, b in pairs]


@dataclass(frozen=True)
class Spread:
    """Seconds of several runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(round(f(values), 5) for f in (statistics.median, min, max)))


@dataclass(frozen=True)
class Timed:
    """Seconds of the calls after the warm-ups.

    extra: what the warm-ups took beyond as many of these: compilation, recording. peak_gib: most memory that torch
    had allocated in the timed calls, GiB; reserved_gib: most that it took from the device in a call more, memory of
    recorded graphs included; None where the device does not say.
    """

    seconds: Spread
    extra: float
    peak_gib: float | None
    reserved_gib: float | None = None


def timed(function: Callable[[], object], device: torch.device, repeats: int, warmups: int) -> Timed:
    """Time a function; each call waits for the device."""
    before = [seconds(function, device) for _ in range(warmups)]
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    values = [seconds(function, device) for _ in range(repeats)]
    peak = round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if cuda else None
    reserved = None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        function()
        reserved = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    spread = Spread.of(values)
    return Timed(spread, round(sum(before) - warmups * spread.median, 3), peak, reserved)
