"""VAREdit in plain PyTorch: instruction-based image editing by next-scale prediction (arXiv 2508.15772).

`Editor` edits pictures; `sample` is the loop behind it; the modules' docstrings say what each one knows.
"""

from .checkpoints import load_autoencoder, load_transformer
from .defaults import SamplingSettings
from .pipeline import Editor
from .sampling import Scale, sample
from .schedule import Schedule, schedule_for
from .text import load_text_encoder
from .weights import WeightError

__version__ = "0.1.0"
__all__ = [
    "Editor", "SamplingSettings", "Scale", "Schedule", "WeightError", "load_autoencoder", "load_text_encoder",
    "load_transformer", "sample", "schedule_for",
]  # fmt: skip
