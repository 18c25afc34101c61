"""A LoRA's base in 8 bits: frozen linear layers that hold codes, and multiply by the matrix that these stand for.

As QLoRA (arXiv 2305.14314), with the codes of `runtime.fp8`: half the memory of bf16. The matrix is made anew in the
backward pass, so that none is kept between the passes; its own gradient is never computed. Activations are not rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.fp8 import EightBitLinear


class FrozenLinear(EightBitLinear):
    """An 8-bit layer whose products pass gradients on to what comes in. dtype: of the products."""

    reads_rounded = False

    def __init__(self, layer: EightBitLinear, dtype: torch.dtype) -> None:
        has_bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, has_bias, layer.weight.dtype, layer.group)
        self.weight, self.bias, self.weight_scale, self.dtype = layer.weight, layer.bias, layer.weight_scale, dtype

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return _Product.apply(x.to(self.dtype), self, bias)

    def after_gelu(self, x: Tensor) -> Tensor:
        return self(F.gelu(x, approximate="tanh"))


class _Product(torch.autograd.Function):
    """x @ matrix.T + bias, of which only x has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.matrix(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.matrix(gradient.dtype), None, None


def freeze(network: nn.Module, dtype: torch.dtype) -> None:
    """Put layers that gradients pass through in the place of a network's 8-bit ones; their weights stay where they
    are."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, EightBitLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, FrozenLinear(layer, dtype))
    network.requires_grad_(False)
