"""The layers and the attention the networks are built from when nobody injects others.

A namespace of layers has `Linear`, `Conv2d`, `GroupNorm`, `LayerNorm`, `RMSNorm` and `Embedding` with torch.nn's
signatures plus `device` and `dtype`. Networks only ever call these modules; they never read a module's `weight`, so a
namespace may offload, cast or quantise behind the call.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(Protocol):
    """Softmax attention: q [B, H, n, D], k and v [B, H, m, D] -> [B, n, H * D].

    mask: broadcast to [B, H, n, m]: boolean, true where a key may be seen, or numbers that are added to the logits;
    None: all is seen. A function whose attribute `recordable` is true says that it is no other than torch's, perhaps
    with a look at the clock before it: the runtime may record its calls in a graph or do its work with a kernel.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """`Attention` through torch's scaled_dot_product_attention, which picks the back end."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


sdpa.recordable = True


class CastRMSNorm(nn.RMSNorm):
    """RMS norm in the precision of its input, whatever that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Operations:
    """torch.nn's layers; RMS norms take weights of another precision."""

    Linear = nn.Linear
    Conv2d = nn.Conv2d
    GroupNorm = nn.GroupNorm
    LayerNorm = nn.LayerNorm
    RMSNorm = CastRMSNorm
    Embedding = nn.Embedding


def rows(embedding: nn.Module, count: int, device: torch.device) -> Tensor:
    """The first `count` rows of an embedding in fp32, read by calling it (it may be stored in fewer bits)."""
    return embedding(torch.arange(count, device=device)).float()


def affine(norm: nn.Module, width: int, eps: float, device: torch.device) -> Tensor:
    """Scale and shift [2, width] of a layer norm in fp32, read by calling it on two vectors whose norms are known.

    width: even. A vector of +1 and -1 in turns has mean 0 and variance 1, so the norm only shrinks it by eps.
    """
    sign = 1.0 - 2 * (torch.arange(width, device=device) % 2)
    plus, minus = norm(torch.stack((sign, -sign))).float()
    return torch.stack(((plus - minus) * sign * ((1 + eps) ** 0.5 / 2), (plus + minus) / 2))
