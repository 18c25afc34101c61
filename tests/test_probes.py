"""What is asked of a device once: only what lasts may be remembered. And every memo of the code, from a list."""

import ast
import errno
import logging
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from support import ROOT

from varedit_core.runtime import graphs, kernels
from varedit_core.runtime.kernels import matmul_fp32, probes, widens
from varedit_core.runtime.kernels.probes import may_pass, tried_once

CPU = torch.device("cpu")  # stands in for a CUDA device: the probes only run operations on it


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


PASSING = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    MemoryError(),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    caused(RuntimeError("could not compile"), MemoryError()),
]
LASTING = [
    ModuleNotFoundError("No module named 'triton'"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "gcc"),
    TypeError("bmm() got an unexpected keyword argument 'out_dtype'"),
    NotImplementedError("Could not run 'aten::bmm.dtype' with arguments from the 'CUDA' backend."),
    AssertionError(),
]


def named(error: Exception) -> str:
    return str(error)[:40] or type(error).__name__


@pytest.mark.parametrize("error", PASSING, ids=named)
def test_failures_that_pass_are_tried_again(error, caplog):
    outcomes = [error, error, True]

    @tried_once("not now: %s")
    def probe(device):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert may_pass(error)
    assert [probe(CPU) for _ in range(5)] == [False, False, True, True, True] and not outcomes
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING, "said once"


@pytest.mark.parametrize("error", LASTING, ids=named)
def test_failures_that_last_are_remembered_for_their_device(error, caplog):
    asked = []

    @tried_once("not here: %s")
    def probe(device):
        asked.append(device)
        if device == CPU:
            raise error
        return True

    other = torch.device("meta")
    assert not may_pass(error)
    assert [probe(device) for device in (CPU, CPU, other, CPU, other)] == [False, False, True, False, True]
    assert asked == [CPU, other] and caplog.messages == [f"not here: {str(error) or 'AssertionError'}"]


def flaky(results):
    """A function that fails with the errors among the results, in turn, and then answers the last of them for ever."""

    def call(*args, **kw):
        result = results.pop(0) if len(results) > 1 else results[0]
        if isinstance(result, Exception):
            raise result
        return result

    return call


def fresh_triton(monkeypatch, results):
    kernels._runs_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "_triton", lambda name: SimpleNamespace(add_norm=flaky(results)))
    return lambda: kernels.has_triton(CPU)


def fresh_cuda_c(monkeypatch, results):
    kernels._runs_cuda_c.cache_clear()
    monkeypatch.setattr(kernels.cuda_c, "right", flaky(results))
    return lambda: kernels._runs_cuda_c(CPU)


def fresh_products(monkeypatch, results):
    kernels._widens.cache_clear()
    monkeypatch.setattr(torch, "bmm", flaky(results))
    return lambda: kernels._widens(CPU, torch.bfloat16)


def fresh_processors(monkeypatch, results):
    kernels._processors.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", flaky(results))
    return lambda: kernels._processors(torch.device("cuda", 7))


def fresh_eight_bit(monkeypatch, results):
    kernels.multiplies_eight_bit.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", flaky(results))
    return lambda: kernels.multiplies_eight_bit(torch.device("cuda", 7))


def fresh_whole(monkeypatch, results):
    kernels.multiplies_whole.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", flaky(results))
    return lambda: kernels.multiplies_whole(torch.device("cuda", 7))


def fresh_stream(monkeypatch, results):
    graphs._recording_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", flaky(results))
    return lambda: graphs._recording_stream(7)


PROBES = {
    # Every memo that asks a device: how to ask it anew, an answer of what it asks, and what that makes.
    "varedit_core.runtime.kernels._runs_triton": (fresh_triton, None, True),
    "varedit_core.runtime.kernels._runs_cuda_c": (fresh_cuda_c, True, True),
    "varedit_core.runtime.kernels._widens": (fresh_products, torch.ones(1), True),
    "varedit_core.runtime.kernels._processors": (fresh_processors, SimpleNamespace(multi_processor_count=132), 132),
    "varedit_core.runtime.kernels.multiplies_eight_bit": (fresh_eight_bit, (9, 0), True),
    "varedit_core.runtime.kernels.multiplies_whole": (fresh_whole, (8, 6), True),
    "varedit_core.runtime.graphs._recording_stream": (fresh_stream, "stream", "stream"),
}
PURE = {
    # Memos of what is only calculated or imported: what fails raises, and errors are never remembered.
    "varedit_core.shapeedit.render._grid",
    "varedit_core.shapeedit.render._texture_maps",
    "varedit_core.shapeedit.render._background_maps",
    "varedit_core.shapeedit.render._constant",
    "varedit_core.tokenizer.source.Source.own",
    "varedit_core.controls.base.Known.drawn",
    "varedit_core.controls.registry.registered",
    "varedit_core.controls.registry._named",
    "varedit_core.runtime.graph_memory._loaded",
    "varedit_core.runtime.kept._kind",
    "varedit_core.runtime.kept._returns_views",
    "varedit_core.runtime.kernels._triton",
    "varedit_core.runtime.kernels._hadamard",
    "varedit_core.cards.transformer_bytes",
    "varedit_core.cards.text_bytes",
    "varedit_core.cards.autoencoder_bytes",
    "varedit_core.runtime.kernels.cuda_c.kernel",
    "varedit_core.sampling.batch.EditBatch.active",
    "varedit_core.sampling.batch.EditBatch.plan",
    "nodes.inputs.judged",
}
MEMOS = {"cache", "lru_cache", "cached_property", "tried_once"}


