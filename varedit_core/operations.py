"""The layers and the attention the networks are built from when nobody injects others.

A namespace of layers has `Linear`, `Conv2d`, `GroupNorm`, `LayerNorm`, `RMSNorm` and `Embedding` with
torch.nn's signatures plus `device` and `dtype`. Networks only ever call these modules; they never read a
module's `weight`, so a namespace may offload, cast or quantise behind the call.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(Protocol):
    """Softmax attention: q [B, H, n, D], k and v [B, H, m, D] -> [B, n, H * D].

    mask: boolean, broadcast to [B, H, n, m], true where a key may be seen; None (always, when sampling): all.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """`Attention` through torch's scaled_dot_product_attention, which picks the back end."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


class ScaledLinear(nn.Linear):
    """Linear layer whose stored weight may be 8-bit with one scale: weight = stored * weight_scale."""

    def __init__(self, *args, **kw) -> None:
        super().__init__(*args, **kw)
        self.register_buffer("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype and self.weight_scale is None:
            return F.linear(x, self.weight, self.bias)
        weight = self.weight.to(x.dtype)
        if self.weight_scale is not None:
            weight = weight * self.weight_scale.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        scale = state_dict.get(prefix + "weight_scale")
        self.weight_scale = None if scale is None else torch.empty_like(scale, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class CastRMSNorm(nn.RMSNorm):
    """RMS norm in the precision of its input, whatever that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Operations:
    """torch.nn's layers; linear layers also read 8-bit scaled weights, RMS norms weights of another precision."""

    Linear = ScaledLinear
    Conv2d = nn.Conv2d
    GroupNorm = nn.GroupNorm
    LayerNorm = nn.LayerNorm
    RMSNorm = CastRMSNorm
    Embedding = nn.Embedding


def rows(embedding: nn.Module, count: int, device: torch.device) -> Tensor:
    """The first `count` rows of an embedding in fp32, read by calling it (it may be stored in fewer bits)."""
    return embedding(torch.arange(count, device=device)).float()
