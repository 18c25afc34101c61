"""Safetensors files as the package writes them, read by safetensors itself."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from varedit_core.files.tensor_files import write_in_turn, write_tensors
from varedit_core.files.weights import DTYPES, open_weights

TYPES = sorted(DTYPES)


def some(name: str, *shape: int) -> torch.Tensor:
    """Numbers of a type, from any bits."""
    dtype = DTYPES[name]
    if name == "BOOL":
        return torch.ones(*shape, dtype=dtype)
    count = torch.Size(shape).numel() * dtype.itemsize
    return (torch.arange(count) % 60).to(torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("first", TYPES)
def test_every_type_comes_back_behind_every_other(tmp_path, first):
    path, given = tmp_path / "a.safetensors", {first: some(first, 3)}
    given |= {name: some(name, 1, 5) for name in TYPES if name != first}
    given |= {"none": torch.empty(0, 3), "number": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).t()}
    given |= {"shared": given["turned"][1:], "learned": torch.nn.Parameter(torch.ones(2))}
    write_tensors(path, given, {"format": "pt", "é": "ß"})
    for read in (load_file(path), dict(open_weights(path))):
        assert read.keys() == given.keys()
        for key, value in given.items():
            assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape), key
            same = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (read[key], value))
            assert torch.equal(*same), key
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "é": "ß"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_tensors_in_turn_say_how_far_they_are(tmp_path):
    told, facts = [], {"b": (torch.float32, (2, 2)), "a": (torch.uint8, (3,))}
    tensors = iter([torch.ones(2, 2), torch.zeros(3, dtype=torch.uint8)])
    write_in_turn(tmp_path / "a.safetensors", facts, tensors, {}, on_tensor=lambda *at: told.append(at))
    assert told == [(16, 19), (19, 19)] and load_file(tmp_path / "a.safetensors")["b"].sum() == 4
