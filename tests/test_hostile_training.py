"""Trainings from damaged or hostile folders, with impossible settings, on full disks and ended by signals."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("accelerate")

from test_training import TOKENIZER, Alone, losses, stages_of, trained_at  # noqa: E402

from varedit_core.training import states  # noqa: E402
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
