"""`varedit demo`: real edits with the demo model, and a contact sheet of every scale of each."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from .contact_sheet import contact_sheet
from .defaults import DEFAULT_SETTINGS, FIT
from .demo import EXAMPLES, SIZE, demo_files
from .images import check_target, load_image, save_image
from .pipeline import Editor

EDITS = {
    "scene.png": (
        "in the bottom centre, add a pink square",
        "recolour the black star in purple",
        "make the background cyan",
    ),
    "cat.jpg": ("make it sepia", "make the picture a night scene", "make the image black and white"),
}
"""Pictures of `examples/` and what to do with each."""
FOLDER = Path("output/demo")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = FOLDER,
    overwrite: Annotated[bool, typer.Option(help="Replace results that exist.")] = False,
    device: Annotated[Optional[str], typer.Option(help="cuda, cpu, mps; by default cuda where there is one.")] = None,
    report: Annotated[bool, typer.Option("--json", help="Print a JSON report on standard output.")] = False,
) -> None:
    """Edit a drawn scene and a photograph with the demo model: six instructions, and a picture of every scale."""
    from .cli import Watcher, _progress, console

    files, sheet = demo_files(), output / "contact-sheet.png"
    jobs = [
        (EXAMPLES / name, words, output / f"{_slug(f'{Path(name).stem} {words}')}.png")
        for name, instructions in EDITS.items()
        for words in instructions
    ]
    sources = {path: load_image(path) for path, _, _ in jobs}
    for target in (sheet, *(target for *_, target in jobs)):
        check_target(target, False, overwrite)
    begin = time.perf_counter()
    editor = Editor.load(*files, device=device)
    load_seconds = time.perf_counter() - begin
    rows, facts = [], []
    for path, words, target in jobs:
        begin = time.perf_counter()
        with _progress() as progress:
            watcher = Watcher(editor, progress, keep=True)
            (result,) = editor.edit(sources[path], words, None, SIZE, FIT, DEFAULT_SETTINGS, watcher)
        seconds = round(time.perf_counter() - begin, 4)
        save_image(result, target, overwrite, sources[path].icc_profile)
        rows.append(watcher.row(words, sources[path], result))
        facts.append({"source": str(path), "instruction": words, "output": str(target), "seconds": seconds})
        console.print(f"{target}: {words} ({seconds:.1f} s)", soft_wrap=True)
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
