"""Multi-scale binary residual quantisation, both ways (Infinity, arXiv 2412.04431, section 3.2).

Shape suffixes: B images, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of one
scale, (i, j) its token grid, p patch side. Everything is fp32; bits are boolean. Pictures are resized as they lie when
contiguous: a GPU rounds those that lie channels-last in another way, and one rounding may turn bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Grid, Schedule


def latent_grids(schedule: Schedule, patch: int) -> list[Grid]:
    """The latent grid (h, w) of every scale: token grids times the patch side."""
    return [(h * patch, w * patch) for h, w in schedule.grids]


def area_resize(x: Tensor, grid: Grid) -> Tensor:
    """Adaptive average pooling of [B, c, H, W] to a grid; the input itself where it has that size."""
    return x if x.shape[-2:] == grid else F.adaptive_avg_pool2d(x.contiguous(), grid)


def linear_resize(x: Tensor, grid: Grid) -> Tensor:
    """Bilinear resize of [B, c, h, w] without corner alignment or antialiasing, up and down."""
    return x if x.shape[-2:] == grid else F.interpolate(x.contiguous(), grid, mode="bilinear", align_corners=False)


def codes(bits_BdHW: Tensor) -> Tensor:
    """Unit vectors (2 bit - 1) / sqrt(d) of boolean bits [B, d, h, w]."""
    length = bits_BdHW.shape[1] ** -0.5
    return torch.where(bits_BdHW, length, -length)


def encode(features_BdHW: Tensor, grids: Sequence[Grid]) -> tuple[list[Tensor], Tensor]:
    """Features [B, d, H, W] -> boolean bits [B, d, h, w] of every latent grid, and their sum [B, d, H, W]."""
    features = features_BdHW.float()
    total, bits = torch.zeros_like(features), []
    for grid in grids:
        bits.append(area_resize(features - total, grid) > 0)
        total = total + linear_resize(codes(bits[-1]), grids[-1])
    return bits, total


def decode(bits: Sequence[Tensor], grid: Grid) -> Tensor:
    """Bits [B, d, h, w] of every scale -> their sum [B, d, H, W] on the last grid, which the decoder reads."""
    return torch.stack([linear_resize(codes(b), grid) for b in bits]).sum(0)


def to_tokens(x_BdHW: Tensor, patch: int) -> Tensor:
    """Latents [B, d, i * p, j * p] -> tokens [B, i * j, d * p * p]."""
    return F.pixel_unshuffle(x_BdHW, patch).flatten(2).transpose(1, 2)


def from_tokens(x_BnD: Tensor, grid: Grid, patch: int) -> Tensor:
    """Tokens [B, i * j, d * p * p] of a token grid (i, j) -> latents [B, d, i * p, j * p]."""
    return F.pixel_shuffle(x_BnD.transpose(1, 2).unflatten(2, grid), patch)


def on_latents(mask_B1hw: Tensor, patch: int) -> Tensor:
    """A mask of tokens as one of latent positions."""
    return mask_B1hw.repeat_interleave(patch, -1).repeat_interleave(patch, -2)
