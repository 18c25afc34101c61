"""Files of tokens: safetensors with a bit a bit, and in their metadata what the bits are of.

A file may come from anywhere, so nothing in it is believed: its sizes must be those of the scale tables and of its own
tensors, and may not come to more than the limits below, before anything is made of it. What would not be read again is
not written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..fitting import MAX_CANVAS_PIXELS, Fitting, Size, canvas_size
from ..sampling.tokens import LOST, Tokens
from ..tokenizer.schedule import TABLES, TOKEN_PIXELS, Grid, Schedule
from .reading import check_file
from .safe_write import check_target as check_file_target
from .safe_write import write_bytes
from .token_header import FORMAT, MAX_BYTES, MAX_HEADER, SUFFIX

AUTO_MASK = "auto_mask"
"""Metadata of files that VAREdit Save Tokens wrote before tokens knew their auto mask."""
DIGEST = "digest"
"""In the facts: of all the rest of the file, so that a changed bit or a swapped tensor is seen. Older files lack it."""
MAX_NUMBERS = 2**26
"""Numbers of the running sum of all edits of a file: 256 MiB, which a draft of one scale asks for with few bits."""
MAX_EDITS = 4096
MAX_BITS = 256
"""Bits a position: published models have at most 64 a token."""
MAX_CHAIN = 100
"""Edits of edits that a file remembers."""


def check_target(path: Path, overwrite: bool = False) -> None:
    """Raise what `save_tokens` would for this path, and make missing folders, before there are tokens."""
    if path.suffix != SUFFIX:
        raise ValueError(f"cannot write tokens to {path.name}; its suffix must be {SUFFIX}")
    check_file_target(path, overwrite)


def save_tokens(
    tokens: Tokens, path: str | os.PathLike[str], overwrite: bool = False,
    write: Callable[[Path, bytes, bool], None] = write_bytes, notes: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a safetensors file, a bit a bit. write: see `safe_write.together`. notes: further metadata that reading
    does not heed, such as the graph that made them. FileExistsError where there is one and overwrite is False,
    ValueError for another suffix and for tokens that `load_tokens` would not read."""
    path = Path(path)
    check_target(path, overwrite)
    tensors: dict[str, Tensor] = {}
    facts = _put(tokens, tensors, "")
    try:
        _check(facts)
        if (size := sum(tensor.numel() for tensor in tensors.values())) > MAX_BYTES:
            raise ValueError(f"they have {size} bytes where at most {MAX_BYTES} are read")
    except ValueError as error:
        raise ValueError(f"these tokens cannot be saved ({error}); save fewer edits in a file") from None
    facts[DIGEST] = _digest(facts, {name: tensor.numpy() for name, tensor in tensors.items()})
    written = save(tensors, {**(notes or {}), "format": FORMAT, "tokens": json.dumps(facts)})
    if (header := int.from_bytes(written[:8], "little")) > MAX_HEADER:
        raise ValueError(f"the notes of these tokens are too long ({header} bytes, at most {MAX_HEADER}); save fewer")
    write(path, written, overwrite)


def load_tokens(path: str | os.PathLike[str]) -> Tokens:
    """Read what `save_tokens` wrote. FileNotFoundError where there is nothing, ValueError where it is no file of
    tokens, a damaged one, or one that asks for more than the limits."""
    path = check_file(path, "file of tokens")
    try:
        _check_bytes(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it holds something else")
            facts = json.loads(metadata.get("tokens", ""))
            if isinstance(facts, dict) and AUTO_MASK in metadata:
                facts.setdefault(AUTO_MASK, float(metadata[AUTO_MASK]))
            _check(facts)
            packed = _packed_bits(file, facts)
            if facts.get(DIGEST, digest := _digest(facts, packed)) != digest:
                raise ValueError("it was damaged or changed after it was saved")
            return _take(packed, facts, "")
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is not a file of tokens ({reason}); save one with VAREdit Save Tokens or varedit edit "
            "--save-tokens"
        ) from None


def _put(tokens: Tokens, tensors: dict[str, Tensor], prefix: str) -> dict:
    """Pack the bits into `tensors`; what they are of."""
    for k, bits in enumerate(tokens.bits):
        tensors[f"{prefix}scale.{k:02d}"] = _packed(bits)
    facts = {"ratio": tokens.schedule.ratio, "scales": len(tokens.schedule), "grid": list(tokens.grid), "fitting": None}
    facts |= {"shapes": [list(bits.shape) for bits in tokens.bits], AUTO_MASK: float(tokens.auto_mask)}
    if tokens.lost:
        facts["lost"] = list(tokens.lost)
    if tokens.fitting is not None:
        facts["fitting"] = {"padded_size": list(tokens.fitting.padded_size), "size": list(tokens.fitting.size)}
        if tokens.fitting.box is not None:
            facts["fitting"]["box"] = list(tokens.fitting.box)
    if tokens.free is not None:
        tensors[f"{prefix}free"] = _packed(tokens.free)
        facts |= {"free": list(tokens.free.shape), "under": _put(tokens.under, tensors, f"{prefix}under.")}
    return facts


