"""The command line: `varedit edit | demo | info | convert | merge | train | parity | shapeedit`. Thin: options in, library calls, tables out."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .contact_sheet import Row, contact_sheet
from .convert import PRECISIONS, convert
from .defaults import DEFAULT_SETTINGS, FIT, NEGATIVE_PROMPT, SIZE, SamplingSettings
from .demo import NOTICE, demo_files
from .demo import SIZE as DEMO_SIZE
from .images import FITS, FittedImage, SourceImage, check_target, load_image, save_image
from .images import fit as fit_image
from .info import inspect
from .lora import apply_lora, check_lora, merge_lora
from .parity import Parity, compare
from .pipeline import Editor
from .sampling import Scale
from .schedule import AREAS, schedule_for
from .shapeedit.cli import app as shapeedit
from .showcase import demo
from .training.cli import train
from .weights import open_weights

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Edit images by instruction with VAREdit.",
)
app.add_typer(shapeedit, name="shapeedit")
console = Console(stderr=True, markup=False, highlight=False)

SIZES = {str(schedule_for(area).pixels[0]): area for area in AREAS} | {area: area for area in AREAS}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Entry point: one sentence on standard error instead of a traceback for errors the user can mend."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", soft_wrap=True)
        sys.exit(1)


def _per_scale(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number nor a comma-separated list of one number a scale"
        ) from None


def _choice(text: str, table: dict, name: str):
    if text not in table:
        raise typer.BadParameter(f"unknown {name} {text!r}; choose one of {', '.join(table)}")
    return table[text]


@contextmanager
def _progress():
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


class Watcher:
    """Follows the edit of one picture scale by scale: progress bar, seconds, and on request its pictures.

    Pictures are decoded from the scale's running sum. keep: hold them in `pictures`. folder: write them there, as
    STEM-scale-NN-HxW.png.
    """

    def __init__(
        self, editor: Editor, progress: Progress, keep: bool = False, folder: Path | None = None, stem: str = ""
    ) -> None:
        self.editor, self.progress, self.keep, self.folder, self.stem = editor, progress, keep, folder, stem
        self.task = progress.add_task("reading the source", total=None)
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
        self.progress.update(
            self.task,
            description=f"scale {scale.index + 1}/{scale.count} ({height}x{width})",
            total=sum(tokens),
            completed=sum(tokens[: scale.index + 1]),
        )
        if self.keep or self.folder:
            (picture,) = self.editor.decode(scale.running_sum, fitted)
            if self.keep:
                self.pictures.append(picture)
            if self.folder:
                name = f"{self.stem}-scale-{scale.index + 1:02d}-{height}x{width}.png"
                save_image(picture, self.folder / name, overwrite=True)
        self.begin = time.perf_counter()

    @property
    def columns(self) -> list[str]:
        """A contact sheet's columns: those of `row`."""
        return ["source", *("{}x{}".format(*scale["grid"]) for scale in self.scales), "result"]

    def row(self, label: str, source: SourceImage, result: Image.Image) -> Row:
        """A contact sheet's row: source, every scale, result."""
        return Row(label, [source.rgb, *self.pictures, result])


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="Picture to edit.")],
    instruction: Annotated[str, typer.Argument(help="What to change, in words.")] = "",
    model: Annotated[
        Optional[Path],
        typer.Option(help="Transformer: .safetensors, .pth or a sharded folder; by default the demo model."),
    ] = None,
    vae: Annotated[
        Optional[Path], typer.Option(help="Tokenizer file; by default the model file, where it holds both.")
    ] = None,
    text_encoder: Annotated[Optional[Path], typer.Option(help="T5 encoder: a Hugging Face folder or one file.")] = None,
    lora: Annotated[
        Optional[list[str]], typer.Option(help="FILE[:STRENGTH], a LoRA to apply; may be given several times.")
    ] = None,
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="Folder or file of the text encoder's tokenizer, if not with its weights.")
    ] = None,
    features: Annotated[
        Optional[str], typer.Option(help="FILE:KEY with text features to use in place of an instruction.")
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Result; by default beside the picture, as NAME-edited.png."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output file if it exists.")] = False,
    size: Annotated[
        Optional[str],
        typer.Option(help=f"Working size: {', '.join(SIZES)}.", show_default=f"{SIZE}; {DEMO_SIZE} for the demo model"),
    ] = None,
    fit: Annotated[str, typer.Option(help="square (as published) or aspect (experimental).")] = FIT,
    guidance: Annotated[
        str, typer.Option(help="Classifier-free guidance; one number, or one a scale.")
    ] = f"{DEFAULT_SETTINGS.guidance:g}",
    temperature: Annotated[
        str, typer.Option(help="Temperature; 0 is greedy; one number, or one a scale.")
    ] = f"{DEFAULT_SETTINGS.temperature:g}",
    top_p: Annotated[
        str, typer.Option(help="Drop bit values of probability <= 1 - top_p.")
    ] = f"{DEFAULT_SETTINGS.top_p:g}",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = DEFAULT_SETTINGS.seed,
    negative: Annotated[
        str, typer.Option(help="Negative prompt, in place of the learned unconditional features.")
    ] = NEGATIVE_PROMPT,
    device: Annotated[Optional[str], typer.Option(help="cuda, cpu, mps; by default cuda where there is one.")] = None,
    dtype: Annotated[Optional[str], typer.Option(help=f"Of the transformer's blocks: {', '.join(DTYPES)}.")] = None,
    preview_dir: Annotated[Optional[Path], typer.Option(help="Write every scale's picture into this folder.")] = None,
    sheet: Annotated[
        Optional[Path], typer.Option("--contact-sheet", help="Write source, every scale and result as one picture.")
    ] = None,
    report: Annotated[bool, typer.Option("--json", help="Print a JSON report on standard output.")] = False,
) -> None:
    """Edit a picture by an instruction; the result has exactly its size."""
    demo_model = model is None
    if demo_model and (vae or text_encoder or tokenizer):
        raise ValueError("--vae, --text-encoder and --tokenizer belong to a model of yours; name it with --model")
    settings = SamplingSettings(_per_scale(guidance), _per_scale(temperature), _per_scale(top_p), seed)
    area = _choice(size or (DEMO_SIZE if demo_model else SIZE), SIZES, "size")
    _choice(fit, dict.fromkeys(FITS), "fit")
    kind = _choice(dtype, DTYPES, "dtype") if dtype else None
    target = output or image.with_name(f"{image.stem}-edited.png")
    if not (instruction or features):
        raise ValueError("say what to change: give an instruction or --features FILE:KEY")
    if instruction and features:
        raise ValueError("give an instruction or --features, not both")
    if demo_model:
        model, vae, text_encoder = demo_files()
    if (instruction or negative) and not text_encoder:
        raise ValueError("an instruction or a negative prompt needs --text-encoder")
    source = fit_image(load_image(image), area, fit)
    settings.per_scale(len(source.schedule))
    check_target(target, source.source.alpha is not None, overwrite)
    if preview_dir:
        check_target(preview_dir / "scale.png", False, overwrite=True)
    if sheet:
        check_target(sheet, False, overwrite)
    prompts = [_features(features)] if features else [instruction]
    loras = checked_loras(model, lora)

    if demo_model:
        console.print(NOTICE, soft_wrap=True)
    begin = time.perf_counter()
    editor = Editor.load(model, vae or model, text_encoder, tokenizer, device, kind)
    for file, strength in loras:
        apply_lora(editor.transformer, file, strength)
    loaded = time.perf_counter()
    with _progress() as progress:
        watcher = Watcher(editor, progress, sheet is not None, preview_dir, target.stem)
        (result,) = editor.edit([source.source], prompts, [negative], area, fit, settings, watcher)
    edited = time.perf_counter()
    save_image(result, target, overwrite, source.source.icc_profile)
    if sheet:
        row = watcher.row(instruction or features, source.source, result)
        save_image(contact_sheet([row], watcher.columns), sheet, overwrite)
    console.print(
        f"{target} ({result.width}x{result.height}) in {edited - loaded:.1f} s after {loaded - begin:.1f} s of loading",
        soft_wrap=True,
        highlight=False,
    )
    if report:
        facts = {
            "output": str(target),
            "size": list(result.size),
            "pixels": list(source.schedule.pixels),
            "fit": fit,
            "contact_sheet": str(sheet) if sheet else None,
            "loras": [{"file": str(file), "strength": strength} for file, strength in loras],
            **asdict(settings),
        }
        times = {"load_seconds": round(loaded - begin, 4), "edit_seconds": round(edited - loaded, 4)}
        print(json.dumps({**facts, **times, "device": str(editor.device), "scales": watcher.scales}))


