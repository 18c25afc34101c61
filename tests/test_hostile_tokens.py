"""Files of tokens from anywhere: refused in one sentence, or what they say is what they hold; memory stays bounded."""

from __future__ import annotations

import copy
import json
import os
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_tokens import SCENE, drawn, facts_of, held, same, sentence

from varedit_core.files.tokens import DIGEST, FORMAT, MAX_HEADER, _digest, _put, load_tokens
from varedit_core.sampling.tokens import Tokens
from varedit_core.tokenizer.schedule import Schedule

ROOM = 1 << 30
"""Bytes beyond what the process has when a test begins."""
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def bounded(room: int = ROOM):
    """No more memory than so much."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are Linux's")


def metadata(facts: object) -> dict[str, str]:
    return {"format": FORMAT, "tokens": json.dumps(facts)}


def signed(facts: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """What a liar who knows the format writes."""
    return {**facts, DIGEST: _digest(facts, {name: tensor.numpy() for name, tensor in tensors.items()})}


def tried(path) -> Tokens | None:
    """The tokens of a file, with their sum made; None where it is refused, which must be one sentence."""
    with bounded():
        try:
            tokens = load_tokens(path)
        except ValueError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 200 + 200 + len(str(path)) and "; " in text, text
            return None
        assert tokens.total().shape == (tokens.images, tokens.bits[0].shape[1], *tokens.grid)
    return tokens


# What a file says.

HONEST = {
    "held": held(),
    "three bits": replace(drawn(images=1, channels=3, patch=1), auto_mask=0.5),
    "draft": drawn(scales=3),
    "held of held": replace(held(), under=held(1)),
}
VALUES = st.one_of(
    st.sampled_from([0, 1, -1, 2, 7, 13, 14, 16, 32, 8000, 20_000, 100_000, 2**31, 2**63, 10**30, 10**400]),
    st.sampled_from([1.0, 0.5, 1.25, 0.8, 1e308, float("nan"), float("inf"), None, True, False, "7", "", "x" * 9000]),
    st.sampled_from([[], {}, [1], [32, 32], [16, 16], [2, 3, 2, 2], [[1]], [0] * 9000]),
    st.integers(),
    st.text(),
)


def honest(kind: str) -> tuple[dict, dict]:
    """Tensors and facts of a file."""
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _put(HONEST[kind], tensors, "")


@st.composite
def lies(draw, kind: str):
    """An honest file with a few changes."""
    tensors, facts = honest(kind)
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            _lie(draw, facts)
        else:
            _swap(draw, tensors)
    return tensors, facts


def _lie(draw, facts) -> None:
    inside, key = facts, draw(st.sampled_from(sorted(facts)))
    while isinstance(inside[key], (dict, list)) and inside[key] and draw(st.integers(0, 3)):
        inside = inside[key]
        key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
    if draw(st.integers(0, 4)) == 0:
        del inside[key]
    elif type(inside[key]) is int and draw(st.booleans()):
        inside[key] += draw(st.sampled_from([-1, 1, inside[key]]))
    else:
        inside[key] = copy.deepcopy(draw(VALUES))
    if not facts:
        facts["ratio"] = 1.0


def _swap(draw, tensors: dict) -> None:
    name, other = draw(st.sampled_from(sorted(tensors))), draw(st.sampled_from(sorted(tensors)))
    change = draw(st.sampled_from(["gone", "cut", "grown", "swapped", "turned", "another", "kind", "shape"]))
    made = {
        "gone": {}, "cut": {name: tensors[name][:-1]}, "grown": {name: torch.cat([tensors[name]] * 2)},
        "swapped": {name: tensors[other], other: tensors[name]}, "turned": {name: 255 - tensors[name]},
        "another": {name: tensors[name], name + "x": tensors[name]}, "kind": {name: tensors[name].to(torch.int16)},
        "shape": {name: tensors[name][None]},
    }[change]  # fmt: skip
    del tensors[name]
    tensors |= {key: tensor.clone() for key, tensor in made.items()}
    if not tensors:
        tensors["x"] = torch.zeros(1, dtype=torch.uint8)


@pytest.mark.parametrize("kind", HONEST)
def test_what_is_taken_holds_what_it_says(kind, tmp_path):
    """A changed file is refused, or writes the same facts and bits again: nothing in it was ignored or made up."""
    seen = {"taken": 0, "refused": 0}

    @FEW
    @given(lies(kind), st.booleans())
    def holds(changed, digest):
        tensors, facts = changed
        said = signed(facts, tensors) if digest and all(t.dtype == torch.uint8 for t in tensors.values()) else facts
        save_file(tensors, tmp_path / "a.safetensors", metadata(said))
        tokens = tried(tmp_path / "a.safetensors")
        seen["refused" if tokens is None else "taken"] += 1
        if tokens is None:
            return
        tokens.save(tmp_path / "b.safetensors", overwrite=True)
        again = facts_of(tmp_path / "b.safetensors")
        assert again == {"auto_mask": 0.0, **{key: value for key, value in facts.items() if key in again}}
        bits = load_file(tmp_path / "b.safetensors")
        assert bits.keys() == tensors.keys() and all(torch.equal(bits[name], tensors[name]) for name in bits)

    holds()
    assert seen["refused"] > 50, seen


def test_any_changed_byte_is_seen(tmp_path):
    """Or changes nothing: all bits and facts come back as they were."""
    HONEST["three bits"].save(tmp_path / "a.safetensors")
    honest = (tmp_path / "a.safetensors").read_bytes()
    refused = 0
    for place in range(8, len(honest)):
        changed = bytearray(honest)
        changed[place] ^= 1 << place % 8
        (tmp_path / "a.safetensors").write_bytes(changed)
        tokens = tried(tmp_path / "a.safetensors")
        refused += tokens is None
        assert tokens is None or same(tokens, HONEST["three bits"]), place
    assert refused > 0.9 * (len(honest) - 8)


def test_swapped_scales_of_an_edit_and_its_source_are_seen(tmp_path):
    held().save(tmp_path / "a.safetensors")
    tensors, whole = load_file(tmp_path / "a.safetensors"), facts_of(tmp_path / "a.safetensors")
    said = signed(whole, tensors)
    save_file(tensors, tmp_path / "a.safetensors", metadata(said))
    assert same(load_tokens(tmp_path / "a.safetensors"), held())
    tensors["scale.03"], tensors["under.scale.03"] = tensors["under.scale.03"], tensors["scale.03"]
    save_file(tensors, tmp_path / "a.safetensors", metadata(said))
    with pytest.raises(ValueError, match="it was damaged or changed after it was saved"):
        load_tokens(tmp_path / "a.safetensors")


CONTENTS = {
    "bits behind the last": (lambda t: t | {"scale.00": t["scale.00"] | 1}, "scale.00 goes on behind its 3 bits"),
    "one scale more": (lambda t: t | {"scale.07": t["scale.06"].clone()}, "it does not say what 'scale.07' in it is"),
    "a source without a mask": (
        lambda t: t | {"under.scale.00": t["scale.00"].clone()},
        "it does not say what 'under.scale.00' in it is of",
    ),
    "one scale less": (lambda t: {k: v for k, v in t.items() if k != "scale.06"}, "does not contain tensor scale.06"),
}


@pytest.mark.parametrize("lie", CONTENTS)
def test_bits_that_do_not_belong_are_one_sentence(lie, tmp_path):
    make, words = CONTENTS[lie]
    HONEST["three bits"].save(tmp_path / "a.safetensors")
    tensors, facts = make(load_file(tmp_path / "a.safetensors")), facts_of(tmp_path / "a.safetensors")
    for said in (facts, signed(facts, tensors)):
        save_file(tensors, tmp_path / "a.safetensors", metadata(said))
        with pytest.raises(ValueError, match=words):
            load_tokens(tmp_path / "a.safetensors")


# What a file is.


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def _long_header(path: Path) -> None:
    text = json.dumps({"__metadata__": metadata([[]] * 4_000_000)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def _nested(path: Path) -> None:
    save_file(
        {"scale.00": torch.zeros(1, dtype=torch.uint8)},
        path,
        {"format": FORMAT, "tokens": "{" + '"under":{' * 100_000 + "}" * 100_001},
    )


def _thousand_edits_of_one_scale(path: Path) -> None:
    """A file of some hundred bytes that asks for a sum of gigabytes."""
    facts: dict = {"ratio": 1.0, "scales": 13, "grid": [1024, 1024], "fitting": None, "auto_mask": 0.0}
    facts["shapes"] = [[60, 4, 16, 16]]
    save_file({"scale.00": torch.zeros(60 * 4 * 16 * 16 // 8, dtype=torch.uint8)}, path, metadata(facts))


NO_FILES = {
    "nothing": (lambda path: None, "there is no file of tokens at "),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a pipe": (os.mkfifo, "is a pipe, not a file of tokens"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file of tokens"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be the name of a file"),
    "empty": (lambda path: path.touch(), "is not a file of tokens ("),
    "seven bytes": (lambda path: path.write_bytes(b"1234567"), "is not a file of tokens ("),
    "zeros without end": (_sparse, "is not a file of tokens ("),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "is not a file of tokens ("),
    "a long header": (_long_header, f"where at most {MAX_HEADER} are read"),
    "nested deep": (_nested, "is not a file of tokens ("),
    "a sum of gigabytes": (
        _thousand_edits_of_one_scale,
        "its sum has 251658240 numbers where at most 67108864 are read",
    ),
    "weights": (lambda path: save_file({"a": torch.zeros(3)}, path), "it holds something else"),
}
COMMANDS = {
    "decode": lambda path: ("decode", path),
    "edit": lambda path: ("edit", path, "make it sepia"),
    "begun": lambda path: ("edit", SCENE, "make it sepia", "--begun", path),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_of_tokens_is_one_sentence_of_every_command(kind, command, tmp_path, monkeypatch, capsys):
    make, words = NO_FILES[kind]
    path = tmp_path / "t.safetensors"
    make(path)
    with bounded():
        said = sentence(monkeypatch, capsys, *COMMANDS[command](path))
    assert words in said and said.count(str(path)) >= 1 and "\n" not in said, said


def test_a_chain_of_edits_takes_the_memory_of_two(tmp_path):
    """Eight edits of edits, whose sums come to a gigabyte."""
    schedule = Schedule(1.0, held().schedule.grids[:1])
    chain = one = Tokens(schedule, (torch.zeros(500, 256, 16, 16, dtype=torch.bool),), (16, 16))
    for _ in range(7):
        chain = replace(one, free=torch.ones(1, 1, 16, 16, dtype=torch.bool), under=chain)
    chain.save(tmp_path / "a.safetensors")
    assert tried(tmp_path / "a.safetensors").under.images == 500


def test_the_limit_of_memory_is_one():
    with pytest.raises((RuntimeError, MemoryError)), bounded():
        torch.zeros(2 * ROOM, dtype=torch.uint8)
