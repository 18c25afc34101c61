"""Prefix: the bits of the first scales, taken from an edit that was begun before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..tokenizer.schedule import Grid
from .base import Control


class Prefix(Control):
    """Gives the first scales bits that are there already. bits: [B, d, h, w] of every one of them."""

    stage = 10

    def __init__(self, bits: Sequence[Tensor]) -> None:
        self.bits = bits

    @classmethod
    def idle(cls, edit):
        if not edit.shortcuts.stop or edit.begun < edit.stop:
            return ""
        stop = edit.spelled("stop")
        return f"{edit.begun} scales are begun and {stop} ends the edit after {edit.stop}: nothing is drawn; raise it"

    @classmethod
    def of(cls, batch) -> Prefix | None:
        if not batch.prefix:
            return None
        alike = len(batch.prefix[0]) == batch.pictures
        return cls([batch.each_row(bits) if alike else batch.each_result(bits) for bits in batch.prefix])

    def __call__(self, scale) -> None:
        if scale.index < len(self.bits):
            scale.bits = self.bits[scale.index]


def checked_prefix(
    prefix: Sequence[Tensor], grids: Sequence[Grid], counts: tuple[int, int], depth: int
) -> Sequence[Tensor]:
    """Bits [B, d, h, w] of the first scales as they came. ValueError where they are not of these latent grids, or of
    another number of edits or of another model. counts: of pictures and of results. depth: bits a position."""
    for k, (bits, grid) in enumerate(zip(prefix, grids)):
        if bits.shape[1] != depth:
            raise ValueError(
                f"the tokens to go on from have {bits.shape[1]} bits a position but this model's have {depth}; go on "
                "with the model that made them"
            )
        if len(bits) not in counts:
            raise ValueError(one_edit_each(len(bits), counts[0]))
        if bits.shape[-2:] != grid:
            raise ValueError(
                f"the tokens of scale {k + 1} have the shape {list(bits.shape)} but the edit needs {counts[0]} of a "
                f"grid of {grid[0]}x{grid[1]}; use the same size, shape and number of pictures as in the edit that "
                "made them"
            )
    if len(prefix) > len(grids):
        raise ValueError(
            f"there are tokens of {len(prefix)} scales but the edit has {len(grids)}; use the size they are of"
        )
    return prefix


def one_edit_each(edits: int, pictures: int) -> str:
    """What to say of tokens of another number of edits than there are pictures."""
    return f"there are tokens of {edits} edits for {pictures} pictures; go on from one edit of each picture"
