"""Shared fixtures: recorded runs, small networks, and checkpoints in the published key style."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, and for all processes that tests start: threads of OpenMP otherwise spin while they wait,
# and two such processes on two cores slow each other down by several times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from comfyui import ComfyUI, NotFound
from support import GOLDEN

from benchmarks.real_size import published_shapes, random_tensor
from varedit_core.parity import Record

# Beside another worker each has one core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory) -> ComfyUI:
    try:
        return ComfyUI.find(tmp_path_factory.mktemp("stand_in"))
    except NotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def patchify() -> Record:
    return Record.open(GOLDEN / "patchify_256.safetensors")


@pytest.fixture(scope="session")
def plain() -> Record:
    return Record.open(GOLDEN / "plain_256.safetensors")


@pytest.fixture(scope="session")
def published_state() -> dict[str, torch.Tensor]:
    """A small transformer of random weights in the published key style: 8 chunks, biases as loose parameters."""
    torch.manual_seed(3)
    shapes = published_shapes(depth=8, width=128, heads=2, token_bits=56, text=256)
    return {key: random_tensor(key, shape, "cpu") for key, shape in shapes.items()}


@pytest.fixture(scope="session")
def published_file(published_state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "8B-512.pth"
    torch.save(published_state, path)
    return path


SLOW = (
    "test_server", "test_in_comfyui", "test_benchmarks", "test_training", "test_workflows", "test_browser", "test_cli",
    "test_comfyui", "test_lora", "test_parity", "test_demo", "test_core_nodes",
)  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    """Files that take long first, so that of two processes neither is left with one at the end."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))
