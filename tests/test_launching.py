"""Launches of compiled kernels, recordings under CUDA's own allocator, and forms of few passes; all on the CPU."""

import gc
import threading
from importlib.util import find_spec
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from test_workspace import edit
from torch.multiprocessing.reductions import StorageWeakRef

from varedit_core.controls.registry import Shortcuts
from varedit_core.model import functional
from varedit_core.runtime import graph_memory, kept
from varedit_core.runtime.kept import Kept, failed
from varedit_core.runtime.kernels import fewer
from varedit_core.runtime.workspace import Workspace

triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")


class OnGPU(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: SimpleNamespace(index=0))


def on_gpu(*size, dtype=torch.float32):
    return torch.zeros(*size, dtype=dtype).as_subclass(OnGPU)


class Compiled:
    """A compiled kernel: `launched` is what it was called with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, name):
        self.name, self.launched = name, []

    def run(self, *arguments):
        self.launched.append(arguments)


class Function:
    """In place of Triton's: compiles for every call, and lists what it was asked for."""

    arg_names = ("x", "y", "n", "WIDE", "BLOCK")
    params = ()

    def __init__(self):
        self.asked, self.only_compiled = [], []

    def warmup(self, *arguments, grid, **options):
        self.only_compiled.append((grid, arguments, options))

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.asked.append((grid, arguments, options))
            return Compiled(len(self.asked))

        return launch


@pytest.fixture
def launched(monkeypatch):
    from varedit_core.runtime.kernels import launching

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    function = Function()
    return launching.Kernel(function), function, launching


@triton
def test_a_kernel_is_launched_by_its_compiled_form_with_addresses(launched):
    kernel, function, launching = launched
    x, y = on_gpu(64), on_gpu(64)
    for _ in range(3):
        kernel[(5, 2)](x, y, 48, BLOCK=64, WIDE=True, num_warps=4)
    assert len(function.asked) == 1, "Triton is asked once"
    ((compiled, _),) = kernel.compiled.values()
    constants = (True, 64) if launching._WHOLE else ()
    wanted = (5, 2, 1, 77, "function", "metadata", None, None, None, x.data_ptr(), y.data_ptr(), 48, *constants)
    assert compiled.launched == [wanted] * 2, "compile-time arguments in the function's order, wherever they stood"


@triton
def test_another_kind_of_argument_is_compiled_anew(launched):
    kernel, function, _ = launched
    x, y, shifted = on_gpu(64), on_gpu(64), on_gpu(65)[1:]
    kinds = [
        (x, y, 48), (x, y, 47), (x, y, 1), (x, y, 2**40), (x, y, 1.0), (x, shifted, 48), (shifted, y, 48),
        (x, on_gpu(64, dtype=torch.bfloat16), 48),
    ]  # fmt: skip
    options = [dict(WIDE=True, BLOCK=64), dict(WIDE=False, BLOCK=64), dict(WIDE=True, BLOCK=64, num_warps=8)]
    for _ in range(2):
        for arguments in kinds:
            kernel[(1,)](*arguments, **options[0])
        for more in options[1:]:
            kernel[(1,)](*kinds[0], **more)
    assert len(function.asked) == len(kinds) + len(options) - 1
    kernel[(1,)](x, y, 32, **options[0])
    assert len(function.asked) == len(kinds) + len(options) - 1, "another multiple of 16 is none"


@triton
def test_numbers_that_triton_does_not_look_at_are_all_alike(launched):
    _, function, launching = launched
    function.params = [SimpleNamespace(do_not_specialize=name == "n") for name in function.arg_names]
    kernel, x = launching.Kernel(function), on_gpu(64)
    for n in (1, 2, 16, 17, -5):
        kernel[(1,)](x, x, n, WIDE=True, BLOCK=64)
    assert len(function.asked) == 1
    kernel[(1,)](x, x, 2**40, WIDE=True, BLOCK=64)
    assert len(function.asked) == 2, "a wider type"


@triton
def test_kernels_that_are_only_compiled_are_not_launched(launched):
    kernel, function, launching = launched
    x = on_gpu(64)
    with launching.compile_only():
        for n in (48, 48, 47):
            kernel[(1,)](x, x, n, WIDE=True, BLOCK=64)
    assert [arguments[2] for _, arguments, _ in function.only_compiled] == [48, 47], "each variant once"
    assert not function.asked and not kernel.compiled
    kernel[(1,)](x, x, 48, WIDE=True, BLOCK=64)
    with launching.compile_only():
        kernel[(1,)](x, x, 48, WIDE=True, BLOCK=64)
    assert len(function.asked) == 1 and len(function.only_compiled) == 2, "what was launched is compiled"


