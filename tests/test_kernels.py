"""Fused kernels against plain PyTorch, on the CPU through Triton's interpreter.

Triton decides whether to interpret when it is imported, so one test here runs the others in a process of its own. In
fp32, where the interpreter is exact; what depends on the type (rounding once at the end) is checked in bf16 where no
product is involved, which the interpreter cannot do.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import ROOT

from varedit_core.model.functional import add_norm, split_heads
from varedit_core.runtime.kernels import fusable, matmul_fp32, plain

INTERPRETED = os.environ.get("VAREDIT_KERNEL_TESTS") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that another test here starts")
if INTERPRETED:
    from varedit_core.runtime.kernels import transformer as kernels


def interprets() -> bool:
    """Whether Triton's interpreter runs loops here: before 3.7 it takes numbers that NumPy 2.4 no longer gives."""
    found = [tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")]
    return found[0] >= (3, 7) or found[1] < (2, 4)


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(find_spec("triton") is not None and not interprets(), reason="another Triton or NumPy can do it")
def test_kernels_in_a_process_of_their_own():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VAREDIT_KERNEL_TESTS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


EPS = 1e-6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@inside
@pytest.mark.parametrize("width", [128, 200])
@pytest.mark.parametrize("case", ["gated", "plain", "first", "shared"])
def test_add_norm(width, case):
    x, y = torch.randn(2, 19, width) * 3 + 1, torch.randn(2, 19, width)
    modulation = torch.randn(2, 6, width)
    gate = modulation[:, 1] if case == "gated" else None
    scale, shift = modulation[:, 3], modulation[:, 5]
    if case == "shared":
        scale, shift = scale[:1], shift[:1]
    y = None if case == "first" else y
    before = x.clone()
    for found, wanted in zip(
        kernels.add_norm(x, y, gate, scale, shift, EPS, torch.float32),
        add_norm.plain(x, y, gate, scale, shift, EPS, torch.float32),
    ):
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)
    assert torch.equal(x, before), "the input stays"


@inside
def test_add_norm_rounds_once():
    x, y = torch.randn(1, 5, 64), torch.randn(1, 5, 64).bfloat16()
    ones, zeros = torch.ones(1, 64), torch.zeros(1, 64)
    total, h = kernels.add_norm(x, y, ones, ones, zeros, EPS, torch.bfloat16)
    assert total.dtype == torch.float32 and torch.equal(total, x + y.float())
    exact = F.layer_norm(total, (64,), eps=EPS)
    assert h.dtype == torch.bfloat16 and (h.float() - exact).abs().max() < 2**-7 * exact.abs().max()


@inside
def test_add_norm_rounds_to_eight_bits():
    x, y, modulation = torch.randn(2, 7, 200), torch.randn(2, 7, 200), torch.randn(2, 6, 200)
    arguments = (x, y, modulation[:, 1], modulation[:, 3], modulation[:, 5], EPS, torch.float32)
    reader = SimpleNamespace(reads_rounded=True)
    (total, found), (wanted_total, wanted) = kernels.add_norm(*arguments, True), add_norm(*arguments, reader)
    torch.testing.assert_close(total, wanted_total, atol=5e-6, rtol=0)
    torch.testing.assert_close(found.scales, wanted.scales, atol=1e-7, rtol=0)
    assert found.dtype == wanted.dtype == torch.float32
    # Numbers between two codes may go either way; the interpreter forgets the carry to a power of two.
    carried = wanted.codes.float().abs().log2().frac() == 0
    off = (found.codes.float() - wanted.codes.float()).abs() > 0
    assert off[~carried].float().mean() < 0.01


@inside
@pytest.mark.parametrize(("n", "seen", "parts"), [(1, 70, 4), (16, 300, 3), (37, 200, 8), (64, 129, 2)])
def test_attention_in_parts_is_attention(n, seen, parts):
    rows, heads, size = 2, 3, 32
    q = torch.randn(rows, n, heads, size).transpose(1, 2)
    store = torch.randn(2, rows, heads, seen + 7, size)
    store[..., seen + 3 :, :] = float("nan")
    keys, values = store[:, :, :, 3 : 3 + seen]
    found = kernels.split_attention(q, keys, values, parts, 0.5)
    wanted = F.scaled_dot_product_attention(q, keys, values, scale=0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, wanted, atol=3e-6, rtol=0)


