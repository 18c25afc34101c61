"""Convert weight files to safetensors with canonical keys, a tensor at a time.

The result says what it is in its metadata. bf16 and 8-bit apply to the transformer's blocks and to the text
encoder; everything the model computes in fp32 stays fp32, so a converted file edits like the original.
"""

from __future__ import annotations

import json
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
    holds,
    part_of,
    told_kind,
)  # fmt: skip
from .reading import printable
from .safe_write import check_free, make_folder
from .tensor_files import Facts, write_in_turn
from .weights import WeightError, Weights, check_finite, open_weights

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp8")
ARCHITECTURES = {TRANSFORMER: "varedit", TOKENIZER: "varedit-tokenizer", TEXT_ENCODER: "t5-encoder"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the result: where it comes from, its type and shape, and whether it is 8-bit or a scale."""

    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    role: str = "plain"

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

    precision: "fp32", "bf16", or "fp8" (float8_e4m3fn with one fp32 scale a matrix). on_tensor(done, total):
    bytes written. kind: what a transformer was trained for, "edit" or "text-to-image"; auto keeps what the file says
    (see `checkpoints.told_kind`), and says nothing where it does not. Reads and writes one tensor at a time. Raises
    WeightError for unusable input, FileExistsError where the target exists, ValueError for a bad choice.
    """
    source, target = Path(source), Path(target)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    check_result(target, overwrite)
    chosen = checked_kind(kind)
    opened = open_weights(source)
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
    return weights


def _plan(weights: Weights, part: str, precision: str) -> dict[str, Entry]:
    plan: dict[str, Entry] = {}
    for key, meta in weights.meta.items():
        shape, dtype = tuple(meta.shape), _dtype(part, key, meta, precision)
        if f"{key.removesuffix('.weight')}.weight_scale" in weights:
            raise WeightError(f"{weights.path} is 8-bit already; convert the original file instead")
        quantised = dtype == torch.float8_e4m3fn
        plan[key] = Entry(key, dtype, shape, "8-bit" if quantised else "plain")
        if quantised:
            plan[f"{key}_scale"] = Entry(key, torch.float32, (), "scale")
    return plan


def _dtype(part: str, key: str, meta: Tensor, precision: str) -> torch.dtype:
    block = (
        re.match(r"(encoder\.)?block\.", key)
        if part == TEXT_ENCODER
        else re.match(r"blocks\.\d+\.(sa\.mat|sa\.proj|ca\.mat|ca\.proj|ffn)", key)
    )
    if part == TOKENIZER or precision == "fp32" or not (block or part == TEXT_ENCODER):
        return torch.float32
    matrix = key.endswith(".weight") and meta.ndim == 2 and "relative_attention_bias" not in key
    return torch.float8_e4m3fn if precision == "fp8" and matrix and block else torch.bfloat16


def _metadata(plan: Mapping[str, Entry], part: str, precision: str, source: Path) -> dict[str, str]:
    metadata = {
        "format": "pt",
        "varedit.architecture": ARCHITECTURES[part],
        "varedit.precision": "fp32" if part == TOKENIZER else precision,
    }
    metadata["varedit.converted_from"] = printable(source.name)
    layers = {
        key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key, entry in plan.items() if entry.role == "8-bit"
    }
    if layers:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return metadata


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
    scale = torch.ones(())
    for entry in plan.values():
        if entry.role == "scale":
            yield scale
            continue
        tensor = weights[entry.source]
        if entry.role == "8-bit":
            tensor = tensor.float()
            scale = (tensor.abs().amax() / torch.finfo(entry.dtype).max).clamp_min(1e-12)
            tensor = tensor / scale
        tensor = tensor.to(entry.dtype)
        check_finite(weights, entry.source, tensor)  # as it came, and what is too large for its type
        yield tensor
