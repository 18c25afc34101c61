"""Unguided: the last scales run without guidance, with half the rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..defaults import MOST_SCALES
from .base import Control, Knob, Plan


@dataclass(frozen=True)
class Unguided(Control):
    group = "shortcuts"
    order = 110
    knobs = (
        Knob(
            "unguided", 0, 0, MOST_SCALES, scales=True,
            help="So many last scales run without guidance, with half the work; little is lost.",
            option="Shortcut: so many last scales without guidance.",
            label_zh="无引导尺度数",
            help_zh="最后这么多个尺度不用引导，计算量减半；损失很小。",
            more="By then layout and colours are drawn.",
            more_zh="此时布局和颜色都已确定。",
        ),
    )  # fmt: skip
    count: int

    @classmethod
    def idle(cls, edit):
        name, count = edit.spelled("unguided"), edit.shortcuts.unguided
        if not count or any(edit.drawn[k][0] != 1 for k in edit.late(count)):
            return ""
        return f"{name} ends guidance, but none of the last {count} scales runs with any; raise it, or leave it at 0"

    def plan(self, plan: Plan) -> Plan:
        first = len(plan) - self.count
        return [(1.0 if k >= first else guidance, *rest) for k, (guidance, *rest) in enumerate(plan)]
