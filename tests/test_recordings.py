"""Functions recorded as CUDA graphs, with stand-ins for CUDA: what is recorded when, and what a failure leaves.

Where there is a GPU, the last tests try it there.
"""

import gc
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_probes import OnCuda
from test_workspace import edit, same

from varedit_core.runtime import graphs
from varedit_core.runtime.graphs import Captured, Recorder, Recordings
from varedit_core.runtime.kernels import matmul_fp32
from varedit_core.runtime.workspace import Workspace

CPU = torch.device("cpu")
POOL = (0, 1)
REASONS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines"),
    NotImplementedError("no kernel for this"),
    ValueError("Pointer argument (at 0) cannot be accessed from Triton"),
]


class StandIn:
    """In place of `Captured`: a replay calls the function again. made: how many, by device; pools: theirs, in turn;
    refused: why the recording of a number fails, or None."""

    made: Counter[torch.device]
    pools: list[tuple[int, int]]
    refused: Callable[[int], str | None]

    def __init__(self, function, inputs, like, device, pool):
        type(self).made[device] += 1
        type(self).pools.append(pool)
        assert like is None or like.is_meta
        self.failure = type(self).refused(sum(type(self).made.values()))
        self.function = function

    def __call__(self, *inputs):
        return self.function(*inputs)


@pytest.fixture
def captured(monkeypatch):
    StandIn.made, StandIn.pools, StandIn.refused = Counter(), [], lambda number: None
    monkeypatch.setattr(graphs, "Captured", StandIn)
    monkeypatch.setattr(graphs, "can_record", lambda: True)
    handles = itertools.count(1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
    return StandIn


def run(recordings, name="name", function=lambda x: x * 2, x=None):
    return recordings(name, function, (torch.ones(2) if x is None else x,), CPU)


def test_a_function_is_recorded_when_it_comes_a_second_time(captured):
    recordings, made = Recordings(), []
    for number in range(1, 5):
        assert torch.equal(run(recordings, x=torch.full((2,), number)), torch.full((2,), 2 * number))
        made.append(captured.made.total())
    assert made == [0, 1, 1, 1] and len(recordings) == 1


def test_results_of_replays_are_memory_of_their_own(captured):
    recordings, place = Recordings(), torch.zeros(2)
    results = [run(recordings, function=place.copy_, x=torch.full((2,), number)) for number in range(5)]
    assert [r.tolist() for r in results[1:]] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    nothing = [run(recordings, "nothing", lambda x: None) for _ in range(3)]
    assert nothing == [None] * 3


def test_what_cannot_be_recorded_runs_as_it_is_until_all_is_forgotten(captured, caplog):
    captured.refused = lambda number: "no graph holds it"
    recordings = Recordings()
    for _ in range(5):
        assert run(recordings).tolist() == [2, 2] and run(recordings, "other").tolist() == [2, 2]
    assert captured.made.total() == 2 and not len(recordings), "each was tried once"
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "no graph holds it" in caplog.text
    recordings.keep(lambda name: name == "other")
    run(recordings), run(recordings)
    assert captured.made.total() == 3, "the one that was forgotten is tried anew"
    recordings.forget()
    captured.refused = lambda number: None
    for name in ("name", "other") * 3:
        run(recordings, name)
    assert captured.made.total() == 5 and len(recordings) == 2


def test_an_error_of_a_function_that_was_not_recorded_is_raised(captured):
    """Where recording took the memory that was missing, the next call may do without."""
    captured.refused = lambda number: "no memory"
    recordings, calls = Recordings(), []

    def function(x):
        calls.append(x)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("of the function")
        return x

    run(recordings, function=function)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="of the function"):
        run(recordings, function=function)
    run(recordings, function=function), run(recordings, function=function)
    assert captured.made.total() == 1 and len(calls) == 4


def test_a_function_that_failed_when_it_ran_first_is_not_recorded_next(captured):
    def function(x):
        raise RuntimeError("not yet")

    recordings = Recordings()
    with pytest.raises(RuntimeError, match="not yet"):
        run(recordings, function=function)
    assert run(recordings).tolist() == [2, 2] and not captured.made
    assert run(recordings).tolist() == [2, 2] and captured.made.total() == 1


