"""What a network looks like, as frozen dataclasses. `files.shapes` reads them off a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer (VAREdit 2B: 32 blocks of width 2048; 8B: 40 of 3584).

    token_bits: bits of one token, counting all positions of a patch. text_width: channels of the text features.
    text_length: most text tokens the unconditional features cover. levels: rows of `lvl_embed`. source: whether it
    reads the tokens of a source picture first (VAREdit) or a text alone (Infinity, its parent); no shape tells.
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


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the VAE (the picture's autoencoder).

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
        f"the transformer predicts tokens of {transformer.token_bits} bits but the VAE (stride "
        f"{autoencoder.stride}, {bits} bits a position) makes tokens of {side * side * bits}; load the VAE the "
        "transformer was trained with"
    )
