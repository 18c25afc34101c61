"""Scale tables: which token grids an edit runs through, coarse to fine.

Knows aspect ratios and token grids; knows nothing of weights or pixels' content.
A token covers 16 x 16 pixels of the last grid (VAREdit, arXiv 2508.15772, section 3; the tables are
those of Infinity, arXiv 2412.04431, appendix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..defaults import SIZES

Grid = tuple[int, int]

TOKEN_PIXELS = 16
AREAS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Named sizes and the number of scales each runs: 256, 512, 768 and 1024 pixels for a square."""

_PORTRAIT = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _tables() -> dict[float, tuple[Grid, ...]]:
    tables: dict[float, tuple[Grid, ...]] = {}
    for ratio, text in _PORTRAIT.items():
        grids = tuple((int(h), int(w)) for h, w in (cell.split("x") for cell in text.split()))
        tables[ratio] = grids
        if ratio != 1.0:
            tables[math.floor(1000 / ratio) / 1000] = tuple((w, h) for h, w in grids)
    return tables


TABLES = _tables()
"""Aspect ratio (height / width) -> its 13 token grids (height, width)."""


@dataclass(frozen=True)
class Schedule:
    """The token grids of one edit, coarse to fine, out of the table of one aspect ratio.

    ratio: key of the table in TABLES. grids: (height, width) in tokens of every scale that runs.
    """

    ratio: float
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        if self.ratio not in TABLES:
            raise ValueError(f"no scale table for the ratio {self.ratio}; choose one of {sorted(TABLES)}")
        table = TABLES[self.ratio]
        if not self.grids or self.grids != table[: len(self.grids)]:
            raise ValueError(
                f"the grids {self.grids} are not the first rows of the table for ratio {self.ratio}: {table}"
            )

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def pixels(self) -> Grid:
        """(height, width) of the picture in pixels."""
        height, width = self.grids[-1]
        return height * TOKEN_PIXELS, width * TOKEN_PIXELS

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of every scale."""
        return tuple(h * w for h, w in self.grids)


def schedule_for(area: str, ratio: float = 1.0) -> Schedule:
    """The schedule of a size (a key of AREAS, or the side of its square in pixels) and aspect ratio (a key of TABLES).

    Raises ValueError for an unknown size or ratio.
    """
    area = SIZES.get(str(area), area)
    if not isinstance(area, str) or area not in AREAS:
        raise ValueError(f"unknown size {area!r}; choose one of {', '.join(AREAS)}")
    if not isinstance(ratio, (int, float)) or ratio not in TABLES:
        raise ValueError(f"no scale table for the ratio {ratio}; choose one of {sorted(TABLES)}")
    return Schedule(ratio, TABLES[ratio][: AREAS[area]])
