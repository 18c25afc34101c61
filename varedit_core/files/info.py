"""What a weight file holds, read from its header alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..model.config import AutoencoderConfig, TransformerConfig
from ..text.encoder import blank_encoder, encoder_weights
from .checkpoints import (
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    blank,
    canonical,
    describe,
    has_encoder,
    part_of,
    told_kind,
    where_taken,
)
from .lora import read_lora
from .published import AUTOENCODERS, TRANSFORMERS
from .shapes import autoencoder_config, transformer_config
from .weights import WeightError, Weights, open_weights

_CONFIGS = {TRANSFORMER: transformer_config, TOKENIZER: autoencoder_config}


def inspect(path: str | Path) -> dict:
    """Facts about a weight file or folder: what it is, parts, sizes, parameters, types, bytes, metadata.

    Raises WeightError where the file cannot be opened; an unknown model is described, not refused.
    """
    weights = open_weights(path, has_encoder)
    facts: dict = {"file": str(path), "is": describe(weights)}
    for part, kind in _CONFIGS.items():
        sizes = _sizes(weights, part, kind)
        if sizes:
            facts[part] = sizes
    if part_of(weights)[0] == TRANSFORMER and TRANSFORMER in facts:
        told = told_kind(weights)
        facts["is"] = (
            f"a {TRANSFORMER}, {_name(facts[TRANSFORMER])}"
            + (" with its VAE" if TOKENIZER in facts else "")
            + (f", {told}" if told else "")
        )
    elif facts["is"] == f"a {TOKENIZER}" and (size := _published(facts.get(TOKENIZER), AUTOENCODERS)):
        facts["is"] += f", that of {size}"
    for part in _CONFIGS:
        if part in facts and (where := where_taken(canonical(weights, part))):
            facts["is"] += f", {where}"
            break
    whole = [partial(blank, canonical(weights, part), part) for part in _CONFIGS if part in facts]
    if facts["is"] == f"a {TEXT_ENCODER}":
        whole = [lambda: blank_encoder(Path(path), encoder_weights(weights))]
    for check in whole:
        try:
            check()
        except ValueError as error:
            facts["is"] += f", but not whole: {error}"
    if facts["is"] == "a LoRA":
        try:
            facts["LoRA"] = read_lora(weights).summary()
        except WeightError as error:
            facts["is"] += f", but none for VAREdit: {error}"
    sizes = [math.prod(meta.shape) for meta in weights.meta.values()]
    types = Counter[str]()
    for meta, count in zip(weights.meta.values(), sizes):
        types[str(meta.dtype).removeprefix("torch.")] += count
    bytes_ = sum(meta.dtype.itemsize * count for meta, count in zip(weights.meta.values(), sizes))
    return {
        **facts,
        "tensors": len(weights),
        "parameters": sum(sizes),
        "types": dict(types),
        "bytes": bytes_,
        "metadata": weights.metadata,
    }


def _sizes(weights: Weights, part: str, config) -> dict | None:
    try:
        sizes = asdict(config(canonical(weights, part).shapes))
    except (ValueError, KeyError, IndexError):
        return None
    sizes.pop("source", None)  # no size, and no tensor tells it
    return sizes


def _name(sizes: dict) -> str:
    text = f"{sizes['depth']} blocks of width {sizes['width']}"
    known = _published(sizes | {"source": True}, TRANSFORMERS)
    return f"{known} ({text})" if known else text


def _published(sizes: dict | None, table: Mapping[str, TransformerConfig | AutoencoderConfig]) -> str:
    """The name of a published model's sizes; "" for others."""
    return next((name for name, config in table.items() if asdict(config) == sizes), "")
