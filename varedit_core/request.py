"""What is asked of the loop for some pictures: all that has a row a picture, cut and repeated in one place.

Shape suffixes: B pictures, R regions (instructions a picture), d bits a latent position, (H, W) latent grid, (y, x)
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .controls import Regions
from .tokens import Tokens


@dataclass(frozen=True, eq=False)
class Request:
    """features: [B, d, H, W] of the sources. texts: of every picture R instructions, one or those of its regions.
    negatives: of every picture its negative prompt or None. mask: [1 or B, y, x]. areas: [B, R, y, x] of the regions.
    given: tokens of the first scales. source: the sources' tokens, where they are known.
    """

    features: Tensor
    texts: Sequence[Sequence[Tensor]]
    negatives: Sequence[Tensor | None] | None = None
    mask: Tensor | None = None
    areas: Tensor | None = None
    given: Tokens | None = None
    source: Tokens | None = None

    def __post_init__(self) -> None:
        if self.given is not None and self.given.images != len(self):
            raise ValueError(
                f"there are tokens of {self.given.images} edits for {len(self)} pictures; go on from one edit of each picture"
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def regions(self) -> int:
        """R, the rows of each picture."""
        return len(self.texts[0])

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(text) for row in (*self.texts, self.negatives or ()) for text in row if text is not None)

    def part(self, pictures: slice) -> Request:
        """The request for some of the pictures."""
        return self._picked(list(range(len(self))[pictures]))

    def repeated(self, count: int) -> Request:
        """Every picture `count` times, one behind the other."""
        return self._picked([row for row in range(len(self)) for _ in range(count)])

    def _picked(self, rows: list[int]) -> Request:
        given, source = (tokens and tokens.of(rows) for tokens in (self.given, self.source))
        return replace(
            self,
            features=self.features[rows],
            texts=[self.texts[row] for row in rows],
            negatives=self.negatives and [self.negatives[row] for row in rows],
            mask=self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows],
            areas=self.areas if self.areas is None else self.areas[rows],
            given=given,
            source=source,
        )

    def arguments(self, copies: int) -> tuple[tuple, dict]:
        """What `sampling.sample` and `controls.controlled` take of it: features, texts and negatives; the rest by name.

        Rows are pictures, their regions behind each other.
        """
        count = self.regions
        texts = [text for row in self.texts for text in row]
        negatives = self.negatives and [text for text in self.negatives for _ in range(count)]
        mask = self.mask if self.mask is None or len(self.mask) == 1 else _each(self.mask, count)
        given = [_each(bits, count) for bits in self.given.bits] if self.given else []
        total = _each(self.source.total(), count) if self.source else None
        more = dict(mask=mask, given=given, source_total=total)
        more["steer"] = [Regions(self.areas, copies)] if self.areas is not None and count > 1 else []
        return (_each(self.features, count), texts, negatives), more

    def own(self, x_B: Tensor, copies: int) -> Tensor:
        """Of something with a row for every region and copy, one row for every copy: the regions' have become the same."""
        return x_B if self.regions == 1 else x_B.unflatten(0, (-1, self.regions, copies))[:, 0].flatten(0, 1)


def _each(x: Tensor, count: int) -> Tensor:
    return x if count == 1 else x.repeat_interleave(count, 0)
