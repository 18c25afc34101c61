"""Beyond a picture's borders: what a model sees beside its frame and under its alpha.

Where white begins right at a border, a model paints a part of it into the picture, and so does resizing. So a picture
goes on a little, and white begins beyond: mirrored beside its frame, under its alpha in the nearest colours.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..defaults import FIT
from ..fitting import BAND, FITS, Fit, Fitting
from ..tokenizer.schedule import TOKEN_PIXELS

_FAINT = 8  # alpha of less shows at most 8 levels, and files round its colours too much
_KNOWN = 128  # a resize may overshoot it without being cut off
_LEAST_SHARE = 1 / 8  # of a pixel: what 8 bits still tell the colour of


def padded(picture: Image.Image, fitting: Fitting, colour: str | int, fit: Fit = FITS[FIT]) -> Image.Image:
    """A picture at the top left of its canvas; beyond it goes on as the fit says, in `colour` where that is white."""
    canvas = Image.new(picture.mode, fitting.padded_size, colour)
    canvas.paste(picture)
    (width, height), (wide, high) = picture.size, _continued(fitting, fit.mirrored)
    while width < wide:
        more = min(width, wide - width)
        strip = cut(canvas, (width - more, 0, width, height))
        canvas.paste(strip.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (width, 0))
        width += more
    while height < high:
        more = min(height, high - height)
        strip = cut(canvas, (0, height - more, width, height))
        canvas.paste(strip.transpose(Image.Transpose.FLIP_TOP_BOTTOM), (0, height))
        height += more
    if fit.edge:
        _replicated(canvas, width, height)
    return canvas


def cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """A part of an image, as of its `crop`, which has a bound of pixels that is not ours."""
    left, top, right, bottom = box
    part = Image.new(image.mode, (right - left, bottom - top))
    part.paste(image, (-left, -top))
    return part


def resized(canvas: Image.Image, fitting: Fitting, method: Image.Resampling) -> Tensor:
    """A canvas at the model's size, 8-bit levels [C, H, W]."""
    array = np.array(canvas.resize(fitting.schedule.pixels[::-1], method))
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)


def without_rim(rgb: Image.Image, alpha: Image.Image, fitting: Fitting, fit: Fit) -> Tensor:
    """A picture at the model's size, 8-bit levels [3, H, W], whose seen colours go on under its alpha for BAND tokens;
    farther away it has its own. Colours of seen pixels are mixed with those of seen ones only."""
    plain = resized(padded(rgb, fitting, "white", fit), fitting, Image.Resampling.LANCZOS)
    known = alpha.point([0] * _FAINT + [_KNOWN] * (256 - _FAINT))
    seen = Image.new("RGB", rgb.size)
    seen.paste(rgb, mask=known.point([0] * _KNOWN + [255] * (256 - _KNOWN)))
    known, seen = padded(known, fitting, _KNOWN, fit), padded(seen, fitting, "white", fit)
    whole = resized(known, fitting, Image.Resampling.LANCZOS) == _KNOWN
    share = resized(known, fitting, Image.Resampling.BILINEAR).float() / _KNOWN  # no weight is negative
    mixed = resized(seen, fitting, Image.Resampling.BILINEAR) / share.clamp(min=_LEAST_SHARE)
    inside = whole | (share >= _LEAST_SHARE)
    if not inside.any():
        return plain
    colours = torch.where(whole, resized(seen, fitting, Image.Resampling.LANCZOS).float(), mixed)
    reach = BAND * TOKEN_PIXELS
    near = F.max_pool2d(inside.float(), 2 * reach + 1, stride=1, padding=reach) > 0
    bled = spread(colours[None].clamp(0, 255), inside[None].float())[0].round().to(torch.uint8)
    return torch.where(near, bled, plain)


def spread(pixels_BCHW: Tensor, known_11HW: Tensor) -> Tensor:
    """Unknown pixels out of means of known ones, of the nearest that there are: coarser and coarser, then back. Some
    must be known."""
    if known_11HW.all():
        return pixels_BCHW
    halves = dict(kernel_size=2, ceil_mode=True, count_include_pad=False)
    share = F.avg_pool2d(known_11HW, **halves)
    means = F.avg_pool2d(pixels_BCHW * known_11HW, **halves) / share.clamp(min=0.25)
    rough = F.interpolate(spread(means, (share > 0).float()), pixels_BCHW.shape[-2:], mode="bilinear")
    return torch.where(known_11HW > 0, pixels_BCHW, rough)


def _replicated(canvas: Image.Image, width: int, height: int) -> None:
    """Fill a canvas, right and below, with the last pixels of the picture of this size at its top left."""
    wide, high = canvas.size
    if width < wide:
        canvas.paste(cut(canvas, (width - 1, 0, width, height)).resize((wide - width, height)), (width, 0))
    if height < high:
        canvas.paste(cut(canvas, (0, height - 1, wide, height)).resize((wide, high - height)), (0, height))


def _continued(fitting: Fitting, band: float) -> tuple[int, int]:
    """(width, height) of a picture with a band of so many tokens, within its canvas."""
    if band == math.inf:
        return fitting.padded_size
    sides = zip(fitting.size, fitting.padded_size, fitting.schedule.pixels[::-1])
    return tuple(min(all, own + math.ceil(band * TOKEN_PIXELS * all / pixels)) for own, all, pixels in sides)
