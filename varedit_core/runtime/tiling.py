"""Decoding in little memory: picture by picture, then in tiles.

Knows a function that decodes and the memory it takes; of the network only its sizes. A tile is decoded alone, so that
its norms see the tile only: tones differ a little from those of the picture decoded whole, the less the larger the
tiles are (demo VAE at 1024 pixels: PSNR to the whole picture 37 dB in tiles of 768, 31 in tiles of 512, 28 in tiles of
256).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .graphs import recorded_bytes

logger = logging.getLogger(__name__)

LEAST_TILE = 32
"""Latent positions along a tile's edge, at least."""
_OVERLAP = 4  # neighbours share this part of a tile: a quarter
# The kernels' own workspace, and pieces of free memory that are too small, come on top of the estimate.
_SPARE = 1.25

Decode = Callable[[Tensor], Tensor]


def decode(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """`vae.Autoencoder.decode` in the memory that the device has left."""
    whole = partial(type(autoencoder).decode.plain, autoencoder)
    return decode_fitted(whole, latents, autoencoder.config.stride, bytes_to_decode(autoencoder))


def bytes_to_decode(autoencoder: nn.Module) -> int:
    """Memory that decoding takes, a position of the latents; about, and rather more than less."""
    stride, widths = autoencoder.config.stride, autoencoder.config.decoder_widths
    wider = (max(pair) for pair in zip(widths, (*widths[1:], widths[-1])))
    # A residual block that changes the width holds its input, that normalised, and the first convolution's result.
    numbers = max(3 * width / min(2**level, stride) ** 2 for level, width in enumerate(wider))
    return round(numbers * stride**2 * autoencoder.decode_dtype.itemsize)


def decode_fitted(decode: Decode, latents: Tensor, stride: int, needed: float) -> Tensor:
    """Decode latents [B, d, h, w] -> pixels [B, 3, h * stride, w * stride] in the memory that the device has left.

    needed: bytes that `decode` takes a latent position. A warning is logged for every picture that needs tiles. Raises
    torch.cuda.OutOfMemoryError where even the smallest tiles do not fit.
    """
    images, _, height, width = latents.shape
    positions = free_memory(latents.device) / (needed * _SPARE)
    longest = max(height, width) - 1
    if images * height * width <= positions:
        whole = _attempted(decode, latents)
        if whole is not None:
            return whole
        longest = longest * 3 // 4  # the estimate was too low
    if images > 1:
        return torch.cat([decode_fitted(decode, latent, stride, needed) for latent in latents.split(1)])
    tile = max(LEAST_TILE, min(math.isqrt(int(min(positions, height * width))), longest) // 8 * 8)
    logger.warning(
        "decoding %d x %d pixels takes more memory than is free, so it is done in tiles of %d, whose tones may differ "
        "a little; free memory for a picture without them",
        width * stride, height * stride, tile * stride,
    )  # fmt: skip
    while tile > LEAST_TILE:
        tiled = partial(decode_tiled, decode, tile=tile, overlap=tile // _OVERLAP, stride=stride)
        picture = _attempted(tiled, latents)
        if picture is not None:
            return picture
        tile = max(LEAST_TILE, tile * 3 // 4 // 8 * 8)
    return decode_tiled(decode, latents, tile, tile // _OVERLAP, stride)


def decode_tiled(decode: Decode, latents: Tensor, tile: int, overlap: int, stride: int) -> Tensor:
    """Decode latents [B, d, h, w] in tiles -> pixels [B, 3, h * stride, w * stride]; where tiles overlap, one passes
    linearly into the other.

    tile, overlap: latent positions, the least that neighbours share; stride: pixels a position. ValueError unless
    0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} positions cannot share {overlap}; the overlap must be less than the tile")
    rows, columns = (_starts(side, tile, overlap) for side in latents.shape[-2:])
    total = weights = None
    for top in rows:
        for left in columns:
            part = decode(latents[..., top : top + tile, left : left + tile])
            if total is None:
                shape = (*part.shape[:2], *(side * stride for side in latents.shape[-2:]))
                total, weights = part.new_zeros(shape), part.new_zeros(shape[-2:])
            at = tuple(slice(begin * stride, (begin + tile) * stride) for begin in (top, left))
            y, x = (_ramp(length, overlap * stride, part) for length in part.shape[-2:])
            weight = y[:, None] * x
            total[(..., *at)] += part * weight
            weights[at] += weight
    return total / weights


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an edge, evenly spread so that the last one ends with it."""
    count = max(1, math.ceil((side - overlap) / (tile - overlap)))
    return [round(i * max(0, side - tile) / max(1, count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights [length] that rise linearly over the overlap from either end."""
    step = torch.arange(length, device=like.device, dtype=like.dtype)
    return (torch.minimum(step, step.flip(0)) + 0.5).clamp(max=overlap + 0.5) / (overlap + 0.5)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken on a CUDA device: the free ones, and those torch holds without using them, but for
    recorded functions.

    Infinite on others, which do not tell.
    """
    if device.type != "cuda":
        return math.inf
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - recorded_bytes(device)
    return torch.cuda.mem_get_info(device)[0] + max(0, held)


def _attempted(decode: Decode, latents: Tensor) -> Tensor | None:
    """The result, or None where memory ran out: whatever had been made is free again by then."""
    try:
        return decode(latents)
    except torch.cuda.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()
    return None
