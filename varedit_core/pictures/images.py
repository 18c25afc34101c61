"""Pictures: files and Pillow images to the model's pixels, and back at exactly the size they came in.

Knows colour modes, padding and resizing; knows nothing of weights or tokens. Sizes of Pillow images
are (width, height), those of tensors and schedules (height, width). Pixels are fp32 in [-1, 1].
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..defaults import FITS
from ..files.safe_write import check_free, make_folder, write_bytes
from ..fitting import MAX_CANVAS_PIXELS, Fitting, Size, canvas_size, nearest_ratio
from ..tokenizer.schedule import Schedule, schedule_for

# The published code truncates: half a level darker on average, but the pack must equal its output.
PUBLISHED_ROUNDING = "truncate"
ROUNDINGS = (PUBLISHED_ROUNDING, "nearest")

# Lossy only where the format is, so that repeated edits lose as little as they can.
_JPEG = ("JPEG", {"quality": 95, "subsampling": 0})
_FORMATS = {".png": ("PNG", {}), ".webp": ("WEBP", {"lossless": True, "exact": True}), ".jpg": _JPEG, ".jpeg": _JPEG}
# Modes whose numbers an RGB profile still describes after conversion to straight RGB.
_PROFILED_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")


@dataclass(frozen=True)
class SourceImage:
    """An upright 8-bit picture: straight RGB, its alpha (mode L) or None, its RGB profile or None."""

    rgb: Image.Image
    alpha: Image.Image | None = None
    icc_profile: bytes | None = None

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.rgb.size

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


def load_image(image: str | os.PathLike[str] | Image.Image) -> SourceImage:
    """Read a file (its first frame) or take a Pillow image (its current frame), upright by its EXIF.

    Colours under fully transparent pixels become white. Raises FileNotFoundError for a missing file and
    ValueError for one that cannot be read, an empty picture, or values that do not fit 8 or 16 bits.
    """
    upright = _upright(image)
    if 0 in upright.size:
        raise ValueError(f"the image is empty ({upright.width}x{upright.height}); pass one of at least 1x1 pixel")
    profile = upright.info.get("icc_profile") or b""
    kept = upright.mode in _PROFILED_MODES and profile[16:20] == b"RGB "
    red, green, blue, *alpha = _straight(upright).split()
    rgb = Image.merge("RGB", (red, green, blue))
    for band in alpha:
        rgb.paste("white", mask=band.point([255] + [0] * 255))
    return SourceImage(rgb, alpha[0] if alpha else None, profile if kept else None)


def load_mask(image: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """A mask [mode L] from a picture: its alpha where anything shines through, else how bright it is. Raises as
    `load_image`."""
    source = load_image(image)
    return source.rgb.convert("L") if source.opaque else source.alpha


def fitting_for(size: Size, area: str, method: str) -> Fitting:
    """How a picture of a size (width, height) is brought to the model's; arguments and errors as of `fit`."""
    if method not in FITS:
        raise ValueError(f"unknown fit {method!r}; choose one of {', '.join(FITS)}")
    width, height = size
    schedule = schedule_for(area, 1.0 if method == "square" else nearest_ratio(height / width))
    padded_size = canvas_size(size, schedule.pixels)
    if padded_size[0] * padded_size[1] > MAX_CANVAS_PIXELS:
        raise ValueError(
            f"a {width}x{height} image needs a canvas of {padded_size[0]}x{padded_size[1]}; make it smaller"
        )
    return Fitting(schedule, padded_size, size)


def fit(source: SourceImage, area: str, method: str) -> FittedImage:
    """Pad the source with white at the right and bottom, then resize it (Lanczos) to the model's size.

    area: a key of schedule.AREAS. method: one of FITS. Raises ValueError for another area or method and
    for a canvas of more than MAX_CANVAS_PIXELS.
    """
    levels, fitting = fitted_levels(source, area, method)
    return FittedImage(levels[None].float() / 127.5 - 1, fitting, source)


