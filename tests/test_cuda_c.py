"""The kernels in CUDA C, built by a C++ compiler and run on the CPU, thread by thread (`cuda_on_cpu.h`)."""

import ctypes
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from support import ROOT

from varedit_core.model import functional
from varedit_core.runtime import kernels
from varedit_core.runtime.kernels import cuda_c, fewer, nvrtc, plain

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is here")
HEADER = ROOT / "tests" / "cuda_on_cpu.h"
RUN = """extern "C" void run_kernel(const unsigned *grid, unsigned threads, void **arguments) {{
    run({}, grid, threads, arguments);
}}"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Kernels by source and name, as functions of the CPU."""
    folder, known = tmp_path_factory.mktemp("cuda_c"), {}

    def build(source: str, name: str):
        if (source, name) not in known:
            path = folder / f"kernel{len(known)}"
            text = f"#include <type_traits>\n{HEADER.read_text()}\n{source}\n{RUN.format(name)}\n"
            path.with_suffix(".cpp").write_text(text)
            options = ["-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
            subprocess.run(["g++", *options, f"{path}.cpp", "-o", f"{path}.so"], check=True)
            known[source, name] = ctypes.CDLL(f"{path}.so").run_kernel
        return known[source, name]

    return build


@pytest.fixture
def on_cpu(built, monkeypatch):
    launched = []

    def call(self, grid, threads, *arguments):
        launched.append(self.name)
        values = [nvrtc._value(x) for x in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        built(self.source, self.name)((ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))), threads, places)

    monkeypatch.setattr(nvrtc.Kernel, "__call__", call)
    torch.manual_seed(0)
    return launched


BFLOAT16 = dict(atol=0.02, rtol=0.01)


