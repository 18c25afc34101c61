"""`varedit demo`: edits of the demo model on a contact sheet."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from ..defaults import FIT
from ..demo import GUIDANCE, SAMPLES, SIZE, demo_files
from ..editor import Editor
from ..files.reading import printable
from ..pictures.contact_sheet import contact_sheet
from ..pictures.images import load_image, save_image
from ..sampling.settings import SamplingSettings
from . import common as options
from .common import console, progress
from .results import check_results, picture
from .watcher import Watcher

EDITS = {
    "scene.png": (
        "in the bottom centre, add a pink square",
        "recolour the black star in purple",
        "make the background cyan",
    ),
    "cat.jpg": ("make it sepia", "make the picture a night scene", "make the image black and white"),
}
"""Pictures of `samples/` and what to do with each."""
FOLDER = Path("output/demo")
SETTINGS = SamplingSettings(guidance=GUIDANCE)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = FOLDER,
    overwrite: Annotated[bool, typer.Option(help="Replace results that exist.")] = False,
    device: options.Device = None,
    report: options.JsonReport = False,
) -> None:
    """Edit a drawn scene and a photograph with the demo model: six instructions, and a picture of every scale."""
    files, sheet = demo_files(), output / "contact-sheet.png"
    jobs = [
        (SAMPLES / name, words, output / f"{_slug(f'{Path(name).stem} {words}')}.png")
        for name, instructions in EDITS.items()
        for words in instructions
    ]
    sources = {path: load_image(path) for path, _, _ in jobs}
    results = [picture(sheet, "contact sheet"), *(picture(target) for *_, target in jobs)]
    check_results(results, [*files, *sources], overwrite)
    begin = time.perf_counter()
    editor = Editor.load(*files, device=device)
    load_seconds = time.perf_counter() - begin
    rows, facts = [], []
    for path, words, target in jobs:
        begin = time.perf_counter()
        with progress() as bar:
            watcher = Watcher(editor, bar, keep=True)
            (result,) = editor.edit(sources[path], words, None, SIZE, FIT, SETTINGS, watcher)
            watcher.take(result)
        seconds = round(time.perf_counter() - begin, 4)
        save_image(result, target, overwrite, sources[path].icc_profile)
        rows.append(watcher.row(words, sources[path]))
        facts.append({"source": str(path), "instruction": words, "output": str(target), "seconds": seconds})
        console.print(f"{printable(str(target))}: {words} ({seconds:.1f} s)", soft_wrap=True)
    save_image(contact_sheet(rows, watcher.columns), sheet, overwrite)
    total = sum(fact["seconds"] for fact in facts)
    console.print(
        f"{sheet}: every scale of every edit\n"
        f"{len(facts)} edits and a picture of every scale in {total:.1f} s after {load_seconds:.1f} s of loading",
        soft_wrap=True,
    )
    if report:
        times = {"load_seconds": round(load_seconds, 4), "edit_seconds": round(total, 4)}
        print(json.dumps({"contact_sheet": str(sheet), "edits": facts, **times, "device": str(editor.device)}))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
