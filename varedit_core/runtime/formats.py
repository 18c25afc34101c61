"""Forms in which a matrix is stored in fewer bits: three of ComfyUI's, under its names, so that its layers run the same
files. All are approximations.

A format knows its parts (tensors beside the weight, by the names of a layer's attributes), how to make them of numbers
and how to make numbers of them. What it costs is in docs/MEMORY.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .kernels import dequantise_rows, nvfp4_matrix, plain, quantise_rows, rotate
from .kernels.plain import FLOAT8_MOST, LEAST, NVFP4_BLOCK, NVFP4_MOST, nvfp4_codes, nvfp4_places

PARTS = ("weight", "weight_scale", "weight_scale_2")
Parts = Mapping[str, Tensor]
"""The tensors of a stored matrix by those of PARTS that its format has."""
Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_ROWS = 64  # rounded at a time, in which a processor's caches help; on a GPU many more
_ROWS_GPU = 1024
GROUPS = (256, 64, 16)
"""Channels that are rotated together; ComfyUI takes powers of four."""


class Format:
    """What the formats share. A matrix is [outputs N, inputs K]."""

    name: ClassVar[str]
    rows: ClassVar[bool] = False
    """Whether the scale may be one for each output."""
    group: int = 0
    """Inputs are rotated in groups of so many before they are multiplied (see `kernels.rotate`); 0: they are not."""

    def kinds(self, shape: tuple[int, int]) -> Kinds:
        """Type and shape of every part."""
        raise NotImplementedError

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a matrix of this shape can be stored so."""
        return True

    def round(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parts of a matrix, on its device."""
        raise NotImplementedError

    def turned(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in a type, for inputs that are rotated already."""
        raise NotImplementedError

    def matrix(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in a type."""
        if not self.group:
            return self.turned(parts, dtype)
        return rotate(self.turned(parts, torch.float32), self.group).to(dtype)

    @property
    def settings(self) -> dict[str, object]:
        """What a file says of a layer stored so."""
        return {"format": self.name}


@dataclass(frozen=True)
class Float8(Format):
    """float8_e4m3fn times one number."""

    name = "float8_e4m3fn"

    def kinds(self, shape: tuple[int, int]) -> Kinds:
        return {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (torch.float32, ())}

    def round(self, matrix: Tensor) -> dict[str, Tensor]:
        matrix = matrix.float()
        most = matrix.abs().amax()
        scale = (most / torch.full_like(most, FLOAT8_MOST)).clamp_min(LEAST)
        return {"weight": (matrix / scale).to(torch.float8_e4m3fn), "weight_scale": scale}

    def turned(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return _by_rows(parts, dtype)


@dataclass(frozen=True)
class Int8(Format):
    """Whole numbers of 8 bits times a number an output channel.

    group: the inputs are rotated first, which spreads outliers over their group (ConvRot, as ComfyUI names it).
    """

    group: int = 0
    name, rows = "int8_tensorwise", True

    def kinds(self, shape: tuple[int, int]) -> Kinds:
        return {"weight": (torch.int8, shape), "weight_scale": (torch.float32, (shape[0], 1))}

    def fits(self, shape: tuple[int, int]) -> bool:
        return not self.group or shape[1] % self.group == 0

    def round(self, matrix: Tensor) -> dict[str, Tensor]:
        codes, scales = quantise_weight(matrix, torch.int8, self.group)
        return {"weight": codes, "weight_scale": scales[:, None]}

    def turned(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return _by_rows(parts, dtype)

    @property
    def settings(self) -> dict[str, object]:
        return super().settings | ({"convrot": True, "convrot_groupsize": self.group} if self.group else {})


@dataclass(frozen=True)
class Nvfp4(Format):
    """Numbers of 4 bits (1 of sign, 2 of exponent, 1 of mantissa), two a byte; every 16 of a row share a scale in
    float8_e4m3fn, and all one number. Blackwell multiplies it."""

    name = "nvfp4"

    def kinds(self, shape: tuple[int, int]) -> Kinds:
        rows, blocks = nvfp4_places(shape)
        return {
            "weight": (torch.uint8, (shape[0], shape[1] // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, blocks)),
            "weight_scale_2": (torch.float32, ()),
        }

    def fits(self, shape: tuple[int, int]) -> bool:
        return shape[0] % NVFP4_BLOCK == 0 and shape[1] % NVFP4_BLOCK == 0

    def round(self, matrix: Tensor) -> dict[str, Tensor]:
        most = matrix.float().abs().amax()
        most = (most / torch.full_like(most, FLOAT8_MOST * NVFP4_MOST)).clamp_min(torch.finfo(torch.float32).tiny)
        made = [nvfp4_codes(rows, most) for rows in _split(matrix)]
        codes, scales = (torch.cat(kind) for kind in zip(*made))
        return {"weight": codes, "weight_scale": _swizzled(scales), "weight_scale_2": most}

    def turned(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return nvfp4_matrix(parts["weight"], parts["weight_scale"], parts["weight_scale_2"], dtype)


FORMATS = {kind.name: kind for kind in (Float8, Int8, Nvfp4)}


def int8_rotated(shape: tuple[int, int]) -> Int8:
    """Whole numbers whose inputs are rotated in the largest groups that fit."""
    return Int8(next((group for group in GROUPS if shape[1] % group == 0), 0))


def quantise_weight(weight: Tensor, kind: torch.dtype = torch.float8_e4m3fn, group: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (of the type kind, [N, K]) and scales (fp32 [N]) of a weight on its device, a part of it at a time. group:
    its inputs are rotated before."""
    codes = torch.empty(weight.shape, dtype=kind, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for part, *to in zip(*map(_split, (weight, codes, scales))):
        rows = plain.rotate(part.float(), group) if group else part
        for target, x in zip(to, quantise_rows(rows, kind)):
            target.copy_(x)
    return codes, scales


def _split(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows to be rounded together; it changes no number."""
    return matrix.split(_ROWS_GPU if matrix.is_cuda else _ROWS)


def _by_rows(parts: Parts, dtype: torch.dtype) -> Tensor:
    codes = parts["weight"]
    return dequantise_rows(codes, scales_of(parts["weight_scale"], len(codes)), dtype)


def scales_of(scale: Tensor, rows: int) -> Tensor:
    """fp32 [rows] of a scale that is one number, or one a row."""
    return scale.float().reshape(-1).expand(rows).contiguous()


def read(settings: Mapping[str, object]) -> Format:
    """The format that a file's settings of a layer name. ValueError for one that is not of FORMATS."""
    more = settings.get("params")
    settings = {**(more if isinstance(more, dict) else {}), **settings}
    name = settings.get("format")
    if name not in FORMATS:
        raise ValueError(f"the format {name}")
    if name != Int8.name or not settings.get("convrot"):
        return FORMATS[name]()
    group = settings.get("convrot_groupsize", GROUPS[0])
    if group not in _POWERS:
        raise ValueError(f"groups of {group} channels")
    return Int8(group)


_POWERS = tuple(4**power for power in range(1, 7))


def _swizzled(scales: Tensor) -> Tensor:
    """Scales [N, K / 16] as the tensor cores of Blackwell read them: tiles of 128 rows and 4 blocks, in fours of 32
    rows; filled up with zeros."""
    rows, blocks = scales.shape
    filled = scales.new_zeros(-(-rows // 128) * 128, -(-blocks // 4) * 4, dtype=torch.uint8)
    filled[:rows, :blocks] = scales.view(torch.uint8)
    tiles = filled.view(-1, 4, 32, filled.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(filled.shape).view(torch.float8_e4m3fn)
