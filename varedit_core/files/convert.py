"""Convert weight files to safetensors with canonical keys, a tensor at a time.

The result says what it is in its metadata. bf16 and fewer bits apply to the transformer's blocks and to the text
encoder; everything the model computes in fp32 stays fp32, so a converted file edits like the original.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..defaults import KINDS
from ..runtime.formats import Float8, Format, Int8, Nvfp4, int8_rotated
from ..text.encoder import blank_encoder, encoder_weights
from .checkpoints import (
    KIND,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    blank,
    canonical,
    checked_kind,
    describe,
    has_encoder,
    holds,
    part_of,
    tell_taken,
    told_kind,
)  # fmt: skip
from .quantised import quantised, told
from .reading import printable
from .safe_write import check_free, make_folder
from .tensor_files import Facts, write_in_turn
from .weights import WeightError, Weights, check_finite, open_weights

logger = logging.getLogger(__name__)

FORMS: Mapping[str, Callable[[bool, tuple[int, int]], tuple[Format, ...]]] = {
    "fp8": lambda down, shape: (Float8(),),
    "int8": lambda down, shape: (int8_rotated(shape) if down else Int8(),),
    "nvfp4": lambda down, shape: (Float8(),) if down else (Nvfp4(), Float8()),
}
"""How a precision stores a matrix: the first of these formats that takes its shape. down: whether it is a
down-projection, which reads outliers."""
PRECISIONS = ("fp32", "bf16", *FORMS)
_MATRIX = re.compile(r"(encoder\.)?block\.|blocks\.\d+\.(sa\.mat|sa\.proj|ca\.mat|ca\.proj|ffn)")
_DOWN = re.compile(r"\.ffn\.fc2\.|\.DenseReluDense\.wo\.")
ARCHITECTURES = {TRANSFORMER: "varedit", TOKENIZER: "varedit-tokenizer", TEXT_ENCODER: "t5-encoder"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the result: what it is made of, its type and shape; the format of its matrix, and which part of it
    this is."""

    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: Format | None = None
    part: str = "weight"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert(
    source: str | Path,
    target: str | Path,
    precision: str = "bf16",
    overwrite: bool = False,
    on_tensor: Callable[[int, int], None] | None = None,
    kind: str = KINDS[0],
) -> dict[str, str]:
    """Convert a transformer, VAE or text encoder file or folder; returns the metadata written.

    precision: "fp32", "bf16", or the blocks' matrices in fewer bits: "fp8" (float8_e4m3fn with one scale a matrix),
    "int8" (with one scale an output channel; the down-projection's inputs are rotated), "nvfp4" (4 bits with a scale
    for every 16 numbers; the down-projection as in fp8). on_tensor(done, total): bytes written. kind: what a
    transformer was trained for, "edit" or "text-to-image"; auto keeps what the file says (see `checkpoints.told_kind`),
    and says nothing where it does not. Reads and writes one tensor at a time. Raises WeightError for unusable input,
    FileExistsError where the target exists, ValueError for a bad choice.
    """
    source, target = Path(source), Path(target)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    check_result(target, overwrite)
    chosen = checked_kind(kind)
    opened = open_weights(source, has_encoder)
    part, _ = part_of(opened)
    if part is None:
        raise WeightError(f"{source} is {describe(opened)}; expected a VAREdit transformer, a VAE or a T5 encoder")
    if part == TRANSFORMER and holds(opened, TOKENIZER):
        logger.warning("%s holds a VAE too, which is left out; keep the file for it", source)
    weights = _checked(opened, part, source)
    plan = _plan(weights, part, precision)
    metadata = _metadata(plan, part, precision, source)
    kind = (chosen or told_kind(opened)) if part == TRANSFORMER else None
    metadata |= {KIND: kind} if kind else {}
    total = sum(entry.nbytes for entry in plan.values())
    check_space(target, total)
    write_in_turn(target, facts_of(plan), _tensors(weights, plan), metadata, overwrite, on_tensor)
    return metadata


