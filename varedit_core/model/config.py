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
