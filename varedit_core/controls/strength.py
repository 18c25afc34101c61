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
