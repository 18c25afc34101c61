"""What a network looks like, as frozen dataclasses read off a checkpoint's own keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer (VAREdit 2B: 32 blocks of width 2048; 8B: 40 of 3584).

    token_bits: bits of one token, counting all positions of a patch. text_width: channels of the text
    features. text_length: most text tokens the unconditional features cover. levels: rows of `lvl_embed`. source:
    whether it reads the tokens of a source picture first (VAREdit) or a text alone (Infinity, its parent); no shape tells.
    """

    depth: int
    width: int
    heads: int
    token_bits: int
    text_width: int
    text_length: int
    hidden: int
    levels: int
    source: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads or self.head_size % 4:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width} into multiples of 4")
        if self.width % self.pool_heads:
            raise ValueError(f"{self.pool_heads} text pooling heads do not divide the width {self.width}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def pool_heads(self) -> int:
        """Heads of the text pooling: one for every 128 text channels, 64 for widths above 4096."""
        return max(1, self.text_width // (64 if self.width > 4096 else 128))

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> TransformerConfig:
        """Read the sizes off the canonical parameter shapes (see `checkpoints`)."""
        width = shapes["word_embed.weight"][0]
        text_length, text_width = shapes["cfg_uncond.weight"]
        return cls(
            depth=_count(shapes, r"blocks\.(\d+)\."),
            width=width,
            heads=shapes["blocks.0.sa.scale_mul.weight"][-1],
            token_bits=shapes["head.weight"][0] // 2,  # not an input size: 4-bit formats pack those
            text_width=text_width,
            text_length=text_length,
            hidden=shapes["blocks.0.ffn.fc1.weight"][0],
            levels=shapes["lvl_embed.weight"][0],
        )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the tokenizer's convolutional autoencoder.

    bits: channels of the latent = bits of one position. stem: channels after the encoder's first
    convolution. encoder_widths / decoder_widths: channels of every level, finest first.
    encoder_blocks / decoder_blocks: residual blocks a level. stride: pixels a latent position covers.
    """

    bits: int
    stem: int
    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    stride: int

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> AutoencoderConfig:
        """Read the sizes off the canonical parameter shapes (see `checkpoints`)."""
        return cls(
            bits=shapes["encoder.conv_out.weight"][0],
            stem=shapes["encoder.conv_in.weight"][0],
            encoder_widths=_widths(shapes, "encoder.down"),
            decoder_widths=_widths(shapes, "decoder.up"),
            encoder_blocks=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
            decoder_blocks=_count(shapes, r"decoder\.up\.0\.block\.(\d+)\."),
            stride=2
            ** sum(re.fullmatch(r"encoder\.down\.\d+\.downsample\.conv\.weight", key) is not None for key in shapes),
        )


TRANSFORMERS = {
    "2B": TransformerConfig(32, 2048, 16, 32, 2048, 512, 8192, 15),
    "8B": TransformerConfig(40, 3584, 28, 56, 2048, 512, 14336, 15),
}
AUTOENCODERS = {
    "2B": AutoencoderConfig(32, 128, (128, 256, 512, 512, 512), (128, 256, 512, 512, 512), 2, 3, 16),
    "8B": AutoencoderConfig(14, 128, (128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 8),
}
"""The published models. Loading does not need them: sizes are read off the file."""


def patch_size(transformer: TransformerConfig, autoencoder: AutoencoderConfig) -> int:
    """Latent positions a token spans along each axis: 2 for the 8B layout, 1 for the 2B layout.

    Raises ValueError where the two networks do not belong together.
    """
    side, bits = 16 // autoencoder.stride if autoencoder.stride <= 16 else 0, autoencoder.bits
    if side and side * side * bits == transformer.token_bits:
        return side
    raise ValueError(
        f"the transformer predicts tokens of {transformer.token_bits} bits but the tokenizer (stride {autoencoder.stride}, "
        f"{bits} bits a position) makes tokens of {side * side * bits}; load the tokenizer the transformer was trained with"
    )


def _count(shapes: Shapes, pattern: str) -> int:
    return 1 + max(int(match[1]) for match in map(re.compile(pattern).match, shapes) if match)


def _widths(shapes: Shapes, prefix: str) -> tuple[int, ...]:
    levels = _count(shapes, re.escape(prefix) + r"\.(\d+)\.")
    return tuple(shapes[f"{prefix}.{level}.block.0.conv2.weight"][0] for level in range(levels))
