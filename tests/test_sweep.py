"""Sweeps: their plan, their pictures, and the command."""

import json

import numpy as np
import pytest
import typer
from PIL import Image
from support import ROOT
from typer.testing import CliRunner

from varedit_core import Editor
from varedit_core.cli.common import Files
from varedit_core.cli.sweep import sweep as command
from varedit_core.controls.registry import NEUTRAL, SWEPT, Controls
from varedit_core.demo import GUIDANCE, SIZE, demo_files
from varedit_core.pictures.contact_sheet import Row, contact_sheet
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.sweep import MOST, Axis, Swept, grid, planned, sweep

CAT, WORDS = ROOT / "samples" / "cat.jpg", "make it sepia"


@pytest.fixture(scope="module")
def editor():
    return Editor.load(*demo_files(), device="cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    Image.open(CAT).resize((120, 90)).save(path)
    return path


def test_values_have_the_kind_of_their_setting():
    assert Axis.parse("guidance=1, 2,2.5") == Axis("guidance", (1.0, 2.0, 2.5))
    assert Axis.parse("best_of=1,4").values == (1, 4) and Axis.parse("seed=3").values == (3,)
    assert Axis.parse("preset=faithful,creative").labels == ["preset faithful", "preset creative"]
    twice = Axis.read("strength", "1,0.5,1.0")
    assert twice.labels == ["strength 1", "strength 0.5"], "each value once"
    assert twice.doubt == "given more than once, and edited once: strength 1" and Axis.parse("seed=1,2").doubt is None
    assert Axis.read("seed", "1,2,").doubt is None, "a comma at the end is none too many"
    assert "have an empty place" in Axis.read("seed", "1,,2").doubt and Axis.read("seed", "1,,2").values == (1, 2)
    assert Axis.parse("strength=0.5000001,0.5").labels == ["strength 0.5000001", "strength 0.5"]


@pytest.mark.parametrize("name, values", [("foo", (1,)), ("strength", ()), ("seed", [])])
def test_an_axis_of_nothing_is_one_sentence(name, values):
    with pytest.raises(ValueError, match="there is no setting 'foo' to sweep|has no values to sweep"):
        Axis(name, values)
    with pytest.raises(ValueError, match="the values of strength are text with commas between them, got list"):
        Axis.read("strength", [0.5])


@pytest.mark.parametrize("cells", [[], [[]]])
def test_a_sweep_of_no_cells_is_one_sentence(editor, picture, cells):
    with pytest.raises(ValueError, match="there is no edit to sweep"):
        sweep(editor, Swept(picture, WORDS), cells)
    assert set(SWEPT) == {*vars(SamplingSettings()), *vars(NEUTRAL), "preset"}
    for name in SWEPT:
        value = vars(SamplingSettings()) | vars(NEUTRAL) | {"preset": "balanced"}
        assert planned(Axis.read(name, str(value[name])))[0][0].controls == NEUTRAL, "every setting can be swept"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ("guidance", None, r"a sweep takes NAME=VALUE,VALUE,\.\.\., got 'guidance'; such as guidance=1,2,3"),
        ("steps=3", None, r"there is no setting 'steps' to sweep; choose one of guidance, .*, preset"),
        ("guidance=1,high", None, r"guidance takes numbers with commas between them, got '1,high'"),
        ("best_of=1.5", None, r"best_of takes whole numbers with commas between them, got '1\.5'"),
        ("guidance= ,", None, r"guidance has no values to sweep; give some with commas between them"),
        ("strength=0,2", None, r"strength must be a number from 0 to 1, got 2\.0"),
        ("score=best", None, r"unknown score 'best'; choose one of .*"),
        ("preset=wild", None, r"unknown preset 'wild'; choose one of .*"),
        ("seed=1", "seed=2", r"both axes are seed; choose another setting for one of them"),
        (
            f"seed={','.join(map(str, range(51)))}",
            "strength=0,1",
            rf"the sweep has 102 edits; give fewer values, for at most {MOST}",
        ),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_one_sentence(x, y, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        planned(Axis.parse(x), Axis.parse(y) if y else None)


def test_the_plan_has_all_other_settings_as_given():
    cells = planned(
        Axis.parse("guidance=1,4"), Axis.parse("strength=1,0.5"), SamplingSettings(seed=7), Controls(preserve=0.2)
    )
    assert [[(c.column, c.row) for c in row] for row in cells] == [
        [("guidance 1", "strength 1"), ("guidance 4", "strength 1")],
        [("guidance 1", "strength 0.5"), ("guidance 4", "strength 0.5")],
    ]
    assert cells[1][1].settings == SamplingSettings(4.0, seed=7) and cells[1][1].controls == Controls(0.5, 0.2)
    ((bent,),) = planned(Axis.parse("guidance=5"), Axis.parse("preset=faithful"))
    assert bent.settings == SamplingSettings(5.0).preset("faithful"), "a preset bends what the other axis sets"


def test_a_cell_is_the_edit_with_its_settings_and_the_picture_is_encoded_once(editor, picture, monkeypatch):
    cells = planned(Axis.parse("guidance=1,2"), Axis.parse("strength=0.5,1"), SamplingSettings(seed=3))
    expected = [
        [editor.run(picture, WORDS, size=SIZE, settings=c.settings, controls=c.controls).pictures[0] for c in row]
        for row in cells
    ]
    encoded, encode, seen = [], editor.encode_source, []
    monkeypatch.setattr(editor, "encode_source", lambda images: encoded.append(len(images)) or encode(images))
    made = sweep(editor, Swept(picture, WORDS, size=SIZE), cells, lambda cell, result: seen.append((cell, result)))
    assert encoded == [1]
    assert [cell for cell, _ in seen] == [c for row in cells for c in row]
    assert [result.tobytes() for _, result in seen] == [p.tobytes() for row in made for p in row]
    assert [[p.tobytes() for p in row] for row in made] == [[p.tobytes() for p in row] for row in expected]
    assert len({p.tobytes() for row in made for p in row}) == 4
    sheet = grid(cells, made, cell=64)
    assert sheet.width == 6 + 2 * 70 and sheet.height == 6 + 22 + 2 * (22 + 48 + 6)


def test_a_cell_may_have_a_knob_that_does_nothing_there(editor, picture):
    """A value that counts in no cell is refused."""
    x, y = Axis.parse("best_of=1,3"), Axis.parse("score=far,near")
    (plain, far), (same, near) = sweep(
        editor, Swept(picture, WORDS, size=SIZE), planned(x, y, SamplingSettings(temperature=2.0))
    )
    assert plain.tobytes() == same.tobytes() and far.tobytes() != near.tobytes()
    with pytest.raises(ValueError, match="score counts only with best_of"):
        sweep(editor, Swept(picture, WORDS, size=SIZE), planned(y))


def test_cells_that_cannot_run_are_found_before_any_does(editor, picture):
    seen = []
    x, y = Axis.parse("best_of=2,3"), Axis.parse("score=likelihood,instruction")
    cells = planned(x, y, SamplingSettings(guidance=1.0, temperature=1.0))
    with pytest.raises(ValueError, match="use a guidance other than 1"):
        sweep(editor, Swept(picture, WORDS, size=SIZE), cells, lambda *found: seen.append(found))
    assert not seen


def test_a_mask_and_a_negative_prompt_count(editor, picture):
    cells = planned(Axis.parse("guidance=2"))
    mask = Image.new("L", (120, 90))
    mask.paste(255, (60, 0, 120, 90))
    ((plain,),) = sweep(editor, Swept(picture, WORDS, size=SIZE), cells)
    ((masked,),) = sweep(editor, Swept(picture, WORDS, size=SIZE, mask=mask), cells)
    ((other,),) = sweep(editor, Swept(picture, WORDS, "make it a negative", SIZE), cells)
    before, after = (np.asarray(p.convert("RGB"), dtype=int) for p in (Image.open(picture), masked))
    assert np.abs(after - before)[:, :59].max() == 0 < np.abs(after - before)[:, 62:].mean()
    assert other.tobytes() != plain.tobytes()


def test_labels_grow_with_the_cells():
    pictures = [Image.new("RGB", (8, 8), "white")]
    small, large = (contact_sheet([Row("row", pictures)], ["column"], 300, letters) for letters in (14, 28))
    assert large.height - small.height == 2 * 14
    ink = [(np.asarray(sheet.convert("L")) < 200).sum() for sheet in (small, large)]
    assert ink[1] > 2 * ink[0] > 0


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_writes_a_grid_and_its_cells(run, editor, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(Files, "load", lambda *args: editor)
    arguments = [
        picture,
        WORDS,
        "--x",
        "guidance=1,2",
        "--y",
        "strength=1",
        "--cell",
        64,
        "--folder",
        tmp_path / "cells",
    ]
    done = run(*arguments, "-o", tmp_path / "grid.png", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert [(c["x"], c["y"]) for c in report["cells"]] == [("guidance 1", "strength 1"), ("guidance 2", "strength 1")]
    assert sorted(p.name for p in (tmp_path / "cells").iterdir()) == [
        "cat-guidance-1_strength-1.png", "cat-guidance-2_strength-1.png",
    ]  # fmt: skip
    expected = editor.edit(picture, WORDS, size=SIZE, settings=SamplingSettings(GUIDANCE))[0]
    assert Image.open(report["cells"][1]["output"]).tobytes() == expected.tobytes(), "the demo model's own settings"
    assert Image.open(report["output"]).size == (6 + 2 * 70, 6 + 22 + 22 + 48 + 6)
    again = run(*arguments, "-o", tmp_path / "other.png")
    assert isinstance(again.exception, FileExistsError), "said before an edit"
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--x", "guidance=a"], "guidance takes numbers"),
        (["--x", "guidance=1", "--vae", "x.safetensors"], "belong to a model of yours"),
        (["--x", "guidance=1", "--model", "x.safetensors"], "an instruction needs --text-encoder"),
        (["--x", "guidance=1", "-o", "PICTURE"], "which is read"),
    ],
)
def test_the_command_refuses_before_it_loads(run, picture, monkeypatch, arguments, message):
    monkeypatch.setattr(Files, "load", lambda *args: pytest.fail("loaded"))
    done = run(picture, WORDS, *(picture if a == "PICTURE" else a for a in arguments))
    assert isinstance(done.exception, ValueError) and message in str(done.exception)
