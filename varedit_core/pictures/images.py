"""Pictures: files and Pillow images to the model's pixels, and back at exactly the size they came in.

Knows colour modes, padding and resizing; knows nothing of weights or tokens. Sizes of Pillow images
are (width, height), those of tensors and schedules (height, width). Pixels are fp32 in [-1, 1].
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from ..files.safe_write import check_target as check_file_target
from ..files.safe_write import write_bytes
from ..fitting import FITS, PUBLISHED, Fitting, Size, fitting_for
from ..tokenizer.schedule import Schedule
from .borders import cut, padded, resized, without_rim
from .colours import straight, transparent
from .reading import NO_DETAILS, Details, opened

logger = logging.getLogger(__name__)

# The published code truncates: half a level darker on average, but the pack must equal its output.
PUBLISHED_ROUNDING = "truncate"
ROUNDINGS = (PUBLISHED_ROUNDING, "nearest")

# Lossy only where the format is, so that repeated edits lose as little as they can.
_JPEG = ("JPEG", {"quality": 95, "subsampling": 0})
_FORMATS = {".png": ("PNG", {}), ".webp": ("WEBP", {"lossless": True, "exact": True}), ".jpg": _JPEG, ".jpeg": _JPEG}
Readable = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""What `reading.opened` takes; open files, too."""
SHAPE_ERROR = 0.05
"""By how much the shapes of a mask and its picture may differ, as a share: other programs round sizes."""
_SAME, _GREY, _COLOURED = 2, 24, 0.02
"""Of masks: levels that count as one brightness, levels between channels that count as grey, and the share of seen
pixels that makes a picture one in colours."""


@dataclass(frozen=True)
class SourceImage:
    """An upright 8-bit picture: straight RGB, its alpha (mode L) or None, its RGB profile or None, and what else it
    carries."""

    rgb: Image.Image
    alpha: Image.Image | None = None
    icc_profile: bytes | None = None
    details: Details = NO_DETAILS

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.rgb.size

    @property
    def info(self) -> dict[str, object]:
        """What it carries beside pixels, as Pillow's own readers put it into `Image.info`."""
        return self.details.info | ({"icc_profile": self.icc_profile} if self.icc_profile else {})

    @property
    def opaque(self) -> bool:
        """Whether nothing shines through: no alpha, or one that is full everywhere."""
        return self.alpha is None or _is_full(self.alpha)


@dataclass(frozen=True, eq=False)
class FittedImage:
    """What the model sees of a source: pixels [1, 3, H, W] with (H, W) = schedule.pixels; of `empty`, none."""

    pixels: Tensor
    fitting: Fitting
    source: SourceImage

    @property
    def schedule(self) -> Schedule:
        return self.fitting.schedule


def load_image(picture: Readable) -> SourceImage:
    """A picture of any kind that `reading.opened` takes, upright by its EXIF, in straight 8-bit RGB.

    Colours go through a profile that is not of RGB; one of RGB is kept with the picture, as are its details. Colours
    under fully transparent pixels become white. Raises as `opened`, and ValueError for an empty picture and for values
    that do not fit 8 or 16 bits.
    """
    upright, details = opened(picture)
    if 0 in upright.size:
        raise ValueError(f"the image is empty ({upright.width}x{upright.height}); pass one of at least 1x1 pixel")
    image, profile = straight(upright)
    red, green, blue, *alpha = image.split()
    rgb = Image.merge("RGB", (red, green, blue))
    for band in alpha:
        rgb.paste("white", mask=band.point([255] + [0] * 255))
    return SourceImage(rgb, alpha[0] if alpha else None, profile, details)


def load_mask(picture: Readable, erased: bool = False) -> Image.Image:
    """A mask [mode L] from a picture: how bright it is, times how opaque.

    Where all that is seen has one brightness, its transparency alone is the mask (opaque is white), which is told.
    erased: the picture may be a photograph with a part erased, of which the transparency counts, too; else that is a
    ValueError, as elsewhere such files mean the opposite. Raises as `load_image`.
    """
    if isinstance(picture, Image.Image) and picture.mode == "L" and not picture.info and 0 not in picture.size:
        return picture.copy()  # one already, which its owner may change
    source = load_image(picture)
    grey = source.rgb.convert("L")
    if source.opaque:
        return grey
    seen = np.array(source.alpha) > 0
    levels = np.array(source.rgb)[seen].astype(int)
    if not seen.any() or np.ptp(np.array(grey)[seen]) <= _SAME or erased:
        logger.warning("the mask's transparency counts, not how bright it is: what is opaque is white")
        return source.alpha
    if (np.ptp(levels, axis=1) > _GREY).mean() > _COLOURED:
        raise ValueError(
            "this is a picture with a transparent part, not a mask: to edit what was erased, give it with --protect "
            "(in Python load_mask(picture, erased=True), inverted); else save the mask in black and white"
        )
    return ImageChops.multiply(grey, source.alpha)


