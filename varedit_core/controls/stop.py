"""Stop: a draft after some of the scales."""

from __future__ import annotations

from dataclasses import dataclass

from ..defaults import MOST_SCALES
from .base import Control, Knob, Plan


@dataclass(frozen=True)
class Stop(Control):
    group = "shortcuts"
    order = 140
    knobs = (
        Knob(
            "stop", 0, 0, MOST_SCALES, scales=True,
            help="Only so many first scales run, 0 is all: a draft without fine detail, in which small edits are "
            "missing.",
            option="Shortcut: a draft after so many scales; 0: all.",
            label_zh="停止于",
            help_zh="只运行前面这么多个尺度，0 表示全部：得到缺少细节的草图，较小的改动不会出现。",
            more="The picture is decoded as it is then. Good to try an instruction or a seed: the same seed gives the "
            "same first scales.",
            more_zh="随后直接解码。适合快速试指令或种子：同一种子的开头是相同的。",
        ),
    )  # fmt: skip
    count: int

    def plan(self, plan: Plan) -> Plan:
        return plan[: self.count]
