"""Settings that a stage has, but that nothing in its training depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from .settings import SHAPEEDIT, TASKS, Stage

PLAIN = Stage("plain", TASKS[0], 1, 1)


class Place(NamedTuple):
    """The stages in which a setting counts, as a question and in words."""

    holds: Callable[[Stage], bool]
    words: str


_DRAWN = Place(lambda stage: stage.data.source == SHAPEEDIT, "the source shapeedit")
_READ = Place(lambda stage: stage.data.source != SHAPEEDIT, "pairs or pictures from files")
_EDITS = Place(lambda stage: stage.task != TASKS[0], "the tasks transformer and lora")
_PAIRS = Place(lambda stage: _EDITS.holds(stage) and _DRAWN.holds(stage), f"{_DRAWN.words} of {_EDITS.words}")
_NEW = "where no file is named with"

COUNTS = {
    "transformer": _EDITS,
    "text_encoder": Place(
        lambda stage: _EDITS.holds(stage) and stage.new_text is None, f"{_EDITS.words}, without new_text"
    ),
    "checkpointing": _EDITS,
    "train_text": Place(lambda stage: stage.task == "transformer", "the task transformer"),
    "data.pictures": _DRAWN,
    "data.families": _PAIRS,
    "data.styles": _PAIRS,
    "data.block": _PAIRS,
    "data.reuse": _PAIRS,
    "data.columns": _READ,
    "data.on_error": _READ,
    "data.fit": _READ,
    "data.resize_targets": _READ,
    "data.workers": _READ,
    "optimisation.muon_rate": Place(lambda stage: stage.optimisation.optimizer == "muon", "the optimizer muon"),
    "objective": _EDITS,
    "reconstruction": Place(lambda stage: stage.task == TASKS[0], f"the task {TASKS[0]}"),
    "lora": Place(lambda stage: stage.task == "lora", "the task lora"),
    "new_transformer": Place(
        lambda stage: stage.task == "transformer" and not stage.transformer,
        f"the task transformer {_NEW} transformer",
    ),
    "new_tokenizer": Place(
        lambda stage: stage.task == TASKS[0] and not stage.autoencoder, f"the task {TASKS[0]} {_NEW} autoencoder"
    ),
    "new_text": Place(lambda stage: stage.task == "transformer", "the task transformer"),
}
"""Settings, or tables of them, that do not count in every stage, and where they do."""
ALWAYS = frozenset(
    "name task steps batch seed precision compile log_every save_every sample_every autoencoder data.source data.size "
    "optimisation.optimizer optimisation.rate optimisation.beta1 optimisation.beta2 optimisation.decay "
    "optimisation.clip optimisation.warmup optimisation.final optimisation.average optimisation.accumulate".split()
)
"""Settings that count in every stage."""


def idle(stage: Stage) -> list[str]:
    """Sentences on settings that are not at their defaults, but count in other stages only."""
    plain, found = settings_of(PLAIN), []
    changed = [name for name, value in settings_of(stage).items() if value != plain.get(name)]
    for setting, place in COUNTS.items():
        given = [name for name in changed if name == setting or name.startswith(f"{setting}.")]
        if given and not place.holds(stage):
            found.append(f"stage {stage.name}: {', '.join(given)} counts only for {place.words}; leave it out")
    return found


def settings_of(table: Any, prefix: str = "") -> dict[str, Any]:
    """All settings of a stage by their names in full, such as data.size; a table that is not there is None."""
    found = {}
    for each in dataclasses.fields(table):
        value, name = getattr(table, each.name), prefix + each.name
        found |= settings_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found
