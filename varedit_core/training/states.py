"""Checkpoints of a training: `state-N` folders of safetensors and JSON. Reading one never runs code.

Trained weights, optimisers' state and moving average are written once, by each process its own part where they are
sharded; what is frozen stays in its own files; states of random numbers by every process. `state.json` lists the files
with their sizes and checksums: a folder that lacks one, or holds another, is not gone on with. A folder takes its name
when it is whole, and loses it before it goes.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files.reading import check_file, read_json
from ..files.safe_write import make_folder, write_json
from ..files.tensor_files import write_tensors
from .sharded import is_sharded, local, sharded_as

logger = logging.getLogger(__name__)

STATE = "state.json"
FORMAT = 1
PICKLED = ("*.bin", "*.pkl", "*.pt", "*.distcp", "*/.metadata", "*/*.distcp")
"""Files of checkpoints that were written before this format. They hold pickles, which run code when they are read."""


class Broken(ValueError):
    """A checkpoint that cannot be gone on with: what is wrong with it."""


class Kept(Protocol):
    """What has tensors of its own: the moving average."""

    def state(self) -> dict[str, Tensor]: ...


@dataclass
class Progress:
    """How far a training is; saved with its state."""

    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Trained:
    """All that a step changes, in one process of a training."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    average: Kept
    progress: Progress
    rank: int = 0
    processes: int = 1

    @property
    def sharded(self) -> bool:
        return any(map(is_sharded, self.model.parameters()))

    def files(self, processes: int) -> list[str]:
        """Names of a checkpoint's files."""
        parts = ["model", *(f"optimizer_{i}" for i in range(len(self.optimizers))), "average"]
        names = [self._named(part, rank) for part in parts for rank in range(processes if self.sharded else 1)]
        return [*names, *(f"random-{rank}.safetensors" for rank in range(processes))]

    def write(self, folder: Path) -> None:
        """Write this process's files."""
        make_folder(folder)
        if self.sharded or self.rank == 0:
            held = {f"optimizer_{i}": optimizer_state(optimizer) for i, optimizer in enumerate(self.optimizers)}
            held |= {"model": _distinct(self.trained()), "average": self.average.state()}
            for part, tensors in held.items():
                ours = {name: local(tensor).contiguous() for name, tensor in tensors.items()}
                write_tensors(folder / self._named(part, self.rank), ours, {"format": "pt"})
        write_tensors(folder / f"random-{self.rank}.safetensors", random_state(), {"format": "pt"})

    def trained(self) -> dict[str, Tensor]:
        """The model's state without what is frozen, which comes from files of its own."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    @torch.no_grad()
    def read(self, folder: Path, processes: int) -> None:
        """Take over this process's files of a whole checkpoint. Broken where they are another training's."""
        trained = self.trained()
        frozen = self.model.state_dict().keys() - trained.keys()  # earlier releases wrote them, too
        into = {"model": _distinct(trained), "average": self.average.state()}
        for part, held in into.items():
            ours = {name: local(tensor) for name, tensor in held.items()}
            _copy(folder / self._named(part, self.rank), ours, frozen if part == "model" else frozenset())
        for i, optimizer in enumerate(self.optimizers):
            path = folder / self._named(f"optimizer_{i}", self.rank)
            load_optimizer(optimizer, _tensors(path), path)
        if self.rank < processes:
            path = folder / f"random-{self.rank}.safetensors"
            try:
                set_random_state(dict(_tensors(path)))
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                raise Broken(f"{path} holds no states of random numbers ({error}); put it back") from None

    def _named(self, part: str, rank: int) -> str:
        return f"{part}-{rank}.safetensors" if self.sharded else f"{part}.safetensors"


def save_state(folder: Path, trained: Trained, accelerator) -> None:
    """A checkpoint, which takes its name when it is whole. Only then the others go, and parts of killed trainings."""
    step = trained.progress.step
    partial, final = folder / f"state-{step}.partial", folder / f"state-{step}"
    main = accelerator.is_main_process
    try:
        if main and partial.exists():
            _remove(partial)
        accelerator.wait_for_everyone()
        trained.write(partial)
        accelerator.wait_for_everyone()
        if main:
            _describe(partial, trained)
            if final.exists():  # one that was broken
                _remove(final)
            partial.rename(final)
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in sorted(folder.glob("state-*")) if main else ():
        if old != final:
            _remove(old)
    accelerator.wait_for_everyone()


def load_state(folder: Path, trained: Trained, accelerator) -> None:
    """Go on from the newest checkpoint of a stage's folder that is whole; what is left out, and a start at step 0, are
    told. ValueError where checkpoints are there and none is whole, or where they are lost."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            found[0] = newest(folder, trained)
            for left in folder.glob("state-*.partial"):  # by a training that was killed
                _remove(left)
        except ValueError as error:
            found[1] = str(error)
    state, sentence = broadcast_object_list(found)  # all go on from the same one, or none does
    if sentence:
        raise ValueError(sentence)
    if state is None:
        logger.info("%s: there is no checkpoint yet; the training begins at step 0", folder.name)
        return
    facts = _facts(state)
    _check_processes(state, facts, trained)
    trained.read(state, facts["processes"])
    trained.progress.step, trained.progress.seconds = facts["step"], float(facts["seconds"])
    logger.info("%s: going on from step %d", folder.name, trained.progress.step)


