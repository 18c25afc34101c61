"""Draws scenes, on any device, in batches.

Shapes are signed distances with one pixel of antialiasing. Textures and background patterns are fixed to the
picture's grid, not to the object: what an instruction such as "make it striped" asks for is then one exact
picture. Cluttered pictures ("dead leaves": Lee, Mumford & Huang 2001; with 1/f noise) stand in for photographs.

Shape suffixes: B pictures, H, W pixels. Colours are in [0, 1] inside, in [-1, 1] as the library has them outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIDE, STYLES, TEXTURES, Scene

LEAVES = 48
WAVES = 5
LUMA = (0.299, 0.587, 0.114)
SLOTS = 4
"""Most objects of a scene."""


@dataclass(frozen=True)
class Drawing:
    """Scenes as numbers. background [B, 3] and object colours in [0, 1]; pattern, style [B]; waves [B, 5, 3];
    objects [B, n, 8] (centre, radius, cosine, sine, colour); shape, texture [B, n], -1 where there is none."""

    background: Tensor
    pattern: Tensor
    style: Tensor
    waves: Tensor
    objects: Tensor
    shape: Tensor
    texture: Tensor

    def to(self, device) -> Drawing:
        return Drawing(*(getattr(self, f.name).to(device) for f in fields(self)))


@torch.no_grad()
def render(scenes: Sequence[Scene], device="cpu") -> Tensor:
    """Pictures [B, 3, 256, 256] in [-1, 1].

    The same on every device up to rounding, except `picture` backgrounds: those are the same for one seed on one
    kind of device.
    """
    seeds = [scene.background.seed for scene in scenes if scene.background.pattern == "picture"]
    slots = max((len(scene.objects) for scene in scenes), default=0)
    return draw(pack(scenes, slots).to(device), dead_leaves(seeds, device) if seeds else None, used(scenes))


def used(scenes: Sequence[Scene]) -> frozenset[str]:
    """The shapes, styles and patterns that occur: what `draw` need not skip."""
    names = {o.shape for s in scenes for o in s.objects}
    return frozenset(names | {s.style for s in scenes} | {s.background.pattern for s in scenes})


EVERYTHING = frozenset(SHAPES + STYLES + BACKGROUNDS)


def pack(scenes: Sequence[Scene], slots: int = SLOTS) -> Drawing:
    """The scenes' numbers, on the CPU."""
    objects, shapes, textures, waves = [], [], [], []
    for scene in scenes:
        missing = slots - len(scene.objects)
        objects.append([_numbers(o) for o in scene.objects] + [(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)] * missing)
        shapes.append([SHAPES.index(o.shape) for o in scene.objects] + [-1] * missing)
        textures.append([TEXTURES.index(o.texture) for o in scene.objects] + [0] * missing)
        waves.append(_waves(scene.background.seed) if scene.background.pattern == "cloudy" else _CALM)
    return Drawing(
        torch.tensor([COLOURS[s.background.colour] for s in scenes]),
        torch.tensor([BACKGROUNDS.index(s.background.pattern) for s in scenes]),
        torch.tensor([STYLES.index(s.style) for s in scenes]),
        torch.tensor(waves),
        torch.tensor(objects).view(len(scenes), slots, 8),
        torch.tensor(shapes, dtype=torch.long).view(len(scenes), slots),
        torch.tensor(textures, dtype=torch.long).view(len(scenes), slots),
    )


