"""LATENTs as other nodes hand them on: every row knows what it is of, wherever a node has put it.

A row is known by its numbers, which nodes that pick, repeat, join and regroup rows leave as they are. What such a node
drops of a LATENT comes back with `batch_index`, whose numbers know the LATENT that their row comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...varedit_core.fitting import Fitting, schedule_of
from ...varedit_core.sampling.results import joined
from ...varedit_core.sampling.tokens import Tokens
from ...varedit_core.tokenizer.schedule import TOKEN_PIXELS
from .given import INDEX
from .vae import Colours, flat

KEY = "varedit"
"""Where a LATENT keeps its `Origin`."""


@dataclass(frozen=True, eq=False)
class Origin:
    """What a latent needs to become a picture again.

    colours: None where no VAE was at hand. scales: how many scales' sums of each picture the latent holds, one scale
    after the other; 0: the result alone. empty: whether the latent is a size alone, for pictures made of text. tokens:
    whose sum the latent is, where it is one. rows: of what numbers each row was when it was made. changed: whether they
    are others now. guessed: whether the picture's size is that of the latent for want of a better one.
    """

    fitting: Fitting
    colours: Colours | None = None
    scales: int = 0
    empty: bool = False
    tokens: Tokens | None = None
    rows: tuple[bytes, ...] = ()
    changed: bool = False
    guessed: bool = False

    @property
    def auto_mask(self) -> float:
        """By how much the edit found its own mask (see `Controls`)."""
        return self.tokens.auto_mask if self.tokens else 0.0

    def own(self, device: torch.device) -> Tokens | None:
        """The tokens whose sums the rows are, None where there are none or another node has changed the rows since."""
        return None if self.tokens is None or self.scales or self.changed else self.tokens.to(device)

    @property
    def padded(self) -> bool:
        return self.fitting.padded_size != self.fitting.size

    @property
    def doubt(self) -> str:
        """What the user should know of a latent that may not be what it seems; "" where all is known."""
        if self.guessed:
            size = "{}x{}".format(*self.fitting.size)
            return (
                f"this latent does not say of which picture it is, so that one of exactly {size} is made of it; "
                "VAREdit Source Encode and VAREdit Save Tokens keep the size, Save Latent does not"
            )
        if self.changed and self.padded and not self.empty:
            return (
                "another node has changed this latent, whose picture is taken to lie where VAREdit Source Encode put "
                "it; move and mix pictures, not latents"
            )
        return ""


class Index(int):
    """A number of `batch_index` that knows the LATENT in which its row was made."""

    def __new__(cls, number: int, origin: Origin) -> Index:
        made = super().__new__(cls, number)
        made.origin = origin
        return made

    def __getnewargs__(self) -> tuple[int, Origin]:
        return int(self), self.origin

    def __add__(self, other: int) -> Index:  # nodes that repeat rows number them on
        return Index(int(self) + int(other), self.origin)

    __radd__ = __add__


def made(samples: Tensor, origin: Origin, numbers: Sequence[int] | None = None, **rest) -> dict:
    """A LATENT. numbers: of its rows, counted from 0 by default. rest: more of what it holds."""
    origin = replace(origin, rows=_prints(samples), changed=False)
    numbers = range(len(samples)) if numbers is None else numbers
    return {**rest, "samples": samples, INDEX: [Index(n, origin) for n in numbers], KEY: origin}


def origin_in(latent: dict) -> Origin | None:
    """What a LATENT's rows are of as they are now; None where nothing is known. ValueError for rows of pictures that do
    not go together, or that lie otherwise than they were put."""
    samples, own = latent["samples"], latent.get(KEY)
    carried = [number.origin for number in latent.get(INDEX) or () if isinstance(number, Index)]
    origins = list(dict.fromkeys([own, *carried] if own else carried))
    if not origins:
        return None
    if not flat(samples):
        return replace(origins[0], changed=True)
    rows = _prints(samples)
    if own and own.rows == rows:
        return own
    places = {row: (origin, n) for origin in reversed(origins) for n, row in enumerate(origin.rows)}
    found = [places.get(row) for row in rows]
    changed = None in found
    parts = origins if changed else list(dict.fromkeys(origin for origin, _ in found))
    _check_sizes(parts)
    first = parts[0]
    if changed and first.padded:
        _check_turned([x for x, place in zip(samples, found) if place is None], places)
    empty = any(part.empty for part in parts) and not (changed and bool(samples.any()))
    if changed or first.scales:
        return replace(first, rows=rows, changed=True, empty=empty)
    return replace(first, rows=rows, empty=empty, tokens=_tokens_of(found))


def tokens_in(latent: dict) -> Tokens | None:
    """The tokens of a LATENT, None where there are none or another node has changed the latent since."""
    origin = origin_in(latent)
    return None if origin is None else origin.own(latent["samples"].device)


def numbers_of(latent: dict) -> list[int]:
    """The numbers by which a LATENT's rows draw. ValueError where there are more or fewer."""
    rows = len(latent["samples"])
    numbers = [int(number) for number in latent.get(INDEX) or range(rows)]
    if len(numbers) != rows:
        raise ValueError(
            f"another node has made {rows} rows of a latent of {len(numbers)}; cut, batch and repeat pictures, not "
            "latents"
        )
    return numbers


