"""The transformer's small steps as kernels in CUDA C, where Triton is missing; `plain` and `model.functional` have
their meaning, `__init__` chooses. All arithmetic is fp32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...model import functional
from . import plain
from .nvrtc import Kernel

_TYPES, _WIDE = {torch.float32: "float", torch.bfloat16: "bf16"}, (torch.float32,)
_THREADS, _WARP = 256, 32
_WIDEST = 16 * 4 * _THREADS  # channels whose numbers a block's registers hold

SOURCE = r"""
typedef unsigned short bf16;

__device__ float wide(float x) { return x; }
__device__ float wide(bf16 x) { return __uint_as_float((unsigned)x << 16); }
__device__ void put(float *to, float x) { *to = x; }
__device__ void put(bf16 *to, float x) {  // to the nearest, halves to even
    unsigned bits = __float_as_uint(x);
    *to = x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class Number, int COUNT> struct alignas(COUNT * sizeof(Number)) Some { Number x[COUNT]; };

template <int COUNT, class Number> __device__ void load(const Number *from, float *x) {
    Some<Number, COUNT> some = *(const Some<Number, COUNT> *)from;
#pragma unroll
    for (int j = 0; j < COUNT; j++) x[j] = wide(some.x[j]);
}

template <int COUNT, class Number> __device__ void store(Number *to, const float *x) {
    Some<Number, COUNT> some;
#pragma unroll
    for (int j = 0; j < COUNT; j++) put(&some.x[j], x[j]);
    *(Some<Number, COUNT> *)to = some;
}

__device__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

#ifdef ADD_NORM
__device__ float block_sum(float x) {
    __shared__ float parts[THREADS / 32];
    x = warp_sum(x);
    __syncthreads();  // who reads the last sum
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < THREADS / 32; warp++) x += parts[warp];
    return x;
}

// A block a token: x + y * gate, and its layer norm * scale + shift.
extern "C" __global__ void add_norm(
    const float *xs, const Y *ys, const float *gates, const float *scales, const float *shifts, float *sums, H *outs,
    long long n, float eps, long long gate_row, long long scale_row, long long shift_row
) {
    constexpr int PER = (WIDTH + 4 * THREADS - 1) / (4 * THREADS);
    long long token = blockIdx.x, row = token / n;
    float x[PER][4], y[4], factor[4], mean = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        int at = 4 * (i * THREADS + threadIdx.x);
        if (at >= WIDTH) continue;
        load<4>(xs + token * WIDTH + at, x[i]);
        if (HAS_Y) {
            load<4>(ys + token * WIDTH + at, y);
            if (HAS_GATE) load<4>(gates + row * gate_row + at, factor);
            for (int j = 0; j < 4; j++) x[i][j] += HAS_GATE ? y[j] * factor[j] : y[j];
            store<4>(sums + token * WIDTH + at, x[i]);
        }
        for (int j = 0; j < 4; j++) mean += x[i][j];
    }
    mean = block_sum(mean) / WIDTH;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        if (4 * (i * THREADS + threadIdx.x) >= WIDTH) continue;
        for (int j = 0; j < 4; j++) squares += (x[i][j] - mean) * (x[i][j] - mean);
    }
    float deviation = 1 / sqrtf(block_sum(squares) / WIDTH + eps);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        int at = 4 * (i * THREADS + threadIdx.x);
        if (at >= WIDTH) continue;
        load<4>(scales + row * scale_row + at, factor);
        load<4>(shifts + row * shift_row + at, y);
        for (int j = 0; j < 4; j++) y[j] += (x[i][j] - mean) * deviation * factor[j];
        store<4>(outs + token * WIDTH + at, y);
    }
}
#endif

#ifdef HEADS
// Unit length, times a gain, pairs turned by an angle. A warp has the whole vector.
__device__ void turn(const TYPE *from, float gain, const float *cosine, const float *sine, TYPE *to) {
    constexpr int PER = D / 32;
    float x[PER], squares = 0;
    load<PER>(from, x);
    for (int j = 0; j < PER; j++) squares += x[j] * x[j];
    float length = fmaxf(sqrtf(warp_sum(squares)), 1e-12f);
    for (int j = 0; j < PER; j += 2) {
        float a = x[j] / length * gain, b = x[j + 1] / length * gain;
        x[j] = a * cosine[j / 2] - b * sine[j / 2];
        x[j + 1] = a * sine[j / 2] + b * cosine[j / 2];
    }
    store<PER>(to, x);
}

