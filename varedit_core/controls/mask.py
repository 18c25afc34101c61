"""Mask: nothing changes outside of it. Its knob is the margin: how many tokens around it are drawn too.

Shape suffixes: B rows, (h, w) a grid, (y, x) pixels of any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..tokenizer.quantizer import on_latents
from ..tokenizer.schedule import Grid, Schedule
from .base import Control, Knob

MOST_MARGIN = 4


class Mask(Control):
    """Holds all tokens that a mask does not touch to the source's bits, and in the end their latents.

    mask: [1 or B, y, x], above 0 where the picture may change. margin: tokens around it that are drawn too, and latents
    that stay so. The released name of this knob is feather.
    """

    order = 40
    stage = 0
    knobs = (
        Knob(
            "feather", 1, 0, MOST_MARGIN, needs="mask",
            help="The margin: tokens of 16 pixels around a mask that may change too, so that the edit can join its "
            "surroundings.",
            option="The margin: tokens around a mask that are drawn with it, and latents that stay so, 0 to "
            f"{MOST_MARGIN}.",
            label_zh="遮罩余量",
            help_zh="余量：遮罩周围多少个 token（每个 16 像素）也允许改动，使编辑与周围衔接。",
            more="0 is the mask alone. It counts with the sampler's `mask`, or with regions that all have one. Pixels "
            "over which a picture blends are `seam` of VAREdit Decode.",
            more_zh="0 表示仅限遮罩之内。配合采样器的 `mask`，或全部带遮罩的区域使用。图像混合的像素数是 VAREdit 解码的 `seam`。",
        ),
    )  # fmt: skip

    def __init__(self, mask: Tensor, margin: int, schedule: Schedule, patch: int) -> None:
        self.tokens, self.patch = token_masks(mask, schedule, margin), patch
        height, width = schedule.grids[-1]
        self.edited = reached(mask, (height * patch, width * patch), margin)

    @classmethod
    def of(cls, batch) -> Mask | None:
        if batch.mask is None:
            return None
        mask = batch.mask if len(batch.mask) == 1 else batch.each_row(batch.mask)
        return cls(mask.to(batch.features.device), batch.controls.feather, batch.schedule, batch.patch)

    def __call__(self, scale) -> None:
        scale.lock(on_latents(self.tokens[scale.index], self.patch), self.edited)


def checked_mask(mask: Tensor, pictures: int) -> Tensor:
    """A mask as it came. ValueError for one of another number or shape, and for an empty one."""
    if mask.ndim != 3 or len(mask) not in (1, pictures):
        raise ValueError(
            f"the mask has the shape {list(mask.shape)} for {pictures} images; give one [1, y, x], or one for each"
        )
    if not (mask > 0).any():
        raise ValueError("the mask is empty; paint where the picture may change, or leave it out")
    return mask


def reached(mask_Byx: Tensor, grid: Grid, steps: int) -> Tensor:
    """The cells of a grid that a mask of any size touches, and those within so many steps, boolean [B, 1, h, w]."""
    touched = F.adaptive_max_pool2d((mask_Byx[:, None] > 0).float(), grid)
    return F.max_pool2d(touched, 2 * steps + 1, stride=1, padding=steps) > 0


def token_masks(mask_Byx: Tensor, schedule: Schedule, margin: int = Mask.knobs[0].default) -> Sequence[Tensor]:
    """A mask of any size -> boolean [B, 1, h, w] of every scale: tokens that touch it, and those within `margin` tokens
    of the finest grid, at coarser scales at least one where any."""
    finest = max(schedule.grids[-1])
    return [reached(mask_Byx, grid, -(-margin * max(grid) // finest)) for grid in schedule.grids]
