"""Strength: how many of the scales, coarse ones first, keep the source's bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Control, Knob


@dataclass(frozen=True)
class Strength(Control):
    """Holds the first (1 - strength) of all scales to the source. Of the scale where this ends it holds a part of the
    bits, always the same ones. 1 is the free edit, 0 the source through the VAE."""

    order = 10
    knobs = (
        Knob(
            "strength", 1.0, 0.0, 1.0, needs="source",
            help="1 is the free edit. Below it the first scales keep the source's bits, so that layout and colours "
            "stay: 0.75 still recolours and restyles. 0 is the source through the VAE.",
            option="1 is the free edit; less holds more scales, coarse ones first, to the picture; 0: the picture "
            "itself.",
            label_zh="强度",
            help_zh="1 为自由编辑。小于 1 时最初的尺度保留源图的比特，布局和颜色因此不变：0.75 仍可换颜色、换风格。"
            "0 等于源图经过 VAE 的结果。",
            more="At 0.75 a quarter of all scales is held, and a part of the scale where that ends. Restyling and "
            "recolouring take values down to about 0.5; below that, edits of the whole picture fall apart. "
            "Something new that is large needs the first scales, and so a value near 1.",
            more_zh="0.75 保留全部尺度的四分之一，末尾那个尺度只保留一部分。换风格、换颜色可以低到 0.5 左右，再低时改变整张图像的编辑会散掉；要添加较大的新内容，需要最初的尺度，"
            "请接近 1。",
        ),
    )  # fmt: skip
    strength: float

    def __call__(self, scale) -> None:
        held = (1 - self.strength) * len(scale.source.grids) - scale.index
        if held <= 0:
            return
        shape, device = scale.log_odds.shape[1:], scale.log_odds.device
        if held >= 1:
            scale.lock(torch.zeros(1, 1, *shape[1:], dtype=torch.bool, device=device))
        else:
            which = torch.rand(shape, generator=torch.Generator().manual_seed(scale.index))
            scale.lock((which >= held)[None].to(device))
