"""CONDITIONING to instructions and where each counts; what else other nodes put into it is said.

A conditioning is a list of entries, each a text's features [B, L, C] and facts about them by name. `KEYS` is what
becomes of each fact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...varedit_core.pictures.composite import Region
from .text_encoder import MARK

USED = ""
KEYS = {
    MARK: USED, "pooled_output": USED,
    "mask": USED, "mask_strength": USED, "set_area_to_bounds": USED, "area": USED, "strength": USED, "default": USED,
    "start_percent": "a range of steps", "end_percent": "a range of steps",
    "clip_start_percent": "a range of steps", "clip_end_percent": "a range of steps",
    "hooks": "hooks", "guidance": "a guidance of its own",
    "reference_latents": "reference pictures", "reference_latents_method": "reference pictures",
    "control": "a ControlNet", "control_apply_to_uncond": "a ControlNet", "gligen": "boxes of GLIGEN",
    "unclip_conditioning": "what a vision model saw", "clip_vision_output": "what a vision model saw",
    "concat_latent_image": "a picture to paint into", "concat_mask": "a picture to paint into",
}  # fmt: skip
"""What becomes of a fact: it is used, or what it is called where the user is told that it is not. Facts that are not in
here are told by their own name. What is refused are not facts but features: see `_check`."""
_LATENT = 8
"""Pixels of one unit of an area."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture, in pixels or in shares of its size."""

    height: float
    width: float
    top: float
    left: float
    shares: bool

    @classmethod
    def of(cls, area: Sequence) -> Box:
        """From an `area`: (height, width, y, x) in units of latents, or with a word before it in shares; one of a video
        has times before its lengths and places."""
        shares = area[0] == "percentage"
        numbers = list(area[1:] if shares else area)
        half = len(numbers) // 2
        scale = 1 if shares else _LATENT
        return cls(*(scale * number for number in (*numbers[half - 2 : half], *numbers[-2:])), shares)

    def drawn(self, size: tuple[int, int]) -> Tensor:
        width, height = size
        x, y = (width, height) if self.shares else (1, 1)
        top, left = round(self.top * y), round(self.left * x)
        mask = torch.zeros(1, height, width)
        mask[:, top : top + round(self.height * y), left : left + round(self.width * x)] = 1
        return mask


@dataclass(frozen=True, eq=False)
class Place:
    """Where several masks and boxes all are."""

    parts: tuple[Tensor | Box, ...]

    def drawn(self, size: tuple[int, int]) -> Tensor:
        """The MASK of a picture of a size, (width, height)."""
        masks = [part.drawn(size) if isinstance(part, Box) else part for part in self.parts]
        masks = [mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu() for mask in masks]
        seen = [F.interpolate(mask, size[::-1], mode="nearest-exact")[:, 0] > 0 for mask in masks]
        return torch.stack(torch.broadcast_tensors(*seen)).all(0).float()


@dataclass(frozen=True, eq=False)
class Texts:
    """Features [L, T] of the instructions and negative prompts of a batch; a negative is None for the model's own."""

    positive: list[Tensor]
    negative: list[Tensor | None]

    def of(self, image: int) -> tuple[Tensor, Tensor | None]:
        """The pair of picture `image` of a batch; fewer texts than pictures start over."""
        return self.positive[image % len(self.positive)], self.negative[image % len(self.negative)]


@dataclass(frozen=True, eq=False)
class Instructions:
    """The sampler's texts. regions: several with their places, bottom first; none where one counts everywhere. mask:
    where the edit may change anything."""

    texts: Texts
    mask: Tensor | None
    regions: tuple[Region, ...] = ()

    @classmethod
    def read(cls, positive, negative, mask, above: Sequence[Region], tell: Callable[[str], None]) -> Instructions:
        """From the sampler's inputs. above: regions on top, below which `mask` is where positive counts. ValueError
        where a conditioning is empty, of another text encoder, or mixes texts."""
        own = regions(positive, tell, "positive", mask if above and mask is not None and mask.any() else None)
        unwanted = _negative(negative, tell)
        own = [Region(Texts(region.instruction.positive, unwanted), region.mask) for region in own]
        first = own[0].instruction
        if not above and len(own) == 1 and own[0].mask is None:
            return cls(first, mask)
        return cls(first, None if above else mask, (*own, *above))