@torch.no_grad()
def draw(drawing: Drawing, leaves: Tensor | None = None, names: frozenset[str] = EVERYTHING) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] of packed scenes.

    leaves: cluttered pictures [n, 3, H, W] in [0, 1] for the scenes that have one, in their order; or one for every
    scene [B, 3, H, W]. names: the shapes, styles and patterns to look for; all the others are skipped.
    """
    pictures = _background(drawing, names)
    if leaves is not None:
        cluttered = drawing.pattern == BACKGROUNDS.index("picture")
        if len(leaves) == len(pictures):
            pictures = torch.where(cluttered[:, None, None, None], leaves, pictures)
        else:
            pictures[cluttered] = leaves
    for slot in range(drawing.shape.shape[1]):
        pictures = _painted(pictures, drawing, slot, names)
    for index, style in enumerate(STYLES[1:], start=1):
        if style in names:
            pictures = torch.where((drawing.style == index)[:, None, None, None], restyle(pictures, style), pictures)
    return pictures * 2 - 1


def restyle(pictures_B3HW: Tensor, style: str) -> Tensor:
    """A global style (a name of STYLES) on pictures in [0, 1]; also the ground truth on photographs."""
    x, luma = pictures_B3HW, (pictures_B3HW * _rgb(LUMA, pictures_B3HW)).sum(1, keepdim=True)
    if style == "none":
        return x
    if style == "greyscale":
        return luma.expand_as(x)
    if style == "sepia":
        return (luma * _rgb((1.10, 0.86, 0.62), x)).clamp(0, 1)
    if style == "inverted":
        return 1 - x
    if style == "night":
        return (0.5 * x + 0.5 * luma) * _rgb((0.25, 0.30, 0.55), x)
    if style == "blurred":
        return blur(x, 5.0)
    if style == "bright":
        return 1 - (1 - x) * 0.5
    if style == "duotone":
        return _rgb((0.10, 0.05, 0.40), x) + luma * (_rgb((1.0, 0.80, 0.45), x) - _rgb((0.10, 0.05, 0.40), x))
    raise ValueError(f"unknown style {style!r}; choose one of {', '.join(STYLES)}")


def blur(x_BcHW: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, edges mirrored. sigma in pixels."""
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-reach, reach + 1)]
    kernel = _constant(tuple(w / sum(weights) for w in weights), x_BcHW.device)
    flat = x_BcHW.flatten(0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="reflect"), kernel[None, None, None])
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="reflect"), kernel[None, None, :, None])
    return flat[:, 0].view_as(x_BcHW)


def _background(drawing: Drawing, names: frozenset[str]) -> Tensor:
    maps = _background_maps(drawing.pattern.device)
    # Duller than objects of the same name, so that both can be told apart.
    colour = drawing.background[:, :, None, None] * 0.6 + 0.22
    weights = maps[drawing.pattern.clamp_max(len(maps) - 1)][:, None]
    if "cloudy" in names:
        cloudy = (drawing.pattern == BACKGROUNDS.index("cloudy"))[:, None, None, None]
        weights = torch.where(cloudy, _clouds(drawing.waves), weights)
    return colour + (_partner(colour, 0.35) - colour) * weights


def _painted(pictures: Tensor, drawing: Drawing, slot: int, names: frozenset[str]) -> Tensor:
    """The objects of one slot onto every picture that has one there."""
    x, y = _grid(pictures.device)
    numbers = drawing.objects[:, slot, :, None, None]
    cx, cy, radius, cosine, sine = numbers[:, :5].unbind(1)
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = dx * cosine + dy * sine, dy * cosine - dx * sine
    shape, distance = drawing.shape[:, slot, None, None], torch.full_like(u, SIDE)
    for index, name in enumerate(SHAPES):
        if name in names:
            distance = torch.where(shape == index, _DISTANCES[name](u, v), distance)
    coverage = (0.5 - distance * radius).clamp(0, 1)[:, None]
    colour, pattern = numbers[:, 5:], _texture_maps(pictures.device)[drawing.texture[:, slot]][:, None]
    paint = colour + (_partner(colour, 0.62) - colour) * pattern
    return pictures + (paint - pictures) * coverage


def _numbers(it) -> tuple[float, ...]:
    return (*it.centre, it.radius, math.cos(it.tilt), math.sin(it.tilt), *COLOURS[it.colour])


def _partner(colour_B311: Tensor, amount: float) -> Tensor:
    """The second colour of a pattern: towards white for dark colours, towards black for light ones."""
    light = (colour_B311 * _rgb(LUMA, colour_B311)).sum(1, keepdim=True) > 0.55
    return colour_B311 * (1 - amount) + (~light) * amount


