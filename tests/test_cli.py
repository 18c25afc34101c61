"""The command line, run as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support import GOLDEN, ROOT
from typer.testing import CliRunner

from varedit_core.cli.app import app, main
from varedit_core.cli.common import Draw
from varedit_core.defaults import FIT, SIZE
from varedit_core.demo import GUIDANCE as DEMO_GUIDANCE
from varedit_core.sampling.settings import SamplingSettings

RECORD = GOLDEN / "patchify_256.safetensors"
EDIT = [
    "edit",
    str(ROOT / "samples" / "cat.jpg"),
    "--model",
    str(RECORD),
    "--features",
    f"{RECORD}:in.text.0",
    "--size",
    "256",
    "--device",
    "cpu",
]


def command(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "varedit_core", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def failed(monkeypatch, capsys):
    """Standard error of a command that must fail with one sentence."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["varedit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and text.startswith("error: ")
        return " ".join(text.split())

    return run


def test_edit_with_previews_and_report(tmp_path):
    done = command(
        *EDIT,
        "--output",
        tmp_path / "out" / "cat.png",
        "--preview-dir",
        tmp_path / "scales",
        "--json",
        "--seed",
        7,
        "--guidance",
        "3,3,3,3,2,1,1",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["size"] == [451, 300] and report["pixels"] == [256, 256] and report["seed"] == 7
    assert report["guidance"] == [3, 3, 3, 3, 2, 1, 1] and len(report["scales"]) == 7
    assert Image.open(report["output"]).size == (451, 300)
    previews = sorted((tmp_path / "scales").iterdir())
    assert [p.name for p in previews][-1] == "cat-scale-07-16x16.png" and len(previews) == 7
    assert all(Image.open(p).size == (451, 300) for p in previews)
    assert Image.open(previews[-1]).tobytes() == Image.open(report["output"]).tobytes()


def test_nothing_is_overwritten(failed, tmp_path):
    target = tmp_path / "cat.png"
    target.write_bytes(b"precious")
    assert "exists; choose another name or allow overwriting" in failed(*EDIT, "--output", target)
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "nowhere.jpg", "x", "--model", RECORD, "--text-encoder", "t5"], "nowhere.jpg"),
        (["edit", *EDIT[1:2], "--model", RECORD], "say what to change"),
        (
            ["edit", *EDIT[1:2], "make it red", "--model", RECORD],
            "an instruction or a negative prompt needs --text-encoder",
        ),
        ([*EDIT, "--negative", "x"], "an instruction or a negative prompt needs --text-encoder"),
        ([*EDIT[:2], "make it red", *EDIT[2:]], "an instruction or --features, not both"),
        ([*EDIT[:4], "--features", RECORD], "--features takes FILE:KEY"),
        (["edit", "nofile[/b].png", *EDIT[2:]], "nofile[/b].png"),
        (
            [*EDIT[:5], f"{RECORD}:in.image_u8", "--size", "256", "--device", "cpu", "--output", "{tmp}/a.png"],
            "reads [tokens, 256]",
        ),
        ([*EDIT[:-1], "banana", "--output", "{tmp}/a.png"], "the device banana cannot be used here"),
        ([*EDIT, "--output", "{tmp}/a.gif"], "its suffix must be one of .png"),
        ([*EDIT, "--output", "{tmp}", "--overwrite"], "its suffix must be"),
        (
            ["edit", *EDIT[1:2], "--model", RECORD, "--features", f"{RECORD}:in.text.9"],
            "has no tensor in.text.9; it has",
        ),
        (
            ["edit", *EDIT[1:2], "--model", "8B-1024.pth", "--features", f"{RECORD}:in.text.0"],
            "8B-1024.pth does not exist",
        ),
        (
            [*EDIT, "--guidance", "1,2", "--output", "{tmp}/never.png"],
            "guidance has 2 values but the edit runs 7 scales",
        ),
        (["info", "nowhere.pth"], "nowhere.pth does not exist"),
        (["parity", ROOT / "samples" / "cat.jpg"], "is not a weight file"),
        (["convert", RECORD, "x.bin"], "must end in .safetensors"),
    ],
)
def test_mistakes_are_explained_in_one_sentence(failed, tmp_path, arguments, message):
    assert message in failed(*(str(a).replace("{tmp}", str(tmp_path)) for a in arguments))
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "300"], "unknown size"),
        (["--fit", "cover"], "unknown fit"),
        (["--dtype", "fp4"], "unknown dtype"),
        (["--guidance", "a"], "neither a number"),
    ],
)
def test_unknown_choices_name_the_known_ones(arguments, message):
    done = CliRunner().invoke(app, [*EDIT, "--output", "never/never.png", *arguments])
    assert done.exit_code == 2 and message in " ".join(re.sub(r"[│\s]+", " ", done.output).split())


def test_info(tmp_path):
    facts = json.loads(command("info", RECORD, "--json").stdout)
    assert facts["is"] == "a VAREdit transformer, 4 blocks of width 128 with its VAE"
    assert "4 blocks of width 128" in " ".join(CliRunner().invoke(app, ["info", str(RECORD)]).output.split())


def test_convert_then_edit(tmp_path):
    done = command("convert", RECORD, tmp_path / "m.safetensors", "--precision", "fp8")
    assert done.returncode == 0 and "m.safetensors: varedit, fp8" in done.stderr
    done = command(
        *[tmp_path / "m.safetensors" if a == str(RECORD) else a for a in EDIT],
        "--vae",
        RECORD,
        "--output",
        tmp_path / "o.png",
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "o.png").size == (451, 300)


def test_parity_passes_and_fails(tmp_path):
    done = command("parity", RECORD)
    assert done.returncode == 0 and "passed" in done.stdout
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(RECORD)
    with safe_open(RECORD, "pt") as file:
        metadata = file.metadata()
    tensors["ref.logits_cond_uncond.3"] = tensors["ref.logits_cond_uncond.3"] + 2e-4
    tensors["ref.bits.5"] = 255 - tensors["ref.bits.5"]
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    done = CliRunner().invoke(app, ["parity", str(tmp_path / "wrong.safetensors"), "--json"])
    assert done.exit_code == 1
    failures = json.loads(done.stdout)[0]["failures"]
    assert any(f.startswith("scale 4: logits are off by 0.0002") for f in failures) and any(
        "scale 6: bits beyond the margin" in f for f in failures
    )


def test_defaults_are_those_of_the_table():
    help_text = " ".join(
        re.sub(r"[│\s]+", " ", CliRunner().invoke(app, ["edit", "--help"], terminal_width=200).output).split()
    )
    settings = SamplingSettings()
    for value in (
        f"[default: ({settings.guidance:g}; {DEMO_GUIDANCE:g} for the demo model)]",
        f"[default: {settings.temperature:g}]",
        f"[default: {settings.top_p:g}]",
        f"[default: (the weights' own, else {SIZE})]",
        f"[default: ({FIT})]",
    ):
        assert value in help_text


def test_guidance_defaults_to_that_of_the_model():
    assert Draw().settings(None).guidance == DEMO_GUIDANCE != SamplingSettings().guidance
    assert Draw().settings(Path("model.safetensors")) == SamplingSettings()
    assert Draw(guidance="3,1").settings(None).guidance == (3, 1)