def regions(conditioning: list, tell: Callable[[str], None], name: str, limit: Tensor | None = None) -> list[Region]:
    """The instructions of a conditioning and where each counts, bottom first; all of them inside the MASK limit.
    ValueError as `Instructions.read`."""
    entries = _entries(conditioning, name, tell)
    if not entries:
        raise ValueError(f"the {name} conditioning has a strength of 0, so nothing is left to do; raise it")
    if any(_says_nothing(text) for features, _ in entries for text in features):
        raise ValueError("the instruction is empty; say what to change in the picture")
    everywhere = [entry for entry in entries if not _parts(entry[1])]
    if len(everywhere) > 1:
        raise ValueError(
            f"the {name} conditioning combines {len(everywhere)} texts, which this model cannot; write one "
            "instruction, or give all but one a mask"
        )
    found = []
    for features, facts in [*everywhere, *(entry for entry in entries if _parts(entry[1]))]:
        parts = (*_parts(facts), *(() if limit is None else (limit,)))
        found.append(Region(Texts(list(features), [None]), _place(parts)))
    return found


def _place(parts: tuple[Tensor | Box, ...]) -> Place | Tensor | None:
    """Where all of the parts are: a single mask as it came, None for everywhere."""
    if len(parts) == 1 and isinstance(parts[0], Tensor):
        return parts[0]
    return Place(parts) if parts else None


def drawn(place: Place | Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """A region's place as a MASK of a picture of a size, (width, height)."""
    return place.drawn(size) if isinstance(place, Place) else place


def _negative(conditioning: list | None, tell: Callable[[str], None]) -> list[Tensor | None]:
    """Negative prompts; None where there is none, or it says nothing, as ConditioningZeroOut leaves it."""
    entries = [] if conditioning is None else _entries(conditioning, "negative", tell)
    if len(entries) > 1:
        raise ValueError(
            f"the negative conditioning combines {len(entries)} texts, which this model cannot; write one text"
        )
    if not entries:
        return [None]
    (features, facts), *_ = entries
    if _parts(facts):
        tell("the negative conditioning counts everywhere; its mask or area is not used")
    return [None if _says_nothing(text) else text for text in features]


def _entries(conditioning: list, name: str, tell: Callable[[str], None]) -> list[tuple[Tensor, dict]]:
    """The entries that count at all, checked; what is not used of them is told in one sentence."""
    if not conditioning:
        raise ValueError(f"the {name} conditioning is empty; connect VAREdit Text Encode")
    for features, facts in conditioning:
        _check(features, facts, name)
    kept = [(features, facts) for features, facts in conditioning if _strength(facts) > 0]
    unused = sorted({word for _, facts in kept for word in _unused(facts)})
    if unused:
        tell(
            f"the {name} conditioning carries {', '.join(unused)}, which a VAREdit model does not use; remove the "
            "nodes that set it, or use VAREdit Controls, Curves or Region"
        )
    return kept


def _check(features: Tensor, facts: dict, name: str) -> None:
    """ValueError for features that are not those of one text by our encoder."""
    if MARK not in facts:
        raise ValueError(
            f"the {name} conditioning is not of VAREdit's text encoder; use a clip from VAREdit Text Encoder Loader"
        )
    if not features.isfinite().all():
        raise ValueError(f"the {name} conditioning holds undefined numbers; check the text encoder's weights")
    made = facts[MARK]
    first = features[: len(made)]
    if features.any() and not (first.shape == made.shape and torch.equal(first.to(made), made)):
        raise ValueError(
            f"the {name} conditioning was changed by a node that mixes or weighs texts, which this model cannot; write "
            "one instruction and remove that node"
        )


def _unused(facts: dict) -> list[str]:
    """What to tell of the facts of one entry."""
    ranges = [(facts.get(f"{kind}start_percent", 0), facts.get(f"{kind}end_percent", 1)) for kind in ("", "clip_")]
    whole = all(begin <= 0 and end >= 1 for begin, end in ranges)
    words = {KEYS.get(key, key) for key, fact in facts.items() if fact is not None} - {USED}
    if _strength(facts) != 1:
        words.add("a strength other than 0 and 1")
    return sorted(words - {KEYS["start_percent"]} if whole else words)


def _strength(facts: dict) -> float:
    return facts.get("strength", 1.0) * facts.get("mask_strength", 1.0)


def _parts(facts: dict) -> tuple[Tensor | Box, ...]:
    """Where an entry counts; nothing for everywhere."""
    mask, area = facts.get("mask"), facts.get("area")
    return tuple(part for part in (mask, area and Box.of(area)) if part is not None)


def _says_nothing(text: Tensor) -> bool:
    """Whether features are those of the end token alone, or what ConditioningZeroOut leaves."""
    return len(text) < 2 or not text.any()