def memos() -> set[str]:
    """Every function of the code that remembers what it answered."""
    found = set()
    for path in sorted([*ROOT.glob("varedit_core/**/*.py"), *ROOT.glob("nodes/**/*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        owners = {child: node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
        for node in ast.walk(tree):
            for decorator in getattr(node, "decorator_list", ()):
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if getattr(called, "attr", getattr(called, "id", None)) in MEMOS:
                    found.add(".".join(filter(None, (module, owners.get(node), node.name))))
    return found


def test_every_memo_is_known():
    assert memos() == PURE | set(PROBES)


def test_nothing_else_is_remembered_by_modules():
    """No module keeps answers in a global of its own; the few objects that live as long as the process are named."""
    allowed = {
        ("varedit_core/coder.py", "_living"),  # whose locks a forked process makes anew
        ("varedit_core/runtime/graphs.py", "_living"),  # graphs that still exist, for their bytes
        ("varedit_core/runtime/graphs.py", "_failed"),  # those that could not be recorded: torch may still ask them
        ("varedit_core/runtime/warm_up.py", "_begun"),  # for what kernels were compiled, or are
        ("nodes/adapters/advice.py", "_told"),  # what is said once a process
        ("varedit_core/replaceable.py", "REPLACEMENTS"),  # a table that an import fills
    }
    found = set()
    for path in sorted([*ROOT.glob("varedit_core/**/*.py"), *ROOT.glob("nodes/**/*.py")]):
        tree, where = ast.parse(path.read_text()), path.relative_to(ROOT).as_posix()
        found |= {(where, name) for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
        for node in tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            empty = isinstance(value, (ast.Dict, ast.List)) and not ast.unparse(value).strip("{}[]")
            made = isinstance(value, ast.Call) and getattr(value.func, "id", getattr(value.func, "attr", None)) in {
                "dict", "list", "set", "defaultdict", "WeakSet", "WeakKeyDictionary", "WeakValueDictionary"
            }  # fmt: skip
            if isinstance(target, ast.Name) and (empty or made and not value.args):
                found.add((where, target.id))
    assert found == allowed


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("error", PASSING[:2] + PASSING[5:7], ids=named)
def test_no_memo_keeps_a_failure_that_passed(name, error, monkeypatch):
    fresh, answer, wanted = PROBES[name]
    module, _, function = name.rpartition(".")
    ask, outcomes = fresh(monkeypatch, [error, error, answer]), []
    try:
        for _ in range(4):
            try:
                outcomes.append(ask())
            except type(error):
                outcomes.append("failed")
        assert outcomes[0] == outcomes[1] and outcomes[0] in (False, "failed")
        assert outcomes[2] == outcomes[3] == wanted
    finally:
        getattr(import_module(module), function).cache_clear()


def test_triton_is_asked_of_each_device(monkeypatch):
    """One of two GPUs may be too old for it."""
    kernels._runs_triton.cache_clear()
    devices = [torch.device("meta"), CPU]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == CPU else (7, 5))
    monkeypatch.setattr(kernels, "_triton", lambda name: SimpleNamespace(add_norm=flaky([None])))
    assert [kernels.has_triton(device) for device in devices * 2] == [False, True] * 2
    kernels._runs_triton.cache_clear()


def test_no_triton_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not kernels.has_triton()


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU."""

    is_cuda = True


REAL_BMM = torch.bmm


def widening(x, y, out_dtype=None):
    """torch.bmm from 2.8 on, on CUDA."""
    return REAL_BMM(x.float(), y.float()) if out_dtype else REAL_BMM(x, y)


def on_rocm(x, y, out_dtype=None):
    if out_dtype:
        raise RuntimeError("out_dtype is not supported on ROCm")
    return REAL_BMM(x, y)


@pytest.mark.parametrize("bmm", [widening, REAL_BMM, on_rocm], ids=["2.8", "before", "ROCm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_fp32_wherever_they_are_made(bmm, dtype, monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 7, 3).to(dtype)
    monkeypatch.setattr(torch, "bmm", bmm)
    kernels._widens.cache_clear()
    wanted = REAL_BMM(x.float(), y.float())
    for _ in range(2):
        found = matmul_fp32(x.as_subclass(OnCuda), y.as_subclass(OnCuda)).as_subclass(torch.Tensor)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert kernels._widens(CPU, torch.bfloat16) == (bmm is widening)
    kernels._widens.cache_clear()


def test_texts_are_folded_where_torch_multiplies_into_fp32(monkeypatch):
    answers = {torch.bfloat16: False, torch.float16: True}
    monkeypatch.setattr(kernels, "_widens", lambda device, dtype: answers[dtype])
    cuda = torch.device("cuda", 0)
    assert not widens(cuda, torch.bfloat16) and widens(cuda, torch.float16) and widens(cuda, torch.float32)
    assert widens(CPU, torch.bfloat16), "elsewhere the plain form is the only one"


@pytest.mark.parametrize(
    ("version", "capability", "able"),
    [
        ("2.4.1", (9, 0), False),
        ("2.5.0", (9, 0), True),
        ("2.6.0+cu124", (8, 9), False),
        ("2.7.1", (8, 9), True),
        ("2.13.0", (8, 6), False),
        ("2.13.0a0+git1", (9, 0), True),
    ],
)
def test_eight_bit_products_by_version_and_device(version, capability, able, monkeypatch):
    """torch 2.4 calls `_scaled_mm` in another way, and older ones of 2.7 cannot do it on Ada."""
    kernels.multiplies_eight_bit.cache_clear()
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.multiplies_eight_bit(torch.device("cuda", 0)) == able
    assert not kernels.multiplies_eight_bit(CPU)
    kernels.multiplies_eight_bit.cache_clear()


def test_a_chain_of_causes_that_ends():
    error = RuntimeError("a loop")
    error.__cause__ = caused(RuntimeError("b"), error)
    assert not probes.may_pass(error)