@pytest.mark.parametrize("width", [64, 1028 + 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["gated", "plain", "first", "shared"])
def test_add_norm(on_cpu, case, dtype, width):
    x, y = torch.randn(2, 3, width) * 3 + 1, torch.randn(2, 3, width).to(dtype)
    modulation = torch.randn(2, 6, width)
    gate = modulation[:, 1] if case == "gated" else None
    scale, shift = (modulation[: 1 if case == "shared" else 2, n] for n in (3, 5))
    arguments = (x, None if case == "first" else y, gate, scale, shift, 1e-6, dtype)
    total, h = cuda_c.add_norm(*arguments)
    wanted_total, wanted = functional.add_norm.plain(*arguments)
    assert on_cpu == ["add_norm"] and h.dtype == dtype
    torch.testing.assert_close(total, wanted_total, atol=2e-6, rtol=0)
    torch.testing.assert_close(h, wanted, **({"atol": 5e-6, "rtol": 0} if dtype == torch.float32 else BFLOAT16))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads(on_cpu, dtype, size):
    heads = 3 if size == 128 else 9  # more than a block's warps
    qkv, gains = torch.randn(2, 4, 3 * heads * size).to(dtype), torch.rand(heads) * 3
    rotary = torch.randn(2, 4, size // 2)
    qkv[0, 3] = 0  # no length to divide by
    kept = torch.full((2, 2, heads, 8, size), 7.0, dtype=dtype)
    keys, values = kept[:, :, :, 2:6]
    q = cuda_c.heads_into(qkv, gains, rotary, keys, values)
    wanted = functional.split_heads(qkv, gains, rotary)
    for found, expected in zip((q, keys, values), wanted):
        torch.testing.assert_close(found, expected.to(dtype), atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)
    assert (kept[:, :, :, :2] == 7).all() and (kept[:, :, :, 6:] == 7).all(), "nothing beside is written"
    assert q.transpose(1, 2).is_contiguous() and on_cpu == ["heads_into"]


@pytest.mark.parametrize("length", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_weights(on_cpu, dtype, length):
    scores, bias, counts = torch.randn(2, 3, 9 * length) * 4, torch.randn(2, 9 * length), torch.tensor([1, length - 5])
    found = cuda_c.text_weights(scores, bias, counts.int(), 9, dtype)
    wanted = plain.text_weights(scores, bias, counts, 9, dtype)
    torch.testing.assert_close(found, wanted, atol=1e-6 if dtype == torch.float32 else 0.005, rtol=0)
    assert on_cpu == ["text_weights"] and (found.unflatten(2, (9, length))[0, ..., 1:] == 0).all()


def test_bfloat16_is_rounded_as_torch_does(on_cpu):
    """Halves to even; infinities and undefined numbers stay what they are."""
    numbers = [1.00390625, 1.01171875, -1.01171875, 3.4e38, float("inf"), -float("inf"), 1e-39, float("nan")]
    shift = torch.cat((torch.randn(56), torch.tensor(numbers)))[None]
    _, h = cuda_c.add_norm(torch.zeros(1, 1, 64), None, None, torch.ones(1, 64), shift, 1e-6, torch.bfloat16)
    found, wanted = (x.view(-1).view(torch.int16) for x in (h, shift.bfloat16()))
    assert torch.equal(found[:-1], wanted[:-1]) and h[..., -1].isnan().all()


@pytest.mark.parametrize(
    "refused",
    [
        lambda: cuda_c.add_norm(torch.zeros(1, 2, 64), None, None, *torch.zeros(2, 1, 64), 1e-6, torch.float16),
        lambda: cuda_c.add_norm(torch.zeros(1, 2, 62), None, None, *torch.zeros(2, 1, 62), 1e-6, torch.float32),
        lambda: cuda_c.add_norm(
            torch.zeros(1, 2, 64), torch.zeros(1, 2, 64).half(), None, *torch.zeros(2, 1, 64), 1e-6, torch.float32
        ),
        lambda: cuda_c.heads_into(
            torch.zeros(1, 2, 96), torch.ones(1), torch.zeros(2, 2, 16), *torch.zeros(2, 1, 1, 2, 32)
        ),
        lambda: cuda_c.text_weights(torch.zeros(1, 2, 48), torch.zeros(1, 48), torch.ones(1).int(), 3, torch.float32),
    ],
)
def test_what_is_not_taken_is_left_to_torch(on_cpu, refused):
    assert refused() is None and not on_cpu


def test_the_probe_tries_every_kernel(on_cpu, monkeypatch):
    assert cuda_c.right(torch.device("cpu")) and on_cpu == ["add_norm", "heads_into", "text_weights"]
    real = nvrtc.Kernel.__call__

    def wrong(self, grid, threads, *arguments):
        real(self, grid, threads, *arguments)
        if self.name == "heads_into":
            arguments[4][..., 7] += 1

    monkeypatch.setattr(nvrtc.Kernel, "__call__", wrong)
    assert not cuda_c.right(torch.device("cpu"))


class OnGPU(torch.Tensor):
    is_cuda = property(lambda self: True)


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda device: False)
    monkeypatch.setattr(cuda_c, "right", lambda device: True)
    kernels._runs_cuda_c.cache_clear()
    yield
    kernels._runs_cuda_c.cache_clear()


def normed(kind=kernels.add_norm, **changes):
    torch.manual_seed(0)
    x, modulation = torch.randn(1, 3, 64), torch.randn(2, 1, 64)
    x = x.as_subclass(OnGPU) if kind is kernels.add_norm else x
    found = kind(x, None, None, *modulation, 1e-6, torch.float32)[1]
    return found.as_subclass(torch.Tensor)


@pytest.mark.parametrize("works", [True, False])
def test_it_runs_where_triton_is_missing(on_cpu, no_triton, monkeypatch, works):
    monkeypatch.setattr(cuda_c, "right", lambda device: works)
    with torch.no_grad():
        torch.testing.assert_close(normed(), normed(fewer.add_norm), atol=5e-6, rtol=0)
    assert on_cpu == ["add_norm"] * works


def test_a_launch_that_fails_is_the_last(no_triton, monkeypatch, caplog):
    tried = []

    def fails(self, *about):
        tried.append(self.name)
        raise RuntimeError("cuLaunchKernel says 701")

    monkeypatch.setattr(nvrtc.Kernel, "__call__", fails)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(normed(), normed(fewer.add_norm))
    assert tried == ["add_norm"] and "cuLaunchKernel says 701" in caplog.text and len(caplog.records) == 1
    assert not kernels._runs_cuda_c(torch.device("cpu"))


def test_missing_memory_is_what_the_next_plan_is_for(no_triton, monkeypatch):
    monkeypatch.setattr(nvrtc, "driver", lambda: SimpleNamespace(cuModuleLoadData=lambda *about: 2))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        nvrtc._checked("cuModuleLoadData", None)
    monkeypatch.setattr(nvrtc.Kernel, "__call__", lambda self, *about: nvrtc._checked("cuModuleLoadData"))
    with torch.no_grad(), pytest.raises(torch.cuda.OutOfMemoryError):
        normed()
    assert kernels._runs_cuda_c(torch.device("cpu"))


@pytest.mark.parametrize("known", [False, True])
def test_while_a_graph_is_captured_nothing_new_is_tried(on_cpu, no_triton, monkeypatch, known):
    if known:
        assert kernels._runs_cuda_c(torch.device("cpu"))
    monkeypatch.setattr(kernels, "_capturing", lambda: True)
    with torch.no_grad():
        normed()
    assert on_cpu == ["add_norm"] * known
    monkeypatch.setattr(kernels, "_capturing", lambda: False)
    with torch.no_grad():
        normed()
    assert on_cpu[known:] == ["add_norm"], "and tried afterwards"


PICTURE = torch.zeros(1, 32, 2, 2).to(memory_format=torch.channels_last)
FUSED = {
    "add_norm": (
        dict(x=torch.zeros(1, 3, 64), y=torch.zeros(1, 3, 64), gate=torch.zeros(1, 64), scale=torch.zeros(1, 64),
             shift=torch.zeros(1, 64)),
        lambda x, y, gate, scale, shift: kernels.add_norm(x, y, gate, scale, shift, 1e-6, torch.float32),
    ),
    "group_norm_silu": (
        dict(x=PICTURE, weight=torch.ones(32), bias=torch.zeros(32), offset=torch.zeros(32)),
        lambda x, weight, bias, offset: kernels.group_norm_silu(x, 8, weight, bias, 1e-6, offset),
    ),
    "add_pictures": (
        dict(x=PICTURE, y=PICTURE, offset=torch.zeros(32)),
        lambda x, y, offset: kernels.add_pictures(x.clone(), y, offset),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, tracked", [(name, one) for name, (given, _) in FUSED.items() for one in given])
def test_what_needs_gradients_is_left_to_plain_pytorch(name, tracked, monkeypatch):
    """Also where only the blocks' weights are trained, as those of a LoRA, and the stream itself needs none."""
    monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    monkeypatch.setattr(kernels, "_triton", lambda name: 1 / 0)
    given, function = FUSED[name]
    given = {key: x.clone().requires_grad_(key == tracked) for key, x in given.items()}
    found = function(**{key: x.as_subclass(OnGPU) if key in "xy" else x for key, x in given.items()})
    assert found is None if name == "add_norm" else found.requires_grad
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        function(**{key: x.as_subclass(OnGPU) if key in "xy" else x for key, x in given.items()})


def test_a_failed_compiler_is_one_line_and_then_torch(monkeypatch, caplog):
    kernels._runs_cuda_c.cache_clear()
    monkeypatch.setattr(nvrtc, "cubin", lambda *about: 1 / 0)
    assert not kernels._runs_cuda_c(torch.device("cpu"))
    assert len(caplog.records) == 1 and "PyTorch's compiler" in caplog.text
    kernels._runs_cuda_c.cache_clear()
