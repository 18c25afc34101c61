"""The runtime's own operations in plain PyTorch: what the kernels must agree with, and what runs without them. Those of
the networks are in `model.functional`.

Shape suffixes: R rows (images, then their unconditional twins), n tokens, C width, H heads, D head size, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-12  # scales of all-zero rows are made of it
FLOAT8_MOST = 448.0  # the largest number of float8_e4m3fn


@dataclass(frozen=True)
class Rounded:
    """Rows of numbers in 8 bits: codes (float8_e4m3fn [..., C]) times a scale a row (fp32 [...]).

    dtype: what a layer that reads them answers in.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


def text_weights(scores_RnS: Tensor, bias_RS: Tensor, counts: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    scores = (scores_RnS + bias_RS[:, None]).unflatten(-1, (heads, -1))
    real = torch.arange(scores.shape[-1], device=scores.device) < counts[:, None]
    return scores.masked_fill(~real[:, None, None], float("-inf")).softmax(-1).flatten(2).to(dtype)


@dataclass(frozen=True)
class PackedHeads:
    """A block's KV cache in 8 bits, m tokens; the keys of some heads are left as they are.

    codes: int8 [R, coded + H, m, D], the keys of coded heads, then the values of all. scales: of each of their tokens,
    fp32 [R, coded + H, m]. exact: keys [R, H - coded, m, D] of the other heads. order: int32 [H], the heads whose keys
    are coded, then the others.
    """

    codes: Tensor
    scales: Tensor
    exact: Tensor
    order: Tensor

    @property
    def coded(self) -> int:
        """Heads whose keys are in 8 bits."""
        return self.codes.shape[1] - len(self.order)


def pack_heads(staged: Tensor, packed: PackedHeads, rows: slice, begin: int, end: int) -> None:
    keys, values = staged[:, : rows.stop - rows.start, :, begin:end]
    keys, coded = keys[:, packed.order.long()], packed.coded
    x = torch.cat((keys[:, :coded], values), dim=1).float()
    scales = x.abs().amax(-1).clamp_min(LEAST) / 127
    packed.codes[rows, :, begin:end] = (x / scales[..., None]).round().to(torch.int8)
    packed.scales[rows, :, begin:end] = scales
    packed.exact[rows, :, begin:end] = keys[:, coded:]


def unpack_heads(packed: PackedHeads, rows: slice, end: int, staged: Tensor) -> None:
    keys, values = staged[:, : rows.stop - rows.start, :, :end]
    order, coded = packed.order.long(), packed.coded
    x = packed.codes[rows, :, :end].float() * packed.scales[rows, :, :end, None]
    keys[:, order[:coded]] = x[:, :coded].to(keys.dtype)
    keys[:, order[coded:]] = packed.exact[rows, :, :end]
    values.copy_(x[:, coded:])


def quantise_rows(x_nC: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    x = F.gelu(x_nC.float(), approximate="tanh") if gelu else x_nC.float()
    scales = x.abs().amax(-1).clamp_min(LEAST) / FLOAT8_MOST
    return (x / scales[..., None]).to(torch.float8_e4m3fn), scales


def dequantise_rows(codes_nC: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes_nC.float() * scales[..., None]).to(dtype)
