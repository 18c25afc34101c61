"""Window: tokens of the last scales see only rows near their own.

Shape suffixes: (h, w) a token grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tokenizer.schedule import Schedule
from .base import Control, Knob

BAND = 128
"""Queries that share a window."""
WHOLE = 16
"""Coarser scales than so many rows are seen whole."""
WINDOWED = 3
"""How many of the last scales have windows."""


@dataclass(frozen=True, eq=False)
class Bands:
    """Queries that see only some keys: every `tokens` consecutive queries have pieces of
    `runtime.kv_caches.DeviceCache.seen` of their own.

    pieces: int32 [bands, P, 2], begin and end of each; empty ones fill up. listed: the same on the host.
    """

    tokens: int
    pieces: Tensor
    listed: tuple[tuple[slice, ...], ...]


@dataclass(frozen=True)
class Window(Control):
    """Lets the last `WINDOWED` scales see rows within this share of the height."""

    group = "shortcuts"
    order = 130
    knobs = (
        Knob(
            "window", 0.0, 0.0, 1.0, step=0.025,
            help="The last three scales see only rows within this share of the height, such as 0.125; 0 is all. What "
            "is far apart may match less. Grids of up to 16 rows are always whole, so nothing changes at 256. Not "
            "together with inside.",
            option="Shortcut: the last three scales see rows within this share of the height (grids of more than 16 "
            "rows only); 0: all.",
            label_zh="窗口",
            help_zh="最后三个尺度只看上下各占图高这一比例以内的行，例如 0.125；0 表示全部。相距较远的内容可能对不上。"
            "不超过 16 行的网格总是全部可见，因此在 256 时没有变化。不能与 inside 同时使用。",
            more="0.125 is a good start at 1024 pixels. Parts that must match from afar, such as the two halves of a "
            "symmetric thing, may not.",
            more_zh="1024 像素时可从 0.125 试起。需要远距离呼应的内容，例如对称物体的两端，可能对不上。",
        ),
    )  # fmt: skip
    share: float
    schedule: Schedule

    @classmethod
    def of(cls, batch) -> Window | None:
        return cls(batch.shortcuts.window, batch.schedule) if batch.shortcuts.window else None

    @classmethod
    def idle(cls, edit):
        grids = [edit.schedule.grids[k] for k in edit.late(WINDOWED)]
        if not edit.shortcuts.window or any(rows > WHOLE for rows, _ in grids):
            return ""
        return (
            f"{edit.spelled('window')} narrows grids of more than {WHOLE} rows at the last {WINDOWED} scales, and this "
            "edit runs none; leave it at 0"
        )

    @classmethod
    def refuse(cls, edit):
        if not edit.shortcuts.window or edit.controls.source_attention == 1:
            return ""
        window, other = edit.spelled("window"), edit.spelled("source_attention")
        return f"{window} and {other} do not go together; set {window} to 0, or {other} to 1"

    @property
    def depends(self) -> tuple:
        return (self.share,)

    def step(self, step, source):
        if len(self.schedule) - step.index > WINDOWED:
            return step
        made = [
            bands(self.schedule, step.index, self.share, source, first, step.rotary.device) for first in (False, True)
        ]
        return replace(step, bands=tuple(made))


def bands(schedule: Schedule, index: int, window: float, source: bool, first: bool, device="cpu") -> Bands:
    """The keys that each band of a scale's queries sees: rows within `window` of the height, of the source, earlier
    scales and their own; coarse scales whole. source: whether there is one. first: of the first block, whose source is
    pooled to the scale's grid."""
    height, width = schedule.grids[index]
    read = [schedule.grids[index] if first else schedule.grids[-1]] if source else []
    seen = [*read, *schedule.grids[: index + 1]]
    if index == len(schedule) - 1:  # as `DeviceCache.seen` has them
        seen = [seen[-1], *seen[:-1]]
    listed = []
    for start in range(0, height * width, BAND):
        top, bottom = start // width, -(-min(start + BAND, height * width) // width)
        listed.append(_pieces(seen, top / height - window, bottom / height + window))
    most = max(map(len, listed))
    table = [[[p.start, p.stop] for p in pieces] + [[0, 0]] * (most - len(pieces)) for pieces in listed]
    return Bands(BAND, torch.tensor(table, dtype=torch.int32).to(device), tuple(listed))


def _pieces(seen: list, low: float, high: float) -> tuple[slice, ...]:
    """The tokens of grids behind each other whose rows lie from `low` to `high` of the height, as few pieces."""
    begin, pieces = 0, []
    for rows, columns in seen:
        first, last = 0, rows
        if rows > WHOLE:
            first, last = max(0, math.floor(low * rows)), min(rows, math.ceil(high * rows))
        piece = slice(begin + first * columns, begin + last * columns)
        if pieces and pieces[-1].stop == piece.start:
            pieces[-1] = slice(pieces[-1].start, piece.stop)
        else:
            pieces.append(piece)
        begin += rows * columns
    return tuple(pieces)
