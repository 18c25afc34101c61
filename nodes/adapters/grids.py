"""Sweeps under ComfyUI: an edit a cell, and the cells on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...varedit_core.sampling.settings import SamplingSettings
from ...varedit_core.sweep import Axis, Cell, doubts, grid, planned, refuse
from .conditioning import Instructions
from .latents import KEY
from .pictures import decode_edit, to_image, to_pillow
from .running import Edit, sample_latent


@dataclass(frozen=True, eq=False)
class Swept:
    """The inputs of a sweep. axes: setting and values, as text, of x and (if used) of y. image, mask: see
    `VAREditDecode`."""

    told: Instructions
    settings: SamplingSettings
    axes: Sequence[tuple[str, str]]
    image: Tensor | None = None
    mask: Tensor | None = None


def edit_grid(model, source: dict, vae, swept: Swept, tell: Callable[[str], None]) -> tuple[Tensor, list[Tensor]]:
    """The labelled grid of the first picture's edits, and the edits, row by row. ValueError, before
    any edit, as `sweep.planned` and `refuse`."""
    axes = [Axis.read(*axis) for axis in swept.axes]
    for axis in axes:
        if axis.doubt:
            tell(axis.doubt)
    rows = planned(*axes, settings=swept.settings)
    if KEY in source:
        given = rows, source[KEY].fitting.schedule, swept.mask is not None
        refuse(*given)
        for sentence in doubts(*given):
            tell(sentence)
    count, shown = sum(map(len, rows)), []
    for y, row in enumerate(rows):
        parts = [(y * len(row) + x, count) for x in range(len(row))]
        shown.append([_edited(model, source, vae, swept, cell, part, tell) for cell, part in zip(row, parts)])
    sheet = grid(rows, [[to_pillow(batch[0]) for batch in row] for row in shown])
    return to_image([sheet]), [batch for row in shown for batch in row]


def _edited(model, source: dict, vae, swept: Swept, cell: Cell, part: tuple[int, int], tell) -> Tensor:
    told = swept.told
    edit = Edit(told.texts, cell.settings, mask=swept.mask, controls=cell.controls, regions=told.regions, part=part)
    latent, *_ = sample_latent(model, source, edit, "off", vae, tell)
    return decode_edit(vae, latent, swept.image, None if swept.image is None else swept.mask, tell)[0]
