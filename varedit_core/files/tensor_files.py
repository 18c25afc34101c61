"""Writing safetensors files, a tensor at a time. See https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .safe_write import safe_write
from .weights import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Facts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The type and shape of each tensor by its key."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], overwrite: bool = True
) -> None:
    """Write tensors, of any device, to a safetensors file. Raises as `safe_write`."""
    ordered = dict(sorted(tensors.items(), key=lambda pair: -pair[1].dtype.itemsize))  # so that every one is aligned
    facts = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered.items()}
    write_in_turn(path, facts, ordered.values(), metadata, overwrite)


def write_in_turn(
    path: str | os.PathLike[str], facts: Facts, tensors: Iterable[Tensor], metadata: Mapping[str, str],
    overwrite: bool = True, on_tensor: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Write a safetensors file of tensors that come one after the other, in the order of `facts`.

    on_tensor(done, total): bytes written. Raises as `safe_write`.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    for key, (dtype, shape) in facts.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with safe_write(path, overwrite) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            bytes_of = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            done += file.write(memoryview(bytes_of.numpy()))
            if on_tensor:
                on_tensor(done, end)
