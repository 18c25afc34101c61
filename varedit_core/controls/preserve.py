"""Preserve: pulls every bit towards the source's."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Control, Knob
from .strength import Strength

PRESERVED = 2.0
"""Logits that an amount of one half adds to the source's bits."""


@dataclass(frozen=True)
class Preserve(Control):
    """Adds amount / (1 - amount) times `PRESERVED` logits to every bit that the source has; at 1 it is the source."""

    order = 20
    stage = 40
    knobs = (
        Knob(
            "preserve", 0.0, 0.0, 1.0, needs="source",
            help="Pulls every bit towards the source's, at all scales: 0 not at all, 0.5 by so much that unsure ones "
            "stay, 1 wholly.",
            option="Pulls every bit towards the picture's, 0 to 1: 0 not at all, 1 all the way.",
            label_zh="保留",
            help_zh="在所有尺度上把每个比特拉向源图：0 不拉，0.5 使没有把握的比特不变，1 完全拉住。",
            more="At 0.5 it adds two logits; at 1 it is the source again. What the model is sure of still changes.",
            more_zh="0.5 拉两个 logit，1 即又得到源图。模型有把握的照样改变。",
        ),
    )  # fmt: skip
    amount: float

    def __call__(self, scale) -> None:
        if self.amount == 1:
            return Strength(0.0)(scale)
        if not scale.drawn:
            pull = PRESERVED * self.amount / (1 - self.amount)
            scale.log_odds = scale.log_odds + pull / scale.temperature * scale.source_bits.float().mul_(2).sub_(1)