def newest(folder: Path, trained: Trained) -> Path | None:
    """The newest checkpoint that is whole, or None where none was written yet. Raises as `load_state`."""
    steps = [int(match[1]) for path in folder.glob("state-*") if (match := re.fullmatch(r"state-(\d+)", path.name))]
    broken = []
    for step in sorted(steps, reverse=True):
        state = folder / f"state-{step}"
        try:
            check_whole(state, trained)
        except Broken as error:
            broken.append(str(error))
            continue
        for sentence in broken:
            logger.warning("%s; the training goes on from %s", sentence, state.name)
        return state
    if broken:
        raise ValueError(f"{broken[0]}; no checkpoint is whole: put it back, or begin anew with another --output")
    if any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has a result but no checkpoint to go on from; put its state-N folder back, or begin anew with "
            "another --output"
        )
    return None


def check_whole(state: Path, trained: Trained) -> None:
    """Broken where a checkpoint lacks a file, holds other bytes than were written, or is a pickle of older releases."""
    if any(True for pattern in PICKLED for _ in state.glob(pattern)) and not (state / STATE).exists():
        raise Broken(f"{state} was written before checkpoints were safetensors, and reading it could run code")
    facts = _facts(state)
    if facts["sharded"] != trained.sharded:
        return  # another sentence's: see `_check_processes`
    names = trained.files(facts["processes"])
    for name in names:
        if name not in facts["files"]:
            raise Broken(f"{state / name} is not listed in its {STATE}")
    try:
        for name in names:
            check_file(state / name, "part of a checkpoint", Broken)
        found = _sums(state, names)
    except OSError as error:
        raise Broken(str(error).split(";")[0]) from None
    for name in names:
        if found[name] != facts["files"][name]:
            raise Broken(f"{state / name} is not what was written")