def _check_bytes(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes where at most {MAX_BYTES} are read")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise ValueError(f"its header has {header} bytes where at most {MAX_HEADER} are read")


def _counts(facts: Mapping, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The tensors that checked facts tell of: names, and how many bits each packs."""
    for k, shape in enumerate(facts["shapes"]):
        yield f"{prefix}scale.{k:02d}", math.prod(shape)
    if "free" in facts:
        yield f"{prefix}free", math.prod(facts["free"])
        yield from _counts(facts["under"], f"{prefix}under.")


def _packed_bits(file, facts: Mapping) -> dict[str, np.ndarray]:
    """The tensors that checked facts tell of, read when all have been found to be as they say."""
    counts = dict(_counts(facts))
    for name, count in counts.items():
        part = file.get_slice(name)
        if part.get_dtype() != "U8" or part.get_shape() != [-(-count // 8)]:
            raise ValueError(f"{name} has {part.get_shape()} numbers of {part.get_dtype()} where {count} bits belong")
    if others := sorted(set(file.keys()) - counts.keys()):
        raise ValueError(f"it does not say what {_short(others[0])} in it is of")
    packed = {name: file.get_tensor(name).numpy() for name in counts}
    for name, count in counts.items():
        if count % 8 and packed[name][-1] & (0xFF >> count % 8):
            raise ValueError(f"{name} goes on behind its {count} bits")
    return packed


def _digest(facts: Mapping, packed: Mapping[str, np.ndarray]) -> str:
    """Of all that a file says, but for an older file's note of its auto mask."""
    rest = {name: value for name, value in facts.items() if name != DIGEST}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(packed):
        found.update(f"{name} {len(packed[name])} ".encode())
        found.update(packed[name].tobytes())
    return found.hexdigest()


def _take(packed: Mapping[str, np.ndarray], facts: dict, prefix: str) -> Tokens:
    """The tokens of facts and bits that are checked."""
    schedule, own, free, under = _schedule(facts), facts["fitting"], None, None
    bits = tuple(_unpacked(packed[f"{prefix}scale.{k:02d}"], shape) for k, shape in enumerate(facts["shapes"]))
    box = tuple(own["box"]) if own and "box" in own else None
    fitting = own and Fitting(schedule, tuple(own["padded_size"]), tuple(own["size"]), box)
    if "free" in facts:
        free, under = (
            _unpacked(packed[f"{prefix}free"], facts["free"]),
            _take(packed, facts["under"], f"{prefix}under."),
        )
    auto_mask, lost = float(facts.get(AUTO_MASK, 0.0)), tuple(facts.get("lost", ()))
    return Tokens(schedule, bits, tuple(facts["grid"]), fitting, free, under, auto_mask, lost)


def _check(facts: object, depth: int = 1) -> None:
    """ValueError, a few words, where facts contradict themselves or the scale tables, or ask for too much."""
    if not isinstance(facts, dict):
        raise ValueError("it does not say what its tokens are of")
    missing = [name for name in ("ratio", "scales", "grid", "fitting", "shapes") if name not in facts]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    schedule = _schedule(facts)
    grid = _check_grid(facts["grid"], schedule)
    images, channels = _check_shapes(facts["shapes"], schedule, grid)
    if facts["fitting"] is not None:
        _check_fitting(facts["fitting"], schedule)
    amount = facts.get(AUTO_MASK, 0.0)
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount <= 1:
        raise ValueError(f"its auto mask is {_short(amount)}, not a number from 0 to 1")
    lost = facts.get("lost", [])
    if not isinstance(lost, list) or lost != [name for name in LOST if name in lost]:
        raise ValueError(f"what its picture had is {_short(lost)}, not some of {', '.join(LOST)}")
    if "free" in facts or "under" in facts:
        _check_under(facts, schedule, (images, channels, *grid), depth)


def _schedule(facts: Mapping) -> Schedule:
    ratio, scales = facts["ratio"], facts["scales"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or ratio not in TABLES:
        raise ValueError(f"there is no scale table for the ratio {_short(ratio)}")
    if not _whole(scales) or not 1 <= scales <= len(TABLES[ratio]):
        raise ValueError(f"its scales are {_short(scales)} where the table has {len(TABLES[ratio])}")
    return Schedule(ratio, TABLES[ratio][:scales])


def _check_grid(grid: object, schedule: Schedule) -> Grid:
    rows, columns = schedule.grids[-1]
    fits = [(rows * n, columns * n) for n in range(1, TOKEN_PIXELS + 1) if not TOKEN_PIXELS % n]
    if not _sizes(grid, 2) or tuple(grid) not in fits:
        raise ValueError(f"its grid {_short(grid)} is none of the latents of {rows}x{columns} tokens")
    return tuple(grid)


def _check_shapes(shapes: object, schedule: Schedule, grid: Grid) -> tuple[int, int]:
    """How many edits there are, and bits a position."""
    if not isinstance(shapes, list) or not 1 <= len(shapes) <= len(schedule):
        raise ValueError(f"its shapes are not of 1 to {len(schedule)} scales")
    patch = grid[0] // schedule.grids[-1][0]
    images, channels = shapes[0][:2] if _sizes(shapes[0], 4) else (0, 0)
    for k, (shape, (h, w)) in enumerate(zip(shapes, schedule.grids), start=1):
        if not _sizes(shape, 4) or shape != [images, channels, h * patch, w * patch]:
            raise ValueError(f"scale {k} has the shape {_short(shape)} where its grid is {h * patch}x{w * patch}")
    if images > MAX_EDITS:
        raise ValueError(f"it has {_short(images)} edits where at most {MAX_EDITS} are read")
    if channels > MAX_BITS:
        raise ValueError(f"it has {_short(channels)} bits a position where at most {MAX_BITS} are read")
    numbers = images * channels * math.prod(grid)
    if numbers > MAX_NUMBERS:
        raise ValueError(f"its sum has {numbers} numbers where at most {MAX_NUMBERS} are read")
    return images, channels


def _check_fitting(fitting: object, schedule: Schedule) -> None:
    sizes = [fitting.get(name) for name in ("padded_size", "size")] if isinstance(fitting, dict) else [None, None]
    if not all(_sizes(size, 2) for size in sizes):
        raise ValueError(f"its picture has no size: {_short(fitting)}")
    padded, size = map(tuple, sizes)
    if max(math.prod(padded), math.prod(size)) > MAX_CANVAS_PIXELS:
        raise ValueError(f"its picture has a canvas {_short(padded)} of more than {MAX_CANVAS_PIXELS} pixels")
    if "box" in fitting:
        _check_box(fitting["box"], size)
    size = Fitting(schedule, padded, size, fitting.get("box")).seen.size
    if padded != canvas_size(size, schedule.pixels):
        raise ValueError(f"its picture of {size[0]}x{size[1]} does not fit a canvas of {padded[0]}x{padded[1]}")


def _check_box(box: object, size: Size) -> None:
    """Of the part of a picture that was edited: within it, and not all of it."""
    if not (isinstance(box, list) and len(box) == 4 and all(map(_whole, box))):
        raise ValueError(f"the part of its picture is {_short(box)}, no left, top, right and bottom")
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]) or (right - left, bottom - top) == size:
        raise ValueError(f"the part of its picture {_short(box)} does not lie in {size[0]}x{size[1]}")


def _check_under(facts: Mapping, schedule: Schedule, shape: Sequence[int], depth: int) -> None:
    """What is held to a source: where (`free`), and the source's tokens, of the same sizes."""
    free, under = facts.get("free"), facts.get("under")
    images, channels, *grid = shape
    if len(facts["shapes"]) < len(schedule):
        raise ValueError("it is held to a source before its last scale")
    if not _sizes(free, 4) or free[0] not in (1, images) or free[1] not in (1, channels) or free[2:] != grid:
        raise ValueError(f"it is free in the shape {_short(free)} where its sum has {_short(list(shape))}")
    if depth >= MAX_CHAIN:
        raise ValueError(f"it is a chain of more than {MAX_CHAIN} edits")
    _check(under, depth + 1)
    if _schedule(under) != schedule or under["grid"] != grid or under["shapes"][0][:2] != [images, channels]:
        raise ValueError("its source has other sizes than the edit")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes(value: object, count: int) -> bool:
    """Whether a value is a list of so many sizes."""
    return isinstance(value, list) and len(value) == count and all(_whole(one) and one > 0 for one in value)


def _short(value: object) -> str:
    """A value of a file, however long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _packed(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.flatten().cpu().numpy()))


def _unpacked(packed: np.ndarray, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed, count=math.prod(shape))).bool().view(*shape)
