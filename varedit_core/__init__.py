"""VAREdit in plain PyTorch: instruction-based image editing by next-scale prediction (arXiv 2508.15772).

`Editor` edits pictures; `sample` is the loop behind it; the modules' docstrings say what each one knows. Names are
imported when they are first asked for, so that `varedit_core.defaults` can be read without loading torch.
"""

from importlib import import_module

__version__ = "0.1.0"
_HOMES = {
    "Controls": "controls.registry", "Editor": "editor", "Region": "pictures.composite",
    "SamplingSettings": "sampling.settings", "Shortcuts": "controls.registry",
    "Tokens": "sampling.tokens", "Scale": "sampling.scale", "Schedule": "tokenizer.schedule",
    "WeightError": "files.weights", "load_autoencoder": "files.checkpoints", "load_text_encoder": "text.encoder",
    "load_transformer": "files.checkpoints", "sample": "runtime.session", "schedule_for": "tokenizer.schedule",
}  # fmt: skip
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
