"""Numbers in 8 bits as Triton kernels: the KV cache (integers), what 8-bit products read (float8_e4m3fn, integers),
and weights in 4 bits (nvfp4).

`plain` has their meaning, `__init__` chooses. All arithmetic is fp32, divisions are exact to the last digit, and every
scale belongs to one row of numbers that one program sees whole, so results are those of the plain forms.
"""

# Annotations stay objects: the interpreter of Triton 3.0 knows no constexpr whose annotation is a text.
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .plain import LEAST, MOST, NVFP4_BLOCK, PackedHeads

_TOKENS = 64  # always: another number would be compiled anew
_TILE = 2048  # numbers of a weight that a program holds at once


@triton.jit
def _place(place, order_ptr, heads, coded):
    """Of the 2 H places (keys, coded heads first, then values): which kind, which head, where among the codes."""
    kind = (place >= heads).to(tl.int32)
    head = tl.load(order_ptr + tl.minimum(place, heads - 1))
    head = kind * (place - heads) + (1 - kind) * head
    return kind, head, kind * (coded + head) + (1 - kind) * place


@kernel(do_not_specialize=["coded", "first_row", "end"])
def _unpack(
    staged_ptr, codes_ptr, scales_ptr, exact_ptr, order_ptr, heads, coded, first_row, end,
    staged_kind, staged_row, staged_head, codes_row, codes_head, scales_row, scales_head, exact_row, exact_head,
    D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    kind, head, code = _place(place, order_ptr, heads, coded)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < end
    at = token[:, None] * D + tl.arange(0, D)[None, :]
    to = staged_ptr + kind * staged_kind + row * staged_row + head.to(tl.int64) * staged_head + at
    row += first_row
    if (place >= coded) & (place < heads):
        exact = tl.load(exact_ptr + row * exact_row + (place - coded).to(tl.int64) * exact_head + at, there[:, None])
        tl.store(to, exact, there[:, None])
    else:
        scale = tl.load(scales_ptr + row * scales_row + code.to(tl.int64) * scales_head + token, there, other=0.0)
        whole = tl.load(codes_ptr + row * codes_row + code.to(tl.int64) * codes_head + at, there[:, None], other=0)
        tl.store(to, (whole.to(tl.float32) * scale[:, None]).to(staged_ptr.dtype.element_ty), there[:, None])


@kernel(do_not_specialize=["coded", "first_row", "begin", "end"])
def _pack(
    staged_ptr, codes_ptr, scales_ptr, exact_ptr, order_ptr, heads, coded, first_row, begin, end,
    staged_kind, staged_row, staged_head, codes_row, codes_head, scales_row, scales_head, exact_row, exact_head,
    D: tl.constexpr, TOKENS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    kind, head, code = _place(place, order_ptr, heads, coded)
    token = begin + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < end
    at = token[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(
        staged_ptr + kind * staged_kind + row * staged_row + head.to(tl.int64) * staged_head + at,
        there[:, None], other=0.0,
    )  # fmt: skip
    row += first_row
    if (place >= coded) & (place < heads):
        tl.store(exact_ptr + row * exact_row + (place - coded).to(tl.int64) * exact_head + at, x, there[:, None])
    else:
        wide = x.to(tl.float32)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide), 1), LEAST), 127.0)
        # Adding and taking away 1.5 * 2^23 rounds to whole numbers, half to even.
        whole = (tl.div_rn(wide, scale[:, None]) + 12582912.0) - 12582912.0
        tl.store(codes_ptr + row * codes_row + code.to(tl.int64) * codes_head + at, whole.to(tl.int8), there[:, None])
        tl.store(scales_ptr + row * scales_row + code.to(tl.int64) * scales_head + token, scale, there)


def pack_heads(staged: Tensor, packed: PackedHeads, rows: slice, begin: int, end: int) -> None:
    grid, tensors, strides = _launch(staged, packed, rows, end - begin)
    _pack[grid](
        *tensors, staged.shape[2], packed.coded, rows.start, begin, end, *strides,
        D=staged.shape[4], TOKENS=_TOKENS, LEAST=LEAST, num_warps=4,
    )  # fmt: skip


def unpack_heads(packed: PackedHeads, rows: slice, end: int, staged: Tensor) -> None:
    grid, tensors, strides = _launch(staged, packed, rows, end)
    _unpack[grid](
        *tensors, staged.shape[2], packed.coded, rows.start, end, *strides,
        D=staged.shape[4], TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip


def _launch(staged: Tensor, packed: PackedHeads, rows: slice, count: int) -> tuple[tuple, tuple, tuple]:
    """Programs, tensors and strides of both kernels, which are the same."""
    grid = (triton.cdiv(count, _TOKENS), 2 * staged.shape[2], rows.stop - rows.start)
    stored = (packed.codes, packed.scales, packed.exact)
    strides = [stride for x in stored for stride in x.stride()[:2]]
    return grid, (staged, *stored, packed.order), (*staged.stride()[:3], *strides)


@kernel()
def _quantise_rows(
    x_ptr, codes_ptr, scales_ptr, width,
    GELU: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + at, at < width, other=0.0).to(tl.float32)
    if GELU:  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), LEAST), MOST)
    codes = tl.div_rn(x, scale)
    if codes_ptr.dtype.element_ty == tl.int8:  # whole numbers, half to even: as in `_pack`
        codes = (codes + 12582912.0) - 12582912.0
    codes = codes.to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row * width + at, codes, at < width)
    tl.store(scales_ptr + row, scale)


