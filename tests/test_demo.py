"""The demo model and the commands that use it: `varedit demo`, and `varedit edit` without a model."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from varedit_core import demo
from varedit_core.cli import demo as showcase
from varedit_core.cli.app import app, main
from varedit_core.demo import SAMPLES, demo_files
from varedit_core.files.info import inspect
from varedit_core.files.lora import check_lora
from varedit_core.pictures.contact_sheet import Row, contact_sheet

MB = 1e6
GRIDS = 7
EDITS = {"scene.png": showcase.EDITS["scene.png"][:1], "cat.jpg": showcase.EDITS["cat.jpg"][-1:]}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The report of `varedit demo`, with the first edit of the scene and the last one of the photograph."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "EDITS", EDITS)
        done = CliRunner().invoke(app, ["demo", "--output", str(folder), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)


def chroma(path) -> float:
    """Mean distance of the largest from the smallest channel, in levels."""
    return float(np.ptp(pixels(path), axis=2).mean())


def test_files_are_small_and_whole():
    sizes = {path: path.stat().st_size for path in demo.FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 24 * MB and max(sizes.values()) <= 16 * MB
    transformer, tokenizer, text = demo_files()
    assert "not whole" not in inspect(transformer)["is"] and "VAREdit transformer" in inspect(transformer)["is"]
    assert "not whole" not in inspect(tokenizer)["is"] and "VAREdit VAE" in inspect(tokenizer)["is"]
    refiner = demo.FOLDER / "diffusion_models" / "varedit_demo_refiner.safetensors"
    assert "not whole" not in inspect(refiner)["is"] and "VAREdit transformer" in inspect(refiner)["is"]
    check_lora(transformer, demo.FOLDER / "loras" / "varedit_demo_duotone.safetensors")
    assert (text / "config.json").is_file() and (text / "tokenizer.json").is_file()


def test_the_edits_to_show():
    assert all((SAMPLES / name).is_file() and len(set(words)) == 3 for name, words in showcase.EDITS.items())


def test_demo_writes_what_it_says(shown):
    folder, report = shown
    assert [(edit["source"], edit["instruction"]) for edit in report["edits"]] == [
        (str(SAMPLES / name), words) for name, instructions in EDITS.items() for words in instructions
    ]
    written = {report["contact_sheet"], *(edit["output"] for edit in report["edits"])}
    assert {str(path) for path in folder.iterdir()} == written and len(written) == 3
    for edit in report["edits"]:
        assert Image.open(edit["output"]).size == Image.open(edit["source"]).size
        assert np.abs(pixels(edit["output"]) - pixels(edit["source"])).mean() > 1
    assert report["edit_seconds"] > 0 and report["load_seconds"] > 0


def test_contact_sheet_of_the_demo_has_every_scale(shown):
    _, report = shown
    sheet = Image.open(report["contact_sheet"])
    assert sheet.width == contact_sheet([Row("", [sheet] * (GRIDS + 2))], [""] * (GRIDS + 2)).width


def test_black_and_white_takes_the_colour(shown):
    edit = shown[1]["edits"][-1]
    assert edit["instruction"] == "make the image black and white"
    assert chroma(edit["output"]) < 0.25 * chroma(edit["source"])


def test_demo_does_not_overwrite(shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["varedit", "demo", "--output", str(shown[0])])
    with pytest.raises(SystemExit):
        main()
    assert "exists; choose another name or allow overwriting" in " ".join(capsys.readouterr().err.split())


def test_edit_without_a_model_uses_the_demo_model(tmp_path):
    arguments = ["edit", str(SAMPLES / "cat.jpg"), "make it sepia", "--device", "cpu", "--json"]
    files = ["--output", str(tmp_path / "cat.png"), "--contact-sheet", str(tmp_path / "sheet.png")]
    done = CliRunner().invoke(app, [*arguments, *files])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["pixels"] == [256, 256] and report["guidance"] == demo.GUIDANCE
    assert Image.open(tmp_path / "cat.png").size == (451, 300)
    assert "contact_sheet" in report and Image.open(tmp_path / "sheet.png").width > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "{cat}", "make it sepia"], "the demo model is not here"),
        (["demo", "--output", "{tmp}"], "the demo model is not here"),
        (["edit", "{cat}", "make it sepia", "--vae", "v.pth"], "name it with --model"),
    ],
)
def test_without_the_demo_folder(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "nowhere")
    texts = [a.replace("{cat}", str(SAMPLES / "cat.jpg")).replace("{tmp}", str(tmp_path)) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["varedit", *texts])
    with pytest.raises(SystemExit) as stop:
        main()
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 1 and error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cat.jpg", "edited.png"])
def test_a_contact_sheet_replaces_no_picture(tmp_path, monkeypatch, capsys, name):
    Image.open(SAMPLES / "cat.jpg").save(tmp_path / "cat.jpg")
    before = (tmp_path / "cat.jpg").read_bytes()
    files = ["--output", str(tmp_path / "edited.png"), "--contact-sheet", str(tmp_path / name), "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["varedit", "edit", str(tmp_path / "cat.jpg"), "make it sepia", *files])
    with pytest.raises(SystemExit):
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert "would replace" in said or "would be both a" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"] and (tmp_path / "cat.jpg").read_bytes() == before


def test_the_notice_is_one_line_on_standard_error(tmp_path, monkeypatch, capsys):
    """Shown before the work, which is left out here."""
    from varedit_core.editor import Editor

    def refuse(*_, **__):
        raise ValueError("stopped")

    monkeypatch.setattr(Editor, "load", refuse)
    monkeypatch.setattr(
        sys, "argv", ["varedit", "edit", str(SAMPLES / "cat.jpg"), "x", "--output", str(tmp_path / "a.png")]
    )
    with pytest.raises(SystemExit):
        main()
    out, error = capsys.readouterr()
    assert out == "" and error.splitlines() == [demo.NOTICE, "error: stopped"]


def test_contact_sheet_places_its_cells():
    colours = ["red", "green", "blue"]
    rows = [
        Row("wide", [Image.new("RGB", (200, 100), c) for c in colours]),
        Row("a very long label " * 20, [Image.new("RGBA", (50, 100), c) for c in colours]),
        Row("clear", [Image.new("RGBA", (64, 64), (0, 0, 0, 0))] * 3),
    ]
    sheet = contact_sheet(rows, ["one", "two", "three"], cell=64)
    assert sheet.mode == "RGB" and sheet.width == 6 + 3 * 70
    found = {colour: 0 for colour in colours}
    for count, value in sheet.getcolors(1 << 20):
        for colour in colours:
            if Image.new("RGB", (1, 1), colour).getpixel((0, 0)) == value:
                found[colour] = count
    assert all(count == 64 * 32 + 32 * 64 for count in found.values())


@pytest.mark.parametrize(("rows", "columns"), [([], ["a"]), ([Row("x", [])], []), ([Row("x", [])], ["a"])])
def test_contact_sheet_refuses_what_does_not_fit(rows, columns):
    with pytest.raises(ValueError, match="contact sheet needs|pictures for"):
        contact_sheet(rows, columns)


def test_a_size_the_model_was_not_made_for_names_one_that_it_was(tmp_path):
    edit = ["edit", str(SAMPLES / "scene.png"), "make it sepia", "--size", "512", "--output", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, [*edit, "--device", "cpu"])
    assert done.exit_code == 1 and "use one of at most 7, such as 256" in str(done.exception)
