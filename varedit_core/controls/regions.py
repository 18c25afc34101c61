"""Regions: several instructions in one edit, each for its part of the picture.

Shape suffixes: P pictures, R regions, (h, w) latent grid of a scale, (y, x) pixels of any size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokenizer.quantizer import area_resize
from .base import Control


class Regions(Control):
    """Joins the P * R * copies rows of regions into one edit a result: each region follows its own row.

    masks: [P, R, y, x], above 0 where a region is; where several are, the last one counts. A token of several regions,
    as coarse ones are, weighs their log-odds by area.
    """

    stage = 20

    def __init__(self, masks_PRyx: Tensor, copies: int = 1) -> None:
        self.own, self.copies = exclusive(masks_PRyx), copies

    @classmethod
    def of(cls, batch) -> Regions | None:
        return cls(batch.areas, batch.copies) if batch.areas is not None and batch.regions > 1 else None

    def __call__(self, scale) -> None:
        if scale.drawn:
            return
        odds = scale.log_odds.unflatten(0, (-1, self.own.shape[1], self.copies))
        weight = self._weights(scale.log_odds).to(odds)[:, :, None, None]
        mixed = torch.where(weight > 0, odds * weight, 0.0).sum(1, keepdim=True)
        scale.log_odds = mixed.expand_as(odds).flatten(0, 2)

    def _weights(self, like: Tensor) -> Tensor:
        """Shares [P, R, h, w] of the regions at each latent position of a scale; beside them those of the nearest."""
        shares = area_resize(self.own, tuple(like.shape[-2:]))
        empty = ~(shares > 0).flatten(1).any(1)  # pictures that no region touches: all count alike
        shares = torch.where(empty[:, None, None, None], 1.0, shares)
        while not (some := shares.sum(1, keepdim=True) > 0).all():
            shares = torch.where(some, shares, F.max_pool2d(shares, 3, stride=1, padding=1))
        return shares / shares.sum(1, keepdim=True)


def exclusive(masks_PRyx: Tensor) -> Tensor:
    """Masks [P, R, y, x] of which later ones cover earlier ones, as zeros and ones that do not overlap."""
    covered = (masks_PRyx > 0).float()
    later = covered.flip(1).cumsum(1).flip(1) - covered
    return covered * (later == 0)
