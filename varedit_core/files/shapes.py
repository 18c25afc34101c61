"""The sizes of networks, read off the keys and shapes of their weights (the canonical ones, see `checkpoints`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..model.config import AutoencoderConfig, TransformerConfig

Shapes = Mapping[str, tuple[int, ...]]


def transformer_config(shapes: Shapes) -> TransformerConfig:
    """The sizes of a transformer. KeyError for a weight that is not there; no shape tells `source`."""
    width = shapes["word_embed.weight"][0]
    text_length, text_width = shapes["cfg_uncond.weight"]
    return TransformerConfig(
        depth=_count(shapes, r"blocks\.(\d+)\."),
        width=width,
        heads=shapes["blocks.0.sa.scale_mul.weight"][-1],
        token_bits=shapes["head.weight"][0] // 2,  # not an input size: 4-bit formats pack those
        text_width=text_width,
        text_length=text_length,
        hidden=shapes["blocks.0.ffn.fc1.weight"][0],
        levels=shapes["lvl_embed.weight"][0],
    )


def autoencoder_config(shapes: Shapes) -> AutoencoderConfig:
    """The sizes of a VAE. KeyError for a weight that is not there."""
    halved = [key for key in shapes if re.fullmatch(r"encoder\.down\.\d+\.downsample\.conv\.weight", key)]
    return AutoencoderConfig(
        bits=shapes["encoder.conv_out.weight"][0],
        stem=shapes["encoder.conv_in.weight"][0],
        encoder_widths=_widths(shapes, "encoder.down"),
        decoder_widths=_widths(shapes, "decoder.up"),
        encoder_blocks=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        decoder_blocks=_count(shapes, r"decoder\.up\.0\.block\.(\d+)\."),
        stride=2 ** len(halved),
    )


def _count(shapes: Shapes, pattern: str) -> int:
    return 1 + max(int(match[1]) for match in map(re.compile(pattern).match, shapes) if match)


def _widths(shapes: Shapes, prefix: str) -> tuple[int, ...]:
    levels = _count(shapes, re.escape(prefix) + r"\.(\d+)\.")
    return tuple(shapes[f"{prefix}.{level}.block.0.conv2.weight"][0] for level in range(levels))