def quantise_rows(x_nC: Tensor, gelu: bool = False, kind: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    x = x_nC.contiguous()
    count, width = x.shape
    codes = torch.empty(x.shape, dtype=kind, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    _quantise_rows[(count,)](
        x, codes, scales, width, GELU=gelu, MOST=MOST[kind], LEAST=LEAST, BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return codes, scales


@kernel()
def _dequantise_rows(codes_ptr, scales_ptr, x_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(codes_ptr + row * width + at, at < width).to(tl.float32) * tl.load(scales_ptr + row)
    tl.store(x_ptr + row * width + at, x.to(x_ptr.dtype.element_ty), at < width)


def dequantise_rows(codes_nC: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    count, width = codes_nC.shape
    x = torch.empty(codes_nC.shape, dtype=dtype, device=codes_nC.device)
    _dequantise_rows[(triton.cdiv(width, _TILE), count)](codes_nC, scales, x, width, BLOCK=_TILE, num_warps=4)
    return x


@kernel(do_not_specialize=["n"])
def _few_rows(
    codes_ptr, own_ptr, weight_ptr, scales_ptr, bias_ptr, out_ptr, n, width, columns,
    BIAS: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there, real = row < n, column < columns
    x_ptr = codes_ptr + row[:, None].to(tl.int64) * width
    w_ptr = weight_ptr + column[None].to(tl.int64) * width
    out = tl.zeros((ROWS, COLUMNS), SUMS)
    for first in range(0, width, STEP):
        at = first + tl.arange(0, STEP)
        x = tl.load(x_ptr + at[None], there[:, None] & (at < width)[None], other=0.0)
        w = tl.load(w_ptr + at[:, None], real[None] & (at < width)[:, None], other=0.0)
        out = tl.dot(x, w, out, out_dtype=SUMS)
    out = out.to(tl.float32)
    out *= tl.load(own_ptr + row, there, other=0.0)[:, None] * tl.load(scales_ptr + column, real, other=0.0)[None]
    if BIAS:
        out += tl.load(bias_ptr + column, real, other=0.0).to(tl.float32)[None]
    to = out_ptr + row[:, None].to(tl.int64) * columns + column[None]
    tl.store(to, out.to(out_ptr.dtype.element_ty), there[:, None] & real[None])


def few_rows(
    codes_nC: Tensor, own: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_eight_bit` of rows that are rounded already: as many programs as the weight's rows can feed."""
    count, width = codes_nC.shape
    out = torch.empty(count, len(weight), dtype=dtype, device=codes_nC.device)
    rows, columns = 16 if count <= 16 else 64, 32
    _few_rows[(triton.cdiv(len(weight), columns), triton.cdiv(count, rows))](
        codes_nC, own, weight, scales, scales if bias is None else bias, out, count, width, len(weight),
        BIAS=bias is not None, SUMS=tl.int32 if codes_nC.dtype == torch.int8 else tl.float32, ROWS=rows,
        COLUMNS=columns, STEP=256, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@kernel(do_not_specialize=["n"])
def _scale_products(
    sums_ptr, own_ptr, scales_ptr, bias_ptr, out_ptr, n, columns, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    y = tl.load(sums_ptr + row * columns + at, there, other=0).to(tl.float32)
    y = y * tl.load(own_ptr + row) * tl.load(scales_ptr + at, there, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + at, there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + at, y.to(out_ptr.dtype.element_ty), there)


def scale_products(sums_nN: Tensor, own: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    count, columns = sums_nN.shape
    out = torch.empty(sums_nN.shape, dtype=dtype, device=sums_nN.device)
    _scale_products[(triton.cdiv(columns, _TILE), count)](
        sums_nN, own, scales, scales if bias is None else bias, out, count, columns,
        BIAS=bias is not None, BLOCK=_TILE, num_warps=4,
    )  # fmt: skip
    return out


@kernel()
def _nvfp4_matrix(
    codes_ptr, scales_ptr, most_ptr, out_ptr, width, tiles,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    code = tl.load(codes_ptr + row * (width // 2) + at // 2, there, other=0).to(tl.int32)
    code = (code >> (4 * (1 - at % 2))) & 15
    exponent, half = (code >> 1) & 3, (code & 1).to(tl.float32) * 0.5
    step = tl.where(exponent == 0, half, (1 + half) * (1 << tl.maximum(exponent - 1, 0)).to(tl.float32))
    step = tl.where(code >= 8, -step, step)
    block = at // GROUP
    place = ((row // 128) * tiles + block // 4) * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
    # float8_e4m3fn by its bits, as GPUs before Ada do not know it.
    bits = tl.load(scales_ptr + place, there, other=0).to(tl.int32)
    normal = (((bits & 127) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    scale = tl.where(bits < 8, bits.to(tl.float32) / 512, normal) * tl.load(most_ptr)
    tl.store(out_ptr + row * width + at, (step * scale).to(out_ptr.dtype.element_ty), there)


def nvfp4_matrix(codes_nK: Tensor, scales: Tensor, most: Tensor, dtype: torch.dtype) -> Tensor:
    rows, width = len(codes_nK), 2 * codes_nK.shape[1]
    out = torch.empty(rows, width, dtype=dtype, device=codes_nK.device)
    _nvfp4_matrix[(triton.cdiv(width, _TILE), rows)](
        codes_nK,
        scales.view(torch.uint8),
        most,
        out,
        width,
        scales.shape[1] // 4,
        GROUP=NVFP4_BLOCK,
        BLOCK=_TILE,
        num_warps=4,
    )
    return out
