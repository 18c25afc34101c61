"""A transformer's linear layers in 8 bits: half the memory of bf16 and, from Ada and Hopper on, faster products.

An approximation. In 8 bits are the blocks' self-attention projections, the query and projection of cross-attention and
the feed-forward network. All else (head, embeddings, modulation, the text's keys and values) is exact. Outliers sit in
what the down-projection (fc2) reads; numbers of 8 bits that have an exponent bear them, as small ones keep their
precision beside large ones (figures: docs/LOG.md).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .kernels import Rounded, dequantise_rows, linear_eight_bit, quantise_rows

LINEARS = ("exact", "8-bit")
"""What `load_transformer` makes of the blocks' linear layers."""
_LAYER = re.compile(r"blocks\.\d+\.(sa\.mat_qkv|sa\.proj|ca\.mat_q|ca\.proj|ffn\.fc1|ffn\.fc2)")
_ROWS = 1024  # of a weight rounded at a time: what is made meanwhile is small beside the weight


class EightBitLinear(nn.Linear):
    """Linear layer with a weight in 8 bits (float8_e4m3fn) and one fp32 scale an output channel: weight_scale [out].

    What comes in is rounded to 8 bits too, token by token, so that the device multiplies in 8 bits. Makes no weights of
    its own: see `eight_bit`.
    """

    reads_rounded = True

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias, "meta", torch.float8_e4m3fn)
        self.register_buffer("weight_scale", torch.empty(out_features, device="meta"))

    def reset_parameters(self) -> None:
        """Nothing: torch cannot fill 8-bit weights."""

    def forward(self, x: Tensor | Rounded, gelu: bool = False) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear_eight_bit(x, self.weight, self.weight_scale, bias, gelu)

    def after_gelu(self, x: Tensor) -> Tensor:
        """The layer behind GELU(tanh) of x, which is rounded only once."""
        return self(x, gelu=True)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a type, scales applied."""
        return dequantise_rows(self.weight, self.weight_scale, dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = prefix + "weight_scale"
        if name in state_dict:  # files of `convert` have one scale for all channels
            state_dict[name] = state_dict[name].float().expand(self.out_features).contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_linears(linears: str) -> None:
    """ValueError for a name that is not of LINEARS."""
    if linears not in LINEARS:
        raise ValueError(f"unknown linear layers {linears!r}; choose one of {', '.join(LINEARS)}")


def names(network: nn.Module) -> list[str]:
    """The layers of a transformer that have an 8-bit form."""
    return [name for name, _ in network.named_modules() if _LAYER.fullmatch(name)]


def prepare(network: nn.Module) -> None:
    """Put empty 8-bit layers, on the meta device, in the place of a transformer's, for weights to be loaded."""
    for name in names(network):
        layer = network.get_submodule(name)
        _put(network, name, _empty(layer))


@torch.no_grad()
def eight_bit(transformer: nn.Module) -> None:
    """Turn a transformer's linear layers into 8-bit ones in place, a layer at a time.

    Layers of an fp8 file keep their numbers and its scale. A LoRA has to be applied before.
    """
    for name in names(transformer):
        layer = transformer.get_submodule(name)
        if isinstance(layer, EightBitLinear):
            continue
        rounded = _empty(layer)
        scale = getattr(layer, "weight_scale", None)
        if scale is not None and layer.weight.dtype == torch.float8_e4m3fn:
            codes, scales = layer.weight, scale.float().expand(layer.out_features).contiguous()
        else:
            codes, scales = quantise_weight(layer.weight if scale is None else layer.matrix(torch.float32))
        rounded.weight, rounded.weight_scale = nn.Parameter(codes, requires_grad=False), scales
        _put(transformer, name, rounded.train(layer.training))


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn [out, in]) and scales (fp32 [out]) of a weight on its device."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for part, *to in zip(weight.split(_ROWS), codes.split(_ROWS), scales.split(_ROWS)):
        for target, x in zip(to, quantise_rows(part)):
            target.copy_(x)
    return codes, scales


def _empty(layer: nn.Module) -> EightBitLinear:
    made = EightBitLinear(layer.in_features, layer.out_features, layer.bias is not None)
    made.bias = layer.bias  # of its own type
    return made


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)
