"""Trainings from damaged or hostile folders, with impossible settings, on full disks and ended by signals."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from support import ROOT

pytest.importorskip("accelerate")

from test_training import ENVIRONMENT, TOKENIZER, Alone, losses, stages_of, trained_at  # noqa: E402

from varedit_core.training import ending as ends  # noqa: E402
from varedit_core.training import engine, idle, report, settings, states  # noqa: E402
from varedit_core.training.run import run  # noqa: E402

SMALL = "\n[stage.data]\n".join((TOKENIZER.split("[stage.data]")[0], 'source = "pictures"\nworkers = 0\n'))


def small_stage(folder: Path, *changes: str):
    """A training of a VAE on two pictures, which takes a second."""
    (folder / "pictures").mkdir(exist_ok=True)
    for index in range(2):
        Image.new("RGB", (16, 16), (100 * index, 40, 90)).save(folder / "pictures" / f"{index}.png")
    (stage,) = stages_of(folder, SMALL, "a.batch=1", "a.steps=2", "a.save_every=1", *changes)
    return stage


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The settings of a training, its folder after one of two steps, and its losses without a break."""
    folder = tmp_path_factory.mktemp("unfinished")
    stage = small_stage(folder)
    assert run([stage], folder / "whole")
    assert not run([stage], folder / "out", stop_after=0)
    return stage, folder / "out", losses(folder / "whole" / "a")


@pytest.fixture
def stopped(unfinished, tmp_path):
    """Its settings, a copy of its folder, the losses of the unbroken one."""
    stage, output, expected = unfinished
    shutil.copytree(output, tmp_path / "out")
    return stage, tmp_path / "out", expected


# Checkpoints


class Code:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


LOOKED_FOR = (
    "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl", "optimizer.bin", "optimizer_1.bin",
    "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt", "pytorch_model.bin", "model.bin",
    "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp",
)  # fmt: skip
"""Files that accelerate looks for in a checkpoint, and unpickles."""