// A warp a token and head.
extern "C" __global__ void heads_into(
    const TYPE *qkv, const float *gains, const float *rotary, TYPE *q, TYPE *k, TYPE *v,
    long long heads, long long rotary_half, long long qkv_row, long long qkv_token,
    long long q_row, long long q_token, long long q_head,
    long long k_row, long long k_token, long long k_head, long long v_row, long long v_token, long long v_head
) {
    constexpr int PER = D / 32;
    long long token = blockIdx.x, head = blockIdx.y * (THREADS / 32) + threadIdx.x / 32, row = blockIdx.z;
    if (head >= heads) return;
    int at = threadIdx.x % 32 * PER;
    float cosine[PER / 2], sine[PER / 2], x[PER];
    load<PER / 2>(rotary + token * (D / 2) + at / 2, cosine);
    load<PER / 2>(rotary + rotary_half + token * (D / 2) + at / 2, sine);
    const TYPE *from = qkv + row * qkv_row + token * qkv_token + head * D + at;
    turn(from, gains[head], cosine, sine, q + row * q_row + token * q_token + head * q_head + at);
    turn(from + heads * D, 1, cosine, sine, k + row * k_row + token * k_token + head * k_head + at);
    load<PER>(from + 2 * heads * D, x);
    store<PER>(v + row * v_row + token * v_token + head * v_head + at, x);
}
#endif

#ifdef TEXT_WEIGHTS
// Softmax of each head's scores + bias over its first tokens; a warp a token and head.
extern "C" __global__ void text_weights(
    const float *scores, const float *biases, const int *counts, TYPE *weights, long long n, long long heads
) {
    constexpr int PER = LENGTH / 32;
    long long token = blockIdx.x, head = blockIdx.y * (THREADS / 32) + threadIdx.x / 32, row = token / n;
    if (head >= heads) return;
    int at = threadIdx.x % 32 * PER;
    float x[PER], bias[PER], most = -3.4e38f, total = 0;
    load<PER>(scores + (token * heads + head) * LENGTH + at, x);
    load<PER>(biases + (row * heads + head) * LENGTH + at, bias);
    for (int j = 0; j < PER; j++) {
        x[j] += bias[j];
        if (at + j < counts[row]) most = fmaxf(most, x[j]);
    }
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    for (int j = 0; j < PER; j++) {
        x[j] = at + j < counts[row] ? expf(x[j] - most) : 0;
        total += x[j];
    }
    total = warp_sum(total);
    for (int j = 0; j < PER; j++) x[j] /= total;
    store<PER>(weights + (token * heads + head) * LENGTH + at, x);
}
#endif
"""


@cache
def kernel(name: str, **constants: object) -> Kernel:
    """One of the source's functions, with what it finds defined."""
    return Kernel(SOURCE, name, THREADS=_THREADS, **constants)


def takes(*tensors: Tensor | None, types=_TYPES) -> bool:
    """Whether numbers are of types that are known here, and lie so that several are read at once."""
    given = [x for x in tensors if x is not None]
    steps = [step for x in given for step in x.stride()[:-1]]
    return all(x.dtype in types and x.data_ptr() % 16 == 0 and x.stride(-1) == 1 for x in given) and all(
        step % 8 == 0 for step in steps
    )