def _polygon(sides: int):
    apothem, sector = math.cos(math.pi / sides), 2 * math.pi / sides

    def distance(u: Tensor, v: Tensor) -> Tensor:
        # A corner points up; within its sector the nearest edge is a straight line.
        angle = torch.remainder(torch.atan2(u, -v), sector) - sector / 2
        return torch.hypot(u, v) * angle.cos() - apothem

    return distance


def _star(u: Tensor, v: Tensor) -> Tensor:
    sector, inner = 2 * math.pi / 5, 0.45
    angle = (torch.remainder(torch.atan2(u, -v) + sector / 2, sector) - sector / 2).abs()
    r = torch.hypot(u, v)
    px, py = r * angle.cos() - 1, r * angle.sin()
    ex, ey = inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2)
    return (py * -ex + px * ey) / math.hypot(ex, ey)


_DISTANCES = {
    "circle": lambda u, v: torch.hypot(u, v) - 0.95,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.82,
    "triangle": lambda u, v: _polygon(3)(u / 1.1, (v - 0.2) / 1.1) * 1.1,
    "diamond": lambda u, v: (u.abs() * 1.35 + v.abs()) / math.hypot(1.35, 1) - 0.62,
    "hexagon": lambda u, v: _polygon(6)(u, v),
    "star": lambda u, v: _star(u / 1.1, v / 1.1) * 1.1,
    "cross": lambda u, v: torch.minimum(
        torch.maximum(u.abs() - 0.95, v.abs() - 0.32), torch.maximum(u.abs() - 0.32, v.abs() - 0.95)
    ),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.27,
}


@lru_cache(maxsize=4)
def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*(torch.arange(SIDE, device=device) + 0.5,) * 2, indexing="ij")
    return x, y