def infect(file: Path, ran: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    if file.name.startswith("optimizer") or file.suffix == ".pt":
        torch.save({"state": Code(ran)}, file)
    else:
        file.write_bytes(pickle.dumps(Code(ran)))


def test_the_code_of_this_test_would_run(tmp_path):
    infect(tmp_path / "x.pkl", tmp_path / "ran")
    pickle.loads((tmp_path / "x.pkl").read_bytes())
    infect(tmp_path / "x.pt", tmp_path / "ran2")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir() and (tmp_path / "ran2").is_dir()


def test_nothing_of_a_checkpoint_is_a_pickle(stopped):
    _, output, _ = stopped
    written = [path for path in (output / "a" / "state-1").rglob("*") if path.is_file()]
    assert len(written) == 5 and {path.suffix for path in written} == {".safetensors", ".json"}


@pytest.mark.parametrize("listed", [False, True], ids=["put there", "with the right checksum"])
def test_code_in_every_file_of_a_checkpoint_does_not_run(stopped, tmp_path, listed):
    """In each of its files, and in all that accelerate would look for beside them: none is opened as a pickle."""
    stage, output, expected = stopped
    state, ran = output / "a" / "state-1", tmp_path / "ran"
    for name in LOOKED_FOR:
        infect(state / name, ran)
    for file in [path for path in state.iterdir() if path.suffix in (".safetensors", ".json")]:
        kept = {path: path.read_bytes() for path in (file, state / states.STATE)}
        infect(file, ran)
        if listed and file.name != states.STATE:
            facts = json.loads(kept[state / states.STATE])
            facts["files"][file.name] = [file.stat().st_size, zlib.crc32(file.read_bytes())]
            (state / states.STATE).write_text(json.dumps(facts))
        with pytest.raises(ValueError, match=str(state)) as raised:
            run([stage], output, resume=True)
        assert "\n" not in str(raised.value) and not ran.exists(), file
        for path, data in kept.items():
            path.write_bytes(data)
    assert run([stage], output, resume=True) and losses(output / "a") == expected
    assert not ran.exists()


@pytest.mark.parametrize("name", LOOKED_FOR)
def test_checkpoints_of_older_releases_are_refused(stopped, tmp_path, name):
    stage, output, _ = stopped
    shutil.rmtree(output / "a" / "state-1")
    (output / "a" / "state-1").mkdir()
    infect(output / "a" / "state-1" / name, tmp_path / "ran")
    with pytest.raises(ValueError, match="state-1 was written before checkpoints were safetensors.*begin anew with"):
        run([stage], output, resume=True)
    assert not (tmp_path / "ran").exists()


FILES = ("model", "optimizer_0", "average", "random-0")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    **{f"{how.__name__} {name}": (lambda state, name=name, how=how: how(state / f"{name}.safetensors"))
       for how in (Path.unlink, cut, flipped, as_folder, as_pipe) for name in FILES},
    **{f"{how.__name__} list": (lambda state, how=how: how(state / states.STATE))
       for how in (Path.unlink, cut, as_folder, as_pipe)},
    **{f"list is {text[:9]}": (lambda state, text=text: (state / states.STATE).write_text(text))
       for text in ("", "null", "[]", "{}", '{"format": 1}', "[" * 100_000, "NaN", "1e999")},
    "list of another step": lambda state: (state / states.STATE).write_text(
        (state / states.STATE).read_text().replace('"step": 10', '"step": 11')
    ),
    "list of another format": lambda state: (state / states.STATE).write_text(
        (state / states.STATE).read_text().replace('"format": 1', '"format": 9')
    ),
    "emptied": lambda state: [path.unlink() for path in state.iterdir()],
    "no folder": lambda state: (shutil.rmtree(state), state.write_text("x")),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_states(tmp_path_factory):
    """A folder with the checkpoints of steps 5 and 10, as a kill leaves it before the old one is deleted."""
    folder = tmp_path_factory.mktemp("two")
    states.save_state(folder, trained_at(5), Alone())
    shutil.copytree(folder / "state-5", folder / "kept")
    states.save_state(folder, trained_at(10), Alone())
    (folder / "kept").rename(folder / "state-5")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(two_states, tmp_path, caplog, damage):
    folder = tmp_path / "a"
    shutil.copytree(two_states, folder)
    assert states.newest(folder, trained_at(0)) == folder / "state-10"
    DAMAGES[damage](folder / "state-10")
    with caplog.at_level(logging.WARNING):
        assert states.newest(folder, trained_at(0)) == folder / "state-5"
    (message,) = caplog.messages
    assert "state-10" in message and message.endswith("; the training goes on from state-5") and "\n" not in message
    DAMAGES[damage](folder / "state-5") if "another step" not in damage else cut(folder / "state-5" / states.STATE)
    with pytest.raises(ValueError, match="state-10.*; no checkpoint is whole: put it back, or begin anew with another"):
        states.newest(folder, trained_at(0))
    states.save_state(folder, trained_at(10), Alone())  # in the place of the broken one
    assert [path.name for path in folder.iterdir()] == ["state-10"]


def test_a_lost_checkpoint_is_no_silent_start_at_step_0(stopped, caplog):
    stage, output, expected = stopped
    shutil.rmtree(output / "a" / "state-1")
    with pytest.raises(ValueError, match="has a result but no checkpoint to go on from; put its state-N folder back"):
        run([stage], output, resume=True)
    (output / "a" / "tokenizer.safetensors").unlink()
    (output / "a" / "state-1.partial").mkdir()
    with caplog.at_level(logging.INFO, "varedit_core"):
        assert run([stage], output, resume=True)
    assert "a: there is no checkpoint yet; the training begins at step 0" in caplog.messages
    assert losses(output / "a") == expected


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    states.save_state(tmp_path, trained_at(5), Alone())
    other = trained_at(0)
    other = replace(other, model=torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"model.safetensors is of another network \(weight differs\)"):
        other.read(tmp_path / "state-5", 1)
    state = tmp_path / "state-5"
    save_file({"7.exp_avg": torch.zeros(2)}, state / "optimizer_0.safetensors")
    with pytest.raises(ValueError, match=r"optimizer_0.safetensors is of another network \(7.exp_avg differs\)"):
        trained_at(0).read(state, 1)


def test_states_of_random_numbers_go_on(tmp_path):
    import random

    import numpy as np

    for drawn_before in (0, 1):  # an odd number of normal ones leaves one waiting
        for _ in range(drawn_before):
            random.gauss(0, 1), np.random.randn(), torch.randn(1)
        save_file(states.random_state(), tmp_path / "x.safetensors")
        first = random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()
        states.set_random_state(load_file(tmp_path / "x.safetensors"))
        assert first == (
            random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()
        )  # fmt: skip


def test_other_numbers_of_processes_are_told(tmp_path, caplog):
    states.save_state(tmp_path, trained_at(5), Alone())
    facts = json.loads((tmp_path / "state-5" / states.STATE).read_text())
    states._check_processes(tmp_path / "state-5", facts, replace(trained_at(0), processes=2))
    assert "was written by 1 processes and 2 go on with it" in caplog.text
    with pytest.raises(ValueError, match=r"was trained sharded \(FSDP\); go on the same way"):
        states._check_processes(tmp_path / "state-5", facts | {"sharded": True}, trained_at(0))


# Settings


TABLES = {
    "": settings.Stage, "data": settings.Data, "optimisation": settings.Optimisation, "objective": settings.Objective,
    "reconstruction": settings.Reconstruction, "lora": settings.Lora, "new_transformer": settings.NewTransformer,
    "new_tokenizer": settings.NewTokenizer, "new_text": settings.NewText,
}  # fmt: skip
NUMBERS = [
    (f"{table}.{each.name}".lstrip("."), each)
    for table, kind in TABLES.items()
    for each in dataclasses.fields(kind)
    if any(word in str(each.type) for word in ("int", "float"))
]


def put(name: str, value) -> settings.Stage:
    """A stage with one setting, as a file would give it."""
    *table, name = name.split(".")
    kind = next(each for path, each in NUMBERS if path == ".".join([*table, name])).type
    if "dict" in kind:
        value = {"keep" if name == "families" else "sepia": value}
    inner = {name: [value] if "tuple" in kind else value}
    whole = {"name": "a", "task": "tokenizer", "steps": 1, "batch": 1} | ({table[0]: inner} if table else inner)
    return settings.build(settings.Stage, whole, "x.toml")


def test_every_table_of_settings_is_known():
    nested = {each.name for each in dataclasses.fields(settings.Stage) if each.name in TABLES or "New" in each.type}
    assert nested == set(TABLES) - {""} and len(NUMBERS) == 50
    kinds = {value for value in vars(settings).values() if dataclasses.is_dataclass(value)}
    assert kinds == set(TABLES.values())


@pytest.mark.parametrize(("name", "each"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_every_number_of_the_settings_has_a_range(name, each):
    """Beside its field; what lies outside is refused before anything is loaded, and its ends are taken."""
    bounds = each.metadata["range"]
    whole = "float" not in each.type
    outside = [bounds.low - 1, bounds.high + 1, -bounds.high - 11, 10**40, *([bounds.high] * bounds.below)]
    outside += [] if whole else [float("nan"), float("inf"), float("-inf"), 1e38, -1e-3 + bounds.low]
    for value in outside:
        with pytest.raises(ValueError, match=rf"^stage a: {name} must be {bounds}, got ") as raised:
            put(name, int(value) if whole else value)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 200
    default = each.default
    if isinstance(default, int | float):
        assert bounds.holds(default)
    kind = int if whole else float
    for value in (bounds.low, *([] if bounds.below else [bounds.high])):
        if "families" not in name and "styles" not in name:
            assert put(name, kind(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a.data.families.recolor=1", r"data.families must be one of add, .*, got 'recolor' \(did you mean recolour"),
        ("a.data.styles.sepiaa=1", r"data.styles must be one of .*, got 'sepiaa' \(did you mean sepia\?\)"),
        ("a.optimisation.rat=1", r"unknown setting 'rat' \(did you mean rate\?\)"),
        ("a.optimisation.optimizer=adam", r"optimizer must be one of adamw, muon, got 'adam' \(did you mean adamw"),
        ("a.steps.more=1", "'a.steps.more=1' is no setting: steps holds no others"),
        ("a.new_tokenizer.encoder_widths=[]", "new_tokenizer.encoder_widths must hold a number"),
        ("a.steps=" + "9" * 5000, r"steps: expected int, got '9{79}\.\.\.$"),
        ("a.steps=0x" + "f" * 9000, "steps must be from 1 to 1000000000, got a very long int$"),
        ("a.optimisation.rate=" + "9" * 400, "optimisation, rate: expected float"),
        ("a.steps=" + "[" * 5000 + "]" * 5000, "steps: expected int"),
        ("a.name=" + "x" * 101, "must be letters, digits, _ and -, at most 100"),
    ],
)
def test_impossible_settings_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        small_stage(tmp_path, change)
    assert len(str(raised.value)) < 400


def test_shares_that_leave_nothing_are_refused(tmp_path):
    from varedit_core.shapeedit.edits import FAMILIES

    none = ", ".join(f"{name} = 0" for name in FAMILIES)
    with pytest.raises(ValueError, match="data.families leaves nothing to draw"):
        small_stage(tmp_path, f"a.data.families={{{none}}}")


@pytest.mark.parametrize("text", ["", "stage = 1", "stage = [1]", "[[stage]]\nname=1", "x = " + "[" * 10_000, "\x00"])
def test_files_that_hold_no_settings(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError) as raised:
        settings.load_stages(tmp_path / "x.toml")
    assert str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)


def test_a_pipe_or_a_huge_file_of_settings(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ValueError, match="pipe.toml is a pipe, not a file of settings"):
        settings.load_stages(tmp_path / "pipe.toml")
    with open(tmp_path / "huge.toml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="huge.toml is too large for a file of settings"):
        settings.load_stages(tmp_path / "huge.toml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
NAMES = st.sampled_from([*TABLES, *(f.name for kind in TABLES.values() for f in dataclasses.fields(kind))])


@given(st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=3), max_size=4))
def test_any_table_is_a_stage_or_refused_in_one_sentence(table):
    try:
        settings.build(settings.Stage, {"name": "a", "task": "tokenizer", "steps": 1, "batch": 1} | table, "x.toml")
    except ValueError as error:
        assert str(error).startswith(("x.toml", "stage ", "the name ")) and len(str(error)) < 500


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_impossible_times_to_stop_after(unfinished, tmp_path, seconds):
    with pytest.raises(ValueError, match="seconds to stop after must be 0 or more"):
        run([unfinished[0]], tmp_path / "out", stop_after=seconds)


# Damaged folders


TEXTS = ("", "{", "null", "[]", "3", '"x"', "[" * 100_000, "\x00" * 9)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["settings.json", "finished.json"])
def test_damaged_files_of_a_training_are_told(stopped, name, text):
    stage, output, _ = stopped
    (output / "a" / name).write_text(text)
    with pytest.raises(
        ValueError, match=f"{name} .*(put it back, or choose another|remove it, and --resume)"
    ) as raised:
        run([stage], output, resume=True)
    assert "\n" not in str(raised.value) and (output / "a" / "state-1" / states.STATE).is_file()


@pytest.mark.parametrize("name", ["settings.json", "finished.json", "metrics.jsonl"])
def test_pipes_in_the_place_of_files_of_a_training(stopped, name):
    stage, output, _ = stopped
    (output / "a" / name).unlink(missing_ok=True)
    os.mkfifo(output / "a" / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe"):
        run([stage], output, resume=True)


def test_a_missing_file_of_settings_is_told(stopped):
    stage, output, _ = stopped
    (output / "a" / "settings.json").unlink()
    with pytest.raises(ValueError, match="out/a lacks its settings.json; put it back, or choose another --output"):
        run([stage], output, resume=True)


def test_a_lost_result_is_told_and_written_again(stopped):
    stage, output, _ = stopped
    assert run([stage], output, resume=True)
    result = output / "a" / "tokenizer.safetensors"
    before = load_file(result)
    result.unlink()
    with pytest.raises(ValueError, match="finished.json lists tokenizer.safetensors, which is gone; remove it, and"):
        run([stage], output, resume=True)
    (output / "a" / "finished.json").unlink()
    result.write_bytes(b"")
    assert run([stage], output, resume=True)
    after = load_file(result)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


LINES = ('{"step": 1, "lo', "3", "null", "[1]", '{"loss": 1}', '{"step": "x"}', "[" * 100_000, "\udcff\x00")


@pytest.mark.parametrize("line", LINES)
def test_damaged_figures_are_left_out_and_counted(stopped, caplog, line):
    stage, output, expected = stopped
    path = output / "a" / report.METRICS
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.INFO, "varedit_core"):
        assert run([stage], output, resume=True)
    assert f"{path}: 1 lines that were no figures are left out" in caplog.messages
    assert losses(output / "a") == expected


@pytest.mark.parametrize("broken", ["gradient", "average"])
def test_an_undefined_gradient_or_average_stops_and_keeps_the_last_state(stopped, monkeypatch, broken):
    stage, output, expected = stopped
    kept = {path: path.read_bytes() for path in (output / "a" / "state-1").iterdir()}
    with monkeypatch.context() as patch:
        if broken == "gradient":
            true = engine._step

            def step(task, model, *more):
                handles = [p.register_hook(lambda g: g * torch.nan) for p in model.parameters() if p.requires_grad]
                try:
                    return true(task, model, *more)
                finally:
                    [handle.remove() for handle in handles]

            patch.setattr(engine, "_step", step)
        else:
            patch.setattr(engine.Average, "update", lambda self, step: self.values[0].fill_(torch.inf))
        what = broken if broken == "gradient" else "weights"
        with pytest.raises(ValueError, match=f"^stage a: the {what} became undefined at step 2; lower the learning"):
            run([stage], output, resume=True)
    assert {path: path.read_bytes() for path in (output / "a" / "state-1").iterdir()} == kept
    assert [path.name for path in (output / "a").glob("state-*")] == ["state-1"]
    assert run([stage], output, resume=True) and losses(output / "a") == expected


def test_a_damaged_vocabulary_is_told(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from varedit_core.training.tasks import TEXT_FOLDER, TransformerTask

    path = tmp_path / TEXT_FOLDER / "tokenizer.json"
    path.parent.mkdir()
    path.write_text('{"half')
    task = SimpleNamespace(stage=SimpleNamespace(new_text=settings.NewText(), seed=0), _vocabulary=lambda: path)
    task.accelerator = SimpleNamespace(device="cpu")
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        TransformerTask._text_encoder(task)
    assert "\n" not in str(raised.value)


def test_a_damaged_picture_of_an_earlier_run_loses_no_training(stopped, caplog):
    pytest.importorskip("tensorboard")
    stage, output, _ = stopped
    (output / "a" / "samples").mkdir()
    (output / "a" / "samples" / "1.png").write_bytes(b"half a picture")
    assert run([stage], output, resume=True)
    assert any(message.startswith("TensorBoard shows no samples: cannot read") for message in caplog.messages)


# Full disks


@pytest.mark.parametrize(
    "name", ["model.safetensors", "random-0.safetensors", "state.json", "metrics.jsonl", "loss.png"]
)
def test_a_full_disk_is_one_sentence_with_the_name_and_keeps_the_last_state(stopped, monkeypatch, name):
    """No file grows beyond a few bytes from the moment that one is written, as on a full disk."""
    import resource

    from varedit_core.files import safe_write

    stage, output, expected = stopped
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    true = safe_write.on_disk

    def filled(path):
        if Path(path).name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
        return true(path)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(safe_write, "on_disk", filled)
            patch.setattr(report, "on_disk", filled)
            with pytest.raises(OSError, match=r"cannot write .*/a/\S+ \(.*File too large.*\); make room") as raised:
                run([stage], output, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(raised.value) and not list((output / "a").glob("*.partial"))
    assert run([stage], output, resume=True) and losses(output / "a") == expected


# Processes


def children(pid: int) -> set[int]:
    """Processes whose parent, or its parent, is this one."""
    found, parents = set(), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run: a zombie does not."""
    return {pid for pid in pids if (stat := Path(f"/proc/{pid}/stat")).exists() and ") Z " not in stat.read_text()}


def until(condition, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


SOURCES = {"pairs": 'source = "pictures"\nworkers = 2\n', "ShapeEdit": "pictures = 0.2\n"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("source", SOURCES)
def test_no_process_outlives_a_training(tmp_path, source, ending):
    """The workers that read pictures, and those that draw scenes. SIGTERM: its checkpoint is written first."""
    small_stage(tmp_path)
    text = SMALL.split("[stage.data]")[0] + f"\n[stage.data]\n{SOURCES[source]}"
    (tmp_path / "training.toml").write_text(text)
    command = [sys.executable, "-m", "varedit_core", "train", tmp_path / "training.toml", "--output", tmp_path / "out"]
    command += ["--set", "a.steps=100000", "--set", "a.batch=1"]
    training = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )  # fmt: skip
    metrics = tmp_path / "out" / "a" / report.METRICS
    try:
        assert until(lambda: training.poll() is not None or (metrics.exists() and metrics.read_text()))
        assert training.poll() is None, training.stderr.read()
        helpers = children(training.pid)
        assert len(helpers) >= 1 + (source == "pairs")
        training.send_signal(ending)
        _, said = training.communicate(timeout=120)
    finally:
        training.kill()
    assert until(lambda: not alive(helpers), 10), "left behind"
    assert training.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}[ending]
    assert "Traceback" not in said
    if ending == signal.SIGTERM:
        assert "stopped before the end; go on with --resume" in " ".join(said.split())
        (state,) = (tmp_path / "out" / "a").glob("state-*")
        assert json.loads((state / states.STATE).read_text())["step"] >= 1


def end_worker(pair, size, **more) -> None:
    os._exit(9)


def test_a_worker_that_is_ended_from_outside_is_told(tmp_path, monkeypatch):
    from test_training import Share

    from varedit_core.training import pairs

    stage = small_stage(tmp_path, "a.data.workers=1")
    monkeypatch.setattr(pairs, "fitted", end_worker)
    with pytest.raises(ValueError, match="^stage a: a process that reads pictures was ended.*; set data.workers lower"):
        next(pairs._samples(stage, 0, Share()))


def idle_stages():
    """A stage for each setting that counts in some stages only, in which it does not."""
    lora = dict(name="a", task="lora", steps=1, batch=1, transformer="t", autoencoder="v", text_encoder="x")
    lora["data"] = settings.Data("pairs")
    vae = dict(name="a", task="tokenizer", steps=1, batch=1)
    yield "transformer", vae | {"transformer": "t"}
    yield "text_encoder", vae | {"text_encoder": "t"}
    yield "checkpointing", vae | {"checkpointing": True}
    yield "train_text", vae | {"train_text": True}
    for name, value in {
        "pictures": 0.1,
        "families": {"add": 2.0},
        "styles": {"night": 2.0},
        "block": 16,
        "reuse": 2,
    }.items():
        yield f"data.{name}", lora | {"data": settings.Data("pairs", **{name: value})}
    ours = {"columns": {"source": "a"}, "on_error": "skip", "workers": 1, "fit": "crop", "resize_targets": True}
    for name, value in ours.items():
        yield f"data.{name}", vae | {"data": settings.Data(**{name: value})}
    yield "optimisation.muon_rate", lora | {"optimisation": settings.Optimisation(muon_rate=1.0)}
    yield "objective.inside", vae | {"objective": settings.Objective(inside=2.0)}
    yield "reconstruction.absolute", lora | {"reconstruction": settings.Reconstruction(absolute=2.0)}
    yield "lora.rank", lora | {"task": "transformer", "lora": settings.Lora(rank=2)}
    yield "new_transformer", lora | {"new_transformer": settings.NewTransformer(depth=2)}
    yield "new_tokenizer", lora | {"new_tokenizer": settings.NewTokenizer(bits=2)}
    yield "new_text", vae | {"new_text": settings.NewText(width=2)}


IDLE = dict(idle_stages())


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_that_counts_elsewhere_is_told(name):
    (sentence,) = idle.idle(settings.Stage(**IDLE[name]))
    assert sentence.startswith(f"stage a: {name}") and " counts only for " in sentence


def test_every_setting_counts_always_or_is_on_the_list():
    every = set(idle.settings_of(settings.Stage("a", "tokenizer", 1, 1)))
    listed = {name for name in every for one in idle.COUNTS if name == one or name.startswith(f"{one}.")}
    assert listed | idle.ALWAYS == every and not listed & idle.ALWAYS
    assert {one for one in idle.COUNTS for name in IDLE if name == one or name.startswith(f"{one}.")} == set(
        idle.COUNTS
    )


def test_a_lora_trains_no_text_encoder():
    lora = dict(name="a", task="lora", steps=1, batch=1, transformer="t", autoencoder="v", text_encoder="x")
    for more in ({"train_text": True}, {"new_text": settings.NewText()}):
        with pytest.raises(
            ValueError, match="the file of a LoRA holds no text encoder; leave out train_text and new_text"
        ):
            settings.Stage(**lora, **more)


def test_settings_of_windows_are_read(tmp_path):
    text = '[[stage]]\nname = "a"\ntask = "tokenizer"\nsteps = 1\nbatch = 1\n'
    (tmp_path / "a.toml").write_text(text, encoding="utf-8-sig")
    assert settings.load_stages(tmp_path / "a.toml")[0].name == "a"


def test_a_helper_is_quiet_only_where_the_training_has_gone():
    told = []
    hook = ends._unless_left(lambda *about: told.append(about[0]))
    for kind in (ConnectionResetError, BrokenPipeError, EOFError, OSError, ValueError):
        hook(kind, kind(), None)
    assert told == [OSError, ValueError]


INTERRUPTED = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
class Passing:
    def __del__(self):  # an error in here is printed and lost
        os.kill(os.getpid(), signal.SIGINT)
        list(range(9))
class AtThis:
    def find_spec(name, *about):
        if name == sys.argv[0]:
            Passing()
sys.meta_path.insert(0, AtThis)
name = sys.argv.pop(1)
sys.argv[0] = name
runpy.run_module("varedit_core", {}, "__main__", alter_sys=False)
"""


@pytest.mark.parametrize("module", ["varedit_core.cli", "torch", "torch._C", "numpy", "typer", "varedit_core.cli.app"])
def test_ctrl_c_is_quiet_from_the_first_moment(module):
    """Also while torch is imported: an error within its own code can end in an abort or in another error."""
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, "--help"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_the_entry_points_are_light():
    """Nothing is imported before Ctrl-C is answered."""
    code = "import sys, varedit_core.__main__; print({'torch', 'numpy', 'typer', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
    assert re.search(r'^varedit = "varedit_core.__main__:main"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
