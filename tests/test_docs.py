"""What the documentation says is so: tables, defaults, links, names, words, commands and code."""

import ast
import io
import json
import pkgutil
import re
import sys
import tokenize

import pytest
from PIL import Image
from support import GOLDEN, ROOT

import dev
from benchmarks import render
from varedit_core import Editor
from varedit_core.cli.demo import EDITS
from varedit_core.controls.base import Knob
from varedit_core.controls.registry import knobs, registered
from varedit_core.defaults import FIT
from varedit_core.demo import GUIDANCE as DEMO_GUIDANCE
from varedit_core.demo import SAMPLES
from varedit_core.files.weights import open_weights
from varedit_core.sampling.settings import SamplingSettings

FOLDERS = ("", "docs", "benchmarks", "demo", "samples")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
HELP = sorted((ROOT / "web" / "docs").rglob("*.md"))
HISTORY = {"LOG.md", "CHANGELOG.md"}
"""Pages whose entries keep the names of their day."""
COMFYUI_OPTIONS = {
    "--bf16-vae", "--disable-cuda-malloc", "--disable-dynamic-vram", "--fast", "--fp16-intermediates", "--fp32-vae",
    "--lowvram", "--novram", "--use-flash-attention", "--use-sage-attention",
}  # fmt: skip
TEXT_TOKENIZER = re.compile(
    r"\btext\b|\bT5\b|flan-t5|spiece|sentencepiece|tokenizer\.json|\btokenizers \d", re.IGNORECASE
)
"""What tells that a sentence is of the text's: its words, models, files and the package of that name."""
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name_of(page) -> str:
    return page.relative_to(ROOT).as_posix()


def every_page(*, but=frozenset()):
    return pytest.mark.parametrize("page", [page for page in PAGES if page.name not in but], ids=name_of)


def test_every_kind_of_page_is_looked_at():
    names = {name_of(page) for page in PAGES}
    assert names >= {"README.md", "CONTRIBUTING.md", "docs/MODEL.md", "benchmarks/README.md", "demo/README.md"}
    assert len(HELP) == 2 * len(list((ROOT / "web" / "docs").glob("*.md")))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200, "what a user needs first stays, the rest goes to docs/"


