"""`varedit sweep`: a labelled grid of one edit over one or two of its settings."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..controls.registry import SWEPT
from ..defaults import NEGATIVE_PROMPT
from ..demo import NOTICE
from ..files.reading import printable
from ..files.safe_write import together
from ..fitting import fitting_for
from ..pictures.composite import check_masks
from ..pictures.images import load_image, load_mask, save_image
from ..sweep import CELL, Axis, Cell, Swept, check, grid, planned
from ..sweep import sweep as swept
from . import common as options
from .common import (
    NEGATIVE,
    Canvas,
    Draw,
    Files,
    carried,
    check_scales,
    check_words,
    checked_loras,
    command,
    console,
    progress,
)  # fmt: skip
from .results import check_results, picture

_AXIS = f"NAME=VALUE,VALUE,... of one of {', '.join(SWEPT)}"


@dataclass(frozen=True)
class Outputs:
    """What is written."""

    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Grid; by default beside the picture, as NAME-sweep.png.")
    ] = None
    folder: Annotated[Optional[Path], typer.Option(help="Write every edit into this folder, too.")] = None
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False
    cell: Annotated[int, typer.Option(min=32, max=2048, help="Largest side of a picture on the grid, in pixels.")] = (
        CELL
    )
    strip: options.Strip = False
    report: options.JsonReport = False


@command
def sweep(
    image: Annotated[Path, typer.Argument(help="Picture to edit.")],
    instruction: Annotated[str, typer.Argument(help="What to change, in words.")],
    x: Annotated[str, typer.Option("--x", help=f"From left to right: {_AXIS}.")],
    files: Files,
    canvas: Canvas,
    draw: Draw,
    outputs: Outputs,
    y: Annotated[Optional[str], typer.Option("--y", help="From top to bottom, the same of another setting.")] = None,
    negative: Annotated[str, typer.Option(help=NEGATIVE)] = NEGATIVE_PROMPT,
    mask: options.Mask = None,
) -> None:
    """Edit a picture at several values of one or two settings, and lay the results out as a labelled grid."""
    files = files.checked()
    check_words(instruction)
    if outputs.strip and not outputs.folder:
        raise ValueError("--strip is for the edits that --folder keeps, a grid carries nothing; leave it out")
    paths, area, overwrite = files.paths(), canvas.area(files.model), outputs.overwrite
    axes = [Axis.parse(text) for text in (x, y) if text]
    for axis in axes:
        if axis.doubt:
            console.print(axis.doubt, soft_wrap=True)
    cells = planned(*axes, settings=draw.settings(files.model))
    source, target = load_image(image), outputs.output or image.with_name(f"{image.stem}-sweep.png")
    schedule = fitting_for(source.size, area, canvas.method).schedule
    _check(draw, axes, cells, len(schedule))
    check(cells, schedule, mask is not None, bool(negative))
    folder = outputs.folder
    apart = {one: folder / f"{image.stem}-{_named(one)}.png" for row in cells for one in row} if folder else {}
    results = [picture(target, "grid"), *(picture(path, "edit", not source.opaque) for path in apart.values())]
    check_results(results, [image, mask, *files.read(paths)], overwrite)
    drawn = load_mask(mask) if mask else None
    check_masks([drawn] if drawn else [], (), [source.size])
    check_scales(paths[0], len(schedule))
    loras = checked_loras(paths[0], files.lora)

    if files.model is None:
        console.print(NOTICE, soft_wrap=True)
    begin = time.perf_counter()
    editor = files.load(paths, loras)
    loaded = time.perf_counter()
    with together() as write, progress() as bar:
        task = bar.add_task("editing", total=sum(map(len, cells)))

        def done(one: Cell, edited) -> None:
            if folder:
                save_image(edited, apart[one], overwrite, *carried(source, outputs.strip), write)
            bar.advance(task)

        asked = Swept(source, instruction, negative, area, canvas.method, drawn)
        pictures = swept(editor, asked, cells, done)
        save_image(grid(cells, pictures, outputs.cell), target, overwrite, source.icc_profile, write=write)
    seconds = time.perf_counter() - loaded
    name = printable(str(target))
    console.print(
        f"{name}: {sum(map(len, cells))} edits in {seconds:.1f} s after {loaded - begin:.1f} s of loading",
        soft_wrap=True,
        highlight=False,
    )
    if outputs.report:
        facts = [
            {"x": one.column, "y": one.row or None, "output": str(apart[one]) if folder else None}
            for row in cells
            for one in row
        ]
        times = {"load_seconds": round(loaded - begin, 4), "edit_seconds": round(seconds, 4)}
        print(json.dumps({"output": str(target), "cells": facts, **times, "device": str(editor.device)}))


def _check(draw: Draw, axes: Sequence[Axis], cells: Sequence[Sequence[Cell]], scales: int) -> None:
    """Raise ValueError for options of settings that the sweep sets anew, or that count in none of its edits."""
    for axis in axes:
        if axis.name in vars(draw) and draw.set(axis.name):
            raise ValueError(f"the sweep goes over {axis.name} itself; leave {options.spelled(axis.name)} out")
    if all(axis.name != "temperature" for axis in axes):
        draw.check(cells[0][0].settings, scales)


def _named(cell: Cell) -> str:
    return re.sub(r"[^\w.,+-]+", "-", "_".join(filter(None, (cell.column, cell.row))))
