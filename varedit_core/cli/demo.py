"""Edits shown scale by scale: the watcher of an edit, and `varedit demo`, a contact sheet of the demo model's."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.progress import Progress

from ..defaults import FIT
from ..demo import GUIDANCE, SAMPLES, SIZE, demo_files
from ..editor import Editor
from ..pictures.contact_sheet import Row, contact_sheet
from ..pictures.images import FittedImage, SourceImage, check_target, load_image, save_image
from ..sampling.scale import Scale
from ..sampling.settings import SamplingSettings
from . import common as options
from .common import console, progress

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


class Watcher:
    """Follows the edit of one picture (the first of its variations) scale by scale: progress bar, seconds, and on request its pictures.

    Pictures are decoded from the scale's running sum, but for the last one: that is the result, which whoever edits
    gives to `take`. keep: hold them in `pictures`. folder: write them there, as STEM-scale-NN-HxW.png.
    """

    def __init__(
        self, editor: Editor, bar: Progress, keep: bool = False, folder: Path | None = None, stem: str = ""
    ) -> None:
        self.editor, self.bar, self.keep, self.folder, self.stem = editor, bar, keep, folder, stem
        self.task = bar.add_task("reading the source", total=None)
        self.begin, self.scales, self.pictures = time.perf_counter(), [], []

    def __call__(self, scale: Scale, fitted: list[FittedImage]) -> None:
        height, width = scale.grid
        tokens = fitted[0].schedule.tokens
        bits = scale.bits  # drawn here, so that a scale's seconds hold its own draw
        self.scales.append(
            {
                "scale": scale.index + 1,
                "grid": [height, width],
                "seconds": round(time.perf_counter() - self.begin, 4),
                "ones": round(bits.float().mean().item(), 4),
            }
        )
        self.bar.update(
            self.task,
            description=f"scale {scale.index + 1}/{scale.count} ({height}x{width})",
            total=sum(tokens),
            completed=sum(tokens[: scale.index + 1]),
        )
        if (self.keep or self.folder) and scale.index + 1 < scale.count:
            self.take(*self.editor.decode(scale.running_sum[:1], fitted[:1]))
        self.begin = time.perf_counter()

    def take(self, picture: Image.Image) -> None:
        """Keep or write the picture of the scale that passed last."""
        if self.keep:
            self.pictures.append(picture)
        if self.folder:
            number, (height, width) = len(self.scales), self.scales[-1]["grid"]
            save_image(picture, self.folder / f"{self.stem}-scale-{number:02d}-{height}x{width}.png", overwrite=True)

    @property
    def columns(self) -> list[str]:
        """A contact sheet's columns: those of `row`."""
        return ["source", *("{}x{}".format(*scale["grid"]) for scale in self.scales), "result"]

    def row(self, label: str, source: SourceImage) -> Row:
        """A contact sheet's row: source, every scale, result."""
        return Row(label, [source.rgb, *self.pictures, self.pictures[-1]])


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
    for target in (sheet, *(target for *_, target in jobs)):
        check_target(target, False, overwrite)
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
