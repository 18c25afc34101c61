"""The layers networks are loaded with, and what runs faster through them: an activation with the layer beside it.

Layers of other namespaces may have these methods too: `gelu` and `after_gelu` of linear layers, `silu` of group norms,
`apart` of convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import layers
from .kernels import add_pictures, fuses_pictures, group_norm_silu


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


class Operations(layers.Operations):
    """torch.nn's layers; linear layers also read 8-bit scaled weights, and what can be fused is."""

    Linear = ScaledLinear
    Conv2d = Conv2d
    GroupNorm = GroupNorm


def fuses_gelu(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_gelu` runs for x: cuBLAS multiplies and activates in one kernel."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and bias is not None and not torch.is_grad_enabled()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(tanh) of x @ weight.T + bias, all of one type."""
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


def feed_forward(network: nn.Module, x: Tensor) -> Tensor | None:
    """`transformer.FeedForward.forward`: the activation in one kernel with one of the layers, where that layer can."""
    first, second = network.fc1, network.fc2
    if hasattr(second, "after_gelu"):
        return second.after_gelu(first(x))
    return second(first.gelu(x)) if hasattr(first, "gelu") else None


def norm_silu(norm: nn.Module, x: Tensor, offset: Tensor | None = None) -> Tensor:
    """`functional.norm_silu` of x + offset [C], at once where the layer can."""
    if hasattr(norm, "silu"):
        return norm.silu(x, offset)
    return F.silu(norm(x if offset is None else x + offset[:, None, None]), inplace=not torch.is_grad_enabled())


def residual_block(block: nn.Module, x: Tensor) -> Tensor | None:
    """`vae.ResidualBlock.forward` where kernels run: norms take activations along, convolutions leave their biases to
    what follows."""
    if not fuses_pictures(x):
        return None
    h, bias = _apart(block.conv2, norm_silu(block.norm2, *_apart(block.conv1, norm_silu(block.norm1, x))))
    y, own = _apart(block.nin_shortcut, x)
    return add_pictures(h, y, own if bias is None else bias if own is None else bias + own)


def _apart(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's result without its bias, and the bias, where the layer can leave it to what follows."""
    return layer.apart(x) if hasattr(layer, "apart") else (layer(x), None)
