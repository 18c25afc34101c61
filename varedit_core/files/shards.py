"""Which files are one model: those that an index lists, or that are numbered NAME-00001-of-00002.safetensors.

Knows names alone; opening the files is the business of `weights`.
"""

from __future__ import annotations

import re
from pathlib import Path

from .reading import read_json

INDEX = ".index.json"
_NUMBERED = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.\w+)")


def index_of(path: Path) -> Path | None:
    """The index beside a file that lists it; None where there is none."""
    return next((index for index in sorted(path.parent.glob(f"*{INDEX}")) if path.name in _listed(index)), None)


def numbered(path: Path) -> list[Path]:
    """The files of a model that a file's number makes it one of, there or not; itself where its name has no number."""
    match = _NUMBERED.fullmatch(path.name)
    if not match or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    return [path.with_name(f"{match[1]}-{n:05}-of-{match[3]}{match[4]}") for n in range(1, int(match[3]) + 1)]


def parts_of(path: Path) -> set[str]:
    """The names of all files of the model that a file belongs to; its own alone for a model in one file."""
    index = index_of(path)
    return _listed(index) if index else {part.name for part in numbered(path)}


def _listed(index: Path) -> set[str]:
    """The names in an index; none where it cannot be read."""
    try:
        return {str(name) for name in read_json(index, "shard index")["weight_map"].values()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return set()