def _facts(state: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    try:
        facts = read_json(state / STATE, "list of a checkpoint's files", Broken)
    except (Broken, OSError) as error:
        raise Broken(str(error).split(";")[0]) from None
    kinds = {"format": int, "step": int, "seconds": (int, float), "processes": int, "sharded": bool, "files": dict}
    if not isinstance(facts, dict) or any(not isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise Broken(f"{state / STATE} does not say what it should")
    if facts["format"] != FORMAT:
        raise Broken(f"{state} has the format {facts['format']} of another release")
    if f"state-{facts['step']}" != state.name or not 1 <= facts["processes"] <= 65536 or facts["step"] < 1:
        raise Broken(f"{state / STATE} is of another checkpoint")
    return facts


def _check_processes(state: Path, facts: Mapping[str, Any], trained: Trained) -> None:
    if facts["sharded"] != trained.sharded:
        how = "sharded (FSDP)" if facts["sharded"] else "without sharding"
        raise ValueError(f"{state} was trained {how}; go on the same way")
    if facts["processes"] == trained.processes:
        return
    if trained.sharded:
        raise ValueError(
            f"{state} was sharded over {facts['processes']} processes, not {trained.processes}; use as many"
        )
    if trained.rank == 0:
        sentence = "%s was written by %d processes and %d go on with it: they see other samples"
        logger.warning(sentence, state, facts["processes"], trained.processes)


def _describe(partial: Path, trained: Trained) -> None:
    files = _sums(partial, trained.files(trained.processes))
    progress = {"format": FORMAT, "step": trained.progress.step, "seconds": trained.progress.seconds}
    write_json(
        partial / STATE,
        progress | {"processes": trained.processes, "sharded": trained.sharded, "files": files},
    )


def _remove(state: Path) -> None:
    """Remove a checkpoint, which first loses its name: half of one is never taken for a whole one."""
    if not state.name.endswith(".partial"):
        gone = state.with_name(f"{state.name}.old.partial")
        if gone.exists():
            shutil.rmtree(gone)
        state = state.rename(gone)
    if state.is_dir() and not state.is_symlink():
        shutil.rmtree(state)
    else:
        state.unlink()


def _sums(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """[size, checksum] of files, several at once: a large network's have a hundred gigabytes together."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = pool.map(_checksum, [folder / name for name in names])
        return {name: [(folder / name).stat().st_size, one] for name, one in zip(names, sums)}


def _checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            total = zlib.crc32(data, total)
    return total


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the second names of tensors that have two."""
    seen: dict[tuple, str] = {}
    for name, tensor in state.items():
        part = local(tensor)
        seen.setdefault((part.data_ptr(), part.shape, part.stride()) if part.numel() else (name,), name)
    return {name: state[name] for name in seen.values()}


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, one at a time."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise Broken(f"{path} cannot be read ({error}); put it back, or begin anew with another --output") from None


def _copy(path: Path, held: Mapping[str, Tensor], but: Set[str] = frozenset()) -> None:
    """Copy a file's tensors over those of the same names. but: names that a file may have and that are left."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if name not in but}
    except SafetensorError as error:
        raise Broken(f"{path} cannot be read ({error}); put it back, or begin anew with another --output") from None
    other = [name for name in {**held, **shapes} if name not in held or shapes.get(name) != tuple(held[name].shape)]
    if other:
        raise Broken(f"{path} is of another network ({other[0]} differs); begin anew with another --output")
    for name, tensor in _tensors(path):
        if name in held:
            held[name].copy_(tensor)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's tensors as "NUMBER.NAME", the number being the parameter's. Its settings are the training's."""
    return {
        f"{i}.{name}": torch.as_tensor(value)
        for i, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Iterator[tuple[str, Tensor]], path: Path) -> None:
    """Give an optimiser the tensors of `optimizer_state`. path: for messages."""
    parameters, state = _parameters(optimizer), {}
    for name, tensor in tensors:
        number, _, key = name.partition(".")
        parameter = parameters[int(number)] if number.isdecimal() and int(number) < len(parameters) else None
        if parameter is None or (tensor.ndim and tensor.shape != local(parameter).shape):
            raise Broken(f"{path} is of another network ({name} differs); begin anew with another --output")
        if tensor.shape == local(parameter).shape:
            # In the parameter's own order of memory, in which the steps of an unbroken training compute.
            tensor = sharded_as(torch.empty_like(local(parameter), dtype=tensor.dtype).copy_(tensor), parameter)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state() -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's global generators, and of this process's GPU."""
    _, words, following = random.getstate()
    _, keys, place, has_gauss, gauss = np.random.get_state()
    state = {
        "python": torch.tensor(words),
        "python_next": torch.tensor([] if following is None else [following], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss]),
        "numpy_next": torch.tensor([gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Go on from the states of `random_state`."""
    random.setstate((3, tuple(state["python"].tolist()), next(iter(state["python_next"].tolist()), None)))
    *keys, place, has_gauss = state["numpy"].tolist()
    gauss = float(state["numpy_next"][0])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
