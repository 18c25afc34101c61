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
MOST = {torch.float8_e4m3fn: FLOAT8_MOST, torch.int8: 127.0}
"""What the largest number of a row becomes, by the type of its codes."""
NVFP4_BLOCK, NVFP4_MOST = 16, 6.0  # numbers with one scale, and the largest of their 4-bit codes
_NVFP4_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NVFP4_TOPS = (6.0, 4.0)
"""What the largest number of a block may become: between 4 and 6 there is no step, so that 4 is often nearer."""


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


def quantise_rows(x_nC: Tensor, gelu: bool = False, kind: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    x = F.gelu(x_nC.float(), approximate="tanh") if gelu else x_nC.float()
    scales = x.abs().amax(-1).clamp_min(LEAST) / MOST[kind]
    x = x / scales[..., None]
    return (x if kind.is_floating_point else x.round()).to(kind), scales


def dequantise_rows(codes_nC: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes_nC.float() * scales[..., None]).to(dtype)


def scale_products(sums_nN: Tensor, own: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums_nN.float() * own[:, None] * scales
    return (y if bias is None else y + bias.float()).to(dtype)


def rotate(x: Tensor, group: int) -> Tensor:
    """`kernels.rotate` by sums of four in a fixed order, so that every device makes the same numbers of fp32."""
    stages = (group.bit_length() - 1) // 2
    x = x.unflatten(-1, (-1, *[4] * stages))
    for axis in range(-stages, 0):
        a, b, c, d = x.unbind(axis)
        total = (a + b) + (c + d)
        x = torch.stack([total - 2 * part for part in (d, c, b, a)], axis) / 2
    return x.flatten(-stages - 1)


def nvfp4_codes(rows_nK: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8 [n, K / 2], the first of two in the high bits) and scales (float8_e4m3fn [n, K / 16]) of rows.

    most: the number that all scales are multiplied with, fp32 []. Of _NVFP4_TOPS every block takes what is nearest.
    """
    blocks = rows_nK.float().unflatten(-1, (-1, NVFP4_BLOCK))
    sizes, best = blocks.abs(), None
    largest = sizes.amax(-1)
    for top in _NVFP4_TOPS:
        # Divided by a tensor: by a number a GPU multiplies with its inverse.
        scales = (largest / torch.full_like(most, top) / most).clamp(max=FLOAT8_MOST).to(torch.float8_e4m3fn)
        steps = (scales.float() * most)[..., None]
        nearest = _nearest((sizes / steps.clamp_min(torch.finfo(torch.float32).tiny)).clamp_(max=NVFP4_MOST))
        errors = (nearest * steps).sub_(sizes).square_().sum(-1)
        found = nearest, scales.view(torch.uint8), errors
        if best is not None:
            nearer = errors < best[2]
            found = [torch.where(nearer[..., None] if x.ndim == 3 else nearer, x, y) for x, y in zip(found, best)]
        best = found
    nearest = best[0]
    codes = torch.where(nearest < 2, 2 * nearest, torch.where(nearest < 4, nearest + 2, nearest / 2 + 4))
    codes = (codes.to(torch.uint8) + 8 * (blocks < 0).to(torch.uint8)).flatten(-2)
    return codes[:, ::2] << 4 | codes[:, 1::2], best[1].view(torch.float8_e4m3fn)


def _nearest(sizes: Tensor) -> Tensor:
    """Of _NVFP4_STEPS the nearest to numbers from 0 to 6; between two the even one."""
    per_one = torch.where(sizes < 2, 2.0, torch.where(sizes < 4, 1.0, 0.5))
    return (sizes * per_one).round_().div_(per_one)


def _steps(device: torch.device) -> Tensor:
    return torch.tensor(_NVFP4_STEPS, device=device)


def nvfp4_places(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of a matrix's scales as they are stored, in tiles of 128 rows and 4 blocks."""
    rows, width = shape
    return -(-rows // 128) * 128, -(-width // (4 * NVFP4_BLOCK)) * 4


def nvfp4_matrix(codes_nK: Tensor, scales: Tensor, most: Tensor, dtype: torch.dtype) -> Tensor:
    rows, blocks = len(codes_nK), 2 * codes_nK.shape[1] // NVFP4_BLOCK
    tiles = scales.view(torch.uint8).view(-1, scales.shape[1] // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    scales = tiles.reshape(scales.shape)[:rows, :blocks].view(torch.float8_e4m3fn).float() * most
    steps = torch.cat((_steps(codes_nK.device), -_steps(codes_nK.device)))
    numbers = torch.stack((steps[(codes_nK >> 4).int()], steps[(codes_nK & 15).int()]), -1)
    return (numbers.view(rows, blocks, NVFP4_BLOCK) * scales[..., None]).to(dtype).flatten(1)