def right(device: torch.device) -> bool:
    """Whether every kernel gives what plain PyTorch does on a device, with numbers as networks have them."""
    options = {"device": device, "dtype": torch.float32}
    numbers = torch.linspace(-2, 3, 2 * 6 * 2560, **options).sin().view(2, 6, 2560)
    narrow, gate, scale, shift = numbers.bfloat16(), numbers[:, 0], numbers[:, 1], numbers[:, 2]
    pairs = [(add_norm, functional.add_norm.plain, (numbers, narrow, gate, scale, shift, 1e-6, torch.bfloat16))]
    kept = torch.empty(2, 2, 6, 6, 128, device=device, dtype=torch.bfloat16)
    turns = torch.linspace(0, 6, 2 * 6 * 64, **options).view(2, 6, 64)
    heads = (numbers.repeat(1, 1, 2)[..., : 3 * 6 * 128].bfloat16(), scale[0, :6], turns)

    def turned(*arguments) -> tuple:
        q = heads_into(*arguments, kept[0], kept[1])
        return None if q is None else (q, *kept)

    pairs.append((turned, lambda *given: [x.bfloat16() for x in functional.split_heads(*given)], heads))
    counts = torch.tensor([3, 20], dtype=torch.int32, device=device)
    pairs.append((text_weights, plain.text_weights, (numbers, shift.contiguous(), counts, 80, torch.bfloat16)))
    for kernel_form, plain_form, arguments in pairs:
        found, wanted = kernel_form(*arguments), plain_form(*arguments)
        if found is None:
            return False
        found, wanted = ([x] if isinstance(x, Tensor) else x for x in (found, wanted))
        if not all(torch.allclose(a.float(), b.float(), atol=0.03, rtol=0.02) for a, b in zip(found, wanted)):
            return False
    return True


def add_norm(
    x_RnC: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """`functional.add_norm`; None for what it does not take."""
    rows, n, width = x_RnC.shape
    x, y = x_RnC.contiguous(), None if y is None else y.contiguous()
    if dtype not in _TYPES or width > _WIDEST or not (takes(y) and takes(x, gate, scale, shift, types=_WIDE)):
        return None
    total = x if y is None else torch.empty_like(x)
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    types = {"Y": _TYPES[torch.float32 if y is None else y.dtype], "H": _TYPES[dtype]}
    flags = {"HAS_Y": int(y is not None), "HAS_GATE": int(gate is not None)}
    kernel("add_norm", ADD_NORM=1, WIDTH=width, **types, **flags)(
        (rows * n,), _THREADS, x, x if y is None else y, scale if gate is None else gate, scale, shift, total, h, n,
        eps, *(0 if own is None or len(own) == 1 else own.stride(0) for own in (gate, scale, shift)),
    )  # fmt: skip
    return total, h


def heads_into(qkv_RnC: Tensor, query_scale: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
    """`kernels.heads_into`; None for what it does not take."""
    rows, n, _ = qkv_RnC.shape
    heads, size = keys.shape[1], keys.shape[3]
    alike = qkv_RnC.dtype == keys.dtype == values.dtype
    wide = query_scale.is_contiguous() and takes(rotary, types=_WIDE) and query_scale.dtype == torch.float32
    if not (alike and wide and size in (64, 128) and takes(qkv_RnC, keys, values)):
        return None
    # Token by token, so that attention's output, which takes the same layout, is [R, n, C] without a copy.
    q = torch.empty(rows, n, heads, size, dtype=qkv_RnC.dtype, device=qkv_RnC.device).transpose(1, 2)
    kernel("heads_into", HEADS=1, D=size, TYPE=_TYPES[qkv_RnC.dtype])(
        (n, -(-heads // (_THREADS // _WARP)), rows), _THREADS, qkv_RnC, query_scale, rotary, q, keys, values, heads,
        rotary.stride(0), qkv_RnC.stride(0), qkv_RnC.stride(1),
        *(step for x in (q, keys, values) for step in (x.stride(0), x.stride(2), x.stride(1))),
    )  # fmt: skip
    return q


def text_weights(scores_RnS: Tensor, bias_RS: Tensor, counts: Tensor, heads: int, dtype: torch.dtype) -> Tensor | None:
    """`kernels.text_weights`; None for what it does not take."""
    rows, n, width = scores_RnS.shape
    length = width // heads
    laid = scores_RnS.is_contiguous() and bias_RS.is_contiguous() and takes(scores_RnS, bias_RS, types=_WIDE)
    if dtype not in _TYPES or length not in (32, 64, 128) or not laid or counts.dtype != torch.int32:
        return None
    weights = torch.empty(scores_RnS.shape, dtype=dtype, device=scores_RnS.device)
    kernel("text_weights", TEXT_WEIGHTS=1, LENGTH=length, TYPE=_TYPES[dtype])(
        (rows * n, -(-heads // (_THREADS // _WARP))), _THREADS, scores_RnS, bias_RS, counts, weights, n, heads
    )
    return weights
