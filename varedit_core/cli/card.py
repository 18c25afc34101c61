"""`varedit card`: a weight file in, a model card for it out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..files.reading import printable
from ..files.safe_write import write_text
from ..hub.card import card_path, write_up
from .common import console, watching
from .results import Result, check_results


def card(
    file: Annotated[Path, typer.Argument(help="Converted transformer, VAE or text encoder.")],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Card; by default beside it.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the card if it exists.")] = False,
) -> None:
    """Write a model card: what the file is, its source, licence, types, sizes, checksums, and how to use it."""
    target = output or card_path(file)
    check_results([Result(target, "card")], [file], overwrite)
    with watching() as watch:
        text = write_up(file, watch)
    write_text(target, text, overwrite)
    console.print(printable(str(target)), soft_wrap=True, highlight=False)