def check_mask_shape(mask: Image.Image, size: Size, name: str = "mask") -> None:
    """ValueError for a mask of another shape than its picture of `size` (width, height): stretched over it, it would
    mark another place. One that is the same everywhere may have any."""
    sentence = shape_complaint(mask.size, size, name)
    if sentence and len(set(mask.convert("L").getextrema())) > 1:
        raise ValueError(sentence)


def shape_complaint(own: Size, size: Size, name: str = "mask") -> str:
    """A sentence where a mask of one size has another shape than its picture of the other; else an empty text."""
    (width, height), (own_width, own_height) = size, own
    if abs(math.log(own_width * height / (own_height * width))) <= SHAPE_ERROR:
        return ""
    return (
        f"the {name} is {own_width}x{own_height} but the picture is {width}x{height} (upright), another shape; make it "
        "of the picture's shape"
    )


def fit(source: SourceImage, area: str, method: str) -> FittedImage:
    """Bring the source to the model's size (Lanczos), what it lacks of the model's shape beside it as `fitting.FITS`
    says.

    Under its alpha the picture goes on for a few tokens, too (see `borders`). Pixels of "published" are the published
    code's, whose white shows in the result's last rows. Arguments and errors as of `fitting.fitting_for`.
    """
    levels, fitting = fitted_levels(source, area, method)
    return FittedImage(levels[None].float() / 127.5 - 1, fitting, source)


def fitted_levels(source: SourceImage, area: str, method: str) -> tuple[Tensor, Fitting]:
    """`fit` in 8-bit levels [3, H, W]."""
    fitting = fitting_for(source.size, area, method)
    fit, seen, rgb, alpha = FITS[method], fitting.seen, source.rgb, source.alpha
    if fitting.box:
        rgb, alpha = cut(rgb, fitting.box), alpha and cut(alpha, fitting.box)
    if method != PUBLISHED and not source.opaque:
        return without_rim(rgb, alpha, seen, fit), fitting
    return resized(padded(rgb, seen, "white", fit), seen, Image.Resampling.LANCZOS), fitting


def empty(schedule: Schedule) -> FittedImage:
    """In place of a source, for what is made of text alone: exactly the model's size, and no pixels to encode."""
    fitting = Fitting.exact(schedule)
    return FittedImage(torch.empty(1, 3, 0, 0), fitting, SourceImage(Image.new("RGB", fitting.size, "white")))


def fit_mask(mask: Image.Image, fitting: Fitting) -> Tensor:
    """A mask of a picture, of any size and stretched over it, as [1, H, W] from 0 to 1 beside the fitted picture. It
    goes on as the picture does, so that what changes at a border changes beyond it, too."""
    stretched = mask.convert("L").resize(fitting.size, Image.Resampling.BILINEAR)
    stretched = cut(stretched, fitting.box) if fitting.box else stretched
    return resized(padded(stretched, fitting.seen, 0), fitting, Image.Resampling.BOX).float() / 255


def restore(pixels: Tensor, fitted: FittedImage, rounding: str = PUBLISHED_ROUNDING) -> Image.Image:
    """The edited picture, RGB or (with the source's alpha) RGBA, of exactly the source's size.

    pixels: [3, H, W] or [1, 3, H, W] in [-1, 1] with (H, W) = fitted.schedule.pixels; ValueError otherwise.
    rounding: see `to_uint8`.
    """
    height, width = fitted.schedule.pixels
    if tuple(pixels.shape) not in ((3, height, width), (1, 3, height, width)):
        raise ValueError(
            f"pixels are {list(pixels.shape)} but must be [3, {height}, {width}], one image; pass them one by one"
        )
    image = unfit(to_uint8(pixels, rounding).reshape(3, height, width), fitted.fitting, fitted.source.rgb)
    if fitted.source.alpha is not None:
        image.putalpha(fitted.source.alpha)
    return image


