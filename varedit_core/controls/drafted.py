"""Drafted: a second transformer draws the first scales (Collaborative decoding, arXiv 2411.17787)."""

from __future__ import annotations

from ..defaults import MOST_SCALES
from .base import Control, Knob


class Drafted(Control):
    """The knob alone: the driver gives the loop an engine of two (`sampling.drafting`)."""

    group = "shortcuts"
    order = 150
    knobs = (
        Knob(
            "drafted", 0, 0, MOST_SCALES, scales=True,
            help="So many first scales are drawn by the sampler's drafter, a second model; the first draws the rest, "
            "and its quality shows.",
            option="Shortcut: scales that --drafter draws.",
            label_zh="起草尺度数",
            help_zh="前面这么多个尺度由第二个模型（采样器的起草模型）绘制，其余由第一个模型绘制，结果的质量也随之而定。",
            more="Both must share VAE and text encoder. It helps if the first model is the smaller and faster one.",
            more_zh="两者必须共用 VAE 和文本编码器。适用于第一个模型更小更快的情况。",
        ),
    )  # fmt: skip

    @classmethod
    def refuse(cls, edit):
        drafted, count = edit.spelled("drafted"), edit.shortcuts.drafted
        if not count:
            return ""
        if edit.controls.best_of > 1:
            return f"{drafted} and {edit.spelled('best_of')} do not go together; choose one"
        if edit.begun >= count:
            return (
                f"the drafter would draw {count} scales but {edit.begun} are begun already; set {drafted} to more, or "
                "leave the drafter out"
            )
        return out_of_range(count, edit.stop) if count >= edit.stop else ""

    @classmethod
    def of(cls, batch) -> None:
        return None


def out_of_range(count: int, scales: int) -> str:
    """Says how many scales a drafter may draw of those that run: at least one is the other's."""
    return f"the drafter's scales must be from 1 to {scales - 1}, got {count}"
