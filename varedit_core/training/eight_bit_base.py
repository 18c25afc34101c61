"""A LoRA's base in 8 bits: frozen linear layers that hold codes, and multiply by the matrix that these stand for.

As QLoRA (arXiv 2305.14314), with the codes of `runtime.fp8`: half the memory of bf16. The matrix is made anew in the
backward pass, so that none is kept between the passes; its own gradient is never computed. Activations are not rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.fp8 import EightBitLinear
from ..runtime.kernels import dequantise_rows


class FrozenLinear(nn.Linear):
    """An 8-bit layer whose products pass gradients on to what comes in. dtype: of the products."""

    def __init__(self, layer: EightBitLinear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, "meta", layer.weight.dtype)
        self.weight, self.bias, self.dtype = layer.weight, layer.bias, dtype
        self.register_buffer("weight_scale", layer.weight_scale)

    def reset_parameters(self) -> None:
        """Nothing: torch cannot fill 8-bit weights."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return _Product.apply(x.to(self.dtype), self.weight, self.weight_scale, bias)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, of which only x has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantise_rows(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        return gradient @ dequantise_rows(codes, scales, gradient.dtype), None, None, None


def freeze(network: nn.Module, dtype: torch.dtype) -> None:
    """Put layers that gradients pass through in the place of a network's 8-bit ones; their weights stay where they
    are."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, EightBitLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, FrozenLinear(layer, dtype))
    network.requires_grad_(False)