@pytest.mark.parametrize("path", render.outputs(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_is_rendered_is_what_lies_here(path):
    assert path.read_text(encoding="utf-8") == render.outputs()[path], "run python dev.py render"


def marks(pages) -> list[str]:
    """The tables that have their place on these pages. A mark without its end, and one on a page that is not rendered,
    are none."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    begun = [name for text in texts.values() for name in re.findall(r"^<!-- (\w[\w ]*) -->", text, re.MULTILINE)]
    filled = [found[1] for page in pages if page in render.PAGES for found in render.MARKER.finditer(texts[page])]
    assert sorted(begun) == sorted(filled), "a mark without its end, or on a page that is not rendered"
    return sorted(filled)


def test_every_table_stands_on_one_page():
    options = [f"options {name}" for name in render.command_names()]
    assert marks(PAGES) == sorted([*render.TABLES, *options, "knobs controls"])


def test_every_nodes_knobs_stand_on_its_help_pages():
    assert marks(HELP) == sorted([*(f"inputs {group}" for group in render.NODES.values()), "settings"] * 2)
    for node, group in render.NODES.items():
        for page in (ROOT / "web" / "docs" / f"{node}.md", ROOT / "web" / "docs" / node / "zh.md"):
            text = page.read_text(encoding="utf-8")
            assert f"<!-- inputs {group} -->" in text, page
            for knob in knobs(group):
                said = (knob.help, knob.more) if render.language_of(page) == "en" else (knob.help_zh, knob.more_zh)
                (row,) = re.findall(rf"^\| `{knob.name}` \| (.*) \|$", text, re.MULTILINE)
                assert all(part in row.replace("**", "") for part in said), knob.name


def test_knobs_say_as_much_in_both_languages():
    for knob in (knob for group in render.NODES.values() for knob in knobs(group)):
        texts = (knob.help, knob.help_zh), (knob.more, knob.more_zh)
        assert all(bool(english) == bool(chinese) for english, chinese in texts), knob.name
        for english, chinese in texts:
            assert re.findall(r"`[a-z_]+`", english) == re.findall(r"`[a-z_]+`", chinese), knob.name
            assert english.endswith("." * bool(english)) and chinese.endswith("。" * bool(chinese)), knob.name


@pytest.mark.parametrize(
    ("knob", "english", "chinese"),
    [
        (Knob("a", 0.5, 0.0, 1.0), "0 to 1", "0 到 1"),
        (Knob("a", 1, 1), "from 1", "不小于 1"),
        (Knob("a", 1, high=9), "up to 9", "不大于 9"),
        (Knob("a", 1), "any number", "任意数"),
        (Knob("a", "x", choices=("x", "y")), "`x`, `y`", "`x`、`y`"),
    ],
)
def test_what_a_knob_may_be_in_words(knob, english, chinese):
    assert (render.values_of(knob), render.values_of(knob, "zh")) == (english, chinese)


def test_the_table_of_controls_is_the_registrys():
    """In the order of inputs; a control that does nothing at a scale has no stage."""
    rows = [line.strip("| ").split(" | ") for line in render.control_table().splitlines()[2:]]
    assert [re.search(r"`(\w+)`", name)[1] for name, *_ in rows] == [kind.__name__ for kind in registered()]
    stages = {re.search(r"`(\w+)`", name)[1]: stage for name, _, stage, _ in rows}
    assert stages["Mask"] == "0" and stages["AutoMask"] == "90" and stages["Window"] == "-"
    orders = [int(order) for _, order, *_ in rows if order != "-"]
    assert orders == sorted(set(orders)), "of two alike the names would decide"
    assert all(re.fullmatch(r"[A-Z].+\.", says) for *_, says in rows)


def sentences(text: str) -> list[str]:
    """Sentences and lines, without quoted names, code and links."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    return re.split(r"(?<=[.;:?!。；：])\s*|\n", text)


def words_of(page) -> list[str]:
    """The sentences of a page, those of rendered tables and quoted errors included."""
    return sentences(page.read_text(encoding="utf-8"))


def words_of_code(source: str) -> list[str]:
    """The sentences of a module: docstrings, comments and strings of more than one word, without names."""
    texts, line = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            texts += [f"{texts.pop()} {text}" if line and token.start[0] == line + 1 else text]
            line = token.start[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            texts.append("".join(parts))
            node.values = [part for part in node.values if not isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return prose(texts)


def words_of_json(source: str) -> list[str]:
    """The sentences of a locale or a workflow: its values of more than one word."""

    def values(node) -> list[str]:
        if isinstance(node, dict | list):
            return [text for inner in (node.values() if isinstance(node, dict) else node) for text in values(inner)]
        return [node] if isinstance(node, str) else []

    return prose(values(json.loads(source)))


def prose(texts: list[str]) -> list[str]:
    """Sentences of texts of more than one word, without names of files, options and variables."""
    names = re.compile(r"`[^`]*`|--\S+|@\w+|\b[A-Z_]*TOKENIZER\b|\w*tokenizer[_.]\w+|\w+_tokenizer\w*")
    paragraphs = [part for text in texts if re.search(r"\s|[一-鿿]", text) for part in re.split(r"\n\s*\n", text)]
    return [words for part in paragraphs for words in sentences(names.sub("", re.sub(r"\s+", " ", part)))]


def of_pictures(words: list[str]) -> list[str]:
    """The sentences that use the word for something else than the text's."""
    return [text for text in words if "tokenizer" in text.lower() and not TEXT_TOKENIZER.search(text)]


@pytest.mark.parametrize("page", [*PAGES, *HELP], ids=name_of)
def test_a_tokenizer_is_the_texts(page):
    assert not of_pictures(words_of(page)), "the picture's autoencoder is the VAE"


TEXT_CODE = ("varedit_core/text/", "varedit_core/training/words.py", "nodes/adapters/text_encoder.py")
"""Code about the text alone, whose every tokenizer is the text's."""
CODE = [path for folder in ("varedit_core", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))]
JSON = [path for glob in ("locales/*/*.json", "workflows/*.json") for path in sorted(ROOT.glob(glob))]


def test_a_tokenizer_is_the_texts_in_code_too():
    code = [path for path in CODE if not name_of(path).startswith(TEXT_CODE)]
    assert all(any(name_of(path).startswith(one) for path in CODE) for one in TEXT_CODE)
    assert len(code) > 100 and len(JSON) > 20
    wrong = {name_of(path): of_pictures(words_of_code(path.read_text(encoding="utf-8"))) for path in code}
    wrong |= {name_of(path): of_pictures(words_of_json(path.read_text(encoding="utf-8"))) for path in JSON}
    assert not {name: words for name, words in wrong.items() if words}, "the picture's autoencoder is the VAE"


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ('"""Loads the tokenizer."""', False),
        ("x = 1  # a tokenizer of\n", False),
        ("# the text is\n# read by a tokenizer\n", True),
        ('raise ValueError(f"{x} is no tokenizer; load another")', False),
        ('help = "The text encoder." " The " "tokenizer."', False),
        ('help = "来自 tokenizer"', False),
        ('"""See `a_tokenizer`, or the T5\'s own tokenizer."""', True),
        ('TASKS = ("tokenizer", "transformer")', True),
        ('"""The file varedit_demo_tokenizer.safetensors, the name @tokenizer, the option --tokenizer."""', True),
    ],
)
def test_the_rule_of_that_word_in_code_can_fail(source, right):
    assert (not of_pictures(words_of_code(source))) is right


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("The tokenizer redraws it.", False),
        ("tokenizer，来自加载器。", False),
        ("The T5 has another tokenizer.", True),
        ("Load `a_tokenizer`.", True),
        ("- *an error of the tokenizer*: mend it.", False),
        ("The VAE redraws it.", True),
    ],
)
def test_the_rule_of_that_word_can_fail(tmp_path, words, right):
    (tmp_path / "page.md").write_text(words, encoding="utf-8")
    assert (not of_pictures(words_of(tmp_path / "page.md"))) is right


