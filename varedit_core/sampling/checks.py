"""What a batch of edits is checked for, before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..controls.base import Known
from ..controls.mask import checked_mask
from ..controls.prefix import checked_prefix
from ..controls.registry import Controls, Shortcuts
from ..defaults import PUBLISHED_BITS, PUBLISHED_VAES, SIZES
from ..model.config import AutoencoderConfig, TransformerConfig
from ..tokenizer.schedule import AREAS
from .settings import SamplingSettings

if TYPE_CHECKING:
    from .batch import EditBatch


def facts(batch: EditBatch) -> Known:
    """Facts of a batch, to check that every knob counts (`registry.problems`)."""
    return Known(
        batch.schedule, batch.settings, batch.controls, batch.shortcuts, batch.mask is not None, len(batch.prefix),
        batch.copies, negative=any(text is not None for text in batch.negatives),
    )  # fmt: skip


def right_kinds(fields: dict) -> None:
    """Raise ValueError for settings, controls or shortcuts, by these names, that are something else."""
    for name, kind in (("settings", SamplingSettings), ("controls", Controls), ("shortcuts", Shortcuts)):
        if name in fields and not isinstance(fields[name], kind):
            raise ValueError(f"{name} must be {kind.__name__}, got {type(fields[name]).__name__}")


def agree(batch: EditBatch) -> None:
    """Raise ValueError where the parts of a batch do not belong to the same pictures."""
    right_kinds(vars(batch))
    if not isinstance(batch.features, Tensor) or batch.features.ndim != 4 or not len(batch.features):
        raise ValueError("features must be a tensor [pictures, channels, height, width]; see Editor.encode_source")
    wrong = [text for row in (*batch.texts, batch.negatives) for text in row if not isinstance(text, Tensor | None)]
    if wrong:
        raise ValueError(f"texts must be features [tokens, channels], got {wrong[0]!r}; see Editor.encode_text")
    pictures, texts = batch.pictures, [len(of_picture) for of_picture in batch.texts]
    if len(texts) != pictures or len(batch.negatives) != pictures:
        raise ValueError(
            f"{pictures} images need {pictures} instructions and negative prompts, got {len(texts)} and "
            f"{len(batch.negatives)}"
        )
    if len(set(texts)) > 1 or not all(texts):
        raise ValueError(f"all pictures of a batch need as many regions, at least one each, got {texts}")
    if (texts[0] > 1) > (batch.areas is not None) or batch.areas is not None and batch.areas.shape[1] != texts[0]:
        raise ValueError(f"{texts[0]} instructions a picture need as many areas [pictures, regions, y, x]")
    if not batch.seeds or len(batch.seeds) % pictures:
        raise ValueError(
            f"{len(batch.seeds)} seeds are not the same number for each of {pictures} pictures; give one a result"
        )
    if batch.mask is not None:
        checked_mask(batch.mask, pictures)
    checked_prefix(batch.prefix, batch.grids, (pictures, len(batch.seeds)), batch.features.shape[1])


def can_draft(batch: EditBatch, drafter: bool) -> None:
    """Raise ValueError where a batch needs a second transformer. drafter: whether there is one."""
    if batch.shortcuts.drafted and not drafter:
        raise ValueError("drafted scales need a second transformer; give a drafter, or leave drafted at 0")


def fits(batch: EditBatch, configs: Sequence[TransformerConfig]) -> None:
    """Raise ValueError where a batch is not what an engine's transformers can do."""
    can_draft(batch, len(configs) > 1)
    if batch.controls.best_of > 1:
        raise ValueError("the loop alone does not choose the best of several; use Editor.run or `beginnings.begun`")
    for config in configs:
        _fits(batch, config)


def _fits(batch: EditBatch, config: TransformerConfig) -> None:
    (height, width), (rows, columns) = batch.features.shape[-2:], batch.schedule.grids[-1]
    patch, schedule = batch.patch, batch.schedule
    if (height, width) != (rows * patch, columns * patch) or batch.features.shape[1] * patch**2 != config.token_bits:
        raise ValueError(
            f"source features of shape {tuple(batch.features.shape)} do not fit a {rows}x{columns} grid of tokens of "
            f"{config.token_bits} bits; encode the image at {schedule.pixels[1]}x{schedule.pixels[0]} with the model's "
            f"VAE{published_vae(config.token_bits)}"
        )
    check_scales(len(schedule), config.levels)
    texts = [text for of_picture in batch.texts for text in of_picture]
    for text in (*texts, *(batch.negatives if batch.guided_scales else ())):
        if text is not None and (text.ndim != 2 or text.shape[1] != config.text_width or not len(text)):
            raise ValueError(
                f"the text features have the shape {tuple(text.shape)} but the transformer reads [tokens, "
                f"{config.text_width}]; use the text encoder it was trained with"
            )
    for control in batch.active:
        control.check(config)


def check_scales(count: int, levels: int) -> None:
    """Raise ValueError for a size of more scales than a transformer was made for."""
    if count > levels:
        fitting = [side for side, area in SIZES.items() if AREAS[area] <= levels]
        raise ValueError(
            f"this size has {count} scales but the model was made for {levels}; use one of at most {levels}"
            + (f", such as {fitting[-1]}" if fitting else "")
        )


def patch_size(transformer: TransformerConfig, autoencoder: AutoencoderConfig) -> int:
    """Latent positions a token spans along each axis: 2 for the 8B layout, 1 for the 2B layout.

    Raises ValueError where the two networks do not belong together.
    """
    side, bits = 16 // autoencoder.stride if autoencoder.stride <= 16 else 0, autoencoder.bits
    if side and side * side * bits == transformer.token_bits:
        return side
    raise ValueError(
        f"the transformer predicts tokens of {transformer.token_bits} bits but the VAE (stride "
        f"{autoencoder.stride}, {bits} bits a position) makes tokens of {side * side * bits}; load the VAE the "
        f"transformer was trained with{published_vae(transformer.token_bits)}"
    )


def published_vae(bits: int) -> str:
    """The published VAE of latents or tokens of so many bits, in brackets to stand behind advice; "" for others."""
    size = PUBLISHED_BITS.get(bits)
    return f" ({PUBLISHED_VAES[size]} for {size})" if size else ""


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """A number of something. ValueError for one that is not whole, smaller than `low` or larger than `high`."""
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return number


def checked(what: str, value: object, boolean: bool, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """A tensor of one of these shapes, boolean or of numbers. ValueError for any other."""
    if not isinstance(value, Tensor) or (value.dtype == torch.bool) != boolean:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        wanted, advice = ("boolean", "; compare your values with a threshold first") if boolean else ("numbers", "")
        raise ValueError(f"{what} must be {wanted}, got {found}{advice}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{what} must be of the shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
    return value