@lru_cache(maxsize=4)
def _texture_maps(device: torch.device) -> Tensor:
    """Share of the second colour [4, H, W], in the order of TEXTURES."""
    x, y = _grid(device)
    rows, columns = (y // 8) % 2, (x // 8) % 2
    dots = (5.0 - torch.hypot(x % 16 - 8, y % 16 - 8) + 0.5).clamp(0, 1)
    return torch.stack([torch.zeros_like(x), rows, (rows + columns) % 2, dots])


@lru_cache(maxsize=4)
def _background_maps(device: torch.device) -> Tensor:
    """Share of the second colour [4, H, W], in the order of BACKGROUNDS."""
    x, y = _grid(device)
    wide = 32
    return torch.stack([torch.zeros_like(x), y / SIDE, (x // wide) % 2, ((x // wide) + (y // wide)) % 2])


_CALM = [(0.0, 0.0, 0.0)] * WAVES


def _waves(seed: int) -> list[tuple[float, float, float]]:
    """Frequency along x and y, in radians a pixel, and phase of the waves that make clouds."""
    rng = Random(seed)
    angles = [rng.uniform(0, math.tau) for _ in range(WAVES)]
    lengths = [rng.uniform(50, 200) / math.tau for _ in range(WAVES)]
    return [(math.cos(a) / n, math.sin(a) / n, rng.uniform(0, math.tau)) for a, n in zip(angles, lengths)]


def _clouds(waves_Bw3: Tensor) -> Tensor:
    """Share of the second colour [B, 1, H, W]."""
    x, y = _grid(waves_Bw3.device)
    total = 0.0
    for fx, fy, phase in (w[..., None, None].unbind(1) for w in waves_Bw3.unbind(1)):
        total = total + (fx * x + fy * y + phase).sin()
    return (total[:, None] / WAVES * 0.9 + 0.5).clamp(0, 1)


def dead_leaves(seeds: Sequence[int], device="cpu") -> Tensor:
    """Cluttered pictures [B, 3, H, W] in [0, 1] with the statistics of photographs: occlusion at all sizes,
    1/f noise, shading, mostly dull colours."""
    return draw_leaves(*leaf_noise(seeds, device))


def leaf_noise(seeds: Sequence[int], device="cpu") -> tuple[Tensor, Tensor]:
    """The random numbers of cluttered pictures: uniform [B, 49, 16] and normal [B, 6, H, W / 2 + 1, 2]."""
    generator = torch.Generator(device)
    uniform = torch.empty(len(seeds), LEAVES + 1, 16, device=device)
    normal = torch.empty(len(seeds), 6, SIDE, SIDE // 2 + 1, 2, device=device)
    for row, seed in enumerate(seeds):
        generator.manual_seed(seed)
        uniform[row].uniform_(generator=generator)
        normal[row].normal_(generator=generator)
    return uniform, normal


@torch.no_grad()
def draw_leaves(uniform: Tensor, normal: Tensor) -> Tensor:
    """Cluttered pictures [B, 3, H, W] in [0, 1] from their random numbers."""
    device, leaf, noise = uniform.device, uniform, _power_noise(normal, uniform[:, 0, 0])
    whole, leaf = leaf[:, 0], leaf[:, 1:]
    saturation = (whole[:, 1] ** 1.5)[:, None, None]
    value, tint = leaf[..., 0:1] * 0.9 + 0.05, leaf[..., 1:4] - 0.5
    colours = (value + saturation * (tint + 0.5 * (whole[:, None, 2:5] - 0.5))).clamp(0, 1)
    pictures = colours[:, :1].mT[..., None] + 0.2 * noise[:, :3]
    x, y = _grid(device)
    # Radii spread evenly in the logarithm, the large ones painted first.
    radii = (4 * (100 / 4) ** leaf[..., 4]).sort(1, descending=True).values * (0.5 + 2 * whole[:, 5:6] ** 2)
    sides = _constant((3.0, 4.0, 5.0, 6.0, 40.0, 40.0), device)[(leaf[..., 5] * 6).long().clamp_max(5)]
    for i in range(LEAVES):
        cx, cy, stretch, spin, gx, gy, grain, which = (leaf[:, i, k, None, None] for k in (6, 7, 8, 9, 10, 11, 12, 13))
        radius, n = radii[:, i, None, None], sides[:, i, None, None]
        dx, dy = (x - cx * SIDE) / radius, (y - cy * SIDE) / radius * (0.4 + 1.2 * stretch)
        sector = math.tau / n
        angle = torch.remainder(torch.atan2(dx, dy) + spin * math.tau, sector) - sector / 2
        distance = torch.hypot(dx, dy) * angle.cos() - (sector / 2).cos()
        coverage = (0.5 - distance * radius).clamp(0, 1)[:, None]
        shading = (1 + 0.7 * ((gx - 0.5) * dx + (gy - 0.5) * dy).clamp(-1, 1))[:, None]
        texture = torch.where(which[:, None] < 0.5, noise[:, :3], noise[:, 3:]) * grain[:, None] ** 2 * 0.4
        pictures = pictures + (colours[:, i, :, None, None] * shading + texture - pictures) * coverage
    soft = blur(pictures, 0.8)
    return torch.where(whole[:, 6, None, None, None] < 0.4, soft, pictures).clamp(0, 1)


def _power_noise(normal_BcHF2: Tensor, exponent_B: Tensor) -> Tensor:
    """Noise of spectrum 1/f^a [B, c, H, W], unit variance; a from 0.9 to 1.8, mostly the same in three channels."""
    device = normal_BcHF2.device
    frequency = torch.hypot(torch.fft.fftfreq(SIDE, device=device)[:, None], torch.fft.rfftfreq(SIDE, device=device))
    frequency = frequency.clamp_min(0.5 / SIDE)
    spectrum = torch.view_as_complex(normal_BcHF2)
    spectrum = spectrum * frequency ** -(0.9 + 0.9 * exponent_B[:, None, None, None])
    field = torch.fft.irfft2(spectrum, s=(SIDE, SIDE))
    grey = field.unflatten(1, (-1, 3)).mean(2, keepdim=True).expand(-1, -1, 3, -1, -1).flatten(1, 2)
    field = field + 5 * grey
    return field / field.std((2, 3), keepdim=True)


def _rgb(values: tuple[float, ...], like: Tensor) -> Tensor:
    return _constant(values, like.device)[:, None, None]


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