def test_the_pool_of_a_failed_recording_is_not_used_again(captured):
    """torch 2.11 ends a failed recording in the device's memory, but never in its pinned memory."""
    captured.refused = lambda number: "no graph holds it" if number == 2 else None
    recordings = Recordings()
    for name in "abcd":
        run(recordings, name), run(recordings, name)
    assert captured.pools == [(0, 1), (0, 1), (0, 2), (0, 2)] and set(recordings.recorded) == set("acd")


def test_keep_forgets_the_rest(captured):
    recordings = Recordings()
    for name in ("a", "b", "a", "b", "seen"):
        run(recordings, name)
    graph = weakref.ref(recordings.recorded["a"])
    recordings.keep(lambda name: name == "b")
    gc.collect()
    assert graph() is None and set(recordings.recorded) == {"b"}
    run(recordings, "seen"), run(recordings, "a"), run(recordings, "b")
    assert captured.made.total() == 2


# The two that keep recordings: a network's function by shape, and an edit's passes


def recorder(**more):
    network = torch.nn.Linear(1, 1).requires_grad_(False)
    return network, Recorder(network, lambda x: x + network.weight.sum(), **more)


def given(count):
    return torch.zeros(count).as_subclass(OnCuda)


def test_a_recorder_records_shapes(captured):
    network, recorded = recorder(most=5)
    for _ in range(3):
        for count in (2, 3, 6):
            found = recorded(given(count)).as_subclass(torch.Tensor)
            assert torch.equal(found, torch.zeros(count) + network.weight.sum())
    assert captured.made.total() == 2, "the largest is never recorded"


@pytest.mark.parametrize("change", ["weight", "forget", "many shapes"])
@pytest.mark.parametrize("refused", [False, True])
def test_a_recorder_tries_again_only_where_something_changed(captured, change, refused):
    captured.refused = lambda number: "no" if refused else None
    network, recorded = recorder()
    for _ in range(4):
        recorded(given(2))
    assert captured.made.total() == 1
    if change == "weight":
        network.weight.add_(1)
    elif change == "forget":
        recorded.forget()
    else:
        captured.refused = lambda number: None
        for count in range(10, 10 + Recorder.SHAPES + (0 if refused else -1)):
            recorded(given(count)), recorded(given(count))
        before = captured.made.total()
        recorded(given(2)), recorded(given(2))
        assert captured.made.total() == before, "room for what is known"
        recorded(given(5))
    captured.made.clear()
    for _ in range(4):
        recorded(given(2))
    assert captured.made.total() == 1


@pytest.fixture
def recording(captured, monkeypatch):
    """Workspaces on the CPU that record."""
    monkeypatch.setattr(Workspace, "_recording", property(lambda self: self.kept and self.record))
    return captured


@pytest.mark.parametrize("refused", ["none", "every third", "all"])
def test_edits_are_the_same_recorded_or_not(patchify, recording, refused):
    """Also where memory runs out while they are recorded: each pass is tried once, and one failure stops no other."""
    step = {"none": 0, "every third": 3, "all": 1}[refused]
    recording.refused = lambda number: "no memory" if step and number % step == 0 else None
    work, passes = Workspace(), len(patchify.schedule) + 2  # of the text and of the source
    wanted = edit(patchify)
    for _ in range(4):
        work.source = ()  # read again, as for another picture
        same(edit(patchify, work), wanted, atol=3e-5)
    assert recording.made.total() == passes and work.record, "nothing is switched off"
    failed = passes // step if step else 0
    assert len(work.recordings) == passes - failed and len(work.recordings.failed) == failed
    work.forget()
    assert not len(work.recordings) and not work.recordings.failed and work.recordings.pool is None
    edit(patchify, work), edit(patchify, work)
    assert recording.made.total() > passes, "tried again"


def test_changed_weights_let_passes_be_tried_again(patchify, recording):
    recording.refused = lambda number: "no memory"
    work, weight = Workspace(), patchify.transformer.blocks[1].ffn.fc1.bias
    for _ in range(3):
        edit(patchify, work)
    before = recording.made.total()
    weight.add_(0)
    edit(patchify, work), edit(patchify, work)
    assert len(work.recordings.failed) and recording.made.total() > before


