"""`varedit sweep`: a labelled grid of one edit over one or two of its settings."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..controls.registry import SWEPT
from ..defaults import FIT, FITS, KINDS, NEGATIVE_PROMPT
from ..demo import NOTICE, demo_files
from ..pictures.images import check_target, load_image, load_mask, save_image
from ..runtime.fp8 import LINEARS
from ..sampling.settings import DEFAULT_SETTINGS, SamplingSettings
from ..sweep import CELL, Axis, Cell, grid, planned
from ..sweep import sweep as swept
from . import common as options
from .common import (
    DTYPES,
    check_parts,
    checked_loras,
    choice,
    console,
    guidance_or_default,
    load_editor,
    per_scale,
    progress,
    size_or_default,
)  # fmt: skip

_AXIS = f"NAME=VALUE,VALUE,... of one of {', '.join(SWEPT)}"


def sweep(
    image: Annotated[Path, typer.Argument(help="Picture to edit.")],
    instruction: Annotated[str, typer.Argument(help="What to change, in words.")],
    x: Annotated[str, typer.Option("--x", help=f"From left to right: {_AXIS}.")],
    y: Annotated[Optional[str], typer.Option("--y", help="From top to bottom, the same of another setting.")] = None,
    model: options.Model = None,
    vae: options.Vae = None,
    text_encoder: options.TextEncoder = None,
    kind: options.Kind = KINDS[0],
    lora: options.Lora = None,
    tokenizer: options.Tokenizer = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Grid; by default beside the picture, as NAME-sweep.png.")
    ] = None,
    folder: Annotated[Optional[Path], typer.Option(help="Write every edit into this folder, too.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    cell: Annotated[int, typer.Option(min=32, max=2048, help="Largest side of a picture on the grid, in pixels.")] = CELL,
    size: options.Size = None,
    fit: options.Fit = FIT,
    guidance: options.Guidance = None,
    temperature: options.Temperature = options.TEMPERATURE,
    top_p: options.TopP = options.TOP_P,
    seed: options.Seed = DEFAULT_SETTINGS.seed,
    negative: options.Negative = NEGATIVE_PROMPT,
    mask: options.Mask = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    linears: options.Linears = LINEARS[0],
    report: options.JsonReport = False,
) -> None:
    """Edit a picture at several values of one or two settings, and lay the results out as a labelled grid."""
    check_parts(model, vae, text_encoder, tokenizer)
    if model and not text_encoder:
        raise ValueError("an instruction needs --text-encoder")
    if not instruction:
        raise ValueError("say what to change: give an instruction")
    settings = SamplingSettings(guidance_or_default(guidance, model), per_scale(temperature), per_scale(top_p), seed)
    cells = planned(Axis.parse(x), Axis.parse(y) if y else None, settings)
    area = size_or_default(size, model)
    choice(fit, dict.fromkeys(FITS), "fit")
    number = choice(dtype, DTYPES, "dtype") if dtype else None
    files = (model, vae or model, text_encoder) if model else demo_files()
    source, target = load_image(image), output or image.with_name(f"{image.stem}-sweep.png")
    if target.resolve() == image.resolve():
        raise ValueError(f"the grid {target} would replace the picture; choose another name for it")
    check_target(target, False, overwrite)
    apart = {one: folder / f"{image.stem}-{_named(one)}.png" for row in cells for one in row} if folder else {}
    for path in apart.values():
        check_target(path, not source.opaque, overwrite)
    drawn, loras = load_mask(mask) if mask else None, checked_loras(files[0], lora)

    if model is None:
        console.print(NOTICE, soft_wrap=True)
    begin = time.perf_counter()
    editor = load_editor(files, loras, linears, tokenizer, device, number, kind=kind)
    loaded = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("editing", total=sum(map(len, cells)))

        def done(one: Cell, picture) -> None:
            if folder:
                save_image(picture, apart[one], overwrite, source.icc_profile)
            bar.advance(task)

        pictures = swept(editor, source, instruction, cells, negative, area, fit, drawn, done)
    save_image(grid(cells, pictures, cell), target, overwrite, source.icc_profile)
    seconds = time.perf_counter() - loaded
    console.print(
        f"{target}: {sum(map(len, cells))} edits in {seconds:.1f} s after {loaded - begin:.1f} s of loading",
        soft_wrap=True,
        highlight=False,
    )
    if report:
        facts = [
            {"x": one.column, "y": one.row or None, "output": str(apart[one]) if folder else None}
            for row in cells
            for one in row
        ]
        times = {"load_seconds": round(loaded - begin, 4), "edit_seconds": round(seconds, 4)}
        print(json.dumps({"output": str(target), "cells": facts, **times, "device": str(editor.device)}))


def _named(cell: Cell) -> str:
    return re.sub(r"[^\w.,+-]+", "-", "_".join(filter(None, (cell.column, cell.row))))
