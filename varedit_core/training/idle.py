"""Settings that a stage has, but that nothing in its training depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .settings import SHAPEEDIT, TASKS, Stage

_PLAIN = Stage("plain", TASKS[0], 1, 1)

_DRAWN: tuple[Callable[[Stage], bool], str] = lambda stage: stage.data.source == SHAPEEDIT, "the source shapeedit"
_READ: tuple[Callable[[Stage], bool], str] = (
    lambda stage: stage.data.source != SHAPEEDIT,
    "pairs or pictures from files",
)
_EDITS: tuple[Callable[[Stage], bool], str] = lambda stage: stage.task != TASKS[0], "the tasks transformer and lora"
_PAIRS: tuple[Callable[[Stage], bool], str] = (
    lambda stage: stage.task != TASKS[0] and stage.data.source == SHAPEEDIT,
    "the source shapeedit of the tasks transformer and lora",
)

COUNTS: dict[str, tuple[Callable[[Stage], bool], str]] = {
    "transformer": _EDITS,
    "text_encoder": (
        lambda stage: stage.task != TASKS[0] and stage.new_text is None,
        "the tasks transformer and lora, without new_text",
    ),
    "checkpointing": _EDITS,
    "train_text": _EDITS,
    "data.pictures": _DRAWN,
    "data.families": _PAIRS,
    "data.styles": _PAIRS,
    "data.block": _PAIRS,
    "data.reuse": _PAIRS,
    "data.columns": _READ,
    "data.on_error": _READ,
    "data.workers": _READ,
    "optimisation.muon_rate": (lambda stage: stage.optimisation.optimizer == "muon", "the optimizer muon"),
    "objective": _EDITS,
    "reconstruction": (lambda stage: stage.task == TASKS[0], f"the task {TASKS[0]}"),
    "lora": (lambda stage: stage.task == "lora", "the task lora"),
    "new_transformer": (
        lambda stage: stage.task == "transformer" and not stage.transformer,
        "the task transformer where no file is named with transformer",
    ),
    "new_tokenizer": (
        lambda stage: stage.task == TASKS[0] and not stage.autoencoder,
        f"the task {TASKS[0]} where no file is named with autoencoder",
    ),
    "new_text": _EDITS,
}
"""Settings, or tables of them, that do not count in every stage: where they do, as a question and in words."""
ALWAYS = frozenset(
    "name task steps batch seed precision compile log_every save_every sample_every autoencoder data.source data.size "
    "optimisation.optimizer optimisation.rate optimisation.beta1 optimisation.beta2 optimisation.decay "
    "optimisation.clip optimisation.warmup optimisation.final optimisation.average optimisation.accumulate".split()
)
"""Settings that count in every stage."""


def idle(stage: Stage) -> list[str]:
    """Sentences on settings that are not at their defaults, but count in other stages only."""
    plain, found = settings_of(_PLAIN), []
    changed = [name for name, value in settings_of(stage).items() if value != plain.get(name)]
    for setting, (counts, where) in COUNTS.items():
        given = [name for name in changed if name == setting or name.startswith(f"{setting}.")]
        if given and not counts(stage):
            found.append(f"stage {stage.name}: {', '.join(given)} counts only for {where}; leave it out")
    return found


def settings_of(table: Any, prefix: str = "") -> dict[str, Any]:
    """All settings of a stage by their names in full, such as data.size; a table that is not there is None."""
    found = {}
    for each in dataclasses.fields(table):
        value, name = getattr(table, each.name), prefix + each.name
        found |= settings_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found
