"""Inside: the last scales are computed inside the mask only."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from ..defaults import MOST_SCALES
from .base import Control, Knob
from .mask import token_masks

MARGIN = 2
"""How many locked tokens around a mask are computed too, so that the mask's own see their surroundings: without them a
quarter of the demo model's edits fail, with them a tenth (docs/LOG.md)."""


class Inside(Control):
    """Leaves out tokens of the last scales that are far from the mask; their bits are the source's anyway.

    masks: boolean [B, 1, h, w] of every scale's tokens.
    """

    group = "shortcuts"
    order = 120
    knobs = (
        Knob(
            "inside", 0, 0, MOST_SCALES, needs="mask", apart="window", scales=True,
            help="At so many last scales only the masked part is computed: the smaller it is, the faster. The part no "
            "longer sees the rest, so shapes at its edge may suffer; paint a wide mask. Needs a mask.",
            option="Shortcut: compute the last N scales inside the mask only. A wide mask loses less.",
            label_zh="仅遮罩内尺度数",
            help_zh="最后这么多个尺度只计算遮罩内的部分：遮罩越小越快。这部分不再看到其余部分，边缘的形状可能受损；"
            "请把遮罩画宽一些。需要遮罩。",
            more="A margin around the mask is computed, too; the rest keeps the source's bits either way. With the "
            "demo model three of its seven scales cost a tenth of the edits: try 1 first. The mask is the "
            "sampler's `mask`, or one that Set Latent Noise Mask has put on the source.",
            more_zh="遮罩周围的余量也会计算；其余部分本来就保留源图的比特。演示模型在七个尺度中的三个上使用时，约十分之一的编辑失败：请先试 1。遮罩取采样器的 `mask`，"
            "或“设置Latent噪波遮罩”给源图设置的遮罩。",
        ),
    )  # fmt: skip

    def __init__(self, count: int, mask, margin: int, schedule) -> None:
        self.count, self.mask, self.margin, self.schedule = count, mask, margin, schedule

    @classmethod
    def of(cls, batch) -> Inside | None:
        count = batch.shortcuts.inside
        if count and batch.mask is None:
            raise ValueError("computing only inside a mask needs one; give a mask, or leave inside at 0")
        device = batch.features.device
        return cls(count, batch.mask.to(device), batch.controls.feather, batch.schedule) if count else None

    @classmethod
    def idle(cls, edit):
        count = edit.shortcuts.inside
        if not count or edit.late(count):
            return ""
        inside, stop = edit.spelled("inside"), edit.spelled("stop")
        return f"{inside} is for the last {count} scales, and {stop} ends the edit before them; choose one"

    @property
    def depends(self) -> tuple:
        return self.count, self.mask, self.margin

    def step(self, step, source):
        """Waits for the device: how many tokens are left decides what is computed."""
        if len(self.schedule) - step.index > self.count:
            return step
        masks = token_masks(self.mask, self.schedule, self.margin)[step.index].any(0, keepdim=True)
        wide = F.max_pool2d(masks.float(), 2 * MARGIN + 1, stride=1, padding=MARGIN)
        kept = wide.flatten().nonzero().flatten()
        if len(kept) == step.rotary.shape[1]:
            return step
        return replace(step, rotary=step.rotary[:, kept], tokens=kept)
