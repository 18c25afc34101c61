"""Text features kept in files: the same bits without a text encoder, and nothing taken that is not theirs."""

from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT
from test_images import one_sentence

from varedit_core import Editor, SamplingSettings
from varedit_core.cli.edit import _features
from varedit_core.demo import demo_files
from varedit_core.text import cache
from varedit_core.text.cache import CachedText, FeatureFolder, cached_text_encoder
from varedit_core.text.encoder import load_text_encoder

ENCODER = demo_files()[2]
WORDS = ["make it sepia", "remove the green diamond"]


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    return load_text_encoder(ENCODER).encode(WORDS)


@pytest.fixture
def filled(tmp_path):
    """A folder that has the features of the words."""
    cached_text_encoder(ENCODER, tmp_path).encode(WORDS)
    return tmp_path


@pytest.fixture
def forbidden(monkeypatch):
    monkeypatch.setattr(cache, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))


def same(a, b) -> bool:
    return all(x.dtype == y.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_kept_is_what_is_made(filled, plain, forbidden):
    text = cached_text_encoder(ENCODER, filled)
    assert same(text.encode(WORDS), plain) and text.networks == () and text.loaded is None
    with pytest.raises(ValueError, match="the instruction is empty"):
        text.encode([" "])
    for path in filled.iterdir():
        assert cache._NAME.fullmatch(path.name)
        assert not any(word.encode() in path.read_bytes() for words in WORDS for word in words.split() if len(word) > 3)
        with safe_open(path, "pt") as file:
            assert set(file.metadata()) == {"format", "key", "digest"}
        assert any(torch.equal(_features(f"{path}:features"), one) for one in plain), "--features takes it"


def test_an_editor_loads_its_text_encoder_for_new_texts_alone(tmp_path, monkeypatch):
    editor, loads = Editor.load(*demo_files(), device="cpu", text_cache=tmp_path), []
    load = cache.load_text_encoder
    monkeypatch.setattr(cache, "load_text_encoder", lambda *given: (loads.append(1), load(*given))[1])
    more = dict(size="256", settings=SamplingSettings(guidance=2))
    picture, asked = ROOT / "samples" / "scene.png", []
    editor.text.make_room = asked.append
    first = editor.edit(picture, WORDS[0], "blurry", **more)
    assert loads == [1] and len(editor.text.networks) == 1 and len(list(tmp_path.iterdir())) == 2
    assert list(editor.memory.others)[0] is editor.text.networks[0], "it makes way where memory is short"
    assert asked == [sum(weight.nbytes for weight in editor.text.networks[0].parameters())]
    editor.forget()
    assert editor.text.networks == () and isinstance(editor.text, CachedText)
    again = editor.edit(picture, WORDS[0], "blurry", **more)
    assert loads == [1] and editor.text.networks == (), "nothing new, nothing loaded"
    assert again[0].tobytes() == first[0].tobytes()


def copied(folder, change) -> str:
    """A copy of the encoder with other weights."""
    shutil.copytree(ENCODER, folder)
    (path,) = folder.rglob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    os.unlink(path)
    save_file(tensors, path)
    return str(folder)


def first(tensors) -> None:
    tensors[sorted(tensors)[0]].view(-1)[0] += 1


def last(tensors) -> None:
    tensors[sorted(tensors)[-1]].view(-1)[-1] += 1


def everywhere(tensors) -> None:
    for tensor in tensors.values():
        tensor += 1e-3 * tensor.abs().max()


@pytest.mark.parametrize("change", [first, last, everywhere])
def test_another_encoder_takes_nothing_of_this_one(filled, tmp_path_factory, change):
    other = copied(tmp_path_factory.mktemp("other") / "t5", change)
    text = cached_text_encoder(other, filled)
    assert same(text.encode(WORDS[:1]), load_text_encoder(other).encode(WORDS[:1])) and text.loaded


def test_the_way_to_compute_and_the_text_count():
    where, ids = torch.device("cpu"), [5, 6, 1]
    keys = {
        cache.key_of(cache.identity(weights, config, dtype, where), one)
        for weights in ("a", "b") for config in ("c", "d") for dtype in (torch.float32, torch.float16)
        for one in (ids, ids[:2])
    }  # fmt: skip
    assert len(keys) == 16


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "one bit": flipped,
    "empty": lambda data: b"",
    "something else": lambda data: b"\xff" * len(data),
    "infinite": lambda data: data[:-4] + b"\x00\x00\x80\x7f",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_told_and_made_anew(filled, plain, damage, caplog, monkeypatch):
    files = sorted(filled.iterdir())
    for path in files:
        path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert same(cached_text_encoder(ENCODER, filled).encode(WORDS), plain)
    assert sum("is damaged and is made anew" in line for line in caplog.messages) == 2
    monkeypatch.setattr(cache, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))
    assert same(cached_text_encoder(ENCODER, filled).encode(WORDS), plain)


def test_a_file_of_another_text_is_not_taken(filled, plain):
    a, b = sorted(filled.iterdir())
    shutil.copy(a, b)
    assert same(cached_text_encoder(ENCODER, filled).encode(WORDS), plain)


def test_the_longest_unused_go_and_other_files_stay(tmp_path):
    folder, keys = FeatureFolder(tmp_path, most=5000), [f"{n:064x}" for n in range(4)]
    (tmp_path / "notes.txt").write_text("mine" * 9000)
    for n, key in enumerate(keys[:3]):
        folder.put(key, torch.full((4, 100), float(n)))
        os.utime(tmp_path / f"{key}.safetensors", (n, n))
    assert {path.stem for path in tmp_path.iterdir()} == {"notes", keys[1], keys[2]}, "1.9 kB each"
    assert folder.get(keys[1]) is not None
    folder.put(keys[3], torch.zeros(4, 100))
    assert folder.get(keys[2]) is None and folder.get(keys[1])[0, 0] == 1, "what was used stays"
    assert (tmp_path / "notes.txt").exists()


def test_a_folder_that_takes_nothing_is_told_and_nothing_is_lost(tmp_path, plain, caplog):
    (tmp_path / "file").write_text("")
    text = cached_text_encoder(ENCODER, tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING):
        assert same(text.encode(WORDS), plain)
    assert sum("the text features cannot be kept: cannot make the folder" in line for line in caplog.messages) == 2
    with pytest.raises(ValueError, match="is a file; name a folder for text features") as error:
        cached_text_encoder(ENCODER, tmp_path / "file")
    assert one_sentence(error)
