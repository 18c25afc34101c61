"""The layers networks are loaded with, and what runs faster through them: an activation with the layer beside it.

Layers of other namespaces may have these methods too: `gelu` and `after_gelu` of linear layers, `silu` of group norms,
`apart` of convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import layers
from .formats import Float8, Format, Parts
from .kernels import add_pictures, fuses_pictures, group_norm_silu, rotate


class StoredLinear(nn.Linear):
    """Linear layer whose weight may be stored in fewer bits: see `formats`. It multiplies with the numbers they stand
    for."""

    stored: Format | None = None

    def __init__(self, *args, **kw) -> None:
        super().__init__(*args, **kw)
        self.register_buffer("weight_scale", None)
        self.register_buffer("weight_scale_2", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.stored is None:
            return F.linear(x, self.weight.to(x.dtype), bias)
        turned = rotate(x, self.stored.group) if self.stored.group else x
        return F.linear(turned, self.stored.turned(self.parts, x.dtype), bias)

    @property
    def parts(self) -> Parts:
        """The tensors of the stored weight."""
        return {"weight": self.weight, "weight_scale": self.weight_scale, "weight_scale_2": self.weight_scale_2}

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a type."""
        return self.weight.to(dtype) if self.stored is None else self.stored.matrix(self.parts, dtype)

    def store(self, stored: Format | None, weight: Tensor | None = None) -> None:
        """Take a weight [out, in] and store it so; None: its numbers as they are. Without one: make room, on the meta
        device, for parts that are loaded."""
        if stored is None:
            parts = {"weight": weight}
        elif weight is None:
            shape = (self.out_features, self.in_features)
            parts = {n: torch.empty(s, dtype=d, device="meta") for n, (d, s) in stored.kinds(shape).items()}
        else:
            parts = stored.round(weight)
        self.stored, self.weight = stored, nn.Parameter(parts["weight"], requires_grad=False)
        self.weight_scale, self.weight_scale_2 = parts.get("weight_scale"), parts.get("weight_scale_2")

    def gelu(self, x: Tensor) -> Tensor:
        """The layer and GELU(tanh) behind it, where cuBLAS does both in one kernel."""
        if self.weight.dtype != x.dtype or not fuses_gelu(x, self.bias):
            return F.gelu(self(x), approximate="tanh")
        return linear_gelu(x, self.weight, self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ("weight_scale", "weight_scale_2"):
            scale = state_dict.get(prefix + name)
            setattr(self, name, None if scale is None else torch.empty_like(scale, device=self.weight.device))
        if self.weight_scale is None:
            self.stored = None
        elif self.stored is None:  # files of other programs may say nothing else
            self.stored = Float8()
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
    """torch.nn's layers; linear layers also have weights in fewer bits, and what can be fused is."""

    Linear = StoredLinear
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
