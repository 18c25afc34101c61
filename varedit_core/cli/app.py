"""The command line, `varedit COMMAND`. Thin: options in, library calls, tables out."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from .. import __version__
from ..bench.cli import bench
from ..defaults import KINDS
from ..files.checkpoints import TRANSFORMER, describe, part_of
from ..files.convert import PRECISIONS, convert
from ..files.info import inspect
from ..files.lora import merge_lora
from ..files.reading import printable
from ..files.weights import open_weights
from ..parity import Parity, compare
from ..shapeedit.cli import app as shapeedit
from ..training.cli import train
from . import common as options
from .advice import Command, Commands, OnePicture
from .card import card
from .common import DTYPES, choice, console, progress
from .decode import decode
from .demo import demo
from .edit import edit
from .generate import generate
from .get import get
from .sweep import sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    cls=Commands,
    help="Edit images by instruction with VAREdit.",
)
app.add_typer(shapeedit, name="shapeedit")


def _say_version(asked: bool) -> None:
    if asked:
        print(f"varedit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before a command."""


def main() -> None:
    """Entry point: one sentence on standard error instead of a traceback for errors the user can mend."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    warnings.filterwarnings("ignore", module="PIL")  # of EXIF data that are told by a sentence of our own
    for stream in (sys.stdout, sys.stderr):  # names of files may hold letters that a console cannot print
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"error: {printable(str(error))}", soft_wrap=True)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            raise
        console.print(
            "error: there is not enough memory for this; choose a smaller picture, a smaller --size or fewer "
            "--variations",
            soft_wrap=True,
        )
        sys.exit(1)


def _of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out. torch raises a plain RuntimeError where the host's did."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


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
        table.add_row(key, json.dumps(value) if isinstance(value, (dict, list)) else printable(str(value)))
    Console(markup=False).print(table)


@app.command(name="convert")
def convert_command(
    source: Annotated[
        Path, typer.Argument(help=".pth, .safetensors or a sharded folder: transformer, VAE or text encoder.")
    ],
    target: Annotated[Path, typer.Argument(help="Result, ending in .safetensors.")],
    precision: Annotated[
        str, typer.Option(help=f"Of the blocks' matrices: {', '.join(PRECISIONS)} (fp8: one scale a matrix).")
    ] = "bf16",
    overwrite: Annotated[bool, typer.Option(help="Replace the target if it exists.")] = False,
    kind: options.Kind = KINDS[0],
) -> None:
    """Convert weights to safetensors, a tensor at a time."""
    if kind != KINDS[0] and part_of(weights := open_weights(source))[0] not in (None, TRANSFORMER):
        raise ValueError(f"--kind is a transformer's, and {source} is {describe(weights)}; leave it out")
    with progress() as bar:
        task = bar.add_task("converting", total=None)
        metadata = convert(
            source,
            target,
            precision,
            overwrite,
            lambda done, total: bar.update(task, completed=done, total=total),
            kind,
        )
    console.print(
        f"{target}: {metadata['varedit.architecture']}, {metadata['varedit.precision']}, "
        f"{target.stat().st_size / 1e9:.2f} GB",
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
        f"{output}: {printable(metadata['varedit.merged_lora'])} merged, {output.stat().st_size / 1e9:.2f} GB",
        soft_wrap=True,
    )


app.command()(generate)
app.command()(edit)
app.command()(decode)
app.command()(demo)
app.command()(sweep)
app.command()(get)
app.command()(card)
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


for _known in (*app.registered_commands, *shapeedit.registered_commands):
    _known.cls = OnePicture if _known.callback in (edit, sweep) else Command


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
