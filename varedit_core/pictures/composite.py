"""Masks and regions: as the loop reads them, and how edits are put into their pictures.

Shape suffixes: P pictures, R regions, (y, x) pixels of the fitted pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from PIL import Image, ImageChops
from torch import Tensor

from ..controls.auto_mask import differing
from ..fitting import CROP, Size
from ..sampling.tokens import Tokens
from .canvas import faded
from .images import FittedImage, check_mask_shape, fit_mask, seen_mask, unfit_mask


@dataclass(frozen=True, eq=False)
class Region:
    """An instruction, a prompt or its text features [L, channels], and where it counts (white); None: everywhere."""

    instruction: Any
    mask: Any = None


def drawn_masks(masks: list[Image.Image] | None, pictures: int) -> list[Image.Image] | None:
    """A mask for each picture. ValueError for another number of them."""
    if masks is None:
        return None
    if len(masks) not in (1, pictures):
        raise ValueError(f"there are {len(masks)} masks for {pictures} pictures; give one, or one for each")
    return masks if len(masks) == pictures else masks * pictures


def fitted_masks(masks: Sequence[Image.Image] | None, fitted: Sequence[FittedImage]) -> Tensor | None:
    """What the model sees of the pictures' masks, [P, y, x]."""
    if masks is None:
        return None
    seen = torch.cat([fit_mask(one, image.fitting) for one, image in zip(masks, fitted)])
    check_seen(seen, "mask", _cropped(fitted))
    return seen


def check_seen(masks_PHW: Tensor, what: str, cropped: bool = False) -> None:
    """ValueError for a mask, none of them empty when it was drawn, of which nothing is left at the model's size.
    cropped: whether the model sees a part of the picture only."""
    if (masks_PHW > 0).flatten(1).any(1).all():
        return
    if cropped:
        raise ValueError(
            f"the {what} marks nothing in the middle of the picture, which is all that the fit {CROP} edits; paint "
            "there, or choose another fit"
        )
    raise ValueError(f"the {what} is too small to be seen at the model's size; paint more, or choose a larger size")


def _cropped(fitted: Sequence[FittedImage]) -> bool:
    return any(image.fitting.box for image in fitted)


def areas(
    regions: Sequence[Region], fitted: Sequence[FittedImage], drawn: list[Image.Image] | None
) -> tuple[Tensor | None, list[Image.Image] | None, Tensor | None]:
    """Three things: the regions [P, R, y, x]; the pictures' masks, cut to what the regions cover where each region has
    a mask; and these masks as the model sees them."""
    where = fitted_masks(drawn, fitted)
    if not regions:
        return None, drawn, where
    whole = Image.new("L", (1, 1), 255)
    masks = [region.mask or whole for region in regions]
    made = torch.stack([torch.cat([fit_mask(mask, image.fitting) for mask in masks]) for image in fitted])
    for number, seen in enumerate(made.unbind(1), start=1):
        check_seen(seen, f"mask of region {number}", _cropped(fitted))
    if any(region.mask is None for region in regions):
        return made, drawn, where
    size = max(image.source.size for image in fitted)
    union = reduce(ImageChops.lighter, [mask.convert("L").resize(size, Image.Resampling.BILINEAR) for mask in masks])
    within = [union] * len(fitted)
    touched = fitted_masks(within, fitted)
    if drawn is None:
        return made, within, touched
    return made, [_darker(*pair) for pair in zip(drawn, within)], torch.minimum(where, touched)


def _darker(a: Image.Image, b: Image.Image) -> Image.Image:
    return ImageChops.darker(a.convert("L").resize(b.size, Image.Resampling.BILINEAR), b)


def check_regions(regions: Sequence[Region], instructed: bool = False) -> None:
    """Raise ValueError for regions beside an instruction, and for ones without instruction or with an empty mask."""
    if regions and instructed:
        raise ValueError(
            "give an instruction or regions, not both; an instruction for everywhere is a region without a mask"
        )
    for number, region in enumerate(regions, start=1):
        if region.mask is not None and region.mask.convert("L").getbbox() is None:
            raise ValueError(f"the mask of region {number} is empty; paint where its instruction is to count")
        if isinstance(region.instruction, str) and not region.instruction.strip():
            raise ValueError(f"region {number} has no instruction; say what to change in it, or leave it out")


def check_masks(masks: Sequence[Image.Image], regions: Sequence[Region], sizes: Sequence[Size]) -> None:
    """ValueError for a mask of the pictures that is empty, and for one of them, or of a region, that has another shape
    than a picture. sizes: theirs; masks: one for all, or one each."""
    if any(mask.getbbox() is None for mask in masks):
        raise ValueError("the mask is empty, so nothing could change; paint white where the picture may change")
    for mask, size in zip(masks if len(masks) == len(sizes) else [*masks] * len(sizes), sizes):
        check_mask_shape(mask, size)
    for number, region in enumerate(regions, start=1):
        for size in sizes if region.mask is not None else ():
            check_mask_shape(region.mask, size, f"mask of region {number}")


def check_rest(regions: Sequence[Region]) -> None:
    """Raise ValueError where all regions have a mask, but there is no picture to keep outside of them."""
    if regions and all(region.mask is not None for region in regions):
        raise ValueError(
            "every region has a mask, so that nothing says what is beside them; add one without a mask, for everywhere"
        )


def masked(edited: Image.Image, image: FittedImage, mask: Image.Image, seam: int = 0) -> Image.Image:
    """The edit where the mask is white, the picture itself where it is black. seam: the feather, pixels from a mask's
    edge inwards over which the edit fades in."""
    result = Image.composite(edited.convert("RGB"), image.source.rgb, faded(mask, edited.size, seam))
    if image.source.alpha is not None:
        result.putalpha(image.source.alpha)
    return result


def found_mask(tokens: Tokens, levels_3yx: Tensor, decode: Callable[[Tensor], Tensor]) -> Image.Image:
    """Where an edit with an auto mask changed its picture (see `auto_mask.differing`): white, mode L, of its size.

    tokens: of one edit. levels_3yx: of the decoded edit, in 8 bits. decode: the same of a running sum [d, H, W].
    """
    if tokens.free is None:  # nothing was held to the source: all may have changed
        return seen_mask(tokens.shown)
    before = decode(tokens.under.total()[0])
    return unfit_mask(differing(levels_3yx, before, tokens.free[0], tokens.auto_mask), tokens.shown)
