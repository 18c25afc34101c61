"""Five photographs of scikit-image's (public domain or CC0), as a measure for what was never trained on."""

from __future__ import annotations

import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "retina", "rocket")


def photographs(side: int = 256) -> Tensor | None:
    """Pixels [5, 3, side, side] in [-1, 1]: the centre square of each. None where scikit-image is not installed."""
    try:
        from skimage import data
    except ImportError:
        return None
    from PIL import Image, ImageOps

    pictures = []
    for name in PHOTOGRAPHS:
        picture = ImageOps.fit(Image.fromarray(getattr(data, name)()), (side, side), Image.Resampling.LANCZOS)
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        pictures.append(pixels.view(side, side, 3).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(pictures)
