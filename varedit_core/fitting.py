"""How a picture of any size lies on the pixels of a schedule. Sizes are (width, height), grids (height, width)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .tokenizer.schedule import AREAS, TABLES, Grid, Schedule, schedule_for

Size = tuple[int, int]

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""

MAX_CANVAS_PIXELS = 2**28
"""Of a picture: 1 GiB in Pillow; a long thin one padded to a square exceeds it quickly."""
BAND = 2
"""Tokens by which a picture goes on, mirrored, before white begins."""


@dataclass(frozen=True)
class Fit:
    """A way to bring pictures to the model's shape: its canvas is a square, or the nearest of the tables' shapes.

    help: what it does, behind its name. whole: whether the canvas holds the whole picture, else only the largest part
    of the canvas's shape in its middle. mirrored: tokens by which the picture goes on beyond its border, mirrored.
    edge: whether its last pixels go on from there, else white.
    """

    help: str
    nearest: bool = False
    whole: bool = True
    mirrored: float = BAND
    edge: bool = False


ASPECT, PUBLISHED, CROP = "aspect", "published", "crop"
FITS = {
    "square": Fit(f"pads to a square (mirrored for {BAND} tokens, then white)"),
    ASPECT: Fit("takes the nearest of 15 shapes (experimental: the released weights are trained on squares)", True),
    PUBLISHED: Fit("pads with white right from the border on", mirrored=0),
    CROP: Fit("edits the square in the middle alone and puts it back", whole=False),
    "edge": Fit("pads with the border's pixels", mirrored=0, edge=True),
    "mirror": Fit("pads with the picture mirrored", mirrored=math.inf),
}
"""All fits by their names. Saved graphs and settings name them, so that names may be added but none goes."""
FITS_HELP = "; ".join(f"{name} {fit.help}" for name, fit in FITS.items())
"""One line for options and tooltips."""


@dataclass(frozen=True)
class Fitting:
    """How a picture of `size` (width, height) was brought to the schedule's pixels.

    padded_size: (width, height) of the canvas that was resized to them; the picture lies at its top left. box: the part
    of the picture that lies there, where that is not all.
    """

    schedule: Schedule
    padded_size: Size
    size: Size
    box: Box | None = None

    @classmethod
    def exact(cls, schedule: Schedule) -> Fitting:
        """Of a picture that has exactly the schedule's pixels."""
        height, width = schedule.pixels
        return cls(schedule, (width, height), (width, height))

    def __str__(self) -> str:
        """The picture's size, and that of the part which is edited, in words."""
        whole = "{}x{}".format(*self.size)
        return whole if self.box is None else "{} (its middle {}x{})".format(whole, *self.seen.size)

    @property
    def seen(self) -> Fitting:
        """Of what the model sees, as if that were the whole picture."""
        if self.box is None:
            return self
        left, top, right, bottom = self.box
        return Fitting(self.schedule, self.padded_size, (right - left, bottom - top))

    @property
    def told(self) -> str:
        """What a user should know who sees the result; "" for nothing."""
        if self.box is None:
            return ""
        (width, height), (whole_width, whole_height) = self.seen.size, self.size
        return (
            f"only the {width}x{height} in the middle of the {whole_width}x{whole_height} picture is edited; all "
            "beside it stays as it is"
        )


def fitting_for(size: Size, area: str, method: str) -> Fitting:
    """How a picture of a size (width, height) is brought to the model's.

    area: a key of schedule.AREAS. method: a name of FITS. ValueError for others, and for a canvas of more than
    MAX_CANVAS_PIXELS.
    """
    if method not in FITS:
        raise ValueError(f"unknown fit {method!r}; choose one of {', '.join(FITS)}")
    (width, height), fit = size, FITS[method]
    schedule = schedule_for(area, nearest_ratio(height / width) if fit.nearest else 1.0)
    if not fit.whole and width != height:
        return _cropped(schedule, size)
    padded_size = canvas_size(size, schedule.pixels)
    if padded_size[0] * padded_size[1] > MAX_CANVAS_PIXELS:
        raise ValueError(
            f"a {width}x{height} image needs a canvas of {padded_size[0]}x{padded_size[1]}; make it smaller, or choose "
            "the fit crop"
        )
    return Fitting(schedule, padded_size, size)


def _cropped(schedule: Schedule, size: Size) -> Fitting:
    """The largest square in a picture's middle."""
    side = min(size)
    left, top = ((own - side) // 2 for own in size)
    return Fitting(schedule, (side, side), size, (left, top, left + side, top + side))


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
