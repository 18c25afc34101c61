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

from ..runtime.kernels import fuses_pictures, group_norm_silu


class Attention(Protocol):
    """Softmax attention: q [B, H, n, D], k and v [B, H, m, D] -> [B, n, H * D].

    mask: boolean, broadcast to [B, H, n, m], true where a key may be seen; None (always, when sampling): all.
    A function whose attribute `recordable` is true says that it is no other than torch's, perhaps with a look at the
    clock before it: its calls may be recorded in a graph, and a kernel of `kernels` may do its work.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """`Attention` through torch's scaled_dot_product_attention, which picks the back end."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


sdpa.recordable = True


def fuses_gelu(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_gelu` runs for x: cuBLAS multiplies and activates in one kernel."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and bias is not None and not torch.is_grad_enabled()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(tanh) of x @ weight.T + bias, all of one type."""
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


class ScaledLinear(nn.Linear):
    """Linear layer whose stored weight may be 8-bit with one scale: weight = stored * weight_scale."""

    def __init__(self, *args, **kw) -> None:
        super().__init__(*args, **kw)
        self.register_buffer("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype and self.weight_scale is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.matrix(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a type, scale applied."""
        weight = self.weight.to(dtype)
        return weight if self.weight_scale is None else weight * self.weight_scale.to(dtype)

    def gelu(self, x: Tensor) -> Tensor:
        """The layer and GELU(tanh) behind it, where cuBLAS does both in one kernel."""
        if self.weight.dtype != x.dtype or not fuses_gelu(x, self.bias):
            return F.gelu(self(x), approximate="tanh")
        return linear_gelu(x, self.weight, self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        scale = state_dict.get(prefix + "weight_scale")
        self.weight_scale = None if scale is None else torch.empty_like(scale, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class CastRMSNorm(nn.RMSNorm):
    """RMS norm in the precision of its input, whatever that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GroupNorm(nn.GroupNorm):
    """Group norm that can take the activation behind it along."""

    def silu(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """SiLU of the norm of [B, C, H, W] + offset [C]."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, offset)


class Conv2d(nn.Conv2d):
    """Convolution that can leave its bias to what reads the result."""

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution without its bias, and the bias, where kernels run that add it in passing; else with it."""
        if not fuses_pictures(x):
            return self(x), None
        return self._conv_forward(x, self.weight, None), self.bias


class Operations:
    """torch.nn's layers; linear layers also read 8-bit scaled weights, RMS norms weights of another precision."""

    Linear = ScaledLinear
    Conv2d = Conv2d
    GroupNorm = GroupNorm
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


def gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU(tanh) of a linear layer's result, in one kernel where the layer can."""
    return layer.gelu(x) if hasattr(layer, "gelu") else F.gelu(layer(x), approximate="tanh")


def reads_rounded(layer: nn.Module) -> bool:
    """Whether a linear layer reads what is rounded to 8 bits."""
    return getattr(layer, "reads_rounded", False)


def feed_forward(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """Two linear layers with GELU(tanh) between them, in one kernel with one of them where that layer can."""
    if hasattr(second, "after_gelu"):
        return second.after_gelu(first(x))
    return second(gelu(first, x))


def matrix(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """A linear layer's weight [out, in] in a type, where the layer is one that shows it; None where it is not."""
    shown = getattr(layer, "matrix", None)
    return shown(dtype) if shown and layer.bias is not None else None
