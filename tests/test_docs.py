"""What the documentation says is so: tables, defaults, links, commands and code."""

import re

import pytest
from PIL import Image
from support import GOLDEN, ROOT

import dev
from benchmarks.render import PAGES as RENDERED
from benchmarks.render import rendered
from varedit_core import Editor
from varedit_core.cli.demo import EDITS
from varedit_core.defaults import FIT, SIZE
from varedit_core.demo import GUIDANCE as DEMO_GUIDANCE
from varedit_core.demo import SAMPLES
from varedit_core.files.weights import open_weights
from varedit_core.sampling.settings import SamplingSettings

README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/MODEL.md",
        "docs/CONTROLS.md",
        "docs/LOG.md",
        "docs/TRAINING.md",
        "docs/SHAPEEDIT.md",
    )
]


def test_tables_are_those_of_the_measurements():
    for page in RENDERED:
        assert rendered(page.read_text()) == page.read_text(), "run python benchmarks/render.py"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--guidance", f"{SamplingSettings().guidance:g} (demo model: {DEMO_GUIDANCE:g})"), ("--temperature", f"{SamplingSettings().temperature:g}"), ("--top-p", f"{SamplingSettings().top_p:g}"),
     ("--seed", str(SamplingSettings().seed)), ("--size", f"`{SIZE}`"), ("--fit", f"`{FIT}`")],
)  # fmt: skip
def test_defaults(option, value):
    assert f"| `{option}` | {value} |" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_two_commands(monkeypatch):
    calls = []
    monkeypatch.setattr(dev, "prepare", lambda extra: calls.append(extra) or 0)
    monkeypatch.setattr(dev.subprocess, "call", lambda command, cwd: calls.append(command[1:]) or 0)
    for line in ("python dev.py edit", "python dev.py test"):
        assert f"```\n{line}\n```" in README
        assert dev.main(*line.split()[2:]) == 0
    assert calls == ["cli", ["-m", "varedit_core", *dev.MAIN_JOB], "test", ["-m", "pytest", *dev.PARALLEL]]
    assert dev.MAIN_JOB[0] == "demo" and all((SAMPLES / name).is_file() for name in EDITS)
    calls.clear()
    assert dev.main("edit", "a.png", "make it sepia") == 0
    assert calls == ["cli", ["-m", "varedit_core", "edit", "a.png", "make it sepia"]]
    assert "dev.py test" in (ROOT / ".ci" / "run").read_text()


def test_python_code_runs(tmp_path, monkeypatch):
    """The README's Python, with the recorded network at 256 pixels in place of the published one at 1024."""
    path = GOLDEN / "patchify_256.safetensors"
    editor = Editor.load(path, path, device="cpu")
    text = open_weights(path)["in.text.0"]
    monkeypatch.setattr(Editor, "load", lambda *files: editor)
    monkeypatch.setattr(editor, "encode_text", lambda prompts: [text] * len(prompts))
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.open(ROOT / "samples" / "cat.jpg").resize((120, 90)).save(name)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block.replace('"1M"', '"0.06M"'), names)  # noqa: S102
    assert names["day"].size == names["night"].size == names["picture"].size == (120, 90)
    assert names["scale"].index == 6


def test_the_pack_adds_nothing_to_comfyui():
    import sys

    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
    wanted = [name for extra in project["optional-dependencies"].values() for name in extra]
    assert not [name for name in wanted if "==" in name or "<" in name], "never pinned for a user"
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==", pins, flags=re.MULTILINE)
