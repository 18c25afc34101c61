"""The command line: `varedit edit | generate | demo | info | convert | merge | train | bench | parity | shapeedit`. Thin: options in, library calls, tables out."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from . import options
from .bench.cli import bench
from .checkpoints import load_transformer
from .contact_sheet import contact_sheet
from .convert import PRECISIONS, convert
from .defaults import DEFAULT_SETTINGS, FIT, FITS, KINDS, NEGATIVE_PROMPT, NO_SHORTCUTS, SIZE, SamplingSettings, Shortcuts
from .defaults import SIZES as SIDES
from .demo import NOTICE, demo_files
from .demo import SIZE as DEMO_SIZE
from .eight_bit import LINEARS
from .generate import generate
from .images import FittedImage, check_target, load_image, load_mask, save_image
from .images import fit as fit_image
from .info import inspect
from .lora import merge_lora
from .options import DTYPES, checked_loras, choice, console, guidance_or_default, load_editor, per_scale, progress
from .parity import Parity, compare
from .schedule import AREAS
from .shapeedit.cli import app as shapeedit
from .showcase import Watcher, demo
from .training.cli import train
from .weights import open_weights

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Edit images by instruction with VAREdit.",
)
app.add_typer(shapeedit, name="shapeedit")

SIZES = SIDES | {area: area for area in AREAS}


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
    kind: options.Kind = KINDS[0],
    lora: options.Lora = None,
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
    guidance: options.Guidance = None,
    temperature: options.Temperature = options.TEMPERATURE,
    top_p: options.TopP = options.TOP_P,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = DEFAULT_SETTINGS.seed,
    negative: Annotated[
        str, typer.Option(help="Negative prompt, in place of the learned unconditional features.")
    ] = NEGATIVE_PROMPT,
    device: options.Device = None,
    dtype: options.Dtype = None,
    linears: options.Linears = LINEARS[0],
    variations: options.Variations = 1,
    mask: options.Mask = None,
    unguided: options.Unguided = NO_SHORTCUTS.unguided,
    inside: options.Inside = NO_SHORTCUTS.inside,
    window: options.Window = NO_SHORTCUTS.window,
    stop: options.Stop = NO_SHORTCUTS.stop,
    drafter: options.Drafter = None,
    drafted: options.Drafted = NO_SHORTCUTS.drafted,
    preview_dir: Annotated[Optional[Path], typer.Option(help="Write every scale's picture into this folder.")] = None,
    sheet: Annotated[
        Optional[Path], typer.Option("--contact-sheet", help="Write source, every scale and result as one picture.")
    ] = None,
    report: options.JsonReport = False,
) -> None:
    """Edit a picture by an instruction; the result has exactly its size.

    Shortcuts save time and are not exact; README and docs/LOG.md say what each costs.
    """
    if model is None and (vae or text_encoder or tokenizer):
        raise ValueError("--vae, --text-encoder and --tokenizer belong to a model of yours; name it with --model")
    settings = SamplingSettings(guidance_or_default(guidance, model), per_scale(temperature), per_scale(top_p), seed)
    shortcuts = Shortcuts(unguided, inside, window, stop, drafted)
    if bool(drafter) != bool(drafted):
        raise ValueError("--drafter and --drafted go together: a second transformer, and how many scales it draws")
    area = choice(size or (SIZE if model else DEMO_SIZE), SIZES, "size")
    choice(fit, dict.fromkeys(FITS), "fit")
    number = choice(dtype, DTYPES, "dtype") if dtype else None
    files = _files(model, vae, text_encoder, instruction, features, negative)
    fitted = fit_image(load_image(image), area, fit)
    settings.per_scale(len(fitted.schedule))
    source, target = fitted.source, output or image.with_name(f"{image.stem}-edited.png")
    targets = [target.with_stem(f"{target.stem}-{i + 1}") for i in range(variations)] if variations > 1 else [target]
    for path in targets:
        _check_targets(image, path, not source.opaque, sheet, preview_dir, overwrite)
    more = dict(variations=variations, shortcuts=shortcuts, mask=load_mask(mask) if mask else None)
    prompt = _features(features) if features else instruction
    loras = checked_loras(files[0], lora)

    if model is None:
        console.print(NOTICE, soft_wrap=True)
    begin = time.perf_counter()
    editor = load_editor(files, loras, linears, tokenizer, device, number, kind=kind)
    if drafter:
        editor.drafter = load_transformer(drafter, dtype=editor.transformer.dtype, device=editor.device)
    loaded = time.perf_counter()
    with progress() as bar:
        watcher = Watcher(editor, bar, sheet is not None, preview_dir, target.stem)
        results = editor.edit([source], [prompt], [negative], area, fit, settings, watcher, **more)
        watcher.take(results[0])
    edited = time.perf_counter()
    for result, path in zip(results, targets):
        save_image(result, path, overwrite, source.icc_profile)
    if sheet:
        row = watcher.row(instruction or features, source)
        save_image(contact_sheet([row], watcher.columns), sheet, overwrite)
    console.print(
        f"{', '.join(map(str, targets))} ({result.width}x{result.height}) in {edited - loaded:.1f} s after {loaded - begin:.1f} s of loading",
        soft_wrap=True,
        highlight=False,
    )
    if report:
        facts = _facts(targets[0], sheet, fitted, fit, loras, settings) | {"linears": linears}
        facts |= {"outputs": [str(path) for path in targets], "shortcuts": asdict(shortcuts)}
        times = {"load_seconds": round(loaded - begin, 4), "edit_seconds": round(edited - loaded, 4)}
        print(json.dumps({**facts, **times, "device": str(editor.device), "scales": watcher.scales}))


def _files(
    model: Path | None,
    vae: Path | None,
    text_encoder: Path | None,
    instruction: str,
    features: str | None,
    negative: str,
) -> tuple[Path, Path, Path | None]:
    """Transformer, tokenizer and text encoder, the demo model's without a model. ValueError where words lack one."""
    if not (instruction or features):
        raise ValueError("say what to change: give an instruction or --features FILE:KEY")
    if instruction and features:
        raise ValueError("give an instruction or --features, not both")
    if model is None:
        return demo_files()
    if (instruction or negative) and not text_encoder:
        raise ValueError("an instruction or a negative prompt needs --text-encoder")
    return model, vae or model, text_encoder


