"""A transformer's linear layers in 8 bits: half the memory of bf16 and, where the device multiplies 8 bits, faster
products.

An approximation. In 8 bits are the blocks' self-attention projections, the query and projection of cross-attention and
the feed-forward network. All else (head, embeddings, modulation, the text's keys and values) is exact. Outliers sit in
what the down-projection (fc2) reads; numbers of 8 bits that have an exponent bear them, as small ones keep their
precision beside large ones, and whole numbers do where inputs are rotated before (figures: docs/LOG.md).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .formats import Float8, Int8, quantise_weight, scales_of
from .kernels import Rounded, dequantise_rows, linear_eight_bit, rotate

LINEARS = ("exact", "8-bit")
"""What `load_transformer` makes of the blocks' linear layers."""
_LAYER = re.compile(r"blocks\.\d+\.(sa\.mat_qkv|sa\.proj|ca\.mat_q|ca\.proj|ffn\.fc1|ffn\.fc2)")


class EightBitLinear(nn.Linear):
    """Linear layer with a weight in 8 bits and one fp32 scale an output channel: weight_scale [out].

    kind: float8_e4m3fn, or int8, with inputs that are rotated in groups of `group` channels, 0 for none. What comes in
    is rounded to 8 bits too, token by token, so that the device multiplies in 8 bits. Makes no weights of its own: see
    `eight_bit`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, kind: torch.dtype = torch.float8_e4m3fn, group: int = 0
    ) -> None:
        super().__init__(in_features, out_features, bias, "meta")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=kind, device="meta"), False)
        self.group = group
        self.register_buffer("weight_scale", torch.empty(out_features, device="meta"))

    @property
    def reads_rounded(self) -> bool:
        """Whether it takes numbers in float8_e4m3fn."""
        return self.weight.dtype == torch.float8_e4m3fn

    def reset_parameters(self) -> None:
        """Nothing: torch cannot fill 8-bit weights."""

    def forward(self, x: Tensor | Rounded, gelu: bool = False) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear_eight_bit(x, self.weight, self.weight_scale, bias, gelu, self.group)

    def after_gelu(self, x: Tensor) -> Tensor:
        """The layer behind GELU(tanh) of x, which is rounded only once."""
        return self(x, gelu=True)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a type, scales applied."""
        if not self.group:
            return dequantise_rows(self.weight, self.weight_scale, dtype)
        return rotate(dequantise_rows(self.weight, self.weight_scale, torch.float32), self.group).to(dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = prefix + "weight_scale"
        if name in state_dict:  # a file may have one scale for all channels
            state_dict[name] = scales_of(state_dict[name], self.out_features)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_linears(linears: str) -> None:
    """ValueError for a name that is not of LINEARS."""
    if linears not in LINEARS:
        raise ValueError(f"unknown linear layers {linears!r}; choose one of {', '.join(LINEARS)}")


def names(network: nn.Module) -> list[str]:
    """The layers of a transformer that have an 8-bit form, but for those that are stored in fewer bits."""
    found = [name for name, _ in network.named_modules() if _LAYER.fullmatch(name)]
    return [name for name in found if isinstance(_stored(network.get_submodule(name)), (type(None), Float8, Int8))]


def prepare(network: nn.Module) -> None:
    """Put empty 8-bit layers, on the meta device, in the place of a transformer's, for weights to be loaded."""
    for name in names(network):
        _put(network, name, _empty(network.get_submodule(name)))


@torch.no_grad()
def eight_bit(transformer: nn.Module) -> None:
    """Turn a transformer's linear layers into 8-bit ones in place, a layer at a time.

    Layers whose weights are stored in 8 bits keep their numbers, and those in 4 bits stay what they are. A LoRA has to
    be applied before.
    """
    for name in names(transformer):
        layer = transformer.get_submodule(name)
        if isinstance(layer, EightBitLinear):
            continue
        rounded = _empty(layer)
        if _stored(layer) is not None:
            codes, scales = layer.weight, scales_of(layer.weight_scale, layer.out_features)
        else:
            codes, scales = quantise_weight(layer.weight)
        rounded.weight, rounded.weight_scale = nn.Parameter(codes, requires_grad=False), scales
        _put(transformer, name, rounded.train(layer.training))


def _stored(layer: nn.Module):
    return getattr(layer, "stored", None)


def _empty(layer: nn.Module) -> EightBitLinear:
    stored = _stored(layer)
    kind = torch.int8 if isinstance(stored, Int8) else torch.float8_e4m3fn
    made = EightBitLinear(
        layer.in_features, layer.out_features, layer.bias is not None, kind, stored.group if stored else 0
    )
    made.bias = layer.bias  # of its own type
    return made


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)
