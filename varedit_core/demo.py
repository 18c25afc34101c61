"""Where the demo model lies: in `demo/` of a clone of the repository. An installed wheel does not hold it."""

from __future__ import annotations

from pathlib import Path

from .defaults import SIZES

FOLDER = Path(__file__).resolve().parents[1] / "demo"
SAMPLES = FOLDER.with_name("samples")
SIDE = "256"
"""The only size it was trained at, in pixels."""
SIZE = SIZES[SIDE]
GUIDANCE = 2.0
"""Less than the published models' 3: it edits as well and keeps backgrounds better (docs/LOG.md)."""
NOTICE = "using the demo model, a toy that knows drawn shapes and global styles only; --model names another"
FILES = ("diffusion_models/varedit_demo.safetensors", "vae/varedit_demo_tokenizer.safetensors", "text_encoders")
"""Transformer, VAE and text encoder, in folders named as ComfyUI names them: the pack adds these to its own."""


def demo_files() -> tuple[Path, Path, Path]:
    """The demo model's transformer, VAE and text encoder (a folder). FileNotFoundError where one is missing."""
    paths = tuple(FOLDER / name for name in FILES)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"the demo model is not here ({FOLDER} has no {missing[0]}); run from a clone of the repository, or name "
            "a model with --model, --vae and --text-encoder"
        )
    return paths
