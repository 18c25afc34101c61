"""What a file of tokens is known by, without reading its tokens. Imports nothing large: lists of files need it."""

from __future__ import annotations

import os

FORMAT = "varedit.tokens"
SUFFIX = ".safetensors"
MAX_BYTES = 128 << 20
"""Of a file: its bits take eight times as much in memory."""
MAX_HEADER = 4 << 20
"""Bytes of names, sizes and metadata: the longest chain has less than a tenth."""


def holds_tokens(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file says that it is one of tokens; not whether it is in order."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = int.from_bytes(file.read(8), "little")
            return size <= MAX_HEADER and f'"{FORMAT}"'.encode() in file.read(size)
    except OSError:
        return False
