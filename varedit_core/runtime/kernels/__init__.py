"""Operations that are worth fusing: in one Triton kernel each on a GPU, in plain PyTorch everywhere else.

Both forms have the same meaning and agree up to rounding. The plain ones are those of `model.functional` for what the
networks compute, which ask the forms here first (None: the plain one is to run), and `plain` for what only the
runtime does. Triton is asked for only where a tensor lies on a CUDA device, gradients are off and nothing is being
traced. Where it is missing on a GPU (Windows, older cards) kernels in CUDA C run (`cuda_c`), else a form of few
passes (`fewer`), elsewhere the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from importlib import import_module
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import functional
from . import cuda_c, fewer, plain
from .plain import Rounded
from .probes import tried_once

T = TypeVar("T")
FEW_QUERIES = 64
"""So many queries do not keep a GPU busy with one program a head."""
_LEAST_WHOLE = 16  # rows, at most, that torch does not multiply as whole numbers
_LEAST_SEEN = 512  # fewer keys are not worth two kernels
FEW_ROWS, _NARROW_ROWS, _NARROW = 64, 128, 4096
"""8-bit products of so many rows, or of more but few columns, are bound by reading the weight: cuBLAS is slow at it."""


def has_triton(device: torch.device | None = None) -> bool:
    """Whether Triton works on a CUDA device, by default the present one: it also needs a compiler, which many
    installations lack."""
    if device is None:
        if not torch.cuda.is_available():
            return False
        device = torch.device("cuda", torch.cuda.current_device())
    return _runs_triton(device)


def takes_triton(device: torch.device) -> bool:
    """Whether a GPU is new enough for Triton."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@tried_once("Triton does not work here, so plain PyTorch is used, which is slower: %s")
def _runs_triton(device: torch.device) -> bool:
    if not takes_triton(device):
        return False
    probe = torch.ones(2, 1, 16, device=device)
    _triton("transformer").add_norm(probe, None, None, probe[:1, 0], probe[:1, 0], 1e-6, torch.float32)
    return True


@tried_once("PyTorch's compiler for CUDA does not work here, so edits without Triton take longer: %s")
def _runs_cuda_c(device: torch.device) -> bool:
    """Whether kernels in CUDA C run on a device, and are right."""
    if torch.version.hip is not None:
        return False
    if _capturing():
        raise RuntimeError("they cannot be tried while a graph is captured")
    return cuda_c.right(device)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def fusable(x: Tensor) -> bool:
    """Whether a Triton kernel may stand in for plain operations on this tensor."""
    return _on_gpu(x) and has_triton(x.device)


def _on_gpu(x: Tensor) -> bool:
    """Whether a tensor is worth fewer passes over memory, where Triton is missing."""
    return x.is_cuda and not torch.compiler.is_compiling() and not _tracked(x)


