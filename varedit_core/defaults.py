"""The one table of defaults: the library, the command line and the nodes all read it. It loads no torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace


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


PerScale = float | Sequence[float] | Curve

SIZES = {"256": "0.06M", "512": "0.25M", "768": "0.60M", "1024": "1M"}
"""Side of a square picture in pixels -> its named size (see `schedule.AREAS`)."""
SIDE = "512"
SIZE = SIZES[SIDE]
FITS = ("square", "aspect")  # padded as published, or to the nearest table's shape (experimental)
FIT = "square"
TEXT_TOKENS = 512
NEGATIVE_PROMPT = ""
PRECISIONS = ("auto", "bf16", "fp32")
"""What a ComfyUI node lets the transformer's blocks compute in."""
EDIT, TEXT_TO_IMAGE = "edit", "text-to-image"
KINDS = ("auto", EDIT, TEXT_TO_IMAGE)
"""What a transformer was trained for, which its tensors do not tell: auto asks the file (see `checkpoints.told_kind`)."""
RATIOS = {
    "1:1": 1.0, "4:5": 1.25, "3:4": 1.333, "2:3": 1.5, "4:7": 1.75, "1:2": 2.0, "2:5": 2.5, "1:3": 3.0,
    "5:4": 0.8, "4:3": 0.75, "3:2": 0.666, "7:4": 0.571, "2:1": 0.5, "5:2": 0.4, "3:1": 0.333,
}  # fmt: skip
"""Width to height of a picture made of text alone -> its scale table (see `schedule.TABLES`)."""
RATIO = "1:1"
PREVIEWS = ("auto", "fast", "decoded", "off")
"""Live previews of the sampler node: by ComfyUI's setting, by a colour map, by the decoder, none."""
CROP_MARGIN = 0.25
"""What a crop shows around a mask, on every side, as a share of the mask's longer side."""
LEAST_MARGIN = 32
"""The same in pixels, at least."""
FEATHER = 0
"""Pixels inside a mask's edge over which a stitched edit appears."""
FILLS = ("blur", "mirror", "white")
"""What a model sees where a picture was extended: its edges' colours, itself, or what published code pads with."""
FILL = "blur"
OVERLAP = 16
"""Pixels of an extended picture, beside what is new, that an edit may repaint."""
LENGTHS = ("pixels", "percent")
"""What an extension is counted in."""
SCALE_PICTURES = ("full", "own", "fast")
"""Pictures of scales: decoded at the final size, decoded at the scale's own, by a colour map."""


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
        for name, low in (("guidance", -math.inf), ("temperature", 0.0), ("top_p", 0.5)):
            values = _values(name, getattr(self, name))
            high = 1.0 if name == "top_p" else math.inf
            if not all(low <= value <= high and math.isfinite(value) for value in values):
                bounds = {"guidance": "", "temperature": " of at least 0", "top_p": " from 0.5 to 1"}[name]
                raise ValueError(f"{name} must be a finite number{bounds}, got {getattr(self, name)}")
            if isinstance(getattr(self, name), Curve):
                values = Curve(*values)
            object.__setattr__(self, name, values if len(values) > 1 else values[0])
        try:
            object.__setattr__(self, "seed", operator.index(self.seed))
        except TypeError:
            raise ValueError(f"seed must be a whole number, got {self.seed!r}") from None
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, got {self.seed}")

    def per_scale(self, count: int) -> list[tuple[float, float, float]]:
        """(guidance, temperature, top_p) of each of `count` scales. ValueError where a list has another length."""
        return list(zip(*(self._expand(name, count) for name in ("guidance", "temperature", "top_p"))))

    def preset(self, name: str) -> SamplingSettings:
        """These with the curves of PRESETS over them. ValueError for an unknown name, and as `bent`."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return self.bent(*PRESETS[name])

    def bent(self, guided: Curve, warmth: Curve) -> SamplingSettings:
        """These with factors over the scales: on what guidance is above 1, and on temperature. ValueError where guidance or
        temperature are not one number."""
        if guided == warmth == FLAT:
            return self
        for what, value in (("guidance", self.guidance), ("temperature", self.temperature)):
            if not isinstance(value, float):
                raise ValueError(f"a preset bends one {what} over the scales; give one number for it, or no preset")
        guidance = Curve(*(1 + (self.guidance - 1) * factor for factor in guided))
        return replace(self, guidance=guidance, temperature=Curve(*(self.temperature * factor for factor in warmth)))

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
        if isinstance(value, str):
            raise TypeError
        return tuple(float(v) for v in value) if hasattr(value, "__len__") else (float(value),)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number or a list of numbers, one a scale, got {value!r}") from None


@dataclass(frozen=True)
class Shortcuts:
    """What an edit leaves out to be faster. All off by default: none is exact (costs: README, docs/LOG.md).

    unguided: so many last scales run without guidance, with half the rows. inside: at so many last scales only tokens
    that touch the mask, and those near it, are computed. window: tokens of the last three scales see only rows
    within this share of the height; 0: all. stop: scales to run, then the picture is decoded as it is; 0: all. drafted:
    so many first scales are drawn by a second transformer (see `drafting`).
    """

    unguided: int = 0
    inside: int = 0
    window: float = 0.0
    stop: int = 0
    drafted: int = 0

    def __post_init__(self) -> None:
        for name in ("unguided", "inside", "stop", "drafted"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number of scales, at least 0, got {value!r}")
        if not 0 <= self.window <= 1:
            raise ValueError(f"window must be a share of the height from 0 to 1, got {self.window!r}")
        if self.inside and self.window:
            raise ValueError("inside and window do not go together; choose one")

    def planned(self, plan: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
        """(guidance, temperature, top_p) of the scales that run."""
        unguided = len(plan) - self.unguided
        plan = [(1.0 if k >= unguided else guidance, *rest) for k, (guidance, *rest) in enumerate(plan)]
        return plan[: self.stop or None]


@dataclass(frozen=True)
class Controls:
    """How an edit is held to its source, and chosen. All neutral by default: the same edit, bit for bit.

    strength: 1 is the free edit; below it so many of the scales' bits, coarse ones first, are the source's own; 0 is
    the source through the tokenizer. preserve: pulls every bit towards the source's; 1 is the source again.
    source_attention: what the source's keys weigh in self-attention; 0: the source is not seen. feather: tokens around
    a mask that may change, too. auto_mask: above 0 the edit finds its own mask, and nothing outside of it changes; the
    larger, the more of what changed is inside. best_of: so many candidates are begun, and after `best_at` scales the
    one that `score` likes best goes on alone.
    """

    strength: float = 1.0
    preserve: float = 0.0
    source_attention: float = 1.0
    feather: int = 1
    auto_mask: float = 0.0
    best_of: int = 1
    best_at: int = 4
    score: str = "likelihood"

    def __post_init__(self) -> None:
        for name in ("strength", "preserve", "source_attention", "auto_mask"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
        for name, low, high in (("feather", 0, MOST_FEATHER), ("best_of", 1, MOST_CANDIDATES), ("best_at", 1, math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                most = "" if high == math.inf else f" to {high}"
                raise ValueError(f"{name} must be a whole number from {low}{most}, got {value!r}")
        if self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r}; choose one of {', '.join(SCORES)}")

    def check_source(self) -> None:
        """Raise ValueError where something here holds to a source, of which there is none."""
        used = {"strength": self.strength < 1, "preserve": self.preserve, "source_attention": self.source_attention < 1}
        used |= {"auto_mask": self.auto_mask, f"the score {self.score}": self.best_of > 1 and self.score in ("near", "far")}
        for name, on in used.items():
            if on:
                raise ValueError(f"{name} holds an edit to its source, but there is none; give a picture, or leave it out")


AUTO_MASK = 0.5
"""An auto mask that finds most and loses little (docs/LOG.md); change maps count with it."""
MOST_FEATHER = 4
MOST_CANDIDATES = 64
SCORES = ("likelihood", "instruction", "near", "far")
"""What picks the best of several beginnings: the most probable one, the one that the instruction explains best, the
one nearest to the source, and the one farthest from it (see `controls.Candidates`)."""
FLAT = Curve(1.0, 1.0)
PRESETS = {
    "balanced": (FLAT, FLAT),
    "faithful": (Curve(1.0, 0.0), Curve(0.5, 0.5)),
    "creative": (Curve(1.25, 1.0), Curve(8.0, 1.0)),
}
"""Names of curves: factors on what guidance is above 1, and on temperature, from the first to the last scale."""
PRESET = "balanced"
SWEPT = (*(field.name for field in fields(SamplingSettings)), *(field.name for field in fields(Controls)), "preset")
"""Settings that a sweep goes over (see `sweep`)."""

DEFAULT_SETTINGS = SamplingSettings()
NEUTRAL = Controls()
TEXT_SETTINGS = SamplingSettings(temperature=1.0)
"""Of pictures made of text alone: those of Infinity's notebooks for 8B; its scripts for 2B take 0.5, with guidance 3 or 4."""
NO_SHORTCUTS = Shortcuts()
