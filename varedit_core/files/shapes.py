"""The sizes of networks, read off the keys and shapes of their weights (the canonical ones, see `checkpoints`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..model.config import AutoencoderConfig, TransformerConfig

Shapes = Mapping[str, tuple[int, ...]]
MAX_SIZE, MAX_LAYERS, MAX_LEVELS = 1 << 20, 1000, 16
"""Far more than any network has: sizes come out of files, and what is larger is not built to see whether it fits."""
_LAYERS = {"depth", "layers", "encoder_blocks", "decoder_blocks"}


def checked(sizes: Mapping) -> dict:
    """A network's sizes. ValueError where a whole number among them is none that a network can have."""
    for name, value in sizes.items():
        if isinstance(value, tuple) and not 1 <= len(value) <= MAX_LEVELS:
            raise ValueError(f"it would have {len(value)} levels, which is not from 1 to {MAX_LEVELS}")
        most = MAX_LAYERS if name in _LAYERS else MAX_SIZE
        for size in value if isinstance(value, tuple) else (value,):
            if isinstance(size, int) and not 1 <= size <= most:
                raise ValueError(f"its {name.replace('_', ' ')} would be {size}, which is not from 1 to {most}")
    return dict(sizes)


def transformer_config(shapes: Shapes) -> TransformerConfig:
    """The sizes of a transformer. KeyError for a weight that is not there; no shape tells `source`."""
    width = shapes["word_embed.weight"][0]
    text_length, text_width, *_ = shapes["cfg_uncond.weight"] + (0, 0)  # sizes of 0 are refused
    sizes = dict(
        depth=_count(shapes, "blocks"),
        width=width,
        heads=shapes["blocks.0.sa.scale_mul.weight"][-1],
        token_bits=shapes["head.weight"][0] // 2,  # not an input size: 4-bit formats pack those
        text_width=text_width,
        text_length=text_length,
        hidden=shapes["blocks.0.ffn.fc1.weight"][0],
        levels=shapes["lvl_embed.weight"][0],
    )
    return TransformerConfig(**checked(sizes))


def autoencoder_config(shapes: Shapes) -> AutoencoderConfig:
    """The sizes of a VAE. KeyError for a weight that is not there."""
    halved = [key for key in shapes if re.fullmatch(r"encoder\.down\.\d+\.downsample\.conv\.weight", key)]
    sizes = dict(
        bits=shapes["encoder.conv_out.weight"][0],
        stem=shapes["encoder.conv_in.weight"][0],
        encoder_widths=_widths(shapes, "encoder.down"),
        decoder_widths=_widths(shapes, "decoder.up"),
        encoder_blocks=_count(shapes, "encoder.down.0.block"),
        decoder_blocks=_count(shapes, "decoder.up.0.block"),
        stride=2 ** min(len(halved), 2 * MAX_LEVELS),
    )
    return AutoencoderConfig(**checked(sizes))


def _count(shapes: Shapes, prefix: str) -> int:
    """How many layers there are, by the numbers in their keys. ValueError where some are left out."""
    pattern = re.compile(rf"{re.escape(prefix)}\.([0-9]{{1,9}})\.")
    found = {int(match[1]) for match in map(pattern.match, shapes) if match}
    if found != set(range(len(found))):
        raise ValueError(f"it has {prefix}.{max(found)} but not all before it")
    return len(found)


def _widths(shapes: Shapes, prefix: str) -> tuple[int, ...]:
    levels = _count(shapes, prefix)
    return tuple(shapes[f"{prefix}.{level}.block.0.conv2.weight"][0] for level in range(levels))
