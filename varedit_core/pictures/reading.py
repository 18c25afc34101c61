"""Pictures as users have them (files, bytes, open files, Pillow images, arrays, tensors) to one upright Pillow image.

Knows files, formats and what else a picture carries (`Details`); knows nothing of the model. What cannot be used is
said in one sentence, and so is what is left out (as a warning of `logging`).
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files.reading import check_file
from ..fitting import MAX_CANVAS_PIXELS

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "HEIF", "JPEG2000")
"""What is opened. Not all that Pillow knows: EPS starts another program, and others have no bounds."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm"}
"""Of files that look like pictures by their names."""
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_STILL = ("MPO",)  # its further pictures are previews of the first
_PIXELS_A_BYTE = 16384  # more than PNG (8,256) and GIF (2,700) can pack
_PACKED = ("PNG", "GIF", "BMP", "PPM", "JPEG")
_UNREAD = "cannot read {} ({}); save it again as PNG or JPEG"
_PREFIX = 16
"""Bytes by which Pillow knows a format."""
MOST_BYTES = 8 * MAX_CANVAS_PIXELS + (64 << 20)
"""Of a file: pixels of four channels in 16 bits, and room for what it carries."""
_ORIENTATION = 0x0112
_DESCRIBES = {270, 271, 272, 305, 306, 315, 33432}
"""Tags of a picture's description, camera, program, date, artist and rights."""
_IPTC = 0x0404
_XMP = "XML:com.adobe.xmp"
_SRGB = bytes((1, 13))
"""Primaries and curve of sRGB, as cICP numbers them."""
_BROKEN = (SyntaxError, IndexError, TypeError, KeyError, struct.error)
"""What Pillow raises of a file that only begins like one of a format."""


_MOST = {
    "PNG": {"exif": MOST_BYTES, "xmp": MOST_BYTES, "comment": MOST_BYTES, "dpi": 50_000_000},
    "JPEG": {"exif": 65_000, "xmp": 65_000, "comment": 65_000, "dpi": 65_535},
    "WEBP": {"exif": MOST_BYTES, "xmp": MOST_BYTES},
}
"""What formats hold: bytes, and dots per inch."""
_SPOKEN = {"exif": "EXIF data", "dpi": "dots per inch", "xmp": "XMP data", "comment": "comment"}


def _holds(kind: str, name: str, value: bytes | tuple[float, float]) -> bool:
    """Whether a format takes a part of `Details`."""
    most = _MOST[kind].get(name, 0)
    return 1 <= min(value) and max(value) <= most if name == "dpi" else len(value) <= most


@dataclass(frozen=True)
class Details:
    """What a picture carries beside pixels and colour profile: EXIF without its thumbnail and of an upright picture,
    dots per inch, XMP, a comment, and the texts of a PNG."""

    exif: bytes = b""
    dpi: tuple[float, float] | None = None
    xmp: bytes = b""
    comment: bytes = b""
    texts: tuple[tuple[str, str], ...] = ()

    def options(self, kind: str) -> dict[str, Any]:
        """Options of Pillow's `save` for a format; what it cannot hold is told."""
        given = {"exif": self.exif, "dpi": self.dpi, "xmp": self.xmp, "comment": self.comment}
        found = {name: value for name, value in given.items() if value and _holds(kind, name, value)}
        left = [_SPOKEN[name] for name, value in given.items() if value and name not in found]
        if kind == "PNG":
            found["pnginfo"] = self._chunks()
            found.pop("comment", None)
        elif self.texts:
            left.append(f"texts ({', '.join(name for name, _ in self.texts)})")
        if left:
            what = "; ".join(left)
            logger.warning("%s cannot hold all of what the picture carries: it is without its %s; PNG can", kind, what)
        return found

    @property
    def info(self) -> dict[str, Any]:
        """As Pillow's own readers put it into `Image.info`."""
        known = {"exif": self.exif, "dpi": self.dpi, "xmp": self.xmp, "comment": self.comment}
        found = dict(self.texts) | known
        return {name: value for name, value in found.items() if value}

    def _chunks(self) -> PngInfo:
        made = PngInfo()
        for name, text in self.texts:
            made.add_itxt(name, text) if not text.isascii() else made.add_text(name, text)
        if self.comment and "Comment" not in dict(self.texts):
            made.add_itxt("Comment", self.comment.decode("utf-8", "replace"))
        if self.xmp:
            made.add_itxt(_XMP, self.xmp.decode("utf-8", "replace"))
        return made


NO_DETAILS = Details()


