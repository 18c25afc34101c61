"""How a picture of any size lies on the pixels of a schedule. Sizes are (width, height), grids (height, width)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .tokenizer.schedule import AREAS, TABLES, Grid, Schedule

Size = tuple[int, int]

MAX_CANVAS_PIXELS = 2**28
"""Of a picture: 1 GiB in Pillow; a long thin one padded to a square exceeds it quickly."""


@dataclass(frozen=True)
class Fitting:
    """How a picture of `size` (width, height) was brought to the schedule's pixels.

    padded_size: (width, height) of the canvas that was resized to them; the picture lies at its top left.
    """

    schedule: Schedule
    padded_size: Size
    size: Size

    @classmethod
    def exact(cls, schedule: Schedule) -> Fitting:
        """Of a picture that has exactly the schedule's pixels."""
        height, width = schedule.pixels
        return cls(schedule, (width, height), (width, height))


def canvas_size(size: Size, pixels: Grid) -> Size:
    """The smallest (width, height) that holds `size`, shaped as the grid `pixels` (height, width)."""
    (width, height), (grid_height, grid_width) = size, pixels
    if height * grid_width >= width * grid_height:
        return max(width, round(height * grid_width / grid_height)), height
    return width, max(height, round(width * grid_height / grid_width))


def nearest_ratio(ratio: float) -> float:
    """The table key nearest to height / width, measured in the logarithm so that portrait and landscape agree."""
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f"the aspect ratio must be positive, got {ratio}")
    return min(TABLES, key=lambda key: abs(math.log(key / ratio)))


def schedule_of(grid: tuple[float, float]) -> Schedule | None:
    """The named schedule whose last token grid this is; None where there is none."""
    found = ((ratio, table[:count]) for ratio, table in TABLES.items() for count in AREAS.values())
    return next((Schedule(ratio, grids) for ratio, grids in found if grids[-1] == tuple(grid)), None)