def _checked(weights: Weights, part: str, source: Path) -> Weights:
    """The part's tensors under canonical keys, known to be whole."""
    if part == TEXT_ENCODER:  # a whole T5 has a decoder too
        weights = encoder_weights(weights)
        own = blank_encoder(source, weights).state_dict()
        return weights.renamed({key: key for key in weights if key in own or key.removesuffix("_scale") in own})
    weights = canonical(weights, part)
    blank(weights, part)
    tell_taken(weights, part)
    return weights


def _plan(weights: Weights, part: str, precision: str) -> dict[str, Entry]:
    if quantised(weights):
        raise WeightError(f"{weights.path} is in fewer bits already; convert the original file instead")
    return planned(weights.meta, part, precision)


def planned(tensors: Mapping[str, Tensor], part: str, precision: str) -> dict[str, Entry]:
    """The tensors of a converted file. tensors: those of the part, by their keys here; none of them is read."""
    plan: dict[str, Entry] = {}
    for key, meta in tensors.items():
        shape, dtype = tuple(meta.shape), _dtype(part, key, precision)
        stored = _stored(part, key, meta, precision) if dtype == torch.bfloat16 else None
        if stored is None:
            plan[key] = Entry(key, dtype, shape)
            continue
        name = key.removesuffix(".weight")
        plan |= {f"{name}.{n}": Entry(key, kind, s, stored, n) for n, (kind, s) in stored.kinds(shape).items()}
    return plan


def _dtype(part: str, key: str, precision: str) -> torch.dtype:
    narrow = part == TEXT_ENCODER or (part == TRANSFORMER and _MATRIX.match(key))
    return torch.bfloat16 if narrow and precision != "fp32" else torch.float32


def _stored(part: str, key: str, meta: Tensor, precision: str) -> Format | None:
    """The format of a matrix; None where it stays in bf16."""
    matrix = key.endswith(".weight") and meta.ndim == 2 and "relative_attention_bias" not in key
    if precision not in FORMS or not (matrix and _MATRIX.match(key)):
        return None
    shape = tuple(meta.shape)
    forms = FORMS[precision](bool(_DOWN.search(key)), shape)
    return next((form for form in forms if form.fits(shape)), None)


def _metadata(plan: Mapping[str, Entry], part: str, precision: str, source: Path) -> dict[str, str]:
    layers = {entry.source.removesuffix(".weight"): entry.stored for entry in plan.values() if entry.stored}
    return {
        "format": "pt",
        "varedit.architecture": ARCHITECTURES[part],
        "varedit.precision": "fp32" if part == TOKENIZER else precision,
        "varedit.converted_from": printable(source.name),
        **told(layers),
    }


def facts_of(plan: Mapping[str, Entry]) -> Facts:
    """The types and shapes of a plan's tensors."""
    return {key: (entry.dtype, entry.shape) for key, entry in plan.items()}


def check_result(target: Path, overwrite: bool) -> None:
    """ValueError where a result is not named .safetensors, FileExistsError where it exists and may not be replaced."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors")
    check_free(target, overwrite)


def check_space(target: Path, needed: int) -> None:
    """Make the result's folder; ValueError where its disk has not that many bytes free."""
    make_folder(target.parent)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ValueError(
            f"{target.parent} has {free / 1e9:.3g} GB free but the result takes {needed / 1e9:.3g} GB; choose another "
            "disk"
        )


def _tensors(weights: Weights, plan: Mapping[str, Entry]) -> Iterator[Tensor]:
    source, parts = None, {}
    fast = "cuda" if torch.cuda.is_available() else "cpu"  # the same numbers on both
    for entry in plan.values():
        if entry.source != source:
            source, tensor = entry.source, weights[entry.source]
            check_finite(weights, source, tensor)
            parts = entry.stored.round(tensor.to(fast)) if entry.stored else {"weight": tensor.to(entry.dtype)}
            check_finite(weights, source, parts["weight"])  # what is too large for its type
        yield parts[entry.part]