def _check_targets(
    image: Path, target: Path, transparent: bool, sheet: Path | None, previews: Path | None, overwrite: bool
) -> None:
    """Raise what writing an edit's files would, before the edit. ValueError where a sheet would replace a picture."""
    if sheet and sheet.resolve() in (image.resolve(), target.resolve()):
        raise ValueError(f"the contact sheet {sheet} would replace a picture of the edit; choose another name for it")
    check_target(target, transparent, overwrite)
    if previews:
        check_target(previews / "scale.png", False, overwrite=True)
    if sheet:
        check_target(sheet, False, overwrite)


def _facts(
    target: Path,
    sheet: Path | None,
    fitted: FittedImage,
    fit: str,
    loras: list[tuple[Path, float]],
    settings: SamplingSettings,
) -> dict:
    """What the JSON report says of an edit's files and settings."""
    return {
        "output": str(target),
        "size": list(fitted.source.size),
        "pixels": list(fitted.schedule.pixels),
        "fit": fit,
        "contact_sheet": str(sheet) if sheet else None,
        "loras": [{"file": str(file), "strength": strength} for file, strength in loras],
        **asdict(settings),
    }


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
    kind: options.Kind = KINDS[0],
) -> None:
    """Convert weights to safetensors, a tensor at a time."""
    with progress() as bar:
        task = bar.add_task("converting", total=None)
        metadata = convert(
            source, target, precision, overwrite, lambda done, total: bar.update(task, completed=done, total=total), kind
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
    with progress() as bar:
        task = bar.add_task("merging", total=None)
        metadata = merge_lora(
            model,
            lora,
            output,
            strength,
            overwrite,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(
        f"{output}: {metadata['varedit.merged_lora']} merged, {output.stat().st_size / 1e9:.2f} GB", soft_wrap=True
    )


app.command()(generate)
app.command()(demo)
app.command()(train)
app.command()(bench)


@app.command()
def parity(
    files: Annotated[list[Path], typer.Argument(help="Recorded runs.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32 is judged; bf16 and fp16 are reported.")] = "fp32",
    report: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare with recorded figures of the published implementation; fails beyond tolerance."""
    results = [compare(file, choice(dtype, DTYPES, "dtype"), device) for file in files]
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