@inside
@pytest.mark.parametrize("n", [1, 16, 37])
def test_heads_are_normalised_rotated_and_put_in_their_place(n):
    rows, heads, size = 2, 3, 32
    qkv = torch.randn(rows, n, 3 * heads * size)
    scale, rotary = torch.rand(heads) * 8, torch.randn(2, n + 9, size // 2)[:, 4 : 4 + n]
    store = torch.full((2, 2 * rows, heads, n + 11, size), 7.0)
    keys, values = (part[::2, :, 5 : 5 + n] for part in store)
    q = kernels.heads_into(qkv, scale, rotary, keys, values)
    for found, wanted in zip((q, keys, values), split_heads(qkv, scale, rotary)):
        torch.testing.assert_close(found, wanted, atol=3e-6, rtol=0)
    assert (store[:, 1::2] == 7).all() and (store[..., :5, :] == 7).all() and (store[..., 5 + n :, :] == 7).all()
    assert q.transpose(1, 2).is_contiguous(), "attention's output is then [R, n, C] without a copy"


@inside
def test_a_head_of_zeros_is_no_division_by_zero():
    keys, values = torch.empty(1, 1, 4, 16), torch.empty(1, 1, 4, 16)
    q = kernels.heads_into(torch.zeros(1, 4, 48), torch.ones(1), torch.ones(2, 4, 8), keys, values)
    assert not q.any() and not keys.any() and not values.any()


@inside
@pytest.mark.parametrize("n", [1, 50])
def test_text_attention_reads_real_tokens_only(n):
    rows, heads, size = 2, 2, 32
    q = torch.randn(rows, n, heads * size)
    keys, values = torch.randn(2, rows, heads, 96, size)
    lengths = torch.tensor([5, 96], dtype=torch.int32)
    keys[0, :, 5:], values[0, :, 5:] = float("nan"), float("nan")
    found = kernels.text_attention(q, keys, values, lengths, 0.3)
    for row, length in enumerate(lengths):
        heads_q = q[row].unflatten(-1, (heads, size)).transpose(0, 1)
        pair = keys[row, :, :length], values[row, :, :length]
        wanted = F.scaled_dot_product_attention(heads_q, *pair, scale=0.3).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[row], wanted, atol=3e-6, rtol=0)


@inside
def test_weights_of_the_text_are_a_softmax_a_head():
    scores, bias = torch.randn(2, 7, 3 * 16) * 4, torch.randn(2, 3 * 16)
    counts = torch.tensor([16, 3], dtype=torch.int32)
    found = kernels.text_weights(scores, bias, counts, 3, torch.float32)
    torch.testing.assert_close(found, plain.text_weights(scores, bias, counts, 3, torch.float32), atol=1e-6, rtol=0)
    parts = found.unflatten(-1, (3, 16))
    torch.testing.assert_close(parts.sum(-1), torch.ones(2, 7, 3), atol=1e-5, rtol=0)
    assert not parts[1, ..., 3:].any()


@inside
def test_banded_attention_sees_its_pieces_only():
    rows, heads, size, n = 2, 2, 32, 150
    q = torch.randn(rows, n, heads, size).transpose(1, 2)
    keys, values = torch.randn(2, rows, heads, 400, size)
    listed = [[(0, 70), (390, 400)], [(100, 164), (0, 0)]]
    pieces = torch.tensor(listed, dtype=torch.int32)
    found = kernels.banded_attention(q, keys, values, pieces, 128, 0.5)
    for band, own in enumerate(q.split(128, dim=2)):
        seen = torch.cat([torch.arange(begin, end) for begin, end in listed[band]])
        wanted = F.scaled_dot_product_attention(own, keys[:, :, seen], values[:, :, seen], scale=0.5)
        part = found[:, band * 128 : band * 128 + own.shape[2]]
        torch.testing.assert_close(part, wanted.transpose(1, 2).flatten(2), atol=3e-6, rtol=0)


def test_products_in_fp32_of_bf16_matrices():
    x, y = torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 64, 8).bfloat16()
    found = matmul_fp32(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float() @ y.float(), atol=1e-4, rtol=0)


def test_nothing_is_fused_on_the_cpu():
    assert not fusable(torch.zeros(1))
