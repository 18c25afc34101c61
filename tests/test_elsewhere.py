"""Networks that make way for a while: whatever fails, its error is raised and what was moved comes back.

There is no second memory here. A stand-in for `Tensor.to` makes copies and knows which of them lie in host memory.
"""

import logging
import weakref

import pytest
import torch
from torch import nn

from varedit_core.runtime import memory
from varedit_core.runtime.memory import Elsewhere

DEVICE = torch.device("meta")  # its name stands for a GPU's


class First(nn.Linear):
    pass


class Second(nn.Linear):
    pass


class Third(nn.Linear):
    pass


class Moves:
    """Copies between host and device. done: (network's number, "out" or "back"); refused: how often each fails."""

    def __init__(self) -> None:
        self.done, self.refused, self.host = [], {}, {}

    def copy(self, tensor, where, **kw):
        step = (len(tensor), "back" if torch.device(where) == DEVICE else "out")
        if tensor.ndim == 2:  # once a network
            self.done.append(step)
            if self.refused.get(step, 0):
                self.refused[step] -= 1
                raise torch.cuda.OutOfMemoryError(f"no room for {step}")
        copied = tensor.clone()
        if step[1] == "out":
            self.host[copied.data_ptr()] = copied
        return copied

    def places(self, networks):
        """Where each network's weights are."""
        return [{"host" if p.data_ptr() in self.host else "device" for p in n.parameters()} for n in networks]


@pytest.fixture
def moves(monkeypatch):
    moves = Moves()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, where, **kw: moves.copy(tensor, where, **kw))
    return moves


@pytest.fixture
def networks():
    return [kind(2, size) for size, kind in enumerate((First, Second, Third), start=1)]


BACK, AWAY = [{"device"}] * 3, [{"host"}] * 3


def test_networks_make_way_and_come_back(moves, networks):
    elsewhere = Elsewhere()
    for _ in range(2):
        with elsewhere(networks, DEVICE):
            assert moves.places(networks) == AWAY
        assert moves.places(networks) == BACK
    assert [way for _, way in moves.done].count("out") == 3, "copied to the host once"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_that_cannot_make_way(number, moves, networks):
    """Its error is raised, not one of bringing back what never went; those before it come back."""
    moves.refused[number, "out"] = 1
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room for") as raised:
        with Elsewhere()(networks, DEVICE):
            pytest.fail("not all have made way")
    assert moves.places(networks) == BACK and raised.value.__context__ is None


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_that_is_left_between_two_places(number, moves, networks, monkeypatch):
    """A move that breaks off in a network leaves none of it behind."""
    original, puts = Elsewhere._put, []

    def put(network, tensors):
        puts.append(network)
        if len(puts) == number:
            network.weight.data = tensors[0]
            raise ValueError("broken off")
        original(network, tensors)

    monkeypatch.setattr(Elsewhere, "_put", staticmethod(put))
    with pytest.raises(ValueError, match="broken off"), Elsewhere()(networks, DEVICE):
        pytest.fail("not all have made way")
    assert moves.places(networks) == BACK


@pytest.mark.parametrize("error", [ValueError("of the edit"), KeyboardInterrupt(), torch.cuda.OutOfMemoryError("edit")])
def test_an_error_within(error, moves, networks):
    with pytest.raises(type(error)) as raised, Elsewhere()(networks, DEVICE):
        raise error
    assert raised.value is error and moves.places(networks) == BACK


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("within", [None, ValueError("of the edit")])
def test_one_that_cannot_come_back(number, within, moves, networks, caplog):
    """The others do. It is named: in the log where another error is raised, else by the error."""
    elsewhere, name = Elsewhere(), type(networks[number - 1]).__name__
    moves.refused[number, "back"] = 2
    with pytest.raises(ValueError if within else torch.cuda.OutOfMemoryError) as raised:
        with elsewhere(networks, DEVICE):
            if within:
                raise within
    sentence = f"{name} could not come back from host memory"
    if within:
        assert raised.value is within
        assert [r.levelno for r in caplog.records] == [logging.ERROR] and sentence in caplog.text
    else:
        assert sentence in str(raised.value) and "no room for" in str(raised.value.__cause__) and not caplog.records
    assert moves.places(networks) == BACK[: number - 1] + AWAY[:1] + BACK[number:]
    with elsewhere(networks, DEVICE):  # there is room again
        assert moves.places(networks) == AWAY
    assert moves.places(networks) == BACK


def test_two_that_cannot_come_back_are_both_named(moves, networks):
    moves.refused |= {(1, "back"): 2, (3, "back"): 2}
    with pytest.raises(torch.cuda.OutOfMemoryError, match="First, Third could not"), Elsewhere()(networks, DEVICE):
        pass
    assert moves.places(networks) == AWAY[:1] + BACK[:1] + AWAY[:1]


def test_memory_of_a_failed_edit_is_given_back_before_a_second_try(moves, networks, monkeypatch):
    """What the edit held lives as long as its error does, which is still to be raised."""
    held = []
    original = memory.clear_frames
    monkeypatch.setattr(memory, "clear_frames", lambda traceback: (original(traceback), held.append(alive()))[0])

    def edit():
        nonlocal alive
        large = torch.zeros(3)
        alive = weakref.ref(large)
        raise ValueError("of the edit")

    alive = None
    moves.refused[2, "back"] = 1
    with pytest.raises(ValueError, match="of the edit"), Elsewhere()(networks, DEVICE):
        edit()
    assert held == [None] and moves.places(networks) == BACK


def test_forgetting_meanwhile_loses_nothing(moves, networks):
    elsewhere = Elsewhere()
    with elsewhere(networks, DEVICE):
        elsewhere.forget()
    assert moves.places(networks) == BACK


def test_numbers_come_back_as_they_were():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    before = [{name: x.clone() for name, x in network.state_dict().items()} for network in networks]
    elsewhere = Elsewhere()
    for _ in range(2):
        with elsewhere(networks, torch.device("cpu")):
            pass
    for network, wanted in zip(networks, before):
        assert all(torch.equal(x, wanted[name]) for name, x in network.state_dict().items())
