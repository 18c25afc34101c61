"""The source of an edit as what the edit can be held to: its bits, at any scale and against any running sum.

Shape suffixes: B images, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from .quantizer import area_resize, codes, encode, linear_resize
from .schedule import Grid


class Source:
    """features: [B, d, H, W]. grids: latent grids of every scale. total: their sum of codes, where it is known, as
    where an edit goes on from another; it stands for the features then."""

    def __init__(self, features_BdHW: Tensor, grids: Sequence[Grid], total: Tensor | None = None) -> None:
        self.features, self.grids = features_BdHW if total is None else total, list(grids)
        self._total = total

    def bits(self, total_BdHW: Tensor, index: int) -> Tensor:
        """The bits [B, d, h, w] that bring a running sum nearest to the source at a scale, whatever the sum holds
        already: after the source's own bits they are its own again, after others they make good for them."""
        return area_resize(self.features - total_BdHW, self.grids[index]) > 0

    @cached_property
    def own(self) -> tuple[list[Tensor], Tensor]:
        """The source's tokens: bits of every scale, and their sum."""
        return encode(self.features, self.grids)

    @property
    def total(self) -> Tensor:
        """What the VAE makes of the source, as a running sum [B, d, H, W]."""
        return self.own[1] if self._total is None else self._total

    def until(self, index: int) -> Tensor:
        """The source's own running sum [B, d, H, W] up to and with a scale."""
        grid = self.grids[-1]
        return sum(linear_resize(codes(bits), grid) for bits in self.own[0][: index + 1])
