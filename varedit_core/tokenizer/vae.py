"""The VAE: the picture's convolutional encoder and decoder (BSQ-VAE; Infinity, arXiv 2412.04431, section 3.2).

Pixels [B, 3, y, x] in [-1, 1] <-> latents [B, d, y / stride, x / stride]. The quantiser lives in `quantizer`; scales
and tokens are not known here.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import AutoencoderConfig
from ..model.functional import double_picture, laid_out, norm_silu
from ..model.layers import Operations
from ..replaceable import replaceable


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, ops, **kw) -> None:
        super().__init__()
        self.norm1 = _norm(width_in, ops, **kw)
        self.conv1 = ops.Conv2d(width_in, width, 3, padding=1, **kw)
        self.norm2 = _norm(width, ops, **kw)
        self.conv2 = ops.Conv2d(width, width, 3, padding=1, **kw)
        self.nin_shortcut = ops.Conv2d(width_in, width, 1, **kw) if width_in != width else nn.Identity()

    @replaceable
    def forward(self, x: Tensor) -> Tensor:
        # In one expression, so that nothing is kept that is not read again; the sum is made in place for that too.
        h = self.conv2(norm_silu(self.norm2, self.conv1(norm_silu(self.norm1, x))))
        return h.add_(self.nin_shortcut(x))


class Resample(nn.Module):
    """Half or double the size. Downsampling pads right and bottom only, as the published weights expect."""

    def __init__(self, width: int, down: bool, ops, **kw) -> None:
        super().__init__()
        self.down = down
        self.conv = ops.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else double_picture(x))


class Level(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, ops, **kw) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width if i else width_in, width, ops, **kw) for i in range(blocks))


def middle(width: int, ops, **kw) -> nn.Module:
    """Two residual blocks at the lowest resolution."""
    return nn.Sequential(OrderedDict((f"block_{i}", ResidualBlock(width, width, ops, **kw)) for i in (1, 2)))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, ops, **kw) -> None:
        super().__init__()
        widths = config.encoder_widths
        self.conv_in = ops.Conv2d(3, config.stem, 3, padding=1, **kw)
        self.down = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip((config.stem, *widths), widths)):
            level = Level(width_in, width, config.encoder_blocks, ops, **kw)
            if 2**i < config.stride:
                level.downsample = Resample(width, True, ops, **kw)
            self.down.append(level)
        self.mid = middle(widths[-1], ops, **kw)
        self.norm_out = _norm(widths[-1], ops, **kw)
        self.conv_out = ops.Conv2d(widths[-1], config.bits, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:  # here, so that nobody keeps the level's input meanwhile
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(norm_silu(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, ops, **kw) -> None:
        super().__init__()
        widths = config.decoder_widths
        self.conv_in = ops.Conv2d(config.bits, widths[-1], 3, padding=1, **kw)
        self.mid = middle(widths[-1], ops, **kw)
        self.up = nn.ModuleList()
        for i, (width, width_in) in enumerate(zip(widths, (*widths[1:], widths[-1]))):
            level = Level(width_in, width, config.decoder_blocks, ops, **kw)
            if 0 < i and 2 ** (i - 1) < config.stride:
                level.upsample = Resample(width, False, ops, **kw)
            self.up.append(level)
        self.norm_out = _norm(widths[0], ops, **kw)
        self.conv_out = ops.Conv2d(widths[0], 3, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Autoencoder(nn.Module):
    """Encoder and decoder of the VAE.

    operations: namespace of layers (see `layers`). dtype: of the weights and the computation; decode_dtype: of the
    decoder's, if it is another.
    """

    def __init__(
        self, config: AutoencoderConfig, operations=Operations, dtype: torch.dtype = torch.float32, device=None,
        decode_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.dtype, self.decode_dtype = config, dtype, decode_dtype or dtype
        self.encoder = Encoder(config, operations, dtype=self.dtype, device=device)
        self.decoder = Decoder(config, operations, dtype=self.decode_dtype, device=device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, y, x] in [-1, 1] -> unquantised features [B, d, y / stride, x / stride], fp32."""
        return self.encoder(laid_out(pixels, self.dtype)).float()

    @replaceable
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, d, h, w] -> pixels [B, 3, h * stride, w * stride] in [-1, 1], fp32.

        With the runtime, picture by picture or in tiles where the device has too little memory left (see
        `runtime.tiling`); `Autoencoder.decode.plain` is at once, whatever memory it takes.
        """
        return self.decoder(laid_out(latents, self.decode_dtype)).float().clamp(-1, 1)


def _norm(width: int, ops, **kw) -> nn.Module:
    if width % 32 and width % 24:
        raise ValueError(f"the VAE has a level of {width} channels; group normalisation needs a multiple of 32 or 24")
    return ops.GroupNorm(32 if width % 32 == 0 else 24, width, eps=1e-6, **kw)
