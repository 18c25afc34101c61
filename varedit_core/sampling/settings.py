"""How the bits of an edit are drawn: guidance, temperature, top-p and the seed. It loads no torch."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A number a scale: from `start` at the first to `end` at the last, in equal steps."""

    start: float
    end: float

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[float]:
        return iter((self.start, self.end))

    def over(self, count: int) -> tuple[float, ...]:
        """Its values at `count` scales."""
        steps = max(1, count - 1)
        return tuple(self.start + (self.end - self.start) * k / steps for k in range(count))


RANGES = {"guidance": (-1000.0, 1000.0), "temperature": (0.0, 1000.0), "top_p": (0.5, 1.0)}
"""What each setting may be: beyond, logits are no numbers any more."""
PerScale = float | Sequence[float] | Curve


@dataclass(frozen=True)
class SamplingSettings:
    """How the bits of an edit are drawn. Each of the first three is one number, one a scale, or a `Curve`.

    guidance: classifier-free guidance; 1 = off. temperature: divides the logits; 0 = greedy. top_p: a bit
    value of probability <= 1 - top_p is never drawn. seed: image i of a batch draws from seed + i.
    Published settings disagree; these are those of VAREdit's README and web demo.
    """

    guidance: PerScale = 3.0
    temperature: PerScale = 0.1
    top_p: PerScale = 0.97
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            values = _values(name, getattr(self, name))
            if not all(low <= value <= high for value in values):  # nor a number that is none
                raise ValueError(f"{name} must be from {low:g} to {high:g}, got {getattr(self, name)}")
            if isinstance(getattr(self, name), Curve):
                values = Curve(*values)
            object.__setattr__(self, name, values if len(values) > 1 else values[0])
        try:
            object.__setattr__(self, "seed", operator.index(None if isinstance(self.seed, bool) else self.seed))
        except TypeError:
            raise ValueError(f"seed must be a whole number, got {self.seed!r}") from None
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, got {self.seed}")

    def per_scale(self, count: int) -> list[tuple[float, float, float]]:
        """(guidance, temperature, top_p) of each of `count` scales. ValueError where a list has another length."""
        return list(zip(*(self._expand(name, count) for name in ("guidance", "temperature", "top_p"))))

    def preset(self, name: str) -> SamplingSettings:
        """These settings with the curves of that name; see `controls.curves.preset`."""
        from ..controls.curves import preset

        return preset(self, name)

    @property
    def guided(self) -> bool:
        """Whether any scale has guidance, and so a second row a picture."""
        return any(value != 1 for value in _values("guidance", self.guidance))

    def _expand(self, name: str, count: int) -> tuple[float, ...]:
        given = getattr(self, name)
        if isinstance(given, Curve):
            return given.over(count)
        values = _values(name, given)
        if len(values) not in (1, count):
            raise ValueError(f"{name} has {len(values)} values but the edit runs {count} scales; give one or {count}")
        return values * (count // len(values))


def _values(name: str, value: PerScale) -> tuple[float, ...]:
    try:
        many = hasattr(value, "__len__") and getattr(value, "ndim", 1)
        if isinstance(value, (str, bool, dict)) or (many and not len(value)):
            raise TypeError
        return tuple(float(v) for v in value) if many else (float(value),)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number or a list of numbers, one a scale, got {value!r}") from None


DEFAULT_SETTINGS = SamplingSettings()
TEXT_SETTINGS = SamplingSettings(temperature=1.0)
"""For pictures made of text alone, from Infinity's notebooks for 8B; its scripts for 2B take a temperature of 0.5 and
guidance of 3 or 4."""