@triton
@pytest.mark.parametrize("same", [True, False])
def test_who_needs_a_kernel_waits_for_the_thread_that_compiles_it(launched, same):
    kernel, function, launching = launched
    other, x, order, begun, go = launching.Kernel(Function()), on_gpu(64), [], threading.Event(), threading.Event()

    def ahead():
        with launching.compile_only():
            kernel[(1,)](x, x, 48, WIDE=True, BLOCK=64)
            begun.set()
            go.wait(10)
            order.append("compiled")

    thread = threading.Thread(target=ahead)
    thread.start()
    begun.wait(10)
    if same:
        threading.Timer(0.05, go.set).start()
    (kernel if same else other)[(1,)](x, x, 48, WIDE=True, BLOCK=64)
    order.append("launched")
    go.set()
    thread.join()
    assert order == (["compiled", "launched"] if same else ["launched", "compiled"])


@triton
def test_what_triton_makes_in_another_way_is_launched_by_triton(launched, monkeypatch):
    kernel, function, _ = launched
    monkeypatch.delattr(Compiled, "packed_metadata")
    for _ in range(2):
        kernel[(1,)](on_gpu(64), on_gpu(64), 48, WIDE=True, BLOCK=64)
    assert len(function.asked) == 2 and not kernel.compiled


@triton
def test_a_failed_launch_is_told_before_its_tensors_go(launched, monkeypatch):
    kernel, _, _ = launched
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1 / 0)
    told = []
    before = kept._present.set((SimpleNamespace(fail=lambda: told.append(True)),))
    try:
        with pytest.raises(ZeroDivisionError):
            kernel[(1,)](on_gpu(64), on_gpu(64), 48, WIDE=True, BLOCK=64)
    finally:
        kept._present.reset(before)
    assert told == [True]


def test_a_failure_in_another_thread_is_nothing_to_a_recording():
    made = []
    with torch.inference_mode(), Kept():
        x = torch.randn(3)
        made.append(ref(x))
        thread = threading.Thread(target=failed)
        thread.start()
        thread.join()
        del x
    assert not immortal(made[0])


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x[x > 0],
        lambda x: x.to("meta"), lambda x: x.unique(), lambda x: torch.empty(4, device="meta").copy_(x),
    ],
)  # fmt: skip
def test_what_waits_for_the_device_is_refused_before_it_begins(waits):
    x = torch.randn(4)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="waits for the device"), Kept():
        waits(x)
    with torch.inference_mode():
        waits(x)


def immortal(made: ref) -> bool:
    gc.collect()
    return made() is not None


@pytest.mark.parametrize("fails", ["an operation", "a launch", "anything else", "nothing"])
def test_tensors_of_a_recording_that_fails_stay(fails):
    made = []

    def recorded():
        x = torch.randn(3)
        made.append(ref(x))
        if fails == "an operation":
            torch.linalg.cholesky(-torch.eye(3))
        if fails == "a launch":
            failed()
        if fails == "anything else":
            raise KeyError("x")

    expected = {"an operation": RuntimeError, "anything else": KeyError}.get(fails)
    with torch.inference_mode():
        if expected:
            with pytest.raises(expected), Kept():
                recorded()
        else:
            with Kept():
                recorded()
    assert immortal(made[0]) == (fails != "nothing")
    assert not kept._present.get()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:], lambda x: x.view(2, 2).transpose(0, 1), lambda x: x.split(2)[1], lambda x: x.copy_(x * 2),
        lambda x: torch.add(x, 1, out=x), lambda x: (torch._foreach_add_([x], 1), x[:1])[1], lambda x: x.unbind()[0],
    ],
)  # fmt: skip
def test_what_was_there_before_a_recording_that_fails_goes(view):
    """Only memory of the recording stays, not that of which it made views."""
    made = []

    def recorded(x):
        with pytest.raises(KeyError), Kept():
            seen, own = view(x), torch.randn(3)[1:]
            made.extend(StorageWeakRef(y.untyped_storage()) for y in (x, own))
            raise KeyError(f"{seen.shape} and {own.shape} are alive")

    with torch.inference_mode():
        recorded(torch.randn(4))
    gc.collect()
    assert [x.expired() for x in made] == [True, False]


