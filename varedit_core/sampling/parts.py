"""Parts of a batch of edits, and batches on another device."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .batch import EditBatch


def part_of(batch: EditBatch, pictures: slice = slice(None), copies: slice = slice(None)) -> EditBatch:
    """The batch of some of the pictures, with some of their results each. What saves time at the beginning
    (`fresh`, `stream`) holds for the part with the first result."""
    which, count = range(batch.pictures)[pictures], batch.copies
    chosen = [p * count + c for p in which for c in range(count)[copies]]
    trials = len(batch.trial_seeds) // batch.pictures

    def own(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) == 1 < batch.pictures else x[list(which)]

    alike = bool(batch.prefix) and len(batch.prefix[0]) == batch.pictures
    return replace(
        batch,
        features=batch.features[list(which)],
        texts=[batch.texts[p] for p in which],
        negatives=[batch.negatives[p] for p in which],
        seeds=tuple(batch.seeds[n] for n in chosen),
        mask=own(batch.mask),
        areas=own(batch.areas),
        prefix=[bits[list(which) if alike else chosen] for bits in batch.prefix],
        source_total=own(batch.source_total),
        trial_seeds=tuple(s for p in which for s in batch.trial_seeds[p * trials : (p + 1) * trials]),
        **({} if chosen[0] == 0 else {"fresh": False, "stream": None}),
    )


def moved(batch: EditBatch, device) -> EditBatch:
    """The same with its features and other large tensors on a device."""
    total = batch.source_total
    return replace(
        batch,
        features=batch.features.to(device),
        source_total=None if total is None else total.to(device),
        prefix=[bits.to(device) for bits in batch.prefix],
    )


def slices(count: int, at_once: int) -> list[slice]:
    """`count` things, at most `at_once` at a time."""
    return [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)]