def exactly(samples: Tensor, stride: int, colours: Colours | None = None) -> Origin:
    """Of a latent of which nothing is known: a picture that has exactly a size of the model. stride: pixels that a
    position covers. ValueError where there is no such size."""
    pixels = tuple(side * stride for side in samples.shape[-2:])
    schedule = schedule_of((pixels[0] / TOKEN_PIXELS, pixels[1] / TOKEN_PIXELS))
    if schedule is None:
        raise ValueError(
            f"a latent of a {pixels[1]}x{pixels[0]} picture fits no size of the model; use VAREdit Source Encode"
        )
    return Origin(Fitting.exact(schedule), colours, guessed=True)


def check_shape(samples: Tensor, origin: Origin, stride: int) -> None:
    """ValueError where a latent has not the size that it was made with."""
    height, width = (side // stride for side in origin.fitting.schedule.pixels)
    if tuple(samples.shape[-2:]) != (height, width):
        raise ValueError(
            f"the latent is {samples.shape[-1]}x{samples.shape[-2]} but was encoded as {width}x{height}; crop, turn "
            "and resize pictures, not latents"
        )


def _prints(samples: Tensor) -> tuple[bytes, ...]:
    """What tells a row's numbers from all others."""
    rows = samples.detach().cpu().contiguous().flatten(1).view(torch.uint8)
    return tuple(hashlib.blake2b(row.numpy(), digest_size=16).digest() for row in rows)


def _check_sizes(origins: Sequence[Origin]) -> None:
    sizes = list(dict.fromkeys(origin.fitting for origin in origins))
    if len(sizes) > 1:
        names = " and ".join(dict.fromkeys(map(str, sizes)))
        raise ValueError(
            f"this batch of latents is of pictures of different sizes ({names}); take them one by one, by Latent From "
            "Batch, or batch pictures of one size"
        )


def _check_turned(samples: Sequence[Tensor], places: dict) -> None:
    """ValueError for rows that are known ones flipped or turned: their pictures lie elsewhere on the canvas then."""
    if any(row in places for x in samples for way in _turns(x) for row in _prints(way[None])):
        raise ValueError(
            "another node has flipped or turned this latent, whose picture then lies elsewhere in it; flip and turn "
            "pictures, not latents"
        )


def _turns(x: Tensor) -> Iterator[Tensor]:
    for quarters in range(4):
        turned = torch.rot90(x, quarters, (-2, -1))
        yield turned
        yield turned.flip(-1)


def _tokens_of(found: Sequence[tuple[Origin, int]]) -> Tokens | None:
    """The tokens of known rows, where all have some. ValueError for those that are no batch."""
    origins = list(dict.fromkeys(origin for origin, _ in found))
    if any(origin.tokens is None for origin in origins):
        return None
    if len(origins) == 1:
        return origins[0].tokens.of([n for _, n in found])
    if len({(len(origin.tokens), origin.auto_mask, origin.tokens.bits[0].shape[1]) for origin in origins}) > 1:
        raise ValueError(
            "these edits have different numbers of scales or auto masks; take them one by one, by Latent From Batch"
        )
    return joined([origin.tokens.of([n]) for origin, n in found])
