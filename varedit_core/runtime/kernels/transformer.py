"""The transformer's operations as Triton kernels; `plain` has their meaning, `__init__` chooses.

All arithmetic is fp32, whatever the tensors hold; nothing is reduced across programs, so results are the same run by
run.
"""

# Annotations stay objects: the interpreter of Triton 3.0 knows no constexpr whose annotation is a text.
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .plain import FLOAT8_MOST, LEAST, Rounded


@kernel(do_not_specialize=["n"])
def _add_norm(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, h_ptr, own_ptr, n, width, eps,
    gate_stride, scale_stride, shift_stride,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, ROUNDED: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = token // n
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + token * width + at, inside, other=0.0)
    if HAS_Y:
        y = tl.load(y_ptr + token * width + at, inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            y = y * tl.load(gate_ptr + row * gate_stride + at, inside, other=0.0)
        x = x + y
        tl.store(sum_ptr + token * width + at, x, inside)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(scale_ptr + row * scale_stride + at, inside, other=0.0)
    shift = tl.load(shift_ptr + row * shift_stride + at, inside, other=0.0)
    h = centred * deviation * scale + shift
    if ROUNDED:
        own = tl.div_rn(tl.maximum(tl.max(tl.abs(h), 0), LEAST), MOST)
        h = tl.div_rn(h, own)
        tl.store(own_ptr + token, own)
    tl.store(h_ptr + token * width + at, h.to(h_ptr.dtype.element_ty), inside)


def add_norm(
    x_RnC: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype,
    rounded: bool = False,
) -> tuple[Tensor, Tensor | Rounded]:  # fmt: skip
    rows, n, width = x_RnC.shape
    x = x_RnC.contiguous()
    y = None if y is None else y.contiguous()
    total = x if y is None else torch.empty_like(x)
    h = torch.empty(x.shape, dtype=torch.float8_e4m3fn if rounded else dtype, device=x.device)
    own = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) if rounded else scale
    _add_norm[(rows * n,)](
        x, x if y is None else y, scale if gate is None else gate, scale, shift, total, h, own, n, width, eps,
        0 if gate is None else _row_stride(gate), _row_stride(scale), _row_stride(shift),
        HAS_Y=y is not None, HAS_GATE=gate is not None, ROUNDED=rounded, MOST=FLOAT8_MOST, LEAST=LEAST,
        BLOCK=triton.next_power_of_2(width), num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return total, Rounded(h, own, dtype) if rounded else h


def _row_stride(x_RC: Tensor) -> int:
    """Step from row to row; a single row serves all."""
    return 0 if x_RC.shape[0] == 1 else x_RC.stride(0)


@kernel(do_not_specialize=["n", "rotary_half"])
def _heads(
    qkv_ptr, query_scale_ptr, rotary_ptr, q_ptr, k_ptr, v_ptr, n, heads, rotary_half,
    qkv_row, qkv_token, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    half = tl.arange(0, D // 2)
    whole = tl.arange(0, D)
    there = token[:, None] < n
    cosine = tl.load(rotary_ptr + token[:, None] * (D // 2) + half, there, other=0.0)
    sine = tl.load(rotary_ptr + rotary_half + token[:, None] * (D // 2) + half, there, other=0.0)
    at = qkv_ptr + row * qkv_row + token[:, None].to(tl.int64) * qkv_token + head * D + whole
    width = heads * D

    q = tl.load(at, there, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12)
    q = q / length[:, None] * tl.load(query_scale_ptr + head)
    a, b = tl.split(tl.reshape(q, (TOKENS, D // 2, 2)))
    q = tl.interleave(a * cosine - b * sine, a * sine + b * cosine)
    to = q_ptr + row * q_row + token[:, None].to(tl.int64) * q_token + head * q_head + whole
    tl.store(to, q.to(q_ptr.dtype.element_ty), there)

    k = tl.load(at + width, there, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)
    k = k / length[:, None]
    a, b = tl.split(tl.reshape(k, (TOKENS, D // 2, 2)))
    k = tl.interleave(a * cosine - b * sine, a * sine + b * cosine)
    to = k_ptr + row * k_row + token[:, None].to(tl.int64) * k_token + head.to(tl.int64) * k_head + whole
    tl.store(to, k.to(k_ptr.dtype.element_ty), there)

    v = tl.load(at + 2 * width, there, other=0.0)
    to = v_ptr + row * v_row + token[:, None].to(tl.int64) * v_token + head.to(tl.int64) * v_head + whole
    tl.store(to, v.to(v_ptr.dtype.element_ty), there)


def heads_into(qkv_RnC: Tensor, query_scale: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    rows, n, _ = qkv_RnC.shape
    heads, size = keys.shape[1], keys.shape[3]
    # Token by token, so that attention's output, which takes the same layout, is [R, n, C] without a copy.
    q = torch.empty(rows, n, heads, size, dtype=qkv_RnC.dtype, device=qkv_RnC.device).transpose(1, 2)
    tokens = 16  # always: another number would be compiled anew
    _heads[(triton.cdiv(n, tokens), heads, rows)](
        qkv_RnC, query_scale, rotary, q, keys, values, n, heads, rotary.stride(0),
        qkv_RnC.stride(0), qkv_RnC.stride(1),
        q.stride(0), q.stride(2), q.stride(1),
        keys.stride(0), keys.stride(2), keys.stride(1),
        values.stride(0), values.stride(2), values.stride(1),
        D=size, TOKENS=tokens, num_warps=4,
    )  # fmt: skip
    return q


@triton.jit
def _see(
    q, k_ptr, v_ptr, k_token, v_token, begin, end, scale, most, total, out,
    D: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Softmax attention of queries to the tokens begin to end, joined to what they have seen: largest score, total
    weight and weighted sum. scale: of scores whose power of 2 is a weight."""
    whole = tl.arange(0, D)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        real = key < end
        at = key[:, None].to(tl.int64)
        k = tl.load(k_ptr + at * k_token + whole, real[:, None], other=0.0)
        v = tl.load(v_ptr + at * v_token + whole, real[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        score = tl.where(real[None], score, float("-inf"))
        larger = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(most - larger)
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=precision)
        most = larger
    return most, total, out


_LOG2E = tl.constexpr(1.4426950408889634)  # powers of 2 are cheaper than of e


@kernel(do_not_specialize=["n"])
def _text_attention(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, n, scale,
    q_row, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_token,
    D: tl.constexpr, TOKENS: tl.constexpr, TEXT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token[:, None] < n
    whole = tl.arange(0, D)
    q = tl.load(q_ptr + row * q_row + token[:, None].to(tl.int64) * q_token + head * D + whole, there, other=0.0)
    length = tl.load(lengths_ptr + row)
    most = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    out = tl.zeros((TOKENS, D), tl.float32)
    k_ptr += row * k_row + head * k_head
    v_ptr += row * v_row + head * v_head
    most, total, out = _see(
        q, k_ptr, v_ptr, k_token, v_token, 0, length, scale * _LOG2E, most, total, out, D, TEXT, EXACT
    )
    out = out / total[:, None]
    to = out_ptr + row * out_row + token[:, None].to(tl.int64) * out_token + head * D + whole
    tl.store(to, out.to(out_ptr.dtype.element_ty), there)


def text_attention(q_RnC: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    rows, n, _ = q_RnC.shape
    out = torch.empty_like(q_RnC)
    heads, size = keys.shape[1], keys.shape[3]
    tokens = 64 if n > 32 else 16
    _text_attention[(triton.cdiv(n, tokens), heads, rows)](
        q_RnC, keys, values, lengths, out, n, scale,
        q_RnC.stride(0), q_RnC.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        out.stride(0), out.stride(1),
        D=size, TOKENS=tokens, TEXT=32, EXACT=q_RnC.dtype == torch.float32, num_warps=4,
    )  # fmt: skip
    return out


@kernel(do_not_specialize=["n"])
def _text_weights(
    scores_ptr, bias_ptr, counts_ptr, out_ptr, n, heads, counts_step,
    HEADS: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = token // n
    head = tl.arange(0, HEADS)[:, None]
    text = tl.arange(0, TEXT)[None]
    at = head * TEXT + text
    there = (head < heads) & (text < TEXT)
    real = text < tl.load(counts_ptr + row * counts_step)
    scores = tl.load(scores_ptr + token * heads * TEXT + at, there, other=0.0)
    scores += tl.load(bias_ptr + row * heads * TEXT + at, there, other=0.0)
    scores = tl.where(real, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    tl.store(out_ptr + token * heads * TEXT + at, weights.to(out_ptr.dtype.element_ty), there)


def text_weights(scores_RnS: Tensor, bias_RS: Tensor, counts: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    rows, n, length = scores_RnS.shape
    out = torch.empty(scores_RnS.shape, dtype=dtype, device=scores_RnS.device)
    _text_weights[(rows * n,)](
        scores_RnS, bias_RS, counts, out, n, heads, counts.stride(0),
        HEADS=triton.next_power_of_2(heads), TEXT=length // heads, num_warps=4,
    )  # fmt: skip
    return out


@kernel(do_not_specialize=["n"])
def _banded_attention(
    q_ptr, k_ptr, v_ptr, pieces_ptr, out_ptr, n, scale, pieces,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_token,
    D: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    band = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    token = band * TOKENS + tl.arange(0, TOKENS)
    there = token[:, None] < n
    whole = tl.arange(0, D)
    q = tl.load(q_ptr + row * q_row + head * q_head + token[:, None] * q_token + whole, there, other=0.0)
    k_ptr += row * k_row + head.to(tl.int64) * k_head
    v_ptr += row * v_row + head.to(tl.int64) * v_head
    most = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    out = tl.zeros((TOKENS, D), tl.float32)
    for piece in range(pieces):
        begin = tl.load(pieces_ptr + (band * pieces + piece) * 2)
        end = tl.load(pieces_ptr + (band * pieces + piece) * 2 + 1)
        most, total, out = _see(
            q, k_ptr, v_ptr, k_token, v_token, begin, end, scale * _LOG2E, most, total, out, D, KEYS, EXACT
        )
    out = out / total[:, None]
    to = out_ptr + row * out_row + token[:, None].to(tl.int64) * out_token + head * D + whole
    tl.store(to, out.to(out_ptr.dtype.element_ty), there)


def banded_attention(q: Tensor, keys: Tensor, values: Tensor, pieces: Tensor, tokens: int, scale: float) -> Tensor:
    rows, heads, n, size = q.shape
    out = torch.empty(rows, n, heads * size, dtype=q.dtype, device=q.device)
    _banded_attention[(triton.cdiv(n, tokens), heads, rows)](
        q, keys, values, pieces, out, n, scale, pieces.shape[1],
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *out.stride()[:2],
        D=size, TOKENS=tokens, KEYS=64, EXACT=q.dtype == torch.float32, num_warps=8 if tokens >= 128 else 4,
        num_stages=3,
    )  # fmt: skip
    return out


@kernel(do_not_specialize=["n", "seen", "share"])
def _part_attention(
    q_ptr, k_ptr, v_ptr, part_ptr, most_ptr, total_ptr, n, seen, share, scale, heads,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    D: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(0), tl.num_programs(0)
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    row = (tl.program_id(2) // heads).to(tl.int64)
    head = tl.program_id(2) % heads
    lane = tl.arange(0, TOKENS)
    token = tile * TOKENS + lane
    there = token[:, None] < n
    whole = tl.arange(0, D)
    q = tl.load(q_ptr + row * q_row + head * q_head + token[:, None] * q_token + whole, there, other=0.0)
    k_ptr += row * k_row + head.to(tl.int64) * k_head
    v_ptr += row * v_row + head.to(tl.int64) * v_head
    most = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    out = tl.zeros((TOKENS, D), tl.float32)
    end = tl.minimum(seen, (part + 1) * share)
    most, total, out = _see(
        q, k_ptr, v_ptr, k_token, v_token, part * share, end, scale * _LOG2E, most, total, out, D, KEYS, EXACT
    )
    slot = (tl.program_id(2) * tiles + tile) * TOKENS + lane  # of the query, among all; parts of one lie side by side
    slot = slot.to(tl.int64) * parts + part
    tl.store(part_ptr + slot[:, None] * D + whole, out)
    tl.store(most_ptr + slot, most)
    tl.store(total_ptr + slot, total)


@kernel(do_not_specialize=["n", "parts"])
def _join_parts(
    part_ptr, most_ptr, total_ptr, out_ptr, n, room, parts, heads, out_row, out_token,
    D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    part = tl.arange(0, PARTS)
    real = part < parts
    whole = tl.arange(0, D)
    slot = (tl.program_id(1).to(tl.int64) * room + token) * parts + part
    most = tl.load(most_ptr + slot, real, other=float("-inf"))
    weight = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(tl.load(total_ptr + slot, real, other=0.0) * weight, 0)
    out = tl.load(part_ptr + slot[:, None] * D + whole, real[:, None], other=0.0)
    out = tl.sum(out * weight[:, None], 0) / total
    tl.store(out_ptr + row * out_row + token * out_token + head * D + whole, out.to(out_ptr.dtype.element_ty))


def split_attention(q: Tensor, keys: Tensor, values: Tensor, parts: int, scale: float) -> Tensor:
    rows, heads, n, size = q.shape
    seen, step = keys.shape[2], 64
    tokens = 16 if n <= 16 else 64
    share = triton.cdiv(triton.cdiv(seen, parts), step) * step
    parts = triton.cdiv(seen, share)
    tiles = triton.cdiv(n, tokens)
    kw = dict(dtype=torch.float32, device=q.device)
    part = torch.empty(rows * heads, tiles * tokens, parts, size, **kw)
    most, total = torch.empty(2, rows * heads, tiles * tokens, parts, **kw)
    out = torch.empty(rows, n, heads * size, dtype=q.dtype, device=q.device)
    _part_attention[(parts, tiles, rows * heads)](
        q, keys, values, part, most, total, n, seen, share, scale, heads,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        D=size, TOKENS=tokens, KEYS=step, EXACT=q.dtype == torch.float32, num_warps=4, num_stages=3,
    )  # fmt: skip
    _join_parts[(n, rows * heads)](
        part, most, total, out, n, tiles * tokens, parts, heads, *out.stride()[:2],
        D=size, PARTS=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return out
