"""Curves: guidance and temperature rise or fall over the scales. They bend the settings before an edit runs."""

from __future__ import annotations

from dataclasses import replace

from ..sampling.settings import Curve, SamplingSettings
from .base import Control, Knob

FLAT = Curve(1.0, 1.0)
PRESETS = {
    "balanced": (FLAT, FLAT),
    "faithful": (Curve(1.0, 0.0), Curve(0.5, 0.5)),
    "creative": (Curve(1.25, 1.0), Curve(8.0, 1.0)),
}
"""Names of curves: factors on what guidance is above 1, and on temperature, from the first to the last scale."""
PRESET = "balanced"
OWN = "own"
"""In place of a preset: the four numbers."""
_MOST = 16.0


def _factor(name: str, default: float, **texts: str) -> Knob:
    return Knob(name, default, 0.0, _MOST, **texts)


class Curves(Control):
    group = "curves"
    order = 70
    knobs = (
        Knob(
            "preset", PRESET, choices=(*PRESETS, OWN),
            help="balanced changes nothing, faithful lets guidance end and halves temperature, creative begins warm "
            "and with more guidance, own takes the four numbers below.",
            label_zh="预设",
            help_zh="balanced 不改变任何结果，faithful 让引导结束并把温度减半，creative 开头更随机、引导更强，own 使用下面四个数值。",
            option=f"Curves of guidance and temperature over the scales: {', '.join(PRESETS)}.",
            more="With `faithful` guidance falls to none at the last scale. With `creative` guidance begins a quarter "
            "higher, temperature eight times as high, and both end at the sampler's own.",
            more_zh="`faithful` 的引导在最后一个尺度降到没有。`creative` 开头引导高四分之一，温度为八倍，结尾都回到采样器上的数值。",
        ),
        _factor(
            "guidance_start", FLAT.start,
            help="For own: at the first scale so many times what guidance is above 1; 0 is no guidance there.",
            label_zh="引导起点",
            help_zh="用于 own：第一个尺度上，引导强度超过 1 的部分乘以这个系数；0 表示那里没有引导。",
            more="With guidance 3, a factor of 2 makes 5 and a factor of 0 makes 1, which is none.",
            more_zh="引导强度为 3 时，系数 2 得到 5，系数 0 得到 1，即没有引导。",
        ),
        _factor(
            "guidance_end", FLAT.end,
            help="For own: the same at the last scale; between them in equal steps.",
            label_zh="引导终点",
            help_zh="用于 own：最后一个尺度上的同一系数；中间均匀变化。",
            more="Without guidance the last scale takes half the work.",
            more_zh="引导在最后一个尺度降到没有时，该尺度的计算量减半。",
        ),
        _factor(
            "temperature_start", FLAT.start,
            help="For own: at the first scale so many times the temperature. Layout and shapes are drawn there.",
            label_zh="温度起点",
            help_zh="用于 own：第一个尺度上温度乘以这个系数，布局和形状在那里决定。",
        ),
        _factor(
            "temperature_end", FLAT.end,
            help="For own: the same at the last scale, where fine detail is drawn.",
            label_zh="温度终点",
            help_zh="用于 own：最后一个尺度上的同一系数，细节在那里决定。",
            more="0 takes the likelier bit there.",
            more_zh="0 表示那里总取概率较大的比特值。",
        ),
    )  # fmt: skip

    @classmethod
    def of(cls, batch) -> None:
        return None


def preset(settings: SamplingSettings, name: str) -> SamplingSettings:
    """Settings with the curves of a name in PRESETS. ValueError for an unknown name, and as `bent`."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return bent(settings, *PRESETS[name])


def bent(settings: SamplingSettings, guided: Curve, warmth: Curve) -> SamplingSettings:
    """Settings with factors over the scales. guided: on guidance - 1. warmth: on temperature. ValueError where guidance
    or temperature is not one number."""
    if guided == warmth == FLAT:
        return settings
    for what, value in (("guidance", settings.guidance), ("temperature", settings.temperature)):
        if not isinstance(value, float):
            raise ValueError(f"a preset bends one {what} over the scales; give one number for it, or no preset")
    guidance = Curve(*(1 + (settings.guidance - 1) * factor for factor in guided))
    return replace(
        settings, guidance=guidance, temperature=Curve(*(settings.temperature * factor for factor in warmth))
    )
