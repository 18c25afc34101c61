"""Ways to leave work out at late scales, where most of it is: what each does to the passes of an edit.

None is exact; `defaults.Shortcuts` switches them on, docs/LOG.md has what each costs and saves. Shape suffixes: B
images, R rows, H heads, n tokens of a pass, D head size, (h, w) a token grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..defaults import NEUTRAL, Shortcuts
from ..tokenizer.schedule import Grid, Schedule
from .kv_caches import Bands, RowPass

BAND = 128
"""Queries that share a window."""
WHOLE = 16
"""Coarser scales than so many rows are seen whole."""
WINDOWED = 3
"""Windows are for the last scales, this many."""
SEAM = 2
"""Locked tokens around a mask that are computed too, this far, so that the mask's own are not alone: without them a
quarter of the demo model's edits fail, with them a tenth (docs/LOG.md)."""


def reached(mask_Byx: Tensor, grid: Grid, steps: int) -> Tensor:
    """The cells of a grid that a mask of any size touches, and those within so many steps, boolean [B, 1, h, w]."""
    touched = F.adaptive_max_pool2d((mask_Byx[:, None] > 0).float(), grid)
    return F.max_pool2d(touched, 2 * steps + 1, stride=1, padding=steps) > 0


def token_masks(mask_Byx: Tensor, schedule: Schedule, feather: int = NEUTRAL.feather) -> list[Tensor]:
    """A mask of any size -> boolean [B, 1, h, w] of every scale: tokens that touch it, and those within `feather`
    tokens of the finest grid, at coarser scales at least one where any."""
    finest = max(schedule.grids[-1])
    return [reached(mask_Byx, grid, -(-feather * max(grid) // finest)) for grid in schedule.grids]


def passes(
    given: Sequence[RowPass],
    schedule: Schedule,
    shortcuts: Shortcuts,
    masks: Sequence[Tensor] | None,
    source_bias: float = 0.0,
) -> list[RowPass]:
    """The passes of an edit with its shortcuts, the source's first; those that stay as they are are the given ones.

    masks: of `token_masks`. source_bias: see `Pass`. Waits for the device where tokens are skipped.
    """
    made, begin = [given[0]], given[0].end
    source = begin > 0
    for step in given[1:]:
        if source_bias:
            step = replace(step, source_bias=source_bias)
        late = len(schedule) - step.index
        if late <= shortcuts.inside:
            wide = F.max_pool2d(masks[step.index].any(0, keepdim=True).float(), 2 * SEAM + 1, stride=1, padding=SEAM)
            kept = wide.flatten().nonzero().flatten()
            if len(kept) < step.rotary.shape[1]:
                step = replace(step, rotary=step.rotary[:, kept], tokens=kept)
        if shortcuts.window and late <= WINDOWED:
            args = schedule, step.index, shortcuts.window, source
            pair = tuple(bands(*args, first, step.rotary.device) for first in (False, True))
            step = replace(step, bands=pair)
        made.append(step if step.begin == begin else replace(step, begin=begin))
        begin = made[-1].end
    return made


def bands(schedule: Schedule, index: int, window: float, source: bool, first: bool, device="cpu") -> Bands:
    """The keys that each band of a scale's queries sees: rows within `window` of the height, of the source, earlier
    scales and their own; coarse scales whole. source: whether there is one. first: of the first block, whose source is
    pooled to the scale's grid."""
    height, width = schedule.grids[index]
    before = [schedule.grids[index] if first else schedule.grids[-1]] if source else []
    seen = [*before, *schedule.grids[: index + 1]]
    if index == len(schedule) - 1:  # as `DeviceCache.seen` has them
        seen = [seen[-1], *seen[:-1]]
    listed = []
    for start in range(0, height * width, BAND):
        top, bottom = start // width, -(-min(start + BAND, height * width) // width)
        begin, pieces = 0, []
        for rows, columns in seen:
            low, high = 0, rows
            if rows > WHOLE:
                low = max(0, math.floor((top / height - window) * rows))
                high = min(rows, math.ceil((bottom / height + window) * rows))
            piece = slice(begin + low * columns, begin + high * columns)
            if pieces and pieces[-1].stop == piece.start:
                pieces[-1] = slice(pieces[-1].start, piece.stop)
            else:
                pieces.append(piece)
            begin += rows * columns
        listed.append(tuple(pieces))
    most = max(map(len, listed))
    table = [[[p.start, p.stop] for p in pieces] + [[0, 0]] * (most - len(pieces)) for pieces in listed]
    return Bands(BAND, torch.tensor(table, dtype=torch.int32).to(device), tuple(listed))