@every_page(but=HISTORY)
def test_files_that_are_named_are_there(page):
    """A name may leave out the folders before it."""
    named = set(re.findall(r"`([\w/]+\.(?:py|toml|json|yaml))`", page.read_text(encoding="utf-8"))) - NOT_OURS
    folders = ("varedit_core", "nodes", "benchmarks", "tests", "demo", "samples")
    files = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    there = [f"/{name_of(path)}" for path in files]
    missing = [name for name in named if not any(path.endswith(f"/{name}") for path in there)]
    assert not missing, "a file of the repository was moved or renamed"


NOT_OURS = {"tokenizer.json", "settings.json", "finished.json", "KEY.json", "extra_model_paths.yaml"}
"""Files that are not the repository's."""


@every_page(but=HISTORY)
def test_python_names_are_there(page):
    for name in re.findall(r"`[^`\n]*?\b(varedit_core(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        assert pkgutil.resolve_name(name), name


@every_page(but=HISTORY)
def test_options_that_are_named_exist(page):
    known = {
        option
        for name in render.command_names()
        for parameter in render.command(name).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | COMFYUI_OPTIONS | {"--help", "--version"}  # fmt: skip
    text = page.read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    own = [*re.findall(r"`([^`\n]+)`", text), *commands]
    named = {option for words in own if not words.startswith(("torchrun", "accelerate", "git", "pip")) for option in
             re.findall(r"(?<!\S)--[a-z][\w-]*", words)}  # fmt: skip
    assert named <= known


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--guidance", f"{SamplingSettings().guidance:g} (demo model: {DEMO_GUIDANCE:g})"),
        ("--temperature", f"{SamplingSettings().temperature:g}"),
        ("--top-p", f"{SamplingSettings().top_p:g}"),
        ("--seed", str(SamplingSettings().seed)),
        ("--size", "the weights' own"),
        ("--fit", f"`{FIT}`"),
    ],
)
def test_defaults(option, value):
    assert f"| `{option}` | {value} |" in README


