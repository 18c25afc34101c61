"""Stages of a training file, one after the other, each in a folder of its own."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..files.reading import read_json
from ..files.safe_write import make_folder, write_json
from .engine import finished, never, train
from .idle import PLAIN
from .pairs import check_source
from .settings import EARLIER, Stage, shown
from .tasks import LORA_FILE, TASKS, TEXT_FOLDER, TOKENIZER_FILE, TRANSFORMER_FILE

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
CHANGEABLE = ("log_every", "save_every", "sample_every", "checkpointing", "data.workers")  # the result is the same
RESULTS = {"autoencoder": TOKENIZER_FILE, "transformer": TRANSFORMER_FILE, "text_encoder": TEXT_FOLDER}


def run(
    stages: Sequence[Stage],
    output: Path,
    resume: bool = False,
    stop_after: float | None = None,
    asked: Callable[[], bool] = never,
) -> bool:
    """Train every stage that has no result yet; whether all are finished.

    output: a folder a stage is made in it. resume: go on with what is there; without it, ValueError where the folder
    of an unfinished or finished stage exists, and with it, where a stage had other settings. stop_after: seconds after
    which a checkpoint is written and the run ends; at least one step is made. asked: whether to end so now. Runs alike
    in every process of `accelerate launch` or torchrun.
    """
    try:
        from accelerate import Accelerator, PartialState
        from accelerate.state import AcceleratorState
        from accelerate.utils import broadcast_object_list
    except ImportError:
        raise ValueError(
            'training needs accelerate; install it: pip install -e ".[train]" in the folder of the project'
        ) from None
    if stop_after is not None and not 0 <= stop_after < math.inf:
        raise ValueError(f"the seconds to stop after must be 0 or more, got {stop_after}")
    until = time.monotonic() + (math.inf if stop_after is None else stop_after)

    def enough() -> bool:
        return asked() or time.monotonic() > until

    # Told of no device, accelerate takes each of several processes without a GPU for the only one.
    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    for stage in stages:
        _check(output / stage.name, stage, resume)
        if not finished(output / stage.name):
            check_source(stage)
    state.wait_for_everyone()  # nothing is made before every process has looked
    trained = False
    for stage in stages:
        folder = output / stage.name
        resolved = resolve(stage, output)
        if state.is_main_process:
            _remember(folder, stage)
        if finished(folder):
            logger.info("%s is finished; nothing to do", stage.name)
            continue
        if trained and broadcast_object_list([enough()])[0]:
            return False
        if torch.cuda.is_available():
            torch.backends.cudnn.benchmark = True
        AcceleratorState._reset_state()  # a stage may have another precision than the one before
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if stage.precision == "bf16" else "no",
            project_dir=str(folder),
        )
        torch.manual_seed(stage.seed)  # new weights, a LoRA's for instance
        task = TASKS[stage.task](resolved, accelerator)
        if not train(task, stage, folder, accelerator, resume, enough):
            return False
        trained = True
        accelerator.free_memory()
        accelerator.wait_for_everyone()
    return True


def resolve(stage: Stage, output: Path) -> Stage:
    """The stage with `@name` paths replaced by that stage's result. ValueError where it is not there yet."""
    changes = {}
    for field, file in RESULTS.items():
        value = getattr(stage, field)
        if value.startswith(EARLIER):
            path = output / value[1:] / file
            if not path.exists():
                raise ValueError(f"stage {stage.name} needs {path}; train the stage {value[1:]} first")
            changes[field] = str(path)
    return dataclasses.replace(stage, **changes)


def _check(folder: Path, stage: Stage, resume: bool) -> None:
    """ValueError where a stage's folder is in the way, or holds a training with settings that change its result."""
    if folder.exists() and not resume:
        raise ValueError(f"{folder} exists; go on with it by --resume, or choose another --output")
    path = folder / SETTINGS
    if not os.path.lexists(path):
        if any(folder.glob("state-*")):
            raise ValueError(f"{folder} lacks its {SETTINGS}; put it back, or choose another --output")
        return
    held = read_json(path, "file of a stage's settings", cure="put it back, or choose another --output")
    if not isinstance(held, dict):
        raise ValueError(f"{path} does not hold a stage's settings; put it back, or choose another --output")
    # What an earlier release did not know had the value that is now the default.
    plain, now = (_leaves(json.loads(json.dumps(dataclasses.asdict(one)))) for one in (PLAIN, stage))
    before = plain | _leaves(held)
    # Compiled blocks attend by another kernel where they are not recomputed.
    free = set(CHANGEABLE) - ({"checkpointing"} if stage.compile else set())
    other = [name for name in now | before if now.get(name) != before.get(name) and name not in free]
    if other:
        raise ValueError(
            f"{path} has {other[0]} = {shown(before.get(other[0]))}, not {shown(now.get(other[0]))}; restore it or "
            "choose another --output"
        )


def _leaves(table: dict, prefix: str = "") -> dict:
    """Settings by dotted name."""
    leaves = {}
    for name, value in table.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _remember(folder: Path, stage: Stage) -> None:
    """Keep a stage's settings beside its result."""
    make_folder(folder)
    write_json(folder / SETTINGS, dataclasses.asdict(stage), indent=2)


__all__ = ["LORA_FILE", "resolve", "run"]
