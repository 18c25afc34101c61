"""All controls, found in the files of this package, and the classes that hold the values of their knobs.

`Controls` and `Shortcuts` are made from the knobs of their group, in the order of the controls.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from ..sampling.settings import SamplingSettings
from .base import Control, Knob, Known

if TYPE_CHECKING:
    from ..sampling.batch import EditBatch

_OTHERS = ("base", "registry")


@cache
def registered() -> tuple[type[Control], ...]:
    """Every control, by its order and then its name."""
    package = __package__
    names = [
        module.name for module in pkgutil.iter_modules(import_module(package).__path__) if module.name not in _OTHERS
    ]
    modules = [import_module(f".{name}", package) for name in sorted(names)]
    found = {
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Control) and kind.__module__ == module.__name__
    }
    return tuple(sorted(found, key=lambda kind: (kind.order, kind.__name__)))


def knobs(group: str) -> tuple[Knob, ...]:
    """The knobs of a group, in the order of inputs."""
    return tuple(knob for kind in registered() if kind.group == group for knob in kind.knobs)


def knob(group: str, name: str) -> Knob:
    """One knob of a group."""
    return next(knob for knob in knobs(group) if knob.name == name)


def active(batch: EditBatch) -> tuple[Control, ...]:
    """The controls that change a batch of edits, in the order in which they act on a scale."""
    made = (kind.of(batch) for kind in registered())
    return tuple(sorted((control for control in made if control is not None), key=lambda control: control.stage))


def _class(name: str, group: str, doc: str, namespace: dict) -> type:
    made = [(knob.name, type(knob.default), field(default=knob.default)) for knob in knobs(group)]

    def check(self) -> None:
        for knob in knobs(group):
            object.__setattr__(self, knob.name, knob.checked(getattr(self, knob.name)))
        for knob in knobs(group):
            if knob.name in self.changed and knob.apart in self.changed:
                raise ValueError(f"{knob.name} and {knob.apart} do not go together; choose one")

    def changed(self) -> dict:
        """The knobs that are not at their defaults, with their values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {knob.name: values[knob.name] for knob in knobs(group) if values[knob.name] != knob.default}

    doc = doc + "\n\n" + "\n".join(f"{knob.name}: {knob.help}" for knob in knobs(group))
    own = {"__post_init__": check, "changed": property(changed), "__doc__": doc, "__module__": __name__, **namespace}
    return make_dataclass(name, made, frozen=True, namespace=own)


def _held(self) -> str:
    """What holds the edit to its source: the name of a knob, or words for it; an empty text for nothing."""
    return next(filter(None, (kind.held(self) for kind in registered() if kind.group == "controls")), "")


def _check_source(self) -> None:
    """Raise ValueError where something here holds the edit to its source: there is none."""
    if self.held:
        raise ValueError(f"{self.held} holds an edit to its source, but there is none; give a picture, or leave it out")


Controls = _class(
    "Controls",
    "controls",
    "How an edit is held to its source, and chosen. All neutral by default: the same edit, bit for bit.",
    {"held": property(_held), "check_source": _check_source},
)
Shortcuts = _class(
    "Shortcuts",
    "shortcuts",
    "What an edit leaves out to be faster. All off by default: none is exact (costs: docs/SPEED.md).",
    {},
)
NEUTRAL = Controls()
NO_SHORTCUTS = Shortcuts()


def check(edit: Known) -> None:
    """Raise ValueError, saying what to change, where knobs do not go together with each other or with the rest."""
    found = list(filter(None, (kind.refuse(edit) for kind in registered())))
    if found:
        raise ValueError("; ".join(found))


def problems(edit: Known) -> list[str]:
    """Knobs of an edit that would do nothing, or would be cut: one sentence each, saying what to change."""
    found = [text for group in ("controls", "shortcuts") for text in _unused(edit, group)]
    found += filter(None, (kind.idle(edit) for kind in registered()))
    rest, spelled = range(min(edit.begun, edit.stop), edit.stop), edit.spelled
    if edit.variations > 1 and rest and edit.greedy(rest):
        found.append(
            f"{spelled('variations')} draws with several seeds, but {spelled('temperature')} is 0, so that all are "
            f"alike; raise that, or leave {spelled('variations')} at 1"
        )
    if edit.negative and not edit.guided(range(edit.stop)):
        found.append(
            f"{spelled('negative')} counts only with guidance, which is 1 at every scale; raise {spelled('guidance')}, "
            "or leave the negative prompt out"
        )
    if edit.seam and not (edit.mask or edit.controls.auto_mask):
        found.append(f"{spelled('seam')} fades an edit in at a mask's edge; give a mask, or leave it at 0")
    return found


def _unused(edit: Known, group: str) -> list[str]:
    """The same, from what the knobs of a group state themselves."""
    found, values, scales = [], getattr(edit, group), len(edit.schedule)
    for knob in knobs(group):
        name, value = edit.spelled(knob.name), getattr(values, knob.name)
        used = knob.name in values.changed
        if used and "mask" in knob.needs.split() and not edit.mask:
            found.append(f"{name} counts only beside a mask; give a mask, or leave {name} at {knob.default}")
        other = next((need for need in knob.needs.split() if need in _named(group)), None)
        if used and other and other not in values.changed:
            with_what = edit.spelled(other)
            found.append(f"{name} counts only with {with_what}; set that too, or leave {name} at {knob.default}")
        counts = used or (other is not None and other in values.changed)
        if knob.scales and counts and value > scales:
            found.append(f"{name} is {value} but the edit has {scales} scales; give at most {scales}")
    return found


@cache
def _named(group: str) -> Sequence[str]:
    return tuple(knob.name for knob in knobs(group))


SWEPT = (*(field.name for field in fields(SamplingSettings)), *(knob.name for knob in knobs("controls")), "preset")
"""Settings that a sweep goes over."""