def test_passes_that_are_no_longer_wanted_leave_their_recordings(patchify, recording):
    work = Workspace()
    for _ in range(2):
        edit(patchify, work)
    before, step = len(work.recordings), work.passes[2]
    work.recordings.failed.add((step, "made up"))
    work.scale_passes(lambda: [], "other")
    assert len(work.recordings) == before, "these are the plain ones"
    assert (step, "made up") in work.recordings.failed
    other = object()
    work.recordings.failed.add((other, "made up"))
    work.scale_passes(lambda: [], "others")
    assert (other, "made up") not in work.recordings.failed


# `Captured` itself


class Cuda:
    """CUDA as far as recording asks for it. broken: errors of the ends of recordings to come. Like torch's, such a one
    leaves the stream, the pool and the random numbers as they are."""

    def __init__(self):
        self.here = self.present = self.stream_named("here")
        self.other, self.waits, self.reserved, self.broken = self.stream_named("recording"), [], 0, []
        self.pools, self.used, self.drawing = set(), Counter(), True

    def stream_named(self, name):
        return SimpleNamespace(device=CPU, wait_stream=lambda other: self.waits.append((name, other.name)), name=name)

    def set_stream(self, stream):
        self.present = stream

    @contextmanager
    def stream(self, stream):
        before, self.present = self.present, stream
        try:
            yield
        finally:
            self.present = before

    @contextmanager
    def graph(self, graph, pool=(9, 9), stream=None, capture_error_mode="global"):
        before, self.present = self.present, stream
        if pool in self.pools:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.reserved += 100
        self.pools.add(pool)
        self.used[pool] += 1
        self.drawing = False
        try:
            yield
        finally:
            if self.broken:
                raise self.broken.pop()
            self.drawing = True
            self.pools.remove(pool)
            self.present = before

    def end_pool(self, device, pool):
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def release_pool(self, device, pool):
        self.used[pool] -= 1