def _tracked(*tensors: Tensor | None) -> bool:
    """Whether gradients of tensors are wanted, of which kernels know nothing."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _in_cuda_c(function: Callable[..., T], x: Tensor, *arguments) -> T | None:
    """The result of one of `cuda_c`'s functions, where it runs for x. Where a launch fails, no more are tried."""
    if not (_on_gpu(x) and _runs_cuda_c(x.device)):
        return None
    try:
        return function(x, *arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _capturing():
            raise
        _runs_cuda_c.failed(error, x.device)
        return None


def _fits(x: Tensor, size: int) -> bool:
    """Whether kernels run for this tensor and heads of this size."""
    return fusable(x) and size >= 16 and size & (size - 1) == 0


def add_norm(
    x_RnC: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype,
    reader: nn.Module | None = None,
) -> tuple[Tensor, Tensor | Rounded] | None:  # fmt: skip
    """`functional.add_norm`; for a reader that reads them, the second in 8 bits."""
    if _tracked(x_RnC, y, gate, scale, shift):
        return None
    rounded = getattr(reader, "reads_rounded", False)
    if fusable(x_RnC) and (not rounded or multiplies_eight_bit(x_RnC.device)):
        return _triton("transformer").add_norm(x_RnC, y, gate, scale, shift, eps, dtype, rounded)
    if not rounded:
        arguments = (x_RnC, y, gate, scale, shift, eps, dtype)
        found = _in_cuda_c(cuda_c.add_norm, *arguments)
        return fewer.add_norm(*arguments) if found is None and _on_gpu(x_RnC) else found
    x, normed = functional.add_norm.plain(x_RnC, y, gate, scale, shift, eps, torch.float32)
    return x, Rounded(*plain.quantise_rows(normed), dtype)


def heads_into(qkv_RnC: Tensor, query_scale: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [R, H, n, D] of self-attention; k and v are written into `keys` and `values` [R, H, n, D].

    qkv: [R, n, 3 * H * D], thirds q, k, v. q and k get unit length in fp32, q is multiplied by query_scale (fp32 [H]),
    both are rotated by rotary (fp32 [2, n, D / 2]); all is rounded once.
    """
    if _fits(qkv_RnC, keys.shape[3]) and qkv_RnC.stride(2) == 1:
        return _triton("transformer").heads_into(qkv_RnC, query_scale, rotary, keys, values)
    q = _in_cuda_c(cuda_c.heads_into, qkv_RnC, query_scale, rotary, keys, values)
    if q is not None:
        return q
    if _on_gpu(qkv_RnC):
        return fewer.heads_into(qkv_RnC, query_scale, rotary, keys, values)
    q, k, v = functional.split_heads(qkv_RnC, query_scale, rotary)
    keys.copy_(k)
    values.copy_(v)
    return q.to(qkv_RnC.dtype)


def can_attend_to_text(q_RnC: Tensor, keys: Tensor) -> bool:
    """Whether `text_attention` runs here; it has no plain form, since an injected attention does its work."""
    return _fits(q_RnC, keys.shape[3])


def text_attention(q_RnC: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Cross-attention of q [R, n, H * D] to the first lengths[r] of the keys and values [R, H, L, D] -> [R, n, H * D].

    lengths: int32 [R] on the device, so that a recorded call serves texts of every length.
    """
    return _triton("transformer").text_attention(q_RnC, keys, values, lengths, scale)


def banded_attention(
    q: Tensor, keys: Tensor, values: Tensor, pieces: Tensor, tokens: int, scale: float
) -> Tensor | None:
    """Attention of q [R, H, n, D], each band of `tokens` queries to pieces of the keys and values [R, H, m, D] only.

    pieces: int32 [bands, P, 2] on the device, begin and end of each. Returns [R, n, H * D], or None where it does not
    run: an attention that is called band by band does its work there.
    """
    if not _fits(q, q.shape[3]):
        return None
    return _triton("transformer").banded_attention(q, keys, values, pieces, tokens, scale)


def split_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor | None:
    """Attention of few queries q [R, H, n, D], the keys and values [R, H, m, D] of each head in several parts at once.

    Returns [R, n, H * D], or None where the usual attention does as well.
    """
    rows, heads, n, size = q.shape
    few = n <= FEW_QUERIES and keys.shape[2] >= _LEAST_SEEN and q.dtype != torch.float32
    if not few or not _fits(q, size):
        return None
    parts = _processors(q.device) // (rows * heads)
    return _triton("transformer").split_attention(q, keys, values, parts, scale) if parts > 1 else None


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def matmul_fp32(x_Rnk: Tensor, y_Rkm: Tensor) -> Tensor:
    """Products [R, n, m] in fp32 of matrices in any type."""
    narrow = x_Rnk.dtype != torch.float32 and x_Rnk.is_cuda
    if narrow and not torch.compiler.is_compiling() and _widens(x_Rnk.device, x_Rnk.dtype):
        return torch.bmm(x_Rnk, y_Rkm, out_dtype=torch.float32)
    return torch.bmm(x_Rnk.float(), y_Rkm.float())


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `matmul_fp32` reads matrices of this type as they are. Elsewhere it is right, but copies them to fp32."""
    return device.type != "cuda" or dtype == torch.float32 or _widens(device, dtype)


@tried_once(
    "torch multiplies no 16-bit matrices into fp32 here (on CUDA it does from torch 2.8 on), so edits with short texts "
    "take a little longer: %s"
)
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    probe = torch.ones(1, 16, 16, device=device, dtype=dtype)
    return torch.bmm(probe, probe, out_dtype=torch.float32).dtype == torch.float32


def text_weights(scores_RnS: Tensor, bias_RS: Tensor, counts: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Softmax of scores [R, n, H * L] + bias, each head over the first counts[r] (int32 [R]) of its L tokens.

    scores, bias: fp32. L: a power of 2.
    """
    arguments = (scores_RnS, bias_RS, counts, heads, dtype)
    if fusable(scores_RnS):
        return _triton("transformer").text_weights(*arguments)
    found = _in_cuda_c(cuda_c.text_weights, *arguments)
    return plain.text_weights(*arguments) if found is None else found


@cache
def _triton(name: str):
    return import_module(f".{name}", __name__)


def compile_only() -> AbstractContextManager:
    """See `launching.compile_only`; only where Triton is."""
    return _triton("launching").compile_only()


def fuses_pictures(x_BCHW: Tensor) -> bool:
    """Whether kernels run for pictures like this one: on a GPU, channels-last."""
    # Asked first: what is being compiled must not look for Triton.
    if torch.compiler.is_compiling():
        return False
    return fusable(x_BCHW) and x_BCHW.is_contiguous(memory_format=torch.channels_last)


def group_norm_silu(
    x_BCHW: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, offset: Tensor | None = None
) -> Tensor:
    """SiLU of the group norm of [B, C, H, W] + offset [C], in x's type and layout; fused where x lies channels-last.

    weight, bias: [C], of x's type unless the kernel runs. The kernel rounds once, the plain form after the norm too.
    """
    tracked = _tracked(weight, bias, offset)
    if not tracked and fuses_pictures(x_BCHW):
        return _triton("convolution").group_norm_silu(x_BCHW, groups, weight, bias, eps, offset)
    norm = fewer.group_norm if not tracked and _on_gpu(x_BCHW) else F.group_norm
    normed = norm(_offset(x_BCHW, offset), groups, weight, bias, eps)
    return F.silu(normed, inplace=not torch.is_grad_enabled())


def add_pictures(x_BCHW: Tensor, y_BCHW: Tensor, offset: Tensor | None) -> Tensor:
    """x + y + offset [C], in the memory of x [B, C, H, W]."""
    alike = y_BCHW.shape == x_BCHW.shape and y_BCHW.dtype == x_BCHW.dtype
    fused = alike and not _tracked(offset) and fuses_pictures(x_BCHW) and fuses_pictures(y_BCHW)
    if offset is not None and fused:
        return _triton("convolution").add_pictures(x_BCHW, y_BCHW, offset)
    return _offset(x_BCHW.add_(y_BCHW), offset)


def double_picture(x_BCHW: Tensor) -> Tensor | None:
    """`functional.double_picture` of a picture that lies channels-last."""
    return _triton("convolution").double_picture(x_BCHW) if fuses_pictures(x_BCHW) else None


def laid_out(x_BCHW: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`functional.laid_out` where kernels run: channels-last, as they read it."""
    return x_BCHW.to(dtype, memory_format=torch.channels_last) if fusable(x_BCHW) else None


def _offset(x_BCHW: Tensor, offset: Tensor | None) -> Tensor:
    return x_BCHW if offset is None else x_BCHW + offset[:, None, None]


def pack_heads(staged: Tensor, packed: plain.PackedHeads, rows: slice, begin: int, end: int) -> None:
    """Put the tokens begin to end of staged keys and values [2, r, H, m, D] into the rows `rows` of `packed`.

    Codes are x / scale, rounded half to even, with scale = largest of the D numbers / 127.
    """
    _heads_form(staged).pack_heads(staged, packed, rows, begin, end)


def unpack_heads(packed: plain.PackedHeads, rows: slice, end: int, staged: Tensor) -> None:
    """Write the first `end` tokens of the rows `rows` of `packed` to the first rows of `staged` [2, r, H, m, D]."""
    if end:
        _heads_form(staged).unpack_heads(packed, rows, end, staged)


def _heads_form(staged: Tensor):
    return _triton("eight_bit") if _fits(staged, staged.shape[4]) else plain


@lru_cache(maxsize=8)
def multiplies_eight_bit(device: torch.device) -> bool:
    """Whether a device multiplies float8_e4m3fn matrices with a scale a row and a column: Ada from torch 2.7 on, Hopper
    from 2.5 on, before which `torch._scaled_mm` is called in another way."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if device.type != "cuda" or torch.version.hip is not None or version < (2, 5):
        return False
    return torch.cuda.get_device_capability(device) >= ((8, 9) if version >= (2, 7) else (9, 0))


@lru_cache(maxsize=8)
def multiplies_whole(device: torch.device) -> bool:
    """Whether a device multiplies matrices of whole numbers in 8 bits: Turing and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5)


def quantise_rows(x_nC: Tensor, kind: torch.dtype = torch.float8_e4m3fn, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (of the type kind, float8_e4m3fn or int8, [n, C]) of rows and their scales (fp32 [n]): a row's largest
    number becomes 448 or 127.

    gelu: of GELU(tanh) of the rows.
    """
    return _rows_form(x_nC, kind).quantise_rows(x_nC, gelu, kind)


def dequantise_rows(codes_nC: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scales in `dtype`, rounded once."""
    return _rows_form(codes_nC, codes_nC.dtype).dequantise_rows(codes_nC, scales, dtype)


def _rows_form(x: Tensor, kind: torch.dtype):
    return _triton("eight_bit") if fusable(x) and _multiplies(x.device, kind) else plain


def _multiplies(device: torch.device, kind: torch.dtype) -> bool:
    """Whether a device multiplies matrices of an 8-bit type."""
    return multiplies_whole(device) if kind == torch.int8 else multiplies_eight_bit(device)


def nvfp4_matrix(codes_nK: Tensor, scales: Tensor, most: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [n, K] in `dtype` of 4-bit codes (uint8 [n, K / 2]), scales in tiles (see `plain.nvfp4_places`) and
    the number that multiplies all."""
    form = _triton("eight_bit") if fusable(codes_nK) else plain
    return form.nvfp4_matrix(codes_nK, scales, most, dtype)


def rotate(x: Tensor, group: int) -> Tensor:
    """x [..., C], every `group` channels multiplied by a Hadamard matrix of unit rows, which is its own inverse
    (arXiv 2404.00456): outliers are spread over their group."""
    return (x.unflatten(-1, (-1, group)) @ _hadamard(group, x.dtype, x.device)).flatten(-2)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size], a power of four: the one of four whose rows have three ones and a minus one, times itself."""
    four, made = 1 - 2 * torch.eye(4).flip(0), torch.ones(1, 1)
    while len(made) < size:
        made = torch.kron(made, four)
    return (made / size**0.5).to(device, dtype)


def linear_eight_bit(
    x: Tensor | Rounded, weight: Tensor, scales: Tensor, bias: Tensor | None, gelu: bool = False, group: int = 0
) -> Tensor:
    """x @ weight.T + bias: [..., C] -> [..., N], both factors in 8 bits. gelu: GELU(tanh) of x in its place.

    weight, scales: codes and scales of N rows (see `quantise_rows`); x is rounded the same way, token by token, unless
    it is already. group: x is rotated before (see `rotate`), as the weight was. Where the device cannot multiply in 8
    bits, and float8 in other types than bf16, the rounded factors are multiplied in the result's type.
    """
    dtype, kind = x.dtype, weight.dtype
    if isinstance(x, Rounded):
        shape, codes, own = x.codes.shape[:-1], x.codes.flatten(0, -2), x.scales.flatten()
    else:
        if group:
            x, gelu = rotate(F.gelu(x, approximate="tanh") if gelu else x, group), False
        shape, (codes, own) = x.shape[:-1], quantise_rows(x.flatten(0, -2), kind, gelu)
    sixteenths = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    able = _multiplies(codes.device, kind) and (dtype == torch.bfloat16 or kind == torch.int8)
    if not (able and sixteenths):
        y = F.linear(dequantise_rows(codes, own, dtype), dequantise_rows(weight, scales, dtype), bias)
    elif fusable(codes) and (len(codes) <= FEW_ROWS or (len(codes) <= _NARROW_ROWS and len(weight) <= _NARROW)):
        y = _triton("eight_bit").few_rows(codes, own, weight, scales, bias, dtype)
    elif kind == torch.int8:
        y = _whole_products(codes, own, weight, scales, bias, dtype)
    else:
        more = (0, 0, 0, max(0, FEW_ROWS + 1 - len(codes)))  # fewer rows are refused for some widths
        factors = F.pad(codes.view(torch.uint8), more).view(kind), weight.t(), F.pad(own[:, None], more), scales[None]
        y = torch._scaled_mm(*factors, bias, out_dtype=dtype, use_fast_accum=True)[: len(codes)]
    return y.unflatten(0, shape)


def _whole_products(
    codes: Tensor, own: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_eight_bit` of whole numbers, which cuBLAS multiplies where there are more than 16 rows."""
    count, form = len(codes), _triton("eight_bit") if fusable(codes) else plain
    if count <= _LEAST_WHOLE:
        codes = F.pad(codes, (0, 0, 0, _LEAST_WHOLE + 1 - count))
    return form.scale_products(torch._int_mm(codes, weight.t())[:count], own, scales, bias, dtype)
