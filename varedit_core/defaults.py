"""The one table of defaults: the library, the command line and the nodes all read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PerScale = float | Sequence[float]

SIZE = "0.25M"
FIT = "square"
TEXT_TOKENS = 512
NEGATIVE_PROMPT = ""


@dataclass(frozen=True)
class SamplingSettings:
    """How the bits of an edit are drawn. Each of the first three is one number or one a scale.

    guidance: classifier-free guidance; 1 = off. temperature: divides the logits; 0 = greedy. top_p: a bit
    value of probability <= 1 - top_p is never drawn. seed: image i of a batch draws from seed + i.
    Published settings disagree; these are those of VAREdit's README and web demo.
    """

    guidance: PerScale = 3.0
    temperature: PerScale = 0.1
    top_p: PerScale = 0.97
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("guidance", -math.inf, math.inf), ("temperature", 0.0, math.inf), ("top_p", 0.5, 1.0)):
            for value in _values(getattr(self, name)):
                if not (low <= value <= high and math.isfinite(value)):
                    raise ValueError(f"{name} must be a finite number from {low:g} to {high:g}, got {value:g}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, got {self.seed}")

    def per_scale(self, count: int) -> list[tuple[float, float, float]]:
        """(guidance, temperature, top_p) of each of `count` scales. ValueError where a list has another length."""
        return list(zip(*(self._expand(name, count) for name in ("guidance", "temperature", "top_p"))))

    def _expand(self, name: str, count: int) -> list[float]:
        values = _values(getattr(self, name))
        if len(values) not in (1, count):
            raise ValueError(f"{name} has {len(values)} values but the edit runs {count} scales; give one or {count}")
        return values * (count // len(values))


def _values(value: PerScale) -> list[float]:
    return [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]


DEFAULT_SETTINGS = SamplingSettings()
