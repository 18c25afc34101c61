"""Cheap pictures of running sums: a linear map from latents to colours, fitted to the VAE at hand.

Shape suffixes: B images, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..tokenizer.quantizer import area_resize, encode
from .images import to_uint8

SIDE = 512
"""Longest side of a preview in pixels."""
LEAST_DECODED = 16
"""Latent positions a side that decoded previews have at least."""
_PICTURES, _CELLS = 16, 8
_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class ColourMap:
    """Colours in [-1, 1] of latents: weight [3, d], bias [3]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, latents_BdHW: Tensor) -> Tensor:
        """Latents [B, d, h, w] -> colours [B, 3, h, w] in [-1, 1]."""
        weight, bias = self.weight.to(latents_BdHW.device), self.bias.to(latents_BdHW.device)
        return F.conv2d(latents_BdHW.float(), weight[:, :, None, None], bias).clamp(-1, 1)


@torch.no_grad()
def fit_colours(features_of: Callable[[Tensor], Tensor], stride: int) -> ColourMap:
    """The colour map of a VAE, by least squares over pictures of smooth random colours.

    features_of: pixels [B, 3, y, x] in [-1, 1] -> unquantised features [B, d, y / stride, x / stride].
    """
    pixels = _colour_fields(_CELLS * stride)
    features = features_of(pixels).float().cpu()
    sides = [1, 2, 4, _CELLS]
    _, sums = encode(features, [(side, side) for side in sides])
    known = torch.cat([sums, torch.ones_like(sums[:, :1])], dim=1).transpose(0, 1).flatten(1).T.double()
    wanted = area_resize(pixels, (_CELLS, _CELLS)).transpose(0, 1).flatten(1).T.double()
    ridge = _RIDGE * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(known.T @ known + ridge, known.T @ wanted).T.float()
    return ColourMap(solution[:, :-1].contiguous(), solution[:, -1].contiguous())


def _colour_fields(side: int) -> Tensor:
    """Pictures [_PICTURES, 3, side, side] in [-1, 1] of blended colours and grey texture; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    layers = [(3, 3, 0.8), (8, 3, 0.3), (side // 4, 1, 0.5), (side // 2, 1, 0.3)]  # cells, channels, strength
    total = torch.zeros(_PICTURES, 3, side, side)
    for cells, channels, strength in layers:
        noise = torch.rand(_PICTURES, channels, cells, cells, generator=generator) * 2 - 1
        total = total + strength * F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
    return total.clamp(-1, 1)


def at_own_size(running_sum_BdHW: Tensor, grid: tuple[int, int], least: int = 1) -> Tensor:
    """A running sum averaged to its scale's own latent grid [B, d, h, w], of at least `least` cells a side.

    A decoder wants `LEAST_DECODED`: it makes artefacts of fewer.
    """
    height, width = running_sum_BdHW.shape[-2:]
    factor = min(max(1.0, least / min(grid)), height / grid[0])
    return area_resize(running_sum_BdHW, (round(grid[0] * factor), round(grid[1] * factor)))


def enlarged(colours_3hw: Tensor, part: tuple[float, float] = (1.0, 1.0), side: int = SIDE) -> Image.Image:
    """A picture of colours [3, h, w] in [-1, 1] whose cells stay visible, at most `side` pixels long.

    part: the share (width, height) from the top left that is shown.
    """
    image = Image.fromarray(to_uint8(colours_3hw.cpu()).permute(1, 2, 0).contiguous().numpy())
    scale = max(1, side // max(image.size))
    grown = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    shown = grown.crop((0, 0, *(max(1, round(a * b)) for a, b in zip(grown.size, part))))
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    return shown
