"""Colours of Pillow images: any mode, through its colour profile where that is none of RGB, to straight 8-bit RGB."""

from __future__ import annotations

import logging
from io import BytesIO

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

_PROFILED = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")
"""Modes whose numbers an RGB profile still describes after conversion to straight RGB."""
_SPACES = {b"GRAY": ("L", "LA"), b"CMYK": ("CMYK",), b"Lab ": ("LAB",)}
"""Colour spaces of profiles that are gone through, and the modes they are of."""


def straight(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """An image as RGB, or as RGBA where it has any transparency, and its profile where that still holds. ValueError
    for values that do not fit 8 or 16 bits."""
    if image.mode == "F":
        raise ValueError("the image holds floating-point values (mode F); convert it to 8 or 16 bits")
    profile = image.info.get("icc_profile") or b""
    kept = image.mode in _PROFILED and profile[16:20] == b"RGB "
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    through = image.mode in _SPACES.get(profile[16:20], ())
    if through or image.mode == "LAB":
        image = _through(image, profile if through else b"")
    elif profile and not kept:
        logger.warning("the colour profile of the picture is none of its kind of colours, so it is left out")
    return image.convert("RGBA" if transparent(image) else "RGB"), profile if kept else None


def transparent(image: Image.Image) -> bool:
    """Whether an image has transparency of any kind, which may be full everywhere."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return True
    palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return palette or "transparency" in image.info


def _through(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in sRGB, through its profile; as it is, and told, where that cannot be read."""
    alpha = image.getchannel("A") if image.mode == "LA" else None
    try:
        from PIL import ImageCms

        own = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        flat = image.convert("L") if alpha else image
        made = ImageCms.profileToProfile(flat, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception as error:  # Pillow without LittleCMS raises ImportError, broken profiles OSError and PyCMSError
        if image.mode == "LAB":
            raise ValueError(
                f"the image is in Lab colours, which cannot be read here ({error}); save it as RGB"
            ) from error
        logger.warning("the colour profile of the picture cannot be used (%s), so its colours are near ones", error)
        return image
    for name in ("transparency", "icc_profile"):
        made.info.pop(name, None)
    if alpha is None and isinstance(image.info.get("transparency"), int):  # one grey that is see-through
        alpha = image.point([255 * (level != image.info["transparency"]) for level in range(256)])
    if alpha is not None:
        made.putalpha(alpha)
    return made


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as L, or as LA where one grey is marked transparent (before two greys become one)."""
    values = np.array(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"the image's values run from {values.min()} to {values.max()}; scale them to 0..65535")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return grey
