"""Sizes of the published models. Loading does not need them: sizes are read off the file."""

from ..model.config import AutoencoderConfig, TransformerConfig

TRANSFORMERS = {
    "2B": TransformerConfig(32, 2048, 16, 32, 2048, 512, 8192, 15),
    "8B": TransformerConfig(40, 3584, 28, 56, 2048, 512, 14336, 15),
}
AUTOENCODERS = {
    "2B": AutoencoderConfig(32, 128, (128, 256, 512, 512, 512), (128, 256, 512, 512, 512), 2, 3, 16),
    "8B": AutoencoderConfig(14, 128, (128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 8),
}
