"""Widgets made of the knobs of `varedit_core.controls`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps

from ..varedit_core.controls.base import Knob
from ..varedit_core.controls.registry import knobs
from ._api import io

FIRST = {
    "controls": (
        "strength", "preserve", "source_attention", "feather", "auto_mask", "best_of", "best_at", "score",
    ),
    "shortcuts": ("unguided", "inside", "window", "stop", "drafted"),
    "curves": ("preset", "guidance_start", "guidance_end", "temperature_start", "temperature_end"),
}  # fmt: skip
"""Knobs of the first release, which every saved graph has: they are required inputs, and stay so. A later knob is
optional with its default, because graphs saved before it lack it, and ComfyUI would refuse them. Never add to these."""


def widgets(group: str) -> list:
    """The inputs for a group of knobs, in their order."""
    return [widget(knob, optional=knob.name not in FIRST[group]) for knob in knobs(group)]


def widget(knob: Knob, optional: bool = False):
    """One input. optional: whether graphs may lack it."""
    kind = io.Combo if knob.choices else io.Int if isinstance(knob.default, int) else io.Float
    bounds = {"options": list(knob.choices)} if knob.choices else {"min": knob.low, "max": knob.high}
    bounds |= {"step": knob.step, "round": 0.001} if kind is io.Float else {}
    bounds |= {"advanced": True} if knob.advanced else {}
    bounds |= {"optional": True} if optional else {}
    return kind.Input(knob.name, default=knob.default, **bounds, tooltip=knob.help)


def chosen(name: str, value: str, choices: Iterable[str]) -> str:
    """The value of a choice. ValueError for another: links bring what no widget would."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    return value


def takes(group: str) -> Callable[[Callable], Callable]:
    """Gives an `execute(cls, **values)` a group's knobs as its parameters, in their order; those that a graph may lack
    have their defaults."""
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    defaults = {knob.name: empty if knob.name in FIRST[group] else knob.default for knob in knobs(group)}
    made = [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    made.sort(key=lambda parameter: parameter.default is not empty)  # a signature has those without defaults first
    signature = inspect.Signature([inspect.Parameter("cls", kind), *made])

    def decorated(function: Callable) -> Callable:
        @wraps(function)
        def execute(*args, **values):
            bound = signature.bind(*args, **values)
            bound.apply_defaults()
            return function(**bound.arguments)

        execute.__signature__ = signature
        return execute

    return decorated