def unfit(levels_3HW: Tensor, fitting: Fitting, picture: Image.Image | None = None) -> Image.Image:
    """The source's part of 8-bit levels [3, H, W] of the whole canvas, at exactly the source's size.

    picture: the source, RGB, which shows beside what the model saw of it; white without.
    """
    array = levels_3HW.permute(1, 2, 0).cpu().numpy()
    return _placed(Image.fromarray(np.ascontiguousarray(array)), fitting, Image.Resampling.LANCZOS, picture or "white")


def unfit_mask(mask_HW: Tensor, fitting: Fitting) -> Image.Image:
    """The source's part of a mask [H, W] from 0 to 1 of the whole canvas, mode L, at exactly the source's size; black
    beside what the model saw of it."""
    levels = (mask_HW.float() * 255).round().to(torch.uint8).cpu().numpy()
    return _placed(Image.fromarray(levels), fitting, Image.Resampling.BILINEAR, 0)


def seen_mask(fitting: Fitting) -> Image.Image:
    """Where a picture can change at all, mode L: white in what the model sees of it."""
    return unfit_mask(torch.ones(fitting.schedule.pixels), fitting)


def _placed(
    canvas: Image.Image, fitting: Fitting, method: Image.Resampling, rest: Image.Image | str | int
) -> Image.Image:
    """What a canvas at the model's size shows of a picture, at the picture's size. rest: what there is beside it."""
    shown = cut(canvas.resize(fitting.padded_size, method), (0, 0, *fitting.seen.size))
    if fitting.box is None:
        return shown
    whole = rest.copy() if isinstance(rest, Image.Image) else Image.new(canvas.mode, fitting.size, rest)
    whole.paste(shown, fitting.box[:2])
    return whole


def to_uint8(pixels: Tensor, rounding: str = PUBLISHED_ROUNDING) -> Tensor:
    """Pixels of any shape in [-1, 1] (others are clamped) as uint8 levels; rounding is one of ROUNDINGS.

    Raises ValueError for another rounding, and for pixels that are not floating-point or hold NaN.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    if not pixels.is_floating_point() or pixels.isnan().any():
        raise ValueError(f"pixels must be floating-point without NaN, got {pixels.dtype}; decode them in float32")
    levels = ((pixels.float() + 1) / 2 * 255).clamp(0, 255)
    return (levels.round() if rounding == "nearest" else levels).to(torch.uint8)


def save_image(
    image: Image.Image, path: str | os.PathLike[str], overwrite: bool = False, icc_profile: bytes | None = None,
    details: Details = NO_DETAILS, write: Callable[[Path, bytes, bool], None] = write_bytes,
) -> None:  # fmt: skip
    """Write an L, RGB or RGBA image in the format of the path's suffix; the file appears whole or not at all.

    Makes missing folders. details: what the picture carries; what the format cannot hold is told. write: see
    `safe_write.together`. Raises FileExistsError where a file exists and overwrite is False, ValueError for another
    mode or suffix and for transparency that the format cannot hold.
    """
    path = Path(path)
    if image.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"cannot write mode {image.mode}; convert the image to RGB or RGBA")
    check_target(path, _transparent(image), overwrite)
    image = image.convert("RGB") if image.mode == "RGBA" and _is_jpeg(path) else image
    format_name, options = _FORMATS[path.suffix.lower()]
    carried = {"icc_profile": icc_profile, **details.options(format_name)}
    try:
        encoded = _encoded(image, format_name, options | carried)
    except Exception as error:  # an edit is not lost for what its picture carried; Pillow raises anything of it
        encoded = _encoded(image, format_name, options)
        logger.warning("what the picture carries cannot be written to %s (%s) and is left out", path, error)
    write(path, encoded, overwrite)


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    made = BytesIO()  # Pillow's encoders do not notice where a disk takes a part of what they write
    image.save(made, kind, **options)
    return made.getvalue()


def check_target(path: str | os.PathLike[str], transparent: bool, overwrite: bool = False) -> None:
    """Raise what `save_image` would for this path, and make missing folders, before the picture is there."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot write {path.name}: its suffix must be one of {', '.join(_FORMATS)}")
    if transparent and _is_jpeg(path):
        raise ValueError(f"JPEG cannot hold the transparency of {path.name}; save it as PNG or WebP")
    check_file_target(path, overwrite)


def _transparent(image: Image.Image) -> bool:
    """Whether anything shines through an L, RGB or RGBA image."""
    return not _is_full(image.getchannel("A")) if image.mode == "RGBA" else transparent(image)


def _is_full(alpha: Image.Image) -> bool:
    return alpha.getextrema()[0] == 255


def _is_jpeg(path: Path) -> bool:
    return _FORMATS[path.suffix.lower()][0] == "JPEG"