SHORTCUTS = {"plain": {}, "inside": {"inside": 2}, "window": {"window": 0.2}, "unguided": {"unguided": 1}}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_no_pass_of_an_edit_waits_for_the_device(monkeypatch, patchify, name):
    """So that every pass can be recorded under CUDA's own allocator."""
    names = []

    def run(self, name, step, function, *inputs):
        names.append(name)
        with Kept():
            return function(*inputs)

    monkeypatch.setattr(Workspace, "_recording", property(lambda self: self.kept))
    monkeypatch.setattr(Workspace, "_run", run)
    mask = torch.zeros(1, 16, 16)
    mask[:, 3:11, 5:14] = 1
    more = {"mask": mask} if name == "inside" else {}
    with torch.inference_mode():
        edit(patchify, Workspace(), shortcuts=Shortcuts(**SHORTCUTS[name]), **more)
    assert len(names) == len(patchify.schedule) + 2, "text, source and every scale"


class Driver:
    """In place of CUDA's: one device whose handle is 3."""

    def __init__(self, status=0):
        self.status, self.trimmed = status, []

    def cuDeviceGet(self, handle, device):
        handle._obj.value = device + 3
        return 0

    def cuDeviceGetGraphMemAttribute(self, handle, kind, value):
        value._obj.value = 1000 * handle.value + kind
        return self.status

    def cuDeviceGraphMemTrim(self, handle):
        self.trimmed.append(handle.value)
        return self.status


def test_memory_of_graphs_is_the_drivers(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(graph_memory, "driver", lambda: driver)
    assert graph_memory.reserved(1) == 4002
    graph_memory.trim(1)
    assert driver.trimmed == [4]


@pytest.mark.parametrize("driver", [None, SimpleNamespace(), Driver(status=801)])
def test_a_driver_that_does_not_tell_holds_nothing(monkeypatch, driver):
    monkeypatch.setattr(graph_memory, "driver", lambda: driver)
    assert graph_memory.reserved(0) == 0
    graph_memory.trim(0)


@pytest.mark.parametrize("tokens", [19, fewer.LONG])
@pytest.mark.parametrize("case", ["gated", "plain", "first", "shared"])
def test_a_norm_in_few_passes(tokens, case):
    torch.manual_seed(0)
    x, y, modulation = torch.randn(2, tokens, 64) * 3 + 1, torch.randn(2, tokens, 64).bfloat16(), torch.randn(2, 6, 64)
    gate = modulation[:, 1] if case == "gated" else None
    scale, shift = (modulation[: 1 if case == "shared" else 2, n] for n in (3, 5))
    arguments = (x, None if case == "first" else y, gate, scale, shift, 1e-6, torch.float32)
    for found, wanted in zip(fewer.add_norm(*arguments), functional.add_norm.plain(*arguments)):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_in_few_passes(dtype):
    torch.manual_seed(0)
    qkv, gains, rotary = torch.randn(2, 10, 3 * 4 * 32).to(dtype), torch.rand(4) * 3, torch.randn(2, 10, 16)
    qkv[0, 3] = 0  # no length to divide by
    kept_keys, kept_values = torch.full((2, 2, 4, 30, 32), 7.0, dtype=dtype)
    place = (slice(None), slice(None), slice(5, 15))
    q = fewer.heads_into(qkv, gains, rotary, kept_keys[place], kept_values[place])
    wanted = functional.split_heads(qkv, gains, rotary)
    for found, expected in zip((q, kept_keys[place], kept_values[place]), wanted):
        torch.testing.assert_close(found, expected.to(dtype), atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)
    assert (kept_keys[:, :, :5] == 7).all() and (kept_keys[:, :, 15:] == 7).all(), "nothing beside is written"
    assert q.transpose(1, 2).is_contiguous(), "so that attention's result is no copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_norm_in_few_passes(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 64, 9, 7) * 2 + 5).to(dtype)
    weight, bias = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    exact = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-6)
    theirs = (F.group_norm(x, 32, weight, bias, 1e-6) - exact).abs().max()
    ours = fewer.group_norm(x, 32, weight, bias, 1e-6)
    assert ours.dtype == dtype and (ours - exact).abs().max() <= 2 * theirs + 1e-6
