"""Group norm and SiLU: the Triton kernels against exact figures, and what runs in their place.

As a script it runs the kernels, interpreted where there is no GPU, and prints what came of it as JSON: Triton decides
when it is imported whether to interpret, and other tests may have imported it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from support import ROOT
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Name -> shape, groups, mean of the input, numbers a program holds, programs a picture (None: as shipped), types.
CASES = {
    "width 4": ((2, 128, 5, 7), 32, 0, None, None, ("fp32", "bf16", "fp16")),
    "width 2, 24 groups": ((1, 48, 11, 13), 24, 0, None, None, ("fp32", "bf16")),
    "width 3": ((1, 96, 5, 3), 32, 0, None, None, ("fp32", "bf16")),
    "width 16": ((1, 512, 6, 5), 32, 0, None, None, ("fp32", "bf16")),
    "width 24": ((1, 768, 3, 5), 32, 0, None, None, ("fp32",)),
    "one row": ((1, 24, 1, 5), 24, 0, None, None, ("fp32",)),
    "many tiles a chunk": ((1, 64, 31, 29), 32, 0, 1024, 4, ("fp32", "bf16")),
    "many chunks": ((1, 24, 9, 13), 24, 0, 64, 1024, ("fp32",)),
    "large mean": ((1, 64, 31, 29), 32, 1000, 1024, 4, ("fp32", "bf16")),
    "halves apart": ((1, 64, 32, 16), 32, None, 1024, 4, ("fp32",)),
}


def example(shape, mean, dtype, device):
    """x, weight and bias; channels of many spreads around a mean (None: one of -50 above and of 50 below)."""
    generator = torch.Generator().manual_seed(0)
    images, channels, height, width = shape
    x = torch.randn(shape, generator=generator) * (0.1 + torch.rand(channels, 1, 1, generator=generator))
    x = x + (mean if mean is not None else torch.linspace(-50, 50, 2).repeat_interleave(height // 2)[:, None])
    affine = torch.randn(2, channels, generator=generator)
    tensors = (x.contiguous(memory_format=torch.channels_last), *affine)
    return [tensor.to(device, dtype) for tensor in tensors]


def run_kernels() -> dict[str, float]:
    """Largest errors against fp64 beyond one rounding of the result, by case and type; "plain": the plain form's."""
    from varedit_core.runtime.kernels import convolution

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shipped, found = (convolution._TILE, convolution._PROGRAMS), {}
    for name, (shape, groups, mean, tile, programs, kinds) in CASES.items():
        convolution._TILE, convolution._PROGRAMS = tile or shipped[0], programs or shipped[1]
        for kind in kinds:
            dtype = DTYPES[kind]
            x, weight, bias = example(shape, mean, dtype, device)
            exact = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6))
            y = convolution.group_norm_silu(x, groups, weight, bias, 1e-6)
            assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            # Interpreted, bf16 is cut instead of rounded.
            share = 1 if kind == "bf16" and device == "cpu" else 0.5
            rounding = exact.abs() * torch.finfo(dtype).eps * share
            found[f"{name}, {kind}"] = ((y.double() - exact).abs() - rounding).max().item()
            if kind == "fp32":
                plain = F.silu(F.group_norm(x.contiguous(), groups, weight, bias, 1e-6))
                found[f"{name}, plain"] = (plain.double() - exact).abs().max().item()
    x, weight, bias = example((2, 48, 9, 8), 0, torch.float32, device)
    y = convolution.group_norm_silu(x, 24, weight, bias, 1e-6)
    alone = [convolution.group_norm_silu(row, 24, weight, bias, 1e-6) for row in x.split(1)]
    found["batch against single pictures"] = (torch.cat(alone) - y).abs().max().item()
    x, weight, bias = example((2, 96, 9, 7), 3, torch.float32, device)
    offset = torch.linspace(-4, 4, 96, device=device)
    moved = F.silu(F.group_norm((x + offset[:, None, None]).double(), 32, weight.double(), bias.double(), 1e-6))
    y = convolution.group_norm_silu(x, 32, weight, bias, 1e-6, offset)
    found["offset before the norm"] = (y.double() - moved).abs().max().item()
    other, before = x.flip(0).contiguous(memory_format=torch.channels_last), x.clone()
    y = convolution.add_pictures(x, other, offset)
    assert y is x
    found["sum"] = (y - (before + other + offset[:, None, None])).abs().max().item()
    for kind in DTYPES.values():
        small = before.to(kind, memory_format=torch.channels_last)
        y = convolution.double_picture(small)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, F.interpolate(small, scale_factor=2.0, mode="nearest")), kind
    return found


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed here")
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **interpreted, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, row in CASES.items() for kind in row[-1]])
def test_kernels_against_exact_figures(errors, case, kind):
    # In a large mean fp32 has no more digits than this; plain torch has as few.
    bound = max(5e-6, 2 * errors[f"{case}, plain"])
    assert errors[f"{case}, {kind}"] < bound, errors


def test_a_picture_of_a_batch_is_that_picture(errors):
    assert errors["batch against single pictures"] == 0


def test_offsets_are_added_before_the_norm_and_to_the_sum(errors):
    assert errors["offset before the norm"] < 5e-6 and errors["sum"] < 2e-6


def layer(x):
    from varedit_core.runtime.layers import Operations

    norm = Operations.GroupNorm(32, x.shape[1], eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_it_is_torchs_own(layout, dtype):
    x = torch.randn(2, 64, 7, 9).to(dtype=dtype, memory_format=layout)
    before, norm = x.clone(), layer(x).to(dtype)
    with torch.no_grad():
        assert torch.equal(norm.silu(x), F.silu(norm(x))) and torch.equal(x, before)


def test_what_stands_in_for_the_kernels_adds_the_same():
    from varedit_core.model.functional import double_picture
    from varedit_core.runtime.kernels import add_pictures
    from varedit_core.runtime.layers import Operations

    x, y, offset = torch.randn(2, 64, 3, 5), torch.randn(2, 64, 3, 5), torch.randn(64)
    norm, moved = layer(x), x + offset[:, None, None]
    with torch.no_grad():
        assert torch.equal(norm.silu(x, offset), F.silu(norm(moved)))
        torch.testing.assert_close(add_pictures(x.clone(), y, offset), moved + y)
        assert torch.equal(add_pictures(x.clone(), y, None), x + y)
        assert torch.equal(double_picture(x)[..., 1::2, ::2], x)
        convolution = Operations.Conv2d(64, 8, 3, padding=1)
        result, bias = convolution.apart(x)
        assert bias is None and torch.equal(result, convolution(x)), "nothing would add it"


def test_gradients_are_torchs_own():
    x = torch.randn(2, 64, 5, 4, requires_grad=True)
    norm = layer(x)
    wanted = [x, norm.weight, norm.bias]
    fused, plain = (torch.autograd.grad(f.square().sum(), wanted) for f in (norm.silu(x), F.silu(norm(x))))
    assert all(torch.equal(a, b) for a, b in zip(fused, plain))


if __name__ == "__main__":
    print(json.dumps(run_kernels()))
