"""The tokenizer's convolutional encoder and decoder (BSQ-VAE; Infinity, arXiv 2412.04431, section 3.2).

Pixels [B, 3, y, x] in [-1, 1] <-> latents [B, d, y / stride, x / stride]. The quantiser lives in
`quantizer`; scales and tokens are not known here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import AutoencoderConfig
from ..model.layers import Operations
from ..runtime.kernels import add_pictures, double_picture, fusable
from ..runtime.tiling import decode_fitted


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, ops, **kw) -> None:
        super().__init__()
        self.norm1 = _norm(width_in, ops, **kw)
        self.conv1 = ops.Conv2d(width_in, width, 3, padding=1, **kw)
        self.norm2 = _norm(width, ops, **kw)
        self.conv2 = ops.Conv2d(width, width, 3, padding=1, **kw)
        self.nin_shortcut = ops.Conv2d(width_in, width, 1, **kw) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # In one expression, so that nothing is kept that is not read again; the sum is made in place for that too.
        h, bias = _apart(self.conv2, _activated(self.norm2, *_apart(self.conv1, _activated(self.norm1, x))))
        y, own = _apart(self.nin_shortcut, x)
        return add_pictures(h, y, own if bias is None else bias if own is None else bias + own)


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
        self.block = nn.ModuleList(
            ResidualBlock(width_in if i == 0 else width, width, ops, **kw) for i in range(blocks)
        )


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
            for block in level.block:  # here, so that nobody keeps the level's input meanwhile
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(_activated(self.norm_out, self.mid(x)))


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
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(_activated(self.norm_out, x))


class Autoencoder(nn.Module):
    """Encoder and decoder of the tokenizer.

    operations: namespace of layers (see `operations`); a group norm with a method `silu` is asked for both at once.
    dtype: of the weights and the computation; decode_dtype: of the decoder's, if it is another.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        operations=Operations,
        dtype: torch.dtype = torch.float32,
        device=None,
        decode_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.decode_dtype = dtype, decode_dtype or dtype
        self.encoder = Encoder(config, operations, dtype=self.dtype, device=device)
        self.decoder = Decoder(config, operations, dtype=self.decode_dtype, device=device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, y, x] in [-1, 1] -> unquantised features [B, d, y / stride, x / stride], fp32."""
        return self.encoder(_laid_out(pixels, self.dtype, self.encoder.norm_out)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, d, h, w] -> pixels [B, 3, h * stride, w * stride] in [-1, 1], fp32.

        Where the device has too little memory left, picture by picture or in tiles (see `tiling`).
        """
        return decode_fitted(self.decode_whole, latents, self.config.stride, self.bytes_to_decode)

    def decode_whole(self, latents: Tensor) -> Tensor:
        """`decode` at once, whatever memory it takes."""
        return self.decoder(_laid_out(latents, self.decode_dtype, self.decoder.norm_out)).float().clamp(-1, 1)

    @property
    def bytes_to_decode(self) -> int:
        """Memory that decoding takes, a position of the latents; about, and rather more than less."""
        stride, widths = self.config.stride, self.config.decoder_widths
        wider = (max(pair) for pair in zip(widths, (*widths[1:], widths[-1])))
        # A residual block that changes the width holds its input, that normalised, and the first convolution's result.
        numbers = max(3 * width / min(2**level, stride) ** 2 for level, width in enumerate(wider))
        return round(numbers * stride**2 * self.decode_dtype.itemsize)


def _activated(norm: nn.Module, x: Tensor, offset: Tensor | None = None) -> Tensor:
    """SiLU of a norm of x + offset, at once where the layer can."""
    if hasattr(norm, "silu"):
        return norm.silu(x, offset)
    return F.silu(norm(x if offset is None else x + offset[:, None, None]))


def _apart(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's result without its bias, and the bias, where the layer can leave it to what follows."""
    return layer.apart(x) if hasattr(layer, "apart") else (layer(x), None)


def _laid_out(x: Tensor, dtype: torch.dtype, norm: nn.Module) -> Tensor:
    """x as convolutions and norms of this kind are fastest with it: channels-last where norms are fused, else plain."""
    if hasattr(norm, "silu") and fusable(x):
        return x.to(dtype, memory_format=torch.channels_last)
    # Strides from a permute make torch pick channels-last kernels, whose CPU group normalisation is less exact.
    return x.to(dtype).contiguous()


def _norm(width: int, ops, **kw) -> nn.Module:
    if width % 32 and width % 24:
        raise ValueError(
            f"the tokenizer has a level of {width} channels; group normalisation needs a multiple of 32 or 24"
        )
    return ops.GroupNorm(32 if width % 32 == 0 else 24, width, eps=1e-6, **kw)
