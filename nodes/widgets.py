"""Widgets made of the knobs of `varedit_core.controls`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps

from ..varedit_core.controls.base import Knob
from ..varedit_core.controls.registry import knobs
from ._api import io


def widgets(group: str) -> list:
    """The inputs for a group of knobs, in their order."""
    return [widget(knob) for knob in knobs(group)]


def widget(knob: Knob):
    """One input."""
    kind = io.Combo if knob.choices else io.Int if isinstance(knob.default, int) else io.Float
    bounds = {"options": list(knob.choices)} if knob.choices else {"min": knob.low, "max": knob.high}
    bounds |= {"step": knob.step, "round": 0.001} if kind is io.Float else {}
    bounds |= {"advanced": True} if knob.advanced else {}
    return kind.Input(knob.name, default=knob.default, **bounds, tooltip=knob.help)


def takes(group: str) -> Callable[[Callable], Callable]:
    """Gives an `execute(cls, **values)` a group's knobs as its parameters, in their order."""
    names = ["cls", *(knob.name for knob in knobs(group))]
    signature = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])

    def decorated(function: Callable) -> Callable:
        @wraps(function)
        def execute(*args, **values):
            return function(**signature.bind(*args, **values).arguments)

        execute.__signature__ = signature
        return execute

    return decorated
