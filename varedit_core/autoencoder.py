"""The tokenizer's convolutional encoder and decoder (BSQ-VAE; Infinity, arXiv 2412.04431, section 3.2).

Pixels [B, 3, y, x] in [-1, 1] <-> latents [B, d, y / stride, x / stride]. The quantiser lives in
`quantizer`; scales and tokens are not known here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AutoencoderConfig
from .operations import Operations


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, ops, **kw) -> None:
        super().__init__()
        self.norm1 = _norm(width_in, ops, **kw)
        self.conv1 = ops.Conv2d(width_in, width, 3, padding=1, **kw)
        self.norm2 = _norm(width, ops, **kw)
        self.conv2 = ops.Conv2d(width, width, 3, padding=1, **kw)
        self.nin_shortcut = ops.Conv2d(width_in, width, 1, **kw) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Resample(nn.Module):
    """Half or double the size. Downsampling pads right and bottom only, as the published weights expect."""

    def __init__(self, width: int, down: bool, ops, **kw) -> None:
        super().__init__()
        self.down = down
        self.conv = ops.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, ops, **kw) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width_in if i == 0 else width, width, ops, **kw) for i in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Middle(nn.Module):
    def __init__(self, width: int, ops, **kw) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, ops, **kw)
        self.block_2 = ResidualBlock(width, width, ops, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


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
        self.mid = Middle(widths[-1], ops, **kw)
        self.norm_out = _norm(widths[-1], ops, **kw)
        self.conv_out = ops.Conv2d(widths[-1], config.bits, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, ops, **kw) -> None:
        super().__init__()
        widths = config.decoder_widths
        self.conv_in = ops.Conv2d(config.bits, widths[-1], 3, padding=1, **kw)
        self.mid = Middle(widths[-1], ops, **kw)
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
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder and decoder of the tokenizer.

    operations: namespace of layers (see `operations`). dtype: of the weights and the computation.
    """

    def __init__(
        self, config: AutoencoderConfig, operations=Operations, dtype: torch.dtype = torch.float32, device=None
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.encoder = Encoder(config, operations, dtype=dtype, device=device)
        self.decoder = Decoder(config, operations, dtype=dtype, device=device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, y, x] in [-1, 1] -> unquantised features [B, d, y / stride, x / stride], fp32."""
        return self.encoder(self._laid_out(pixels)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, d, h, w] -> pixels [B, 3, h * stride, w * stride] in [-1, 1], fp32."""
        return self.decoder(self._laid_out(latents)).float().clamp(-1, 1)

    def _laid_out(self, x: Tensor) -> Tensor:
        # Strides from a permute make torch pick channels-last kernels, whose CPU group normalisation is less exact.
        return x.to(self.dtype).contiguous()


def _norm(width: int, ops, **kw) -> nn.Module:
    if width % 32 and width % 24:
        raise ValueError(
            f"the tokenizer has a level of {width} channels; group normalisation needs a multiple of 32 or 24"
        )
    return ops.GroupNorm(32 if width % 32 == 0 else 24, width, eps=1e-6, **kw)
