"""What the command line is given and cannot do: said in one sentence before anything is loaded, and nothing is left."""

import json
import sys

import pytest
import torch
import typer
from PIL import Image, ImageDraw
from support import ROOT
from typer.testing import CliRunner

from varedit_core import Controls, __version__
from varedit_core.cli import common, edit
from varedit_core.cli.app import app, main
from varedit_core.cli.common import region_of
from varedit_core.demo import demo_files
from varedit_core.editor import Editor
from varedit_core.files.tokens import save_tokens

WORDS = "make the background cyan"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures and masks, in the current folder."""
    monkeypatch.chdir(tmp_path)
    scene = Image.open(ROOT / "samples" / "scene.png").convert("RGB").resize((96, 64))
    scene.save("a.png")
    scene.save("b.png")
    mask = Image.new("L", (96, 64))
    ImageDraw.Draw(mask).rectangle((0, 0, 47, 63), 255)
    mask.save("mask.png")
    mask.save("mask@2x.png")
    mask.resize((64, 96)).save("turned.png")
    Image.new("L", (96, 64)).save("black.png")
    erased = scene.copy()
    erased.putalpha(mask)
    erased.save("erased.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.save("lying.jpg", exif=exif)
    (tmp_path / "file").touch()
    (tmp_path / "file.safetensors").touch()
    return tmp_path


@pytest.fixture
def said(monkeypatch, capsys, folder):
    """What a command says, which must fail before anything is loaded and leave no file behind."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["varedit", *map(str, arguments)])
        monkeypatch.setattr(Editor, "load", lambda *_, **__: pytest.fail("it was loaded"))
        before = sorted(path.name for path in folder.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main()
        error = capsys.readouterr().err
        assert stop.value.code in (1, 2) and "Traceback" not in error
        assert stop.value.code == 2 or error.count("\n") == 1
        assert sorted(path.name for path in folder.rglob("*")) == before
        return " ".join(error.replace("│", " ").split())

    return run


REFUSED = {
    "two pictures": (["edit", "a.png", "b.png"], "the instruction 'b.png' is the name of a file; give one picture"),
    "two pictures, swept": (["sweep", "a.png", "b.png", "--x", "seed=1,2"], "'b.png' is the name of a file"),
    "pictures by a glob": (["edit", "a.png", "b.png", WORDS], "a.png, b.png: one picture at a time; for all of a"),
    "pictures by a glob, swept": (["sweep", "a.png", "b.png", WORDS, "--x", "seed=1,2"], "for each in *.png; do"),
    "no command": (["a.png", WORDS], "'a.png' is no command; to edit a picture write: varedit edit PICTURE"),
    "features without a key": (["edit", "a.png", "--features", "file"], "--features takes FILE:KEY"),
    "a curve of three": (["edit", "a.png", WORDS, "--guidance", "3:1:2"], "--guidance '3:1:2' is neither a number"),
    "a sweep of nothing": (["sweep", "a.png", WORDS, "--x", "strength=,"], "strength has no values to sweep"),
    "nothing to strip": (["sweep", "a.png", WORDS, "--x", "guidance=1,2", "--strip"], "a grid carries nothing"),
    "no picture's name": (["edit", "", WORDS], "image is empty; name one"),
    "no file's name": (["info", ""], "file is empty; name one"),
    "no clone": (
        ["bench", "--models", "tiny", "--sizes", "256", "--device", "cpu", "--published", "."], "name a clone of",
    ),
    "too many words": (["edit", "a.png", "make", "it", "blue"], "unexpected extra argument"),
    "a result without a name": (["edit", "a.png", WORDS, "-o", ""], "-o is empty; give it a value, or leave it out"),
    "features as a result": (
        ["edit", "a.png", "--features", "file.safetensors:x", "--save-tokens", "file.safetensors", "--overwrite"],
        "would replace file.safetensors, which is read",
    ),
    "a blank": (["edit", "a.png", "  "], "the instruction is empty"),
    "a blank, swept": (["sweep", "a.png", " ", "--x", "seed=1,2"], "the instruction is empty"),
    "a folder": (["edit", ".", WORDS], "is a folder; name the image in it"),
    "a missing picture": (["edit", "c.png", WORDS], "there is no image at c.png"),
    "an empty mask": (["edit", "a.png", WORDS, "--mask", "black.png"], "the mask is empty"),
    "a turned mask": (["edit", "a.png", WORDS, "--mask", "turned.png"], "the mask is 64x96 but the picture is 96x64"),
    "a turned picture": (["edit", "lying.jpg", WORDS, "--mask", "mask.png"], "the picture is 64x96 (upright)"),
    "a turned region": (["edit", "a.png", "--region", f"{WORDS}@turned.png"], "the mask of region 1 is 64x96"),
    "a turned mask to sweep": (
        ["sweep", "a.png", WORDS, "--x", "seed=1,2", "--temperature", "1", "--mask", "turned.png"], "the mask is 64x96",
    ),
    "an erased picture": (["edit", "a.png", WORDS, "--mask", "erased.png"], "give it with --protect"),
    "a size": (["edit", "a.png", WORDS, "--size", "1024"], "the model was made for"),
    "a size to sweep": (["sweep", "a.png", WORDS, "--x", "guidance=1,2", "--size", "1024"], "the model was made for"),
    "a region's file": (["edit", "a.png", "--region", f"{WORDS}@user@host/mask.png"], "write INSTRUCTION@MASK"),
    "too many": (["edit", "a.png", WORDS, "--variations", "1000000000"], "4096"),
    "a seam": (["edit", "a.png", WORDS, "--mask", "mask.png", "--seam", "100000"], "4096"),
    "a guidance": (["edit", "a.png", WORDS, "--guidance", "1e38"], "guidance must be from -1000 to 1000"),
    "no fill": (["edit", "a.png", WORDS, "--fill", "white"], "--fill is for the new part"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_said_before_anything_is_loaded(said, case):
    arguments, sentence = REFUSED[case]
    assert sentence in said(*arguments)


SAME = {
    "a sheet and a map": ["edit", "a.png", WORDS, "-o", "c.png", "--maps", "m", "--contact-sheet", "m/c-changed.png"],
    "a sheet and the result": ["edit", "a.png", WORDS, "-o", "c.png", "--contact-sheet", "./c.png"],
    "a preview and the result": ["edit", "a.png", WORDS, "-o", "i.png", "--preview-dir", ".", "--contact-sheet",
                                 "i-scale-03-4x4.png"],
    "a grid and an edit": ["sweep", "a.png", WORDS, "--x", "guidance=1,2", "--folder", "s", "-o", "s/a-guidance-1.png"],
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_results_of_one_name_are_a_sentence(said, case):
    assert "would be both a" in said(*SAME[case], "--overwrite")


@pytest.mark.parametrize("option", ["-o", "--contact-sheet"])
@pytest.mark.parametrize("read", ["a.png", "mask.png"])
def test_what_is_read_is_not_replaced(said, option, read):
    assert "would replace" in said("edit", "a.png", WORDS, "--mask", "mask.png", option, read, "--overwrite")


READ = {
    "a LoRA": (["edit", "a.png", WORDS, "--lora", "l.safetensors:0.5"], "--save-tokens", "l.safetensors"),
    "a region's mask": (["edit", "a.png", "--region", f"{WORDS}@mask@2x.png"], "-o", "mask@2x.png"),
    "tokens that are decoded": (["decode", "edit.safetensors"], "-o", "edit.safetensors"),
    "the picture of decoded tokens": (["decode", "edit.safetensors", "--image", "a.png"], "-o", "a.png"),
}


@pytest.mark.parametrize("case", READ)
def test_all_that_is_read_is_not_replaced(said, folder, case):
    command, option, name = READ[case]
    (folder / "l.safetensors").touch()
    editor = Editor.load(*demo_files())
    save_tokens(editor.run("a.png", WORDS, controls=Controls(auto_mask=0.5)).tokens, folder / "edit.safetensors")
    before = (folder / name).read_bytes()
    found = said(*command, option, name, "--overwrite")
    assert "would replace" in found or "must be a picture" in found or "suffix" in found, found
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize("command", ["edit", "decode"])
def test_nothing_to_strip_is_a_sentence(said, folder, command):
    editor = Editor.load(*demo_files())
    save_tokens(editor.run("a.png", WORDS).tokens, folder / "edit.safetensors")
    asked = [command, "edit.safetensors", *([WORDS] if command == "edit" else []), "--strip", "-o", "x.png"]
    assert "--strip leaves out what a picture carries" in said(*asked)


@pytest.mark.parametrize("place", ["/proc/x.json", "a.png", "list.json"])
def test_results_of_bench_are_asked_for_before(said, folder, place, monkeypatch):
    monkeypatch.setattr("varedit_core.bench.cli.run", lambda *about: pytest.fail("it was measured"))
    (folder / "list.json").write_text("[1]")
    found = said("bench", "--models", "tiny", "--sizes", "256", "--device", "cpu", "--json", place)
    assert "cannot write" in found or "file of results" in found


def test_previews_do_not_replace_files(said, folder):
    source = (folder / "a.png").read_bytes()
    (folder / "i-scale-03-4x4.png").write_bytes(source)
    asked = ["edit", "i-scale-03-4x4.png", WORDS, "-o", "i.png", "--preview-dir", "."]
    assert "which is read" in said(*asked) and "which is read" in said(*asked, "--overwrite")
    assert "exists; choose another name" in said("edit", "a.png", WORDS, "-o", "i.png", "--preview-dir", ".")
    assert (folder / "i-scale-03-4x4.png").read_bytes() == source


PLACES = {"no folder of files": "/proc/out", "below a file": "file/out", "a long name": "x" * 300}
WRITTEN = {
    "edit": (
        ["edit", "a.png", WORDS], {"--output": ".png", "--save-tokens": ".safetensors", "--contact-sheet": ".png"},
    ),
    "edit, folders": (["edit", "a.png", WORDS], {"--maps": "", "--preview-dir": ""}),
    "sweep": (["sweep", "a.png", WORDS, "--x", "guidance=1,2"], {"--output": ".png", "--folder": ""}),
    "demo": (["demo"], {"--output": ""}),
}  # fmt: skip
OUTPUTS = [(name, option) for name, (_, options) in WRITTEN.items() for option in options]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "option"), OUTPUTS)
def test_a_place_that_cannot_be_written_is_said_before_anything_is_loaded(said, name, option, place):
    arguments, options = WRITTEN[name]
    found = said(*arguments, option, PLACES[place] + options[option])
    assert found.startswith(("error: cannot write", "error: cannot make the folder", f"error: '{PLACES[place]}"))
    assert PLACES[place].split("/out")[0] in found and ".tmp" not in found


def test_every_option_that_names_an_output_is_on_the_list():
    named = {option for _, options in WRITTEN.values() for option in options}
    for name, command in (("edit", edit.Outputs), ("sweep", sys.modules["varedit_core.cli.sweep"].Outputs)):
        for field in command.__dataclass_fields__.values():
            if "Path" in str(field.type) or field.name == "save_tokens":
                option = {"sheet": "--contact-sheet"}.get(field.name, common.spelled(field.name))
                assert option in named, f"{option} of {name}"


REGIONS = {
    f"{WORDS}@mask.png": (WORDS, True), f"{WORDS}@mask@2x.png": (WORDS, True), WORDS: (WORDS, False),
    "write me@home on the sign": ("write me@home on the sign", False),
    "say hi @ noon@mask.png": ("say hi @ noon", True),
    "mail me@example.com": ("mail me@example.com", False),
}  # fmt: skip


@pytest.mark.parametrize("text", REGIONS)
def test_the_longest_file_behind_an_at_is_the_mask(folder, text):
    region = region_of(text)
    assert (region.instruction, region.mask is not None) == REGIONS[text]


def ran(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["varedit", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, error = capsys.readouterr()
    return code or 0, out, error


def test_an_erased_part_is_edited_with_protect(monkeypatch, capsys, caplog, folder):
    """As other programs take such files; what is opaque stays."""
    asked = ["edit", "a.png", WORDS, "--protect", "erased.png", "-o", "c.png", "--json"]
    code, out, _ = ran(monkeypatch, capsys, *asked)
    assert code == 0 and json.loads(out)["output"] == "c.png" and "transparency counts" in caplog.text
    before, after = (Image.open(name).convert("RGB") for name in ("a.png", "c.png"))
    assert before.crop((0, 0, 47, 64)).tobytes() == after.crop((0, 0, 47, 64)).tobytes()
    assert before.tobytes() != after.tobytes()


def test_results_appear_all_or_none(monkeypatch, capsys, folder):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "t.safetensors")

    asked = ["edit", "a.png", WORDS, "-o", "c.png", "--variations", "2", "--temperature", "1", "--save-tokens"]
    asked += ["t.safetensors", "--maps", "maps", "--contact-sheet", "sheet.png"]
    save = edit.save_tokens
    monkeypatch.setattr(edit, "save_tokens", full)
    code, _, error = ran(monkeypatch, capsys, *asked)
    begun = ("c-", "t.", "sheet", ".")
    left = [path for path in folder.rglob("*") if path.name.startswith(begun) or path.parent.name == "maps"]
    assert code == 1 and "No space left" in error and not left
    monkeypatch.setattr(edit, "save_tokens", save)
    assert ran(monkeypatch, capsys, *asked)[0] == 0, "the same command again finds nothing in its way"
    assert {"c-1.png", "c-2.png", "t.safetensors", "sheet.png"} <= {path.name for path in folder.iterdir()}


def test_what_a_picture_carries_is_kept_and_stripped(monkeypatch, capsys, folder):
    exif = Image.Exif()
    exif[0x013B] = "A. Painter"
    Image.open("a.png").save("e.jpg", exif=exif, dpi=(300, 300), quality=95)
    assert ran(monkeypatch, capsys, "edit", "e.jpg", WORDS, "-o", "kept.jpg")[0] == 0
    assert ran(monkeypatch, capsys, "edit", "e.jpg", WORDS, "-o", "bare.jpg", "--strip")[0] == 0
    kept, bare = (Image.open(name) for name in ("kept.jpg", "bare.jpg"))
    assert kept.getexif()[0x013B] == "A. Painter" and kept.info["dpi"] == (300, 300)
    assert not bare.getexif() and kept.tobytes() == bare.tobytes()


@pytest.mark.parametrize("words", ["把背景变成青色", "сделай фон голубым", "🙂🙂🙂"])
def test_text_that_is_not_understood_is_told(monkeypatch, capsys, caplog, folder, words):
    for arguments in (["edit", "a.png", words, "-o", "c.png", "--overwrite"],
                      ["sweep", "a.png", words, "--x", "guidance=1,2", "-o", "d.png", "--overwrite"]):  # fmt: skip
        caplog.clear()
        assert ran(monkeypatch, capsys, *arguments)[0] == 0
        assert "unknown to the text encoder; write English" in caplog.text


def test_a_long_text_is_one_sentence(monkeypatch, capsys, folder):
    code, _, error = ran(monkeypatch, capsys, "edit", "a.png", "make the sky very blue " * 150, "-o", "c.png")
    assert code == 1 and " ".join(error.split()).count("tokens") == 1 and "but the model takes 64" in error


def test_a_console_that_cannot_print_a_name(folder):
    import subprocess

    (folder / "bild-\udce4.png").write_bytes((folder / "a.png").read_bytes())
    command = [sys.executable, "-m", "varedit_core", "edit", "bild-\udce4.png", WORDS, "--json"]
    more = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, cwd=folder, env=more)
    assert done.returncode == 0, done.stderr
    assert (folder / "bild-\udce4-edited.png").is_file() and json.loads(done.stdout)["size"] == [96, 64]


def test_an_empty_option_is_not_one_that_was_not_given(monkeypatch, capsys, folder):
    """As a shell gives it for a variable that is not set. The options are the commands' own."""
    tried = 0
    group = typer.main.get_command(app)
    nested = {("shapeedit", name): command for name, command in group.commands["shapeedit"].commands.items()}
    commands = {(name,): command for name, command in group.commands.items() if name != "shapeedit"} | nested
    for words, command in commands.items():
        for option in command.params:
            takes = option.opts[0][0] == "-" and not option.is_flag and option.default != ""
            for name in option.opts if takes else ():
                for given in ([name, ""], [f"{name}="]) if name[1] == "-" else ([name, ""],):
                    code, _, error = ran(monkeypatch, capsys, *words, *given)
                    assert code == 2 and f"{name} is empty; give it a value" in error, (words, given, error)
                    tried += 1
    assert tried > 150


def test_an_option_that_is_given_twice_is_told(monkeypatch, capsys, folder):
    asked = ["edit", "a.png", WORDS, "--guidance", "1", "--guidance=2", "-o", "c.png", "--json"]
    code, out, error = ran(monkeypatch, capsys, *asked)
    assert code == 0 and json.loads(out)["guidance"] == 2
    assert "--guidance is given 2 times; the last one counts" in error


def test_the_version(monkeypatch, capsys):
    assert ran(monkeypatch, capsys, "--version") == (0, f"varedit {__version__}\n", "")


def test_a_value_that_is_swept_twice_is_told(monkeypatch, capsys, folder):
    asked = ["sweep", "a.png", WORDS, "--x", "guidance=1,2,2", "-o", "g.png", "--json"]
    code, out, error = ran(monkeypatch, capsys, *asked)
    assert code == 0 and "given more than once, and edited once: guidance 2" in error
    assert [cell["x"] for cell in json.loads(out)["cells"]] == ["guidance 1", "guidance 2"]


def test_a_mask_that_the_model_cannot_see(monkeypatch, capsys, folder):
    mask = Image.new("L", (9600, 6400))
    mask.putpixel((4000, 4000), 1)
    mask.save("speck.png")
    code, _, error = ran(monkeypatch, capsys, "edit", "a.png", WORDS, "--mask", "speck.png")
    assert code == 1 and "the mask is too small to be seen at the model's size; paint more" in error


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_where_memory_runs_out_it_is_a_sentence(monkeypatch, capsys, error):
    def fail():
        raise error

    monkeypatch.setattr("varedit_core.cli.app.app", fail)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "not enough memory for this; choose a smaller picture" in capsys.readouterr().err
    monkeypatch.setattr("varedit_core.cli.app._of_memory", lambda error: False)
    with pytest.raises(type(error)):
        main()


def test_a_name_reaches_no_terminal_as_an_order(tmp_path):
    path = tmp_path / "e\x1b[31mred.png"
    Image.new("RGB", (32, 32)).save(path)
    said = CliRunner().invoke(app, ["edit", str(path), "make it sepia"], env={"COLUMNS": "300"})
    assert said.exit_code == 0 and "\x1b[31m" not in said.output and "e\\x1b[31mred" in said.output