def fitted_levels(source: SourceImage, area: str, method: str) -> tuple[Tensor, Fitting]:
    """`fit` in 8-bit levels [3, H, W]."""
    fitting = fitting_for(source.size, area, method)
    canvas = Image.new("RGB", fitting.padded_size, "white")
    canvas.paste(source.rgb)
    resized = canvas.resize(fitting.schedule.pixels[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1), fitting


def empty(schedule: Schedule) -> FittedImage:
    """In place of a source, for what is made of text alone: exactly the model's size, and no pixels to encode."""
    fitting = Fitting.exact(schedule)
    return FittedImage(torch.empty(1, 3, 0, 0), fitting, SourceImage(Image.new("RGB", fitting.size, "white")))


def fit_mask(mask: Image.Image, fitting: Fitting) -> Tensor:
    """A mask of a picture, of any size and stretched over it, as [1, H, W] from 0 to 1 beside the fitted picture."""
    canvas = Image.new("L", fitting.padded_size)
    canvas.paste(mask.convert("L").resize(fitting.size, Image.Resampling.BILINEAR))
    resized = canvas.resize(fitting.schedule.pixels[::-1], Image.Resampling.BOX)
    return torch.from_numpy(np.array(resized))[None].float() / 255


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
    image = unfit(to_uint8(pixels, rounding).reshape(3, height, width), fitted.fitting)
    if fitted.source.alpha is not None:
        image.putalpha(fitted.source.alpha)
    return image


def unfit(levels_3HW: Tensor, fitting: Fitting) -> Image.Image:
    """The source's part of 8-bit levels [3, H, W] of the whole canvas, at exactly the source's size."""
    array = levels_3HW.permute(1, 2, 0).cpu().numpy()
    padded = Image.fromarray(np.ascontiguousarray(array)).resize(fitting.padded_size, Image.Resampling.LANCZOS)
    return padded.crop((0, 0, *fitting.size))


def unfit_mask(mask_HW: Tensor, fitting: Fitting) -> Image.Image:
    """The source's part of a mask [H, W] from 0 to 1 of the whole canvas, mode L, at exactly the source's size."""
    levels = (mask_HW.float() * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(levels).resize(fitting.padded_size, Image.Resampling.BILINEAR).crop((0, 0, *fitting.size))


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
    image: Image.Image, path: str | os.PathLike[str], overwrite: bool = False, icc_profile: bytes | None = None
) -> None:
    """Write an L, RGB or RGBA image in the format of the path's suffix; the file appears whole or not at all.

    Makes missing folders. Raises FileExistsError where a file exists and overwrite is False, ValueError for
    another mode or suffix and for transparency that the format cannot hold.
    """
    path = Path(path)
    if image.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"cannot write mode {image.mode}; convert the image to RGB or RGBA")
    check_target(path, _transparent(image), overwrite)
    image = image.convert("RGB") if image.mode == "RGBA" and _is_jpeg(path) else image
    format_name, options = _FORMATS[path.suffix.lower()]
    encoded = BytesIO()  # Pillow's encoders do not notice where a disk takes a part of what they write
    image.save(encoded, format_name, icc_profile=icc_profile, **options)
    write_bytes(path, encoded.getvalue(), overwrite)


def check_target(path: str | os.PathLike[str], transparent: bool, overwrite: bool = False) -> None:
    """Raise what `save_image` would for this path, and make missing folders, before the picture is there."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot write {path.name}: its suffix must be one of {', '.join(_FORMATS)}")
    if transparent and _is_jpeg(path):
        raise ValueError(f"JPEG cannot hold the transparency of {path.name}; save it as PNG or WebP")
    check_free(path, overwrite)
    make_folder(path.parent)


def _transparent(image: Image.Image) -> bool:
    """Whether anything shines through an L, RGB or RGBA image."""
    return not _is_full(image.getchannel("A")) if image.mode == "RGBA" else image.has_transparency_data


def _is_full(alpha: Image.Image) -> bool:
    return alpha.getextrema()[0] == 255


def _is_jpeg(path: Path) -> bool:
    return _FORMATS[path.suffix.lower()][0] == "JPEG"


def _upright(image: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """A decoded copy, turned by its EXIF orientation."""
    try:
        if isinstance(image, Image.Image):
            return ImageOps.exif_transpose(image)
        # Given a path, Pillow 11 to 13 map uncompressed TIFFs and scramble those that EXIF turns on their side.
        with open(image, "rb") as file, Image.open(file) as opened:
            return ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image at {image}; check the path") from None
    except Exception as error:  # broken files raise struct.error, SyntaxError, EOFError and more
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            raise ValueError(f"a picture is a path or a PIL image, got {type(image).__name__}") from None
        raise ValueError(f"cannot read {image} ({error}); save it again as PNG or JPEG") from error


def _straight(image: Image.Image) -> Image.Image:
    """The image as RGB, or as RGBA where it has any transparency."""
    if image.mode == "F":
        raise ValueError("the image holds floating-point values (mode F); convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as L, or as LA where one grey is marked transparent (before two greys become one)."""
    values = np.array(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"the image's values run from {values.min()} to {values.max()}; scale them to 0..65535")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return grey
