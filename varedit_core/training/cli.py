"""`varedit train`: a file of stages in, trained weights out. What trains is imported only when the command runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Optional

import typer

logger = logging.getLogger(__name__)


def train(
    config: Annotated[Path, typer.Argument(help="TOML file of stages; see docs/TRAINING.md.")],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for checkpoints, figures and results.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    stop_after: Annotated[
        Optional[float], typer.Option(help="Seconds after which to write a checkpoint and stop.")
    ] = None,
    check_data: Annotated[
        bool, typer.Option("--check-data", help="Read every pair once, list the bad ones, train nothing.")
    ] = False,
    changes: Annotated[
        Optional[list[str]], typer.Option("--set", help="STAGE.NAME=VALUE in place of the file's; several times.")
    ] = None,
) -> None:
    """Train a VAE, a transformer or a LoRA on pairs of pictures."""
    from .idle import idle
    from .settings import load_stages

    if check_data and (output or resume or stop_after is not None):
        raise ValueError("--check-data trains nothing; leave out --output, --resume and --stop-after")
    stages = load_stages(config, changes or ())
    _listen()
    for stage in stages:
        for sentence in idle(stage):
            logger.warning(sentence)
    if check_data:
        _check_data(stages)
        return
    if output is None:
        raise ValueError("say where the results go: give --output FOLDER")
    from .ending import asked_to_stop
    from .run import run

    asked = asked_to_stop()
    if not run(stages, output, resume, stop_after, asked):
        logger.info("stopped before the end; go on with --resume")
        if asked():
            raise typer.Exit(143)


def _listen() -> None:
    """Progress of the first process on the console; what accelerate says of its files stays silent."""
    import os

    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger(__package__).setLevel(logging.INFO if first else logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.WARNING)


def _check_data(stages) -> None:
    """Print one sentence for every bad sample; exit code 1 where there is one."""
    from .data import check_pairs
    from .settings import SHAPEEDIT

    checked, bad = {}, 0
    for stage in stages:
        source, pictures = stage.data.source, stage.task == "tokenizer"
        resize = stage.data.resize_targets
        key = source, tuple(stage.data.columns.items()), pictures, resize
        if source == SHAPEEDIT or key in checked:
            continue
        report = checked[key] = check_pairs(source, stage.data.columns, pictures, resize)
        for sentence in report.bad:
            print(sentence)
        print(f"{stage.name}: {report.good} of {report.count} samples of {source} are good")
        bad += len(report.bad)
    if not checked:
        print("no stage reads samples from files; there is nothing to check")
    if bad:
        raise typer.Exit(1)
