"""Prefix: the bits of the first scales, taken from an edit that was begun before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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
