"""Where the tests' files lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
MORE_GOLDEN = ROOT.parent / "shared" / "golden"


def recordings() -> list[Path]:
    """The recordings shipped with the tests, and the full set where it lies beside the project."""
    files = {path.name: path for folder in (MORE_GOLDEN, GOLDEN) for path in sorted(folder.glob("*.safetensors"))}
    return sorted(files.values(), key=lambda path: path.name)