@pytest.fixture(params=["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"])
def cuda(monkeypatch, request):
    cuda = Cuda()
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    monkeypatch.setattr(torch._C, request.param, cuda.end_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release_pool, raising=False)
    graphs._recording_stream.cache_clear()
    for name, value in {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "device": lambda device: nullcontext(),
        "current_stream": lambda: cuda.present,
        "current_device": lambda: 0,
        "Stream": lambda device: cuda.other,
        "stream": cuda.stream,
        "set_stream": cuda.set_stream,
        "graph": cuda.graph,
        "memory_reserved": lambda: cuda.reserved,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    yield cuda
    graphs._recording_stream.cache_clear()


LIKE = torch.empty(2, device="meta")


def test_a_recording(cuda):
    calls = []
    made = Captured(lambda x: calls.append(cuda.present.name) or x * 2, (torch.ones(2),), LIKE, CPU, POOL)
    assert made.failure is None and made.nbytes == 100 and made.output.tolist() == [2, 2]
    assert calls == ["recording"], "run only to be recorded"
    assert cuda.waits == [("recording", "here"), ("here", "recording")], "cuBLAS has its memory before"
    assert made in graphs._living, "its bytes count"
    assert made(torch.full((2,), 3.0)) is made.output and made.inputs[0].tolist() == [3, 3]
    assert cuda.present is cuda.here


def test_a_recording_without_a_result(cuda):
    place = torch.zeros(2)
    made = Captured(lambda x: [place.copy_(x)] and None, (torch.ones(2),), None, CPU, POOL)
    assert made.failure is None and made(torch.ones(2)) is None


@pytest.mark.parametrize("outcome", ["recorded", "failed"])
@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_within_a_recording(cuda, collects, outcome):
    """An older recording that lies there in a cycle would be let go of, which ends this one."""
    found = []

    def function(x):
        found.append(gc.isenabled())
        if outcome == "failed":
            raise RuntimeError("no")
        return x * 2

    gc.enable() if collects else gc.disable()
    try:
        Captured(function, (torch.ones(2),), LIKE, CPU, POOL)
        found.append(gc.isenabled())
    finally:
        gc.enable()
    assert found == [False, collects]


@pytest.mark.parametrize("when", ["within", "at its end"])
@pytest.mark.parametrize("error", REASONS, ids=lambda error: type(error).__name__)
def test_a_recording_that_fails_leaves_nothing(cuda, error, when):
    held = []

    def function(x):
        result = x * 2
        held.append(weakref.ref(result))
        if when == "within":
            raise error
        return result

    if when == "at its end":
        cuda.broken.append(error)
    made = Captured(function, (torch.ones(2),), LIKE, CPU, POOL)
    assert made.failure == str(error).splitlines()[0]
    assert cuda.present is cuda.here, "the stream of recordings is not left the present one"
    assert made not in graphs._living
    assert not cuda.pools and cuda.drawing, "others can record and draw"
    assert cuda.used[POOL] == (1 if when == "within" else 0), "a graph that ended gives its pool back itself"
    assert Captured(lambda x: x * 3, (torch.ones(2),), LIKE, CPU, POOL).failure is None
    error.__traceback__ = None
    del made
    gc.collect()
    assert [result() for result in held] == [None]


@pytest.mark.parametrize("missing", ["inputs", "result", "cuBLAS"])
def test_what_finds_no_room_to_be_recorded_runs_as_it_is(cuda, monkeypatch, missing):
    def full(*about, **more):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    recordings, x = Recordings(), torch.ones(2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    assert recordings("f", lambda x: x * 2, (x,), CPU).tolist() == [2, 2]
    if missing == "inputs":
        monkeypatch.setattr(torch.Tensor, "clone", full)
    if missing == "result":
        monkeypatch.setattr(torch, "empty_like", full)
    if missing == "cuBLAS":
        monkeypatch.setattr(graphs, "_prepare", full)
    for _ in range(3):
        assert recordings("f", lambda x: x * 2, (x,), CPU).tolist() == [2, 2]
    assert recordings.failed == {"f"} and not recordings.seen and cuda.present is cuda.here


def test_an_interrupted_recording_gives_the_stream_back(cuda):
    def function(x):
        raise KeyboardInterrupt

    cuda.broken.append(RuntimeError("the capture is invalid"))
    with pytest.raises(KeyboardInterrupt):
        Captured(function, (torch.ones(2),), LIKE, CPU, POOL)
    assert cuda.present is cuda.here and not cuda.pools and cuda.drawing


def test_recording_asks_for_an_allocator_that_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for backend, able in (("native", True), ("cudaMallocAsync", True), ("another", False)):
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda backend=backend: backend)
        assert graphs.can_record() == able
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not graphs.can_record()


# On a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("reason", ["waits for the device", "memory"])
def test_a_gpu_goes_on_after_a_recording_that_failed(reason):
    device, recordings = torch.device("cuda", torch.cuda.current_device()), Recordings()
    here, x, calls = torch.cuda.current_stream(), torch.ones(1 << 20, device=device), []

    def wrong(x):
        calls.append(x)
        if len(calls) == 2:
            if reason == "memory":
                torch.empty(1 << 46, dtype=torch.uint8, device=device)
            x.sum().item()
        return x * 2

    def right(x):
        return (x * 3).cumsum(0)

    for _ in range(3):
        assert torch.equal(recordings("wrong", wrong, (x,), device), x * 2)
        assert torch.equal(recordings("right", right, (x,), device), (x * 3).cumsum(0))
    assert recordings.failed == {"wrong"} and set(recordings.recorded) == {"right"}
    assert torch.cuda.current_stream() == here and torch.randn(4, device=device).isfinite().all()
    calls.clear()
    recordings.forget()
    gc.collect(), torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):  # no memory is lost, however often it is tried
        for _ in range(2):
            recordings("wrong", wrong, (x,), device)
        calls.clear()
        recordings.forget()
        gc.collect(), torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@on_gpu
def test_a_gpu_multiplies_into_fp32_as_the_copies_do():
    x, y = (torch.randn(2, 32, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.testing.assert_close(matmul_fp32(x, y), torch.bmm(x.float(), y.float()), atol=1e-4, rtol=1e-5)


@on_gpu
def test_a_recording_that_waits_to_be_collected_does_not_end_the_next_one():
    device, recordings = torch.device("cuda", torch.cuda.current_device()), Recordings()
    x = torch.ones(4, device=device)
    for number in range(3):
        for _ in range(2):
            assert recordings(number, lambda x: [[] for _ in range(2000)] and x * 2, (x,), device).tolist() == [2] * 4
        waiting = [recordings.recorded.pop(number)]
        waiting.append(waiting)
        del waiting
    assert not recordings.failed