def anchors(page) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *HELP], ids=name_of)
def test_links_lead_somewhere(page):
    own = "https://github.com/varedit/varedit/blob/main"
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith(own):
            path = str(ROOT) + path.removeprefix(own)
        if path.startswith("https://"):
            continue
        aim = page.parent / path if path else page
        assert aim.exists() and (not anchor or anchor in anchors(aim)), target


def test_the_two_commands(monkeypatch):
    calls = []
    monkeypatch.setattr(dev, "prepare", lambda extra: calls.append(extra) or 0)
    monkeypatch.setattr(dev.subprocess, "call", lambda command, **kw: calls.append(command[1:]) or 0)
    for line in ("python dev.py edit", "python dev.py test"):
        assert f"```\n{line}\n```" in README
        assert dev.main(*line.split()[2:]) == 0
    assert calls == ["cli", ["-m", "varedit_core", *dev.MAIN_JOB], "test", ["-m", "pytest", *dev.PARALLEL]]
    assert dev.MAIN_JOB[0] == "demo" and all((SAMPLES / name).is_file() for name in EDITS)
    calls.clear()
    assert dev.main("edit", "a.png", "make it sepia") == 0
    assert calls == ["cli", ["-I", "-m", "varedit_core", "edit", "a.png", "make it sepia"]]
    assert "dev.py test" in (ROOT / ".ci" / "run").read_text()


def test_nothing_of_the_current_folder_runs(tmp_path, monkeypatch, capfd):
    """Pictures may lie in a folder of anybody's; what is imported is .venv's and ours."""
    for name in ("typer", "torch", "json", "pip", "varedit_core"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dev, "PYTHON", sys.executable)
    assert dev.run("varedit_core", ["info", "nowhere.pth"]) == 1
    assert "nowhere.pth does not exist" in capfd.readouterr().err
    assert dev.check_pip(getattr(sys, "_base_executable", sys.executable)) in (0, 1)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The recorded network at 256 pixels in place of the published one at 1024, in a folder with pictures."""
    path = GOLDEN / "patchify_256.safetensors"
    editor = Editor.load(path, path, device="cpu")
    text = open_weights(path)["in.text.0"]
    monkeypatch.setattr(Editor, "load", lambda *files: editor)
    monkeypatch.setattr(editor, "encode_text", lambda prompts: [text] * len(prompts))
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "sky.png"):
        Image.open(ROOT / "samples" / "cat.jpg").resize((120, 90)).save(name)
    (tmp_path / "samples").symlink_to(ROOT / "samples")


def run_python_of(text: str) -> dict:
    blocks, names = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL), {}
    for block in blocks:
        exec(block.replace('"1M"', '"0.06M"'), names)  # noqa: S102
    return names | {"blocks": len(blocks)}


def test_python_code_of_the_readme_runs(recorded):
    names = run_python_of(README)
    assert names["blocks"] == 3
    assert names["dark"].size == Image.open(ROOT / "samples" / "cat.jpg").size
    assert names["day"].size == names["night"].size == names["picture"].size == (120, 90)
    assert names["scale"].index == 6


def test_python_code_of_the_controls_runs(recorded, tmp_path):
    names = run_python_of((ROOT / "docs" / "CONTROLS.md").read_text(encoding="utf-8"))
    assert names["blocks"] == 1 and len(names["branches"].pictures) == 4
    assert all(names[name].pictures[0].size == (120, 90) for name in ("edited", "again", "both"))
    assert {path.name for path in tmp_path.iterdir()} >= {"night.png", "what-changed.png", "night.safetensors"}


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
