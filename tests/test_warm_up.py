"""What is done before the first edit: every kernel that it launches has been compiled; nothing else changes."""

import logging
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from support import ROOT

from varedit_core import Editor
from varedit_core.bench.models import MODELS
from varedit_core.demo import demo_files
from varedit_core.files import checkpoints
from varedit_core.model.transformer import Transformer
from varedit_core.runtime import kernels, warm_up
from varedit_core.runtime.fp8 import LINEARS, eight_bit
from varedit_core.runtime.layers import Operations
from varedit_core.runtime.session import Session
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.loop import sample
from varedit_core.tokenizer.vae import Autoencoder

CPU = torch.device("cpu")
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")


@pytest.fixture
def variants(monkeypatch):
    """The CPU as a GPU with Triton whose launches do nothing; all variants of kernels that were asked for."""
    from varedit_core.runtime.kernels import launching

    asked = set()

    def launches(self, grid):
        def launch(*arguments, **options):
            kinds = tuple(map(launching._kind, arguments, self.alike))
            asked.add((self.function.fn.__name__, kinds, tuple(options.items())))

        return launch

    monkeypatch.setattr(launching.Kernel, "__getitem__", launches)
    monkeypatch.setattr(kernels, "fusable", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(kernels, "multiplies_eight_bit", lambda device: True)
    monkeypatch.setattr(kernels, "_processors", lambda device: 132)
    monkeypatch.setattr(Workspace, "_recording", property(lambda self: self.kept))
    monkeypatch.setattr(Workspace, "_run", lambda self, name, step, function, *inputs: function(*inputs))

    def multiplied(x, weight, *more, out_dtype, **options):
        return x.new_zeros(len(x), weight.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", multiplied)
    return asked


def drawn(network, record, **more):
    """All passes of an edit, of which nothing is looked at: launches left undefined numbers."""
    engine = Session(network, Workspace())
    batch = EditBatch.of(record["ref.vae_features"].float(), record.texts("text"), record.schedule, **more)
    for _ in sample(engine, batch):
        pass


@triton
@torch.no_grad()
@pytest.mark.parametrize("linears", LINEARS)
def test_all_kernels_of_an_edit_are_compiled_before(variants, patchify, linears):
    network = deepcopy(patchify.transformer)
    if linears == "8-bit":
        eight_bit(network)
    variants.clear()
    warm_up._edit(replace(network.config, depth=2), network.dtype, CPU, linears)
    before = set(variants)
    variants.clear()
    drawn(network, patchify)
    assert len(variants) > 4 and not variants - before


@triton
@torch.no_grad()
@pytest.mark.parametrize("size", [64, 208])
def test_all_kernels_of_the_vae_are_compiled_before(variants, size):
    config, dtype = MODELS["tiny"].autoencoder, torch.bfloat16
    warm_up._pictures(config, dtype, CPU)
    before = set(variants)
    variants.clear()
    network = Autoencoder(config, Operations, decode_dtype=dtype)
    network.decode(network.encode(torch.zeros(1, 3, size, size)))
    assert len(variants) > 3 and not variants - before


def test_a_hollow_network_is_one_piece_of_memory():
    network = warm_up.hollow(Autoencoder(MODELS["tiny"].autoencoder, Operations, device="meta"), CPU)
    places = {x.untyped_storage().data_ptr() for x in network.state_dict().values()}
    largest = max(x.nbytes for x in network.state_dict().values())
    assert len(places) == 1 and network.encoder.conv_in.weight.untyped_storage().nbytes() == largest
    wanted = Autoencoder(MODELS["tiny"].autoencoder, Operations, device="meta").state_dict()
    assert {k: (x.shape, x.dtype) for k, x in network.state_dict().items()} == {
        k: (x.shape, x.dtype) for k, x in wanted.items()
    }
    assert network.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.encode(torch.ones(1, 3, 64, 64)).count_nonzero() == 0


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with Triton and free memory, by its words; what was done in it, in turn."""
    done = []

    @contextmanager
    def compiled():
        done.append("compile")
        yield
        done.append("compiled")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    monkeypatch.setattr(warm_up, "has_triton", lambda device: True)
    monkeypatch.setattr(warm_up, "compile_only", compiled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(warm_up, "_begun", set())
    return done


def begun(monkeypatch, *networks, device="cuda:0", linears="exact", work=lambda *about: None):
    """Warm up, and wait for it; the threads that were started."""
    threads, real = [], threading.Thread

    class Thread(real):
        def start(self):
            threads.append(self)
            super().start()

    monkeypatch.setattr(warm_up.threading, "Thread", Thread)
    monkeypatch.setattr(warm_up, "_edit", work)
    monkeypatch.setattr(warm_up, "_pictures", work)
    for network in networks:
        warm_up.warm_up(network, device, linears)
    for thread in threads:
        thread.join()
    return threads


def empty(name="tiny", part="transformer", **more):
    kind = Transformer if part == "transformer" else Autoencoder
    return kind(getattr(MODELS[name], part), Operations, device="meta", **more)


def test_kernels_are_compiled_and_then_run_once_for_each_kind_of_network(monkeypatch, gpu):
    def work(*about):
        gpu.append(threading.current_thread().name)
        assert not torch.is_grad_enabled()

    narrow = {"dtype": torch.bfloat16}
    networks = [empty(), empty(), empty(**narrow), empty(part="autoencoder"), empty(part="autoencoder")]
    networks.append(empty(part="autoencoder", decode_dtype=torch.bfloat16))
    assert len(begun(monkeypatch, *networks, work=work)) == 4
    assert gpu.count("compile") == gpu.count("compiled") == 4 and gpu.count("VAREdit warm-up") == 8
    assert len(begun(monkeypatch, empty(**narrow), linears="8-bit")) == 1
    deeper = empty()
    deeper.config = replace(deeper.config, depth=9)
    assert not begun(monkeypatch, deeper), "how deep it is does not matter"


@pytest.mark.parametrize("device, wanted", [("cuda", 1), ("cuda:0", 0)])
def test_it_is_the_device_on_which_the_network_will_be(monkeypatch, gpu, device, wanted):
    seen = []
    begun(monkeypatch, empty(), empty(part="autoencoder"), device=device, work=lambda *about: seen.append(about))
    assert len(seen) == 4 and all(torch.device("cuda", wanted) in about for about in seen)


@pytest.mark.parametrize("case", ["cpu", "no Triton", "full", "full later", "fails", "no thread"])
def test_where_it_is_of_no_use_now_it_is_tried_again(monkeypatch, gpu, case, caplog):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    works, free = [], [1, 8] if case == "full" else [8, 1]

    def work(*about):
        works.append(about)
        if case == "fails" and len(works) == 1:
            raise RuntimeError("out of memory")

    if case == "no Triton":
        monkeypatch.setattr(warm_up, "has_triton", lambda device: False)
    if case.startswith("full"):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free.pop(0) if free else 8) << 30, 8 << 30))
    if case == "no thread":
        monkeypatch.setattr(threading.Thread, "start", no_thread)
    device = "cpu" if case == "cpu" else "cuda"
    with caplog.at_level(logging.DEBUG):
        started = len(begun(monkeypatch, empty(), device=device, work=work)) if case != "no thread" else 0
        if case == "no thread":
            warm_up.warm_up(empty(), device)
    assert started == (case not in ("cpu", "no thread"))
    assert len(works) == {"full later": 1, "fails": 1}.get(case, 0) and not warm_up._begun
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * (case in ("fails", "no thread"))
    if case in ("full", "full later", "fails"):
        free.clear(), works.clear()
        begun(monkeypatch, empty(), device=device, work=lambda *about: works.append(about))
        assert len(works) == 2 and len(warm_up._begun) == 1


def test_torchs_compiler_is_not_imported_for_it():
    """In a thread that would take seconds of the main thread's time, and break an import of the compiler there."""
    code = """
import sys, torch
from dataclasses import replace
from varedit_core.bench.models import MODELS
from varedit_core.runtime import warm_up
with torch.no_grad():
    for linears in ("exact", "8-bit"):
        warm_up._edit(replace(MODELS["tiny"].transformer, depth=2), torch.float32, torch.device("cpu"), linears)
    warm_up._pictures(MODELS["tiny"].autoencoder, torch.float32, torch.device("cpu"))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


def test_loading_an_editor_warms_up_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints, "warm_up", lambda network, device, *more: asked.append((type(network), *more)))
    transformer, autoencoder, _ = demo_files()
    Editor.load(transformer, autoencoder, device="cpu", linears="8-bit")
    assert asked == [(Transformer, "8-bit"), (Autoencoder,)]
    checkpoints.load_transformer(transformer), checkpoints.load_autoencoder(autoencoder)
    assert len(asked) == 2, "training forks, which no thread that imports survives"
