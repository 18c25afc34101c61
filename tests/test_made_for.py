"""What weights were made for: edits follow it by themselves, and another size is told."""

import logging

import pytest

from varedit_core import Editor, SamplingSettings
from varedit_core.cli.common import Canvas, Draw
from varedit_core.demo import GUIDANCE, SAMPLES, demo_files
from varedit_core.made_for import MadeFor
from varedit_core.tokenizer.schedule import schedule_for

NAMES = {
    "8B-1024.pth": "1M",
    "8B-512.pth": "0.25M",
    "2b_512_mine.safetensors": "0.25M",
    "8B-1024-bf16.safetensors": "1M",
    "varedit_demo.safetensors": "0.06M",
    "varedit_demo_refiner.safetensors": "0.06M",
    "model.safetensors": "0.25M",
    "v10240.safetensors": "0.25M",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_size_follows_the_name(tmp_path, name):
    made_for = MadeFor.of(tmp_path / "1024" / name)
    assert made_for.size == NAMES[name] == Canvas().area(tmp_path / "1024" / name)
    for size in ("256", "512", "768", "1024"):
        said = made_for.doubt(schedule_for(size))
        assert (said is None) == (made_for.side in ("", size))
        assert said is None or (name in said and said.endswith(f"choose {made_for.side}"))


def test_the_guidance_follows_the_demo_model():
    for path in (None, demo_files()[0], demo_files()[0].with_name("varedit_demo_refiner.safetensors")):
        assert Draw().settings(path).guidance == GUIDANCE == MadeFor.of(path).settings.guidance
        assert "guidance of 2" in MadeFor.of(path).doubt_default(SamplingSettings())
        assert MadeFor.of(path).doubt_default(SamplingSettings(2.5)) is None
    assert MadeFor.of("8B-512.pth").settings == SamplingSettings()
    assert MadeFor.of("8B-512.pth").doubt_default(SamplingSettings()) is None


def test_an_editor_edits_as_its_weights_were_made_for(caplog):
    editor, words = Editor.load(*demo_files()), "make it sepia"
    alone = editor.run(SAMPLES / "cat.jpg", words)
    told = editor.run(SAMPLES / "cat.jpg", words, size=256, settings=SamplingSettings(GUIDANCE))
    assert alone.tokens.schedule == schedule_for("256")
    assert alone.pictures[0].tobytes() == told.pictures[0].tobytes()
    assert not caplog.records


def test_another_size_is_told_once(caplog):
    editor = Editor.load(*demo_files())
    editor.made_for = MadeFor.of("8B-1024.pth")
    for _ in range(2):
        editor.run(SAMPLES / "cat.jpg", "make it sepia", size=256)
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert said.message.startswith("8B-1024.pth is made for 1024 pixels")
