"""The command line of ShapeEdit: `varedit shapeedit make | evaluate`. Thin: options in, library calls, tables out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ..cli.common import Draw, Files, checked_loras, command, complain, console, hardware, knob_options, progress
from ..cli.results import Result, check_results
from ..cli.results import picture as picture_file
from ..controls.base import Known
from ..controls.registry import NEUTRAL, Shortcuts
from ..demo import demo_files
from ..files.safe_write import write_json
from ..pictures.images import save_image
from ..tokenizer.schedule import schedule_for
from .edits import FAMILIES
from .evaluate import AREA, BATCH, Batch, Report, draw, evaluate, make, picture
from .metrics import ssim_function
from .scenes import SIDE, STYLES

COUNT, SEED = 1000, 0
SHOWN = 4
CAPTION = 24
"""Height of an instruction above its pictures, in pixels."""
COLUMNS = {
    "family": "family",
    "count": "samples",
    "success": "success",
    "ceiling_success": "(VAE's)",
    "s": "S",
    "o": "O",
    "balance": "balance",
    "psnr": "background PSNR",
    "ceiling_psnr": "(VAE's)",
    "ssim": "SSIM",
    "ceiling_ssim": "(VAE's)",
}

app = typer.Typer(no_args_is_help=True, help="ShapeEdit, a procedural benchmark of edits with exact answers.")


@app.command("make")
def make_command(
    folder: Annotated[Path, typer.Argument(help="Empty or new folder.")],
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = SEED,
    count: Annotated[int, typer.Option(min=1, help="Number of samples, the families in turn.")] = COUNT,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
) -> None:
    """Write samples as pictures with a metadata.jsonl, as training reads them."""
    make(folder, seed, count, split)
    console.print(f"{folder}: {count} samples of the {split} split", soft_wrap=True)


_Shortcuts = knob_options(Shortcuts, "shortcuts", but=lambda knob: knob.name == "drafted")


@dataclass(frozen=True)
class Samples:
    """What is judged, and how."""

    count: Annotated[int, typer.Option(min=1, help="Number of samples, the families in turn.")] = COUNT
    family: Annotated[
        Optional[list[str]], typer.Option(help=f"Only this one; may be given several times: {', '.join(FAMILIES)}.")
    ] = None
    style: Annotated[str, typer.Option(help=f"Only this style: {', '.join(STYLES[1:])}.")] = ""
    batch: Annotated[int, typer.Option(min=1, help="Samples edited at a time.")] = BATCH
    masked: Annotated[bool, typer.Option(help="Give every edit its true region as a mask.")] = False


@dataclass(frozen=True)
class Outputs:
    """What is written."""

    report: Annotated[Optional[Path], typer.Option("--json", help="Write figures, every sample's too, here.")] = None
    pictures: Annotated[
        Optional[Path], typer.Option(help="Write source, edit and target of some samples here, a PNG a family.")
    ] = None
    show: Annotated[int, typer.Option(min=1, help="How many samples of a family --pictures shows.")] = SHOWN
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False

    def check(self) -> None:
        """Raise ValueError for a --show of nothing."""
        if self.show != SHOWN and not self.pictures:
            raise ValueError("--show counts what --pictures shows; name a folder with that, or leave --show out")


@app.command("evaluate")
@command
def evaluate_command(files: Files, asked: Samples, draws: Draw, shortcuts: _Shortcuts, outputs: Outputs) -> None:
    """Edit test samples and judge them by their exact answers (see docs/SHAPEEDIT.md).

    --seed is that of the samples and of the draws; --model, --vae and --text-encoder are the demo model's by default.
    """
    files = files.checked(demo=False)
    settings, saved, schedule = draws.settings(files.model), shortcuts.values(), schedule_for(AREA)
    outputs.check()
    if saved.inside and not asked.masked:
        raise ValueError("--inside computes inside a mask only; add --masked")
    draws.check(settings, len(schedule))
    complain(Known(schedule, settings, NEUTRAL, saved, asked.masked))
    samples = draw(draws.seed, asked.count, asked.family, asked.style)
    families = [sample.family for sample in samples]
    gallery = Gallery(outputs.pictures, outputs.show, outputs.overwrite, families) if outputs.pictures else None
    ssim_function()
    paths = [
        own or demo for own, demo in zip((files.model, files.vae or files.model, files.text_encoder), demo_files())
    ]
    results = [picture_file(path, "picture of samples") for path in (gallery.files if gallery else ())]
    results += [Result(outputs.report, "report")] if outputs.report else []
    check_results(results, files.read(paths), outputs.overwrite)
    loras = checked_loras(paths[0], files.lora)
    editor = files.load(paths, loras)
    with progress() as bar:
        task = bar.add_task("editing", total=len(samples))

        def follow(done: Batch) -> None:
            bar.advance(task, len(done.samples))
            if gallery:
                gallery.add(done)

        figures = evaluate(editor, samples, settings, asked.batch, follow, saved, asked.masked)
    if gallery:
        gallery.save()
    if outputs.report:
        names = dict(zip(("model", "vae", "text_encoder"), (path.name for path in paths)))
        facts = {
            "seed": draws.seed, "count": asked.count, "style": asked.style,
            "loras": [[str(file), strength] for file, strength in loras], "linears": files.linears,
            "masked": asked.masked, "shortcuts": asdict(saved), **names, **hardware(editor),
            **figures.to_json(samples=True),
        }  # fmt: skip
        write_json(outputs.report, facts, overwrite=outputs.overwrite)
    _print(figures)


class Gallery:
    """Source, edit and target of the first samples of every family, each under its instruction."""

    def __init__(self, folder: Path, show: int, overwrite: bool, families: list[str]) -> None:
        self.folder, self.overwrite, self.rows = folder, overwrite, {}
        seen: Counter[str] = Counter()
        for index, family in enumerate(families):
            if seen[family] < show:
                self.rows[family, index] = None
            seen[family] += 1
        self.files = [folder / f"{family}.png" for family in seen]

    def add(self, batch: Batch) -> None:
        """Keep what will be shown of a batch."""
        for row, record in enumerate(batch.records):
            if (record.family, record.index) in self.rows:
                pixels = (batch.source[row], batch.edited[row], batch.target[row])
                self.rows[record.family, record.index] = self._row(record, [picture(p) for p in pixels])

    def save(self) -> None:
        """Write FOLDER/<family>.png for every family."""
        for name in dict.fromkeys(family for family, _ in self.rows):
            rows = [image for (family, _), image in self.rows.items() if family == name]
            sheet = Image.new("RGB", (rows[0].width, sum(image.height for image in rows)), "white")
            for number, image in enumerate(rows):
                sheet.paste(image, (0, number * image.height))
            save_image(sheet, self.folder / f"{name}.png", self.overwrite)

    @staticmethod
    def _row(record, images: list[Image.Image]) -> Image.Image:
        row = Image.new("RGB", (3 * SIDE, CAPTION + SIDE), "white")
        verdict = "success" if record.score.success else "failure"
        text = f"{record.instruction}  ({verdict}; source, edit, target)"
        ImageDraw.Draw(row).text((6, 6), text, fill="black")
        for place, image in enumerate(images):
            row.paste(image, (place * SIDE, CAPTION))
        return row


def _print(report: Report) -> None:
    table = Table(title="ShapeEdit", title_justify="left")
    for name, heading in COLUMNS.items():
        table.add_column(heading, justify="left" if name == "family" else "right")
    for row in report.table():
        table.add_row(*(_cell(name, row[name]) for name in COLUMNS))
    Console(width=max(Console().width, 130), markup=False).print(table)


def _cell(name: str, value) -> str:
    if value is None:
        return "-"
    if name.endswith("success"):
        return f"{value:.1%}"
    if name.endswith("psnr"):
        return f"{value:.2f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
