"""Auto mask: the edit finds what it changes, and the rest stays the source's. Also: how much pixels changed.

Shape suffixes: B rows, d bits a latent position, (H, W) latent grid of the last scale, (y, x) pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Control, Knob

AUTO_MASK = 0.5
"""A good amount: it finds most and loses little (docs/LOG.md). Change maps use it."""
LATE = 2
"""So many of the last scales are locked by the mask."""
MOVED = 0.6
"""Distance of latents, in codes, from which they count as changed, at an amount of one half."""
DIFFERENT = 0.3
"""The same of decoded pixels, which are in [-1, 1]."""
GLOBAL = 0.9
"""From this share of changed latents on, an edit is one of the whole picture."""


class AutoMask(Control):
    """Finds where an edit changes its picture, and locks the rest, in one run.

    After all but the last `LATE` scales: latents whose running sum is farther from the source's own than `MOVED`
    (scaled with the amount), and their neighbours, stay free.
    """

    order = 50
    stage = 90
    knobs = (
        Knob(
            "auto_mask", 0.0, 0.0, 1.0, needs="source",
            help="Above 0 the edit finds out by itself where it changes something, and the rest stays the source's; "
            "the larger, the more is taken for changed. 0.5 is a good start. Connect the picture to VAREdit Decode.",
            option="0 to 1; above 0 the edit finds what it changes, and all else stays as it is: "
            f"{AUTO_MASK:g} is a good one, more lets more in.",
            label_zh="自动遮罩",
            help_zh="大于 0 时编辑自己找出改动之处，其余部分保持源图；数值越大，算作改动的越多，可从 0.5 试起。"
            "请把原图接到 VAREdit 解码。",
            more="It looks after all but the last two scales; what is decoded shows the edit only where its pixels "
            "changed. For local changes: a new style or background changes everything.",
            more_zh="在只剩最后两个尺度时查看；解码结果只在像素有变化处显示编辑。适合局部改动：换风格或换背景会改变一切。",
        ),
    )  # fmt: skip

    @classmethod
    def idle(cls, edit):
        if not edit.controls.auto_mask or edit.late(LATE):
            return ""
        name, stop = edit.spelled("auto_mask"), edit.spelled("stop")
        return f"{name} counts at the last {LATE} scales, and {stop} ends the edit before them; choose one"

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self.region: Tensor | None = None
        """Boolean [B, 1, H, W], once found."""

    def __call__(self, scale) -> None:
        begin = max(1, len(scale.source.grids) - LATE)
        if scale.index < begin:
            return
        if scale.index == begin:
            moved = (scale.total - scale.source.until(begin - 1)).norm(dim=1, keepdim=True)
            free = F.max_pool2d((moved > threshold(MOVED, self.amount)).float(), 3, stride=1, padding=1)
            self.region = free > 0
        grid = tuple(scale.log_odds.shape[-2:])
        scale.lock(F.adaptive_max_pool2d(self.region.float(), grid) > 0)


def threshold(base: float, amount: float) -> float:
    """What counts as changed at an amount: the base at one half, half of it at 1."""
    return base / (2 * amount)


def changed(edited_B3yx: Tensor, source_B3yx: Tensor, amount: float = AUTO_MASK) -> Tensor:
    """How much pixels in [-1, 1] differ, [B, y, x]: 0 no, 1 the threshold of the auto mask or more. Both decoded, so
    that what the VAE alone changes does not count."""
    difference = (edited_B3yx - source_B3yx).abs().amax(1, keepdim=True)
    blurred = F.avg_pool2d(difference, 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    return (blurred / threshold(DIFFERENT, amount)).clamp(0, 1)


def differing(edited_3yx: Tensor, source_3yx: Tensor, free_dHW: Tensor, amount: float) -> Tensor:
    """Where an edit changed a picture, boolean [y, x]: both decoded, in 8-bit levels, and of `free` only what is near.
    Everywhere, where `GLOBAL` of the latents or more are free: such an edit is one of the whole picture."""
    if free_dHW.any(0).float().mean() >= GLOBAL:
        return torch.ones(edited_3yx.shape[-2:], dtype=torch.bool, device=edited_3yx.device)
    edited, source = (levels[None].float() / 127.5 - 1 for levels in (edited_3yx, source_3yx))
    far = changed(edited, source, amount)[0] >= 1
    near = F.interpolate(free_dHW.any(0)[None, None].float(), far.shape)[0, 0] > 0
    return far & near.to(far.device)
