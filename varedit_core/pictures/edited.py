"""From sums of codes to edited pictures: decoded once, composited by their masks, and with maps of what changed.

Shape suffixes: N results, d bits a latent position, (H, W) latent grid, (y, x) pixels of the fitted pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..controls.auto_mask import changed
from ..sampling.tokens import Tokens
from .composite import found_mask, masked
from .images import FittedImage, to_uint8, unfit, unfit_mask


@dataclass(frozen=True, eq=False)
class Edited:
    """The results of edits. pictures: of the inputs' sizes. tokens: what they are decoded from. Variations of a picture
    follow each other. masks: what each auto mask found, white where the picture changed. changes: how much each place
    changed (`auto_mask.changed`), certainty: how sure the model was of it (`Confidence`). White is most; all are as
    large as the pictures, mode L, and None where not asked for."""

    pictures: list[Image.Image]
    tokens: Tokens
    masks: list[Image.Image] | None = None
    changes: list[Image.Image] | None = None
    certainty: list[Image.Image] | None = None


@dataclass(frozen=True, eq=False)
class Decoded:
    """Results as 8-bit pixels, each decoded once.

    decode: pixels [1, 3, y, x] in [-1, 1] of a sum [1, d, H, W]. total, before: sums [N, d, H, W] of the results and of
    their sources; None where these are not asked for. shown: the fitted picture of every result.
    """

    decode: Callable[[Tensor], Tensor]
    total: Tensor
    shown: Sequence[FittedImage]
    before: Tensor | None = None
    levels: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", [self._levels(one) for one in self.total])

    def _levels(self, total_dHW: Tensor) -> Tensor:
        return to_uint8(self.decode(total_dHW[None])[0])

    @property
    def pictures(self) -> list[Image.Image]:
        """The results at their pictures' sizes, alpha kept."""
        made = [unfit(levels, image.fitting, image.source.rgb) for levels, image in zip(self.levels, self.shown)]
        for picture, image in zip(made, self.shown):
            if image.source.alpha is not None:
                picture.putalpha(image.source.alpha)
        return made

    def sources(self) -> list[Tensor]:
        """8-bit pixels of every result's source; results of one picture share theirs."""
        first = {id(image): n for n, image in reversed(list(enumerate(self.shown)))}
        levels = cache(lambda n: self._levels(self.before[n]))
        return [levels(first[id(image)]) for image in self.shown]

    def found(self, tokens: Tokens) -> list[Image.Image]:
        """The masks that edits found by themselves. tokens: theirs."""
        each = zip(self.levels, self.sources(), self.shown)
        return [
            found_mask(replace(tokens.of([n]), fitting=image.fitting), edit, lambda _, own=source: own)
            for n, (edit, source, image) in enumerate(each)
        ]

    def maps(self, confidence_NHW: Tensor) -> tuple[list[Image.Image], list[Image.Image]]:
        """How much each place changed, and how sure the model was of it."""
        side = self.shown[0].schedule.pixels
        sure = F.interpolate(confidence_NHW[:, None], side, mode="bilinear")[:, 0]
        pairs = zip(self.levels, self.sources())
        soft = [changed(*(levels[None].float() / 127.5 - 1 for levels in pair))[0] for pair in pairs]
        return tuple([unfit_mask(x, image.fitting) for x, image in zip(each, self.shown)] for each in (soft, sure))

    def composited(self, layers: Sequence[Sequence[Image.Image] | None], seam: int) -> list[Image.Image]:
        """The results within their masks, one layer of masks after the other."""
        results = self.pictures
        for layer in layers:
            if layer is not None:
                results = [masked(*one, seam) for one in zip(results, self.shown, layer)]
        return results