def _features(name: str) -> torch.Tensor:
    path, _, key = name.rpartition(":")
    if not (path and key):
        raise ValueError(f"--features takes FILE:KEY, got {name}; name the tensor behind a colon")
    weights = open_weights(path)
    if key not in weights:
        raise ValueError(
            f"{path} has no tensor {key}; it has {', '.join(sorted(k for k in weights if len(weights.shapes[k]) == 2)[:3])}, ..."
        )
    return weights[key].float()


def checked_loras(model: Path, texts: list[str] | None) -> list[tuple[Path, float]]:
    """The LoRAs of --lora with their strengths, known to fit the transformer's file."""
    loras = [_lora(text) for text in texts or []]
    for file, _ in loras:
        check_lora(model, file)
    return loras


def _lora(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH]; a colon may be part of the file's name."""
    file, _, strength = text.rpartition(":")
    try:
        return (Path(text), 1.0) if not file or Path(text).exists() else (Path(file), float(strength))
    except ValueError:
        return Path(text), 1.0


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="Weight file or folder.")],
    report: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a weight file is: its parts, sizes, types and metadata."""
    facts = inspect(file)
    if report:
        print(json.dumps(facts))
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    Console(markup=False).print(table)


@app.command(name="convert")
def convert_command(
    source: Annotated[
        Path, typer.Argument(help=".pth, .safetensors or a sharded folder: transformer, tokenizer or text encoder.")
    ],
    target: Annotated[Path, typer.Argument(help="Result, ending in .safetensors.")],
    precision: Annotated[
        str, typer.Option(help=f"Of the blocks' matrices: {', '.join(PRECISIONS)} (fp8: one scale a matrix).")
    ] = "bf16",
    overwrite: Annotated[bool, typer.Option(help="Replace the target if it exists.")] = False,
) -> None:
    """Convert weights to safetensors, a tensor at a time."""
    with _progress() as progress:
        task = progress.add_task("converting", total=None)
        metadata = convert(
            source, target, precision, overwrite, lambda done, total: progress.update(task, completed=done, total=total)
        )
    console.print(
        f"{target}: {metadata['varedit.architecture']}, {metadata['varedit.precision']}, {target.stat().st_size / 1e9:.2f} GB",
        soft_wrap=True,
    )


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="Transformer: .safetensors, .pth or a sharded folder; not 8-bit.")],
    lora: Annotated[Path, typer.Argument(help="LoRA to merge into it.")],
    output: Annotated[Path, typer.Argument(help="Result, ending in .safetensors.")],
    strength: Annotated[float, typer.Option(help="1 is as trained.")] = 1.0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it exists.")] = False,
) -> None:
    """Merge a LoRA into a transformer, a tensor at a time."""
    with _progress() as progress:
        task = progress.add_task("merging", total=None)
        metadata = merge_lora(
            model,
            lora,
            output,
            strength,
            overwrite,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"{output}: {metadata['varedit.merged_lora']} merged, {output.stat().st_size / 1e9:.2f} GB", soft_wrap=True
    )


app.command()(demo)
app.command()(train)


@app.command()
def parity(
    files: Annotated[list[Path], typer.Argument(help="Recorded runs.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32 is judged; bf16 and fp16 are reported.")] = "fp32",
    report: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare with recorded figures of the published implementation; fails beyond tolerance."""
    results = [compare(file, _choice(dtype, DTYPES, "dtype"), device) for file in files]
    if report:
        print(json.dumps([result.to_json() for result in results]))
    else:
        for result in results:
            _print_parity(result)
    if any(result.failures for result in results):
        raise typer.Exit(1)


def _print_parity(result: Parity) -> None:
    table = Table(title=f"{Path(result.file).name} ({result.dtype})", title_justify="left")
    for heading in (
        "scale",
        "tokens",
        "largest logit error",
        "equal bits, record's history",
        "of these beyond the margin",
        "equal bits, free run",
    ):
        table.add_column(heading, justify="right")
    for index, row in enumerate(result.scales, start=1):
        error = "-" if row.logit_error is None else f"{row.logit_error:.1e}"
        table.add_row(
            str(index),
            f"{row.grid[0]}x{row.grid[1]}",
            error,
            f"{row.forced:.4%}",
            f"{row.forced_beyond_margin:.4%}",
            f"{row.free:.4%}",
        )
    out = Console(width=max(Console().width, 110), markup=False)
    out.print(table)
    out.print("; ".join(f"{name} {value:.2g}" for name, value in result.errors.items()), highlight=False)
    verdict = (
        f"FAILED: {'; '.join(result.failures)}"
        if result.failures
        else "reported, not judged"
        if result.dtype != "float32"
        else "passed"
    )
    out.print(f"free run {result.free_bits:.4%} equal; {verdict}\n", highlight=False)
