"""A control is one file: put into a copy of the repository, it is an option, an input, a setting to sweep, and acts."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT

PARTS = ("varedit_core", "nodes", "locales", "web", "docs", "benchmarks", "samples", "tests", "workflows")
"""What a control may show up in. The demo model is linked: it is large, and nothing writes to it."""
FILE = '''\
"""Sharpness: bits are drawn nearer to what is most probable."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Control, Knob


@dataclass(frozen=True)
class Sharpness(Control):
    """Multiplies log-odds by 1 and eight times the amount."""

    knobs = (
        Knob(
            "sharpness", 0.0, 0.0, 1.0,
            help="0 is the draw as it is; at 1 nearly all bits are the most probable ones.",
            label_zh="锐度",
            help_zh="0 为原样抽取；为 1 时几乎所有比特都取最可能的值。",
        ),
    )  # fmt: skip
    amount: float

    def __call__(self, scale) -> None:
        if not scale.drawn:
            scale.log_odds = scale.log_odds * (1 + 8 * self.amount)
'''
HELP = "0 is the draw as it is; at 1 nearly all bits are the most probable ones."
EDITS = """
import hashlib, json, sys
import torch
from varedit_core import Controls, Editor, SamplingSettings
from varedit_core.demo import SAMPLES, demo_files

torch.set_num_threads(1)
editor = Editor.load(*demo_files(), device="cpu")
settings, found = SamplingSettings(guidance=2.0, temperature=1.0, seed=5), []
for controls in json.loads(sys.argv[1]):
    controls = Controls(**controls)
    made = editor.run(SAMPLES / "scene.png", "make it sepia", size="0.06M", settings=settings, controls=controls)
    bits = b"".join(bits.numpy().tobytes() for bits in made.tokens.bits)
    found.append([hashlib.sha256(bits).hexdigest(), hashlib.sha256(made.pictures[0].tobytes()).hexdigest()])
print(json.dumps(found))
"""
NODE = """
import asyncio, importlib.util, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests")
import stand_in

sys.modules.update(stand_in.modules(Path(tempfile.mkdtemp())))
spec = importlib.util.spec_from_file_location("pack", "__init__.py", submodule_search_locations=[str(Path.cwd())])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)

async def ask():
    return await (await pack.comfy_entrypoint()).get_node_list()

nodes = {node.define_schema().node_id: node for node in asyncio.run(ask())}
node = nodes["VAREditControls"]
slots = node.define_schema().inputs
given = {slot.id: slot.default for slot in slots} | {sys.argv[1]: 0.5}
names = ("id", "kind", "default", "tooltip", "min", "max", "step")
facts = [[getattr(slot, name, None) for name in names] for slot in slots]
made = node.execute(**given).result[0] if sys.argv[1] in {slot.id for slot in slots} else None
print(json.dumps({"slots": facts, "value": made and getattr(made, sys.argv[1]), "changed": made and made.changed}))
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The repository with one more file, and nothing else touched."""
    folder = tmp_path_factory.mktemp("copy") / "varedit"
    folder.mkdir()
    for name in PARTS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for path in ROOT.glob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    (folder / "demo").symlink_to(ROOT / "demo", target_is_directory=True)
    (folder / "varedit_core" / "controls" / "sharpness.py").write_text(FILE, encoding="utf-8")
    return folder


def python(folder, *arguments) -> subprocess.CompletedProcess:
    """Python in a folder whose own code is imported."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, env=environment
    )
    return done


def answer(folder, code: str, *arguments):
    done = python(folder, "-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_copy_is_what_runs(copied):
    code = "import json, varedit_core.controls.registry as registry; print(json.dumps(registry.__file__))"
    assert answer(copied, code).startswith(str(copied))


def test_it_is_an_option(copied):
    done = python(copied, "-m", "varedit_core", "edit", "--help")
    text = " ".join(re.sub(r"[│\s]+", " ", done.stdout).split())
    assert done.returncode == 0 and "--sharpness" in text and HELP in text, done.stderr
    assert "--sharpness" not in python(ROOT, "-m", "varedit_core", "edit", "--help").stdout
    wrong = python(copied, "-m", "varedit_core", "edit", "samples/scene.png", "x", "--sharpness", "2")
    assert wrong.returncode == 1 and wrong.stderr == "error: sharpness must be a number from 0 to 1, got 2.0\n"
    generate = python(copied, "-m", "varedit_core", "generate", "--help")
    assert "--sharpness" in generate.stdout, "it needs no source"


def test_it_is_an_input_of_the_node(copied):
    found, before = answer(copied, NODE, "sharpness"), answer(ROOT, NODE, "sharpness")
    assert found["slots"][:-1] == before["slots"], "behind all others, so that saved graphs keep their values"
    assert found["slots"][-1] == ["sharpness", "FLOAT", 0.0, HELP, 0.0, 1.0, 0.05]
    assert found["value"] == 0.5 and found["changed"] == {"sharpness": 0.5} and before["value"] is None


def test_it_is_a_setting_to_sweep(copied):
    done = python(copied, "-m", "varedit_core", "sweep", "samples/scene.png", "x", "--x", "nothing=1")
    assert done.returncode == 1 and "sharpness" in done.stderr.partition("choose one of")[2].replace("\n", " ").split(
        ", "
    )
    code = "import json; from varedit_core.sweep import Axis; print(json.dumps(Axis.parse('sharpness=0,0.5').labels))"
    assert answer(copied, code) == ["sharpness 0", "sharpness 0.5"]
    beyond = python(copied, "-m", "varedit_core", "sweep", "samples/scene.png", "x", "--x", "sharpness=0,2")
    assert beyond.returncode == 1 and "sharpness must be a number from 0 to 1" in beyond.stderr


def test_it_acts_and_is_neutral_at_its_default(copied):
    plain, zero, half, again = answer(
        copied, EDITS, json.dumps([{}, {"sharpness": 0.0}, {"sharpness": 0.5}, {"sharpness": 0.5}])
    )
    (without,) = answer(ROOT, EDITS, json.dumps([{}]))
    assert plain == zero == without, "bit for bit"
    assert half == again and half[0] != plain[0] and half[1] != plain[1]


def test_it_is_in_what_is_generated(copied):
    """Docs and both languages' texts, as `python dev.py render` writes them."""
    english, chinese = (f"locales/{language}/nodeDefs.json" for language in ("en", "zh"))
    files = ["docs/COMMAND_LINE.md", "docs/CONTROLS.md", english, chinese]
    assert not any("sharpness" in (ROOT / name).read_text(encoding="utf-8") for name in files)
    done = python(copied, "benchmarks/render.py")
    assert done.returncode == 0, done.stderr
    texts = {name: (copied / name).read_text(encoding="utf-8") for name in files}
    for name in ("docs/COMMAND_LINE.md", "docs/CONTROLS.md"):
        assert any("`--sharpness`" in line and HELP in line for line in texts[name].splitlines()), name
    for name, label, said in (
        (english, "sharpness", HELP),
        (chinese, "锐度", "0 为原样抽取；为 1 时几乎所有比特都取最可能的值。"),
    ):
        made = json.loads(texts[name])["VAREditControls"]["inputs"]["sharpness"]
        assert made == {"name": label, "tooltip": said}
