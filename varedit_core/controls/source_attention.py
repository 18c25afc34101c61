"""Source attention: what the source's keys weigh in self-attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .base import Control, Knob


@dataclass(frozen=True)
class SourceAttention(Control):
    """Adds the logarithm of a weight to the logits of the source's keys: 1 as trained, 0 the source is not seen."""

    order = 30
    knobs = (
        Knob(
            "source_attention", 1.0, 0.0, 1.0, needs="source",
            help="What the source weighs while the edit looks around: 1 is as trained, less lets more go, 0 does not "
            "see it. Not together with the shortcut window.",
            option="What the picture weighs in self-attention: 1 as trained, 0 it is not seen.",
            label_zh="源图注意力",
            help_zh="编辑观察四周时源图的权重：1 与训练时相同，减小则放开更多，0 看不到源图。不能与捷径 window 同时使用。",
            more="Useful values are 0.25 to 1; at 0 an edit model makes a blank. It works against `strength` and "
            "`preserve`, and costs a little time.",
            more_zh="有用的范围是 0.25 到 1，设为 0 时编辑模型只会画出空白。它与 `strength`、`preserve` 作用相反，会略微多花时间。",
        ),
    )  # fmt: skip
    weight: float

    def check(self, config) -> None:
        if not config.source:
            raise ValueError(
                "this transformer reads no source, so source_attention has nothing to weigh; leave it at 1"
            )

    @property
    def depends(self) -> tuple:
        return (self.weight,)

    def step(self, step, source):
        return replace(step, source_bias=math.log(self.weight) if self.weight else -math.inf)