def is_picture(value: object) -> bool:
    """Whether a value is one picture, rather than several: of arrays, those of up to three dimensions."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim < 4
    return isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(value, "read")


def opened(picture: object) -> tuple[Image.Image, Details]:
    """A decoded copy, turned by its EXIF orientation, and what it carries.

    picture: a path, bytes, an open file, a Pillow image (its current frame), or an array or tensor of one picture:
    levels in uint8 or numbers from 0 to 1, [H, W], [H, W, C], and for tensors [C, H, W], C in 1, 3, 4. Of files with
    several frames the first is read, which is told. FileNotFoundError for a missing file; ValueError for one that
    cannot be read, for other formats than FORMATS, for more than MAX_CANVAS_PIXELS, and for anything else.
    """
    if isinstance(picture, Image.Image):
        try:
            return _upright(picture, "the picture")
        except (OSError, *_BROKEN) as error:
            raise ValueError(f"the picture cannot be decoded ({error}); open another file") from error
    if isinstance(picture, (np.ndarray, Tensor)):
        return of_array(picture), NO_DETAILS
    if isinstance(picture, (bytes, bytearray, memoryview)):
        data = bytes(picture)
        return _read(BytesIO(data), "the picture", len(data))
    if hasattr(picture, "read"):
        name = getattr(picture, "name", None)
        name = str(name) if isinstance(name, (str, os.PathLike)) else "the picture"
        data = _all_of(picture, name)
        return _read(BytesIO(data), name, len(data))
    if not isinstance(picture, (str, os.PathLike)):
        raise ValueError(
            f"a picture is a path, bytes, an open file, a PIL image, or an array or tensor of one, got "
            f"{type(picture).__name__}"
        )
    path = check_file(picture, "image")
    # Given a path, Pillow 11 to 13 map uncompressed TIFFs and scramble those that EXIF turns on their side.
    with open(path, "rb") as file:
        return _read(file, str(path), path.stat().st_size)


def _all_of(file, name: str) -> bytes:
    """What an open file holds: no more than a picture can have, and nothing of what begins like none."""
    data = file.read(_PREFIX)
    if not isinstance(data, bytes):
        raise ValueError("the open file gives text; open it with mode 'rb'")
    try:
        _begun(data)
    except ValueError as error:
        raise ValueError(_UNREAD.format(name, error)) from error
    parts, left = [data], MOST_BYTES
    while part := file.read(min(left + 1, 1 << 24)):
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise ValueError(f"{name} holds more than {MOST_BYTES >> 20} MB, which no picture has; check it")
    return b"".join(parts)


def of_array(values: np.ndarray | Tensor) -> Image.Image:
    """A picture of an array or a tensor (see `opened`). ValueError for other shapes, types and values."""
    tensor = isinstance(values, Tensor)
    if tensor and (values.layout != torch.strided or values.is_meta or values.is_complex()):
        raise ValueError("a tensor of a picture is a plain one: dense, of real numbers, with data; convert it")
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError("an array of a picture has no mask of its own; fill it (numpy.ma.filled) first")
    array = values.detach().cpu().float().numpy() if tensor and values.is_floating_point() else np.asarray(values)
    shape, channels = tuple(array.shape), (1, 3, 4)
    if array.ndim == 3 and shape[0] in channels and (tensor or shape[2] not in channels):
        array = np.moveaxis(array, 0, 2)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in channels):
        raise ValueError(f"an array of one picture is [height, width] or has 1, 3 or 4 channels, got {list(shape)}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        least, most = (float(array.min()), float(array.max())) if array.size else (0, 0)
        if math.isnan(least) or math.isnan(most):
            raise ValueError("an array of a picture holds undefined numbers; check what made it")
        if not (least >= 0 and most <= 1):
            raise ValueError(f"an array of floating-point numbers must be from 0 to 1, got {least:g} to {most:g}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be of uint8 or of numbers from 0 to 1, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _read(file, name: str, size: int) -> tuple[Image.Image, Details]:
    """`opened` of an open file that holds so many bytes."""
    try:
        with _open(file) as image:
            width, height = image.size
            if width * height > MAX_CANVAS_PIXELS:
                raise ValueError(f"{name} has {width}x{height} pixels where at most {MAX_CANVAS_PIXELS} are read; "
                                 "make it smaller")  # fmt: skip
            if image.format in _PACKED and width * height > _PIXELS_A_BYTE * size:
                raise ValueError(f"{name} claims {width}x{height} pixels but has only {size} bytes; it is damaged")
            _tell_lost(image, file, name)
            frames = 1 if image.format in _STILL else getattr(image, "n_frames", 1)
            found = _upright(image, name)
    except (ValueError, FileNotFoundError) as error:
        if name in str(error):
            raise
        raise ValueError(_UNREAD.format(name, error)) from error
    except Exception as error:  # broken files raise struct.error, SyntaxError, EOFError and more
        cut = "truncated" in str(error)
        advice = "it is cut short, so copy or download it again" if cut else "save it again as PNG or JPEG"
        raise ValueError(f"cannot read {name} ({error}); {advice}") from error
    if frames > 1:
        logger.warning("%s has %d frames; the first is read", name, frames)
    return found


def _tell_lost(image: Image.Image, file, name: str) -> None:
    """Tell of numbers that are read as 8 bits, and of colours that a PNG gives in another way than by a profile."""
    bits, said = 8, ""
    if image.format == "PNG":
        bits, said = _png_facts(file, image.info)
    elif image.format == "TIFF" and image.mode != "F":  # which is refused
        bits = max(image.tag_v2.get(258) or (8,))
    elif image.mode.startswith("I"):
        bits = 16
    if bits > 8:
        logger.warning("%s has %d bits a channel, of which 8 are kept", name, bits)
    if said:
        logger.warning("%s says %s, which is not used: it is read as sRGB; convert it to sRGB first", name, said)


def _png_facts(file, info: dict[str, Any]) -> tuple[int, str]:
    """Bits a channel of a PNG, and how it says that its colours are not those of sRGB, where no profile says more."""
    here = file.tell()
    file.seek(24)
    bits, said = file.read(1)[0], ""
    at = 8
    while file.seek(at) == at and len(head := file.read(12)) == 12 and head[4:8] not in (b"IDAT", b"IEND"):
        at += 12 + int.from_bytes(head[:4], "big")
        if head[4:8] == b"cICP" and head[8:10] != _SRGB:
            said = "in a cICP chunk that its colours are others"
    file.seek(here)
    gamma = info.get("gamma")
    if not said and not {"icc_profile", "srgb"} & info.keys() and gamma and abs(gamma - 0.45455) > 0.01:
        said = f"that its gamma is {gamma:g}"
    return bits, said


def _open(file) -> Image.Image:
    """As `PIL.Image.open`, for FORMATS and without its own bounds: it warns of pictures that are none too large for
    the model, and refuses some."""
    kind, factory = _begun(file.read(_PREFIX))
    file.seek(0)
    try:
        return factory(file, "")
    except _BROKEN as error:
        raise ValueError(f"it begins like {kind} but is damaged: {error}") from error


def _begun(prefix: bytes) -> tuple[str, Callable]:
    """The format that a file of these first bytes has, and what opens it. ValueError for none of FORMATS."""
    for known in (Image.preinit, Image.init):
        known()
        for kind in FORMATS:
            factory, accepts = Image.OPEN.get(kind, (None, None))
            if factory is not None and (not accepts or accepts(prefix) is True):
                return kind, factory
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF:
        raise ValueError("it is HEIF, which this Pillow cannot decode; convert it")
    raise ValueError(f"it is none of {', '.join(FORMATS)}")


def _upright(image: Image.Image, name: str) -> tuple[Image.Image, Details]:
    image.load()
    try:
        turned = ImageOps.exif_transpose(image)
    except _BROKEN as error:
        logger.warning("the EXIF data of %s cannot be read (%s): it is taken as upright", name, error)
        turned = image.copy()
    return turned, _details(image, turned, name)


def _details(image: Image.Image, turned: Image.Image, name: str) -> Details:
    """What an image carries; turned: the same, upright."""
    try:
        exif = turned.getexif()
        if image.format == "TIFF":  # whose own tags these are, among those of how it is stored
            own = image.getexif()
            for tag in _DESCRIBES & own.keys():
                exif[tag] = own[tag]
        if image.getexif().get(_ORIENTATION):
            exif[_ORIENTATION] = 1
        data = exif.tobytes() if len(exif) else b""
    except Exception as error:  # broken data raise struct.error, KeyError and more
        logger.warning("the EXIF data of %s cannot be read (%s) and is left out", name, error)
        data = b""
    resources = image.info.get("photoshop")
    if isinstance(resources, dict) and _IPTC in resources:
        logger.warning("the IPTC data of %s (caption, keywords) are left out; EXIF and XMP are kept", name)
    texts = getattr(image, "text", None)
    texts = {key: str(text) for key, text in texts.items()} if isinstance(texts, dict) else {}
    xmp = turned.info.get("xmp") or turned.info.get(_XMP) or texts.get(_XMP) or b""
    comment = turned.info.get("comment") or b""
    texts.pop(_XMP, None)
    return Details(
        data, _dpi(turned.info.get("dpi"), name), xmp.encode() if isinstance(xmp, str) else xmp,
        comment.encode() if isinstance(comment, str) else comment, tuple(texts.items()),
    )  # fmt: skip


def _dpi(given: object, name: str) -> tuple[float, float] | None:
    """Dots per inch, told where they are none."""
    try:
        across, down = (float(one) for one in given or (1, 1))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        across = down = math.nan
    if (across, down) == (1, 1):  # of a TIFF that says none
        return None
    if not (0 < across < math.inf and 0 < down < math.inf):
        logger.warning("the dots per inch of %s are %s, which is none, and are left out", name, given)
        return None
    return across, down
