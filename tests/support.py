"""Where the tests' files lie, and inputs that several of them use."""

from __future__ import annotations

from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
MORE_GOLDEN = ROOT.parent / "shared" / "golden"


def recordings() -> list[Path]:
    """The recordings shipped with the tests, and the full set where it lies beside the project."""
    files = {path.name: path for folder in (MORE_GOLDEN, GOLDEN) for path in sorted(folder.glob("*.safetensors"))}
    return sorted(files.values(), key=lambda path: path.name)


def sources(record, count: int) -> torch.Tensor:
    """Features [count, d, H, W] of up to three pictures, made of a recorded one."""
    features = record["ref.vae_features"].float()
    return torch.cat([features, features.flip(-1), features * 0.5])[:count]


def words(record, count: int) -> list[torch.Tensor]:
    """Text features of up to three instructions of several lengths, made of a recorded one."""
    text = record.texts("text")[0]
    return [text, text.flip(0)[:3], text.repeat(3, 1)][:count]
