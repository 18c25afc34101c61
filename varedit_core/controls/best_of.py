"""Best of: several candidates are begun, and only the best one is finished.

The driver runs the candidates (`sampling.driver`); here are the knobs and how candidates are scored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..defaults import MOST_SCALES
from .base import Control, Knob

MOST_CANDIDATES = 64
NO_INSTRUCTION = "the score instruction compares with no instruction; use a guidance other than 1"
OF_SOURCE = ("near", "far")
"""Scores that compare with the source."""
SCORES = ("likelihood", "instruction", *OF_SOURCE)


class BestOf(Control):
    """The knobs alone: candidates are edits of their own, and the best one's bits become the prefix."""

    order = 60
    knobs = (
        Knob(
            "best_of", 1, 1, MOST_CANDIDATES, advanced=True,
            help="So many candidates are begun, from one look at the source, and only the best one of each result is "
            "finished.",
            option="Begin so many candidates and go on with the best one.",
            label_zh="候选数量",
            help_zh="先开始这么多个候选，源图只读取一次，每个结果只完成最好的一个。",
            more="Candidates take as much memory as results; the first scales are cheap, so time grows little. They "
            "differ by the draw: raise the temperature, or take the preset creative of VAREdit Curves.",
            more_zh="占用的内存与同样多的结果相当；前几个尺度开销小，时间增加不多。候选因随机抽样而不同：请提高温度，或用 VAREdit 曲线的预设 creative。",
        ),
        Knob(
            "best_at", 4, 1, MOST_SCALES, advanced=True, needs="best_of", scales=True,
            help="After so many scales the best candidate is chosen.",
            option="Scales after which the best candidate is chosen.",
            label_zh="选择尺度",
            help_zh="经过多少个尺度后选出最好的候选。",
            more="Later shows more of it, and costs more.",
            more_zh="越多看得越清楚，也越慢。",
        ),
        Knob(
            "score", SCORES[0], choices=SCORES, advanced=True, needs="best_of",
            help="What the best candidate is: likelihood the most probable one, instruction the one that the "
            "instruction explains best (needs guidance), near the nearest to the source, far the farthest.",
            option=f"What chooses it: {', '.join(SCORES)}.",
            label_zh="评分",
            help_zh="怎样算最好：likelihood 概率最大，instruction 指令最能解释（需要引导），near 离源图最近，far 离源图最远。",
            more="The score `instruction` compares with the model without the instruction, and needs a guidance other "
            "than 1.",
            more_zh="`instruction` 与没有指令的模型相比，需要不为 1 的引导强度。",
        ),
    )  # fmt: skip

    @classmethod
    def idle(cls, edit):
        count, at = edit.controls.best_of, edit.controls.best_at
        if count == 1:
            return ""
        best_of, best_at, stop = map(edit.spelled, ("best_of", "best_at", "stop"))
        if edit.stop < min(at, len(edit.schedule)):
            return f"{best_at} is {at} but {stop} ends the edit after {edit.stop} scales; give at most {edit.stop}"
        drawn = range(edit.begun, min(at, edit.stop))
        if drawn and edit.greedy(drawn):
            return (
                f"{best_of} begins with several seeds, but {edit.spelled('temperature')} is 0 there, so that all are "
                f"alike; raise that, or leave {best_of} at 1"
            )
        return ""

    @classmethod
    def refuse(cls, edit):
        if edit.controls.best_of == 1:
            return ""
        at = min(edit.controls.best_at, edit.stop)
        if edit.begun >= edit.controls.best_at:
            best_at = edit.spelled("best_at")
            return f"{edit.begun} scales are begun but the best is chosen after {at}; set {best_at} to more"
        guided = all(edit.guided(range(k, k + 1)) for k in range(at))
        return NO_INSTRUCTION if edit.controls.score == "instruction" and not guided else ""

    @classmethod
    def held(cls, values):
        return f"the score {values.score}" if values.best_of > 1 and values.score in OF_SOURCE else ""

    @classmethod
    def of(cls, batch) -> None:
        return None


class Candidates:
    """Scores beginnings of edits, each from its logits and bits.

    likelihood: log-probability of the bits with the instruction. instruction: how much more likely they are with it
    than without, which wants guidance. near, far: distance of the running sum from the source's own, the smaller or the
    larger the better.
    """

    def __init__(self, score: str) -> None:
        self.score, self.bits = score, []
        self.scores: Tensor | float = 0.0
        """Of every row, [B]."""

    def __call__(self, scale) -> None:
        bits = scale.bits
        self.bits.append(bits)
        if self.score in OF_SOURCE:
            distance = (scale.running_sum - scale.source.until(scale.index)).square().mean((1, 2, 3))
            self.scores = distance if self.score == "far" else -distance
            return
        if not scale.whole:
            raise ValueError(
                f"the score {self.score} needs whole scales; lower best_at or inside, so that these do not meet"
            )
        sign = bits.float() * 2 - 1
        odds = [scale.on_grid(x[..., 1] - x[..., 0]) for x in scale.logits.split(len(bits))]
        terms = [F.logsigmoid(sign * x).sum((1, 2, 3)) for x in odds]
        if self.score == "instruction" and len(terms) == 1:
            raise ValueError(NO_INSTRUCTION)
        self.scores = self.scores + (terms[0] - terms[1] if self.score == "instruction" else terms[0])


def best(scores_PRC: Tensor) -> Tensor:
    """The best of C candidates of every picture [P], by the sum of its regions' scores."""
    return torch.as_tensor(scores_PRC).sum(1).argmax(1)
