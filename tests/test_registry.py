"""A control is one file: put into a copy of the repository, it is an option, an input, a setting to sweep, and acts.

After `python dev.py render` there it is in docs, help pages, locales and schemas, too, and the checks of these pass.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT

PARTS = ("varedit_core", "nodes", "locales", "web", "docs", "benchmarks", "samples", "tests", "workflows")
"""What a control may show up in. The demo model and the recordings are linked: nothing writes to them."""
FILE = '''\
"""Sharpness: bits are drawn nearer to what is most probable."""

from __future__ import annotations

from dataclasses import dataclass

from ..defaults import MOST_SCALES
from .base import Control, Knob


@dataclass(frozen=True)
class Sharpness(Control):
    """Multiplies log-odds by 1 and eight times the amount, at the first scales."""

    knobs = (
        Knob(
            "sharpness", 0.0, 0.0, 1.0,
            help="0 is the draw as it is; at 1 nearly all bits are the most probable ones.",
            label_zh="锐度",
            help_zh="0 为原样抽取；为 1 时几乎所有比特都取最可能的值。",
        ),
        Knob(
            "sharp_scales", 0, 0, MOST_SCALES, needs="sharpness", scales=True,
            help="How many of the first scales are drawn so; 0 is all.",
            label_zh="锐化尺度数",
            help_zh="前面多少个尺度这样抽取；0 表示全部。",
        ),
    )  # fmt: skip
    amount: float
    scales: int

    def __call__(self, scale) -> None:
        if not scale.drawn and scale.index < (self.scales or len(scale.schedule)):
            scale.log_odds = scale.log_odds * (1 + 8 * self.amount)
'''
HELP = "0 is the draw as it is; at 1 nearly all bits are the most probable ones."
HELP_ZH = "0 为原样抽取；为 1 时几乎所有比特都取最可能的值。"
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
released = {slot.id: slot.default for slot in slots if not slot.optional}
lacking = vars(node.execute(**released).result[0])
print(json.dumps({
    "slots": facts, "optional": [slot.id for slot in slots if slot.optional], "lacking": lacking,
    "value": made and getattr(made, sys.argv[1]), "changed": made and made.changed,
}))
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
    for name in ("demo", "tests/golden"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    (folder / "varedit_core" / "controls" / "sharpness.py").write_text(FILE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rendered(copied):
    """The same after `python dev.py render`, which is this script in `.venv`."""
    done = python(copied, "benchmarks/render.py")
    assert done.returncode == 0, done.stderr
    return copied


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
    """The last one, and optional, so that saved graphs keep their values and run without it."""
    found, before = answer(copied, NODE, "sharpness"), answer(ROOT, NODE, "sharpness")
    assert found["slots"][:-2] == before["slots"]
    assert found["slots"][-2] == ["sharpness", "FLOAT", 0.0, HELP, 0.0, 1.0, 0.05]
    assert found["slots"][-1][:3] == ["sharp_scales", "INT", 0]
    assert found["value"] == 0.5 and found["changed"] == {"sharpness": 0.5} and before["value"] is None
    assert found["optional"] == [*before["optional"], "sharpness", "sharp_scales"]
    assert found["lacking"] == before["lacking"] | {"sharpness": 0.0, "sharp_scales": 0}


def test_comfyui_runs_a_saved_graph_that_lacks_it(copied, comfyui, tmp_path):
    """And one that has it; one that lacks a released input is refused, as ever."""
    graph = json.loads((ROOT / "workflows" / "api" / "strength.json").read_text(encoding="utf-8"))
    old = next(node for node in graph.values() if node["class_type"] == "VAREditControls")
    with comfyui.server(tmp_path / "comfyui", pack=copied) as server:
        for more, wanted in (({}, "sharpness=0.0"), ({"sharpness": 0.5}, "sharpness=0.5")):
            node = {**old, "inputs": {**old["inputs"], **more}}
            shows = {"class_type": "PreviewAny", "inputs": {"source": ["c", 0]}}
            done = server.run({"c": node, "s": shows})
            assert done["status"]["status_str"] == "success", done["status"]
            assert wanted in done["outputs"]["s"]["text"][0]
        lacking = {name: value for name, value in old["inputs"].items() if name != "preserve"}
        refused = server.queue({"c": {**old, "inputs": lacking}, "s": shows})
        assert [error["type"] for error in refused["node_errors"]["c"]["errors"]] == ["required_input_missing"]


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


def test_it_says_when_it_does_nothing(copied):
    for more, said in (
        (["--sharp-scales", 3], "--sharp-scales counts only with --sharpness; set that too, or leave it"),
        (["--sharpness", 1, "--sharp-scales", 8], "--sharp-scales is 8 but the edit has 7 scales; give at most 7"),
    ):
        done = python(copied, "-m", "varedit_core", "edit", "samples/scene.png", "x", *more)
        assert done.returncode == 1 and done.stderr.startswith(f"error: {said.removesuffix('it')}")


WRITTEN = {
    "docs/COMMAND_LINE.md", "docs/CONTROLS.md", "locales/en/nodeDefs.json", "locales/zh/nodeDefs.json",
    "web/docs/VAREditControls.md", "web/docs/VAREditControls/zh.md", "web/docs/VAREditSweep.md",
    "web/docs/VAREditSweep/zh.md", "tests/schemas.json",
}  # fmt: skip


def test_it_is_in_what_is_generated(rendered):
    """Docs, help pages, both languages' texts and the inputs' record; nothing else has changed."""
    texts = {name: (rendered / name).read_text(encoding="utf-8") for name in WRITTEN}
    for name in ("docs/COMMAND_LINE.md", "docs/CONTROLS.md"):
        assert any("`--sharpness`" in line and HELP in line for line in texts[name].splitlines()), name
    assert re.search(r"`Sharpness`.*\| 1000 \| 50 \| Bits are drawn nearer to", texts["docs/CONTROLS.md"])
    for language, label, said in (("en", "sharpness", HELP), ("zh", "锐度", HELP_ZH)):
        made = json.loads(texts[f"locales/{language}/nodeDefs.json"])["VAREditControls"]["inputs"]["sharpness"]
        assert made == {"name": label, "tooltip": said}
    assert f"| `sharpness` | {HELP} |" in texts["web/docs/VAREditControls.md"]
    assert f"| `sharpness` | {HELP_ZH} |" in texts["web/docs/VAREditControls/zh.md"]
    assert "- `sharpness`: 0 to 1\n" in texts["web/docs/VAREditSweep.md"]
    assert "- `sharpness`（锐度）：0 到 1\n" in texts["web/docs/VAREditSweep/zh.md"]
    changed = {name for name in files(rendered) if not same(ROOT / name, rendered / name)}
    assert changed == WRITTEN | {"varedit_core/controls/sharpness.py"}


def files(folder) -> set[str]:
    found = {path.relative_to(folder).as_posix() for name in PARTS for path in (folder / name).rglob("*")}
    return {name for name in found if (folder / name).is_file() and "__pycache__" not in name and "/golden" not in name}


def same(one, other) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


def test_the_record_of_inputs_gains_its_lines_alone(rendered):
    before, after = ((root / "tests" / "schemas.json").read_text().splitlines() for root in (ROOT, rendered))
    new = [line for line in after if line.rstrip(",") not in {old.rstrip(",") for old in before}]
    assert len(new) == 4 and sum("sharp_scales" in line for line in new) == 3, "two inputs, and two lists of settings"
    assert len(after) == len(before) + 2


CHECKS = {
    "test_nodes.py": "contract or appended or defaults or shortcuts or controls or help or errors_on or translations "
    "or graphs or twin or heavy",
    "test_options.py": "knob or every_option",
    "test_docs.py": "rendered or table or knobs",
    "test_sweep.py": "kind_of_their_setting",
    "test_house.py": "imports or short",
}
"""The tests that a control meets. The others would take minutes."""


def test_the_checks_pass_with_it(rendered):
    for file, names in CHECKS.items():
        done = python(rendered, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", f"tests/{file}", "-k", names)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_the_record_of_inputs_stays_where_a_released_one_would_move(copied, tmp_path):
    """As with a new knob before the released ones. The other files are written."""
    file, known = copied / "varedit_core" / "controls" / "sharpness.py", (ROOT / "tests" / "schemas.json").read_bytes()
    file.write_text(FILE.replace("    knobs = (", "    order = 5\n    knobs = ("), encoding="utf-8")
    try:
        done = python(copied, "benchmarks/render.py", "--folder", tmp_path)
    finally:
        file.write_text(FILE, encoding="utf-8")
    assert done.returncode == 1 and "VAREditControls: strength of the inputs is not what it was" in done.stderr
    assert done.stderr.startswith("error: schemas.json stays as it is (released inputs ")
    assert (tmp_path / "docs" / "CONTROLS.md").is_file() and not (tmp_path / "tests").exists()
    assert (ROOT / "tests" / "schemas.json").read_bytes() == known


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    knobs = (", "    group = 'contrls'\n    knobs = (", "its group is 'contrls'; choose one of controls"),
        ("    knobs = (", "    order = 10\n    knobs = (", "its order 10 is that of "),
        ('label_zh="锐度",', "", "sharpness lacks help, help_zh or label_zh"),
        ('needs="sharpness"', 'needs="sharpnes"', "sharp_scales names sharpnes, which is no knob"),
        ('"sharp_scales", 0', '"sharp-scales", 0', "'sharp-scales'"),
        (FILE.splitlines()[0], "", "its file has no docstring"),
    ],
)  # fmt: skip
def test_a_control_that_lacks_something_is_a_sentence_before_anything_is_written(copied, tmp_path, old, new, said):
    file = copied / "varedit_core" / "controls" / "sharpness.py"
    assert old in FILE
    file.write_text(FILE.replace(old, new), encoding="utf-8")
    try:
        done = python(copied, "benchmarks/render.py", "--folder", tmp_path)
    finally:
        file.write_text(FILE, encoding="utf-8")
    assert done.returncode == 1 and said in done.stderr, done.stderr[-800:]
    assert not any(tmp_path.iterdir())
