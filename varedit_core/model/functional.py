"""What the networks compute beside their layers, in plain PyTorch.

The runtime may know a faster way to the same numbers, up to rounding, of an operation that is marked `replaceable`.

Shape suffixes: R rows (images, then their unconditional twins), n tokens, C width, H heads, D head size; pictures
[B, C, H, W].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..replaceable import replaceable


@replaceable
def add_norm(
    x_RnC: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype,
    reader: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A gated residual and the norm that reads it: x + gate * y, and norm(x + gate * y) * scale + shift in `dtype`.

    x: fp32. y: [R, n, C] in any type; None: nothing is added. gate, scale, shift: fp32 [R or 1, C]; gate None: 1.
    reader: the layer that reads the second, which the runtime may give to it in a form of the layer's own.
    """
    x = x_RnC
    if y is not None:
        x = x + (y if gate is None else gate[:, None] * y)
    return x, (F.layer_norm(x, x.shape[-1:], eps=eps) * scale[:, None] + shift[:, None]).to(dtype)


def split_heads(qkv_RnC: Tensor, query_scale: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [R, H, n, D] of self-attention: q and k of unit length and rotated, both in fp32, v as it comes.

    qkv: [R, n, 3 * H * D], thirds q, k, v. query_scale: fp32 [H]. rotary: fp32 [2, n, D / 2] (see `positions`).
    """
    q, k, v = qkv_RnC.unflatten(-1, (3, query_scale.shape[0], -1)).permute(2, 0, 3, 1, 4)
    q = rotate(F.normalize(q.float(), dim=-1, eps=1e-12) * query_scale[:, None, None], rotary)
    return q, rotate(F.normalize(k.float(), dim=-1, eps=1e-12), rotary), v


def rotate(x_RHnD: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs (x_2i, x_2i+1) by the angles of [2, n, D / 2] (RoPE, two axes)."""
    cosine, sine = rotary
    a, b = x_RHnD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cosine - b * sine, a * sine + b * cosine), dim=-1).flatten(-2)


@replaceable
def norm_silu(norm: nn.Module, x_BCHW: Tensor) -> Tensor:
    """SiLU of a group norm's result."""
    return F.silu(norm(x_BCHW), inplace=not torch.is_grad_enabled())


@replaceable
def double_picture(x_BCHW: Tensor) -> Tensor:
    """Every pixel of [B, C, H, W] as a square of four."""
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


@replaceable
def laid_out(x_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures in the type and memory layout that convolutions read."""
    # Strides from a permute make torch pick channels-last kernels, whose CPU group normalisation is less exact.
    return x_BCHW.to(dtype).contiguous()
