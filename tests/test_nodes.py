"""The nodes and all that is shipped beside them, without ComfyUI: a small stand-in takes its place."""

import ast
import dataclasses
import importlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import schemas as released
import torch
from schemas import lists_files
from stand_in import FOLDER_PATHS, FOLDERS, KINDS, Schema, Slot, load_pack, modules, nodes_of, unload_pack
from support import GOLDEN, ROOT

from varedit_core import defaults
from varedit_core.controls.best_of import SCORES
from varedit_core.controls.curves import FLAT, PRESET, PRESETS
from varedit_core.controls.registry import NEUTRAL, NO_SHORTCUTS, SWEPT, Controls, Shortcuts, knobs
from varedit_core.fitting import FITS
from varedit_core.sampling.settings import DEFAULT_SETTINGS, SamplingSettings

RECORD = GOLDEN / "patchify_256.safetensors"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LANGUAGES = ("en", "zh")
NODES = [
    "VAREditModelLoader", "VAREditTextEncoderLoader", "VAREditVAELoader", "VAREditTextEncode", "VAREditSourceEncode",
    "VAREditSampler", "VAREditDecode", "VAREditScalePreview", "VAREditMemoryPlan", "VAREditFileInfo",
    "VAREditSampleImage", "VAREditShortcuts", "VAREditCropRegion", "VAREditStitch", "VAREditExtendCanvas",
    "VAREditEmptySource", "VAREditControls", "VAREditCurves", "VAREditRegion",
    "VAREditSaveTokens", "VAREditLoadTokens", "VAREditFirstScales", "VAREditChangeMap", "VAREditSweep",
]  # fmt: skip
LOADERS = {
    "VAREditModelLoader": "diffusion_models",
    "VAREditTextEncoderLoader": "text_encoders",
    "VAREditVAELoader": "vae",
}
NOTES = ("Note", "MarkdownNote")


@pytest.fixture
def models(tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    return tmp_path


@pytest.fixture
def comfy(models, monkeypatch):
    """The stand-in's modules, in place of ComfyUI's. The pack's demo model is not in its folders yet."""
    made = modules(models)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def pack(comfy):
    yield load_pack()
    unload_pack()


@pytest.fixture
def nodes(pack) -> dict[str, type]:
    return {node.define_schema().node_id: node for node in nodes_of(pack)}


@pytest.fixture
def schemas(nodes) -> dict[str, Schema]:
    return {name: node.define_schema() for name, node in nodes.items()}


@pytest.fixture
def file_info(nodes) -> type:
    return nodes["VAREditFileInfo"]


def required(method) -> list[str]:
    """The parameters that have no default."""
    return [name for name, p in inspect.signature(method).parameters.items() if p.default is p.empty]


def parameters(method) -> list[str]:
    return list(inspect.signature(method).parameters)


def slots_of(schema: Schema) -> list[Slot]:
    return [*schema.inputs, *schema.outputs]


def within(slot: Slot, value: float) -> bool:
    """Whether a number is within an input's bounds. None: none."""
    return (slot.min is None or slot.min <= value) and (slot.max is None or value <= slot.max)


def ends(slot: Slot) -> list:
    """The values at the bounds of an input, or all of a choice's."""
    return slot.options if slot.kind == "COMBO" else [end for end in (slot.min, slot.max) if end is not None]


def has_widget(slot: Slot) -> bool:
    return hasattr(slot, "default")


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_the_nodes_are_these(nodes):
    assert list(nodes) == NODES


@pytest.mark.parametrize("name", NODES)
def test_a_node_keeps_the_contract(nodes, schemas, name):
    node, schema = nodes[name], schemas[name]
    assert re.fullmatch(r"VAREdit[A-Za-z]+", name) and name == node.__name__
    assert schema.category == ("VAREdit/loaders" if name in LOADERS else "VAREdit")
    assert schema.display_name.replace(" ", "") == name
    assert schema.description.endswith(".") and schema.search_aliases
    ids = [slot.id for slot in schema.inputs]
    assert ids == parameters(node.execute), "saved graphs and ComfyUI's calls must agree"
    if hasattr(node, "fingerprint_inputs"):
        assert sorted(ids) == sorted(parameters(node.fingerprint_inputs))
    optional = [bool(slot.optional) for slot in schema.inputs]
    assert optional == sorted(optional), "required inputs come first"
    needed = [slot.id for slot in schema.inputs if not slot.optional]
    assert required(node.execute) == needed
    for asked in ("fingerprint_inputs", "validate_inputs"):
        assert set(required(getattr(node, asked, lambda: None))) <= {*needed}, "a saved graph may lack the others"
    for slot in slots_of(schema):
        assert slot.tooltip and slot.tooltip.endswith("."), f"{name}.{slot.id} has no tooltip"
    for slot in schema.inputs:
        if slot.kind == "COMBO":
            assert slot.options and (slot.default is None or slot.default in slot.options)
        if slot.kind in ("INT", "FLOAT"):
            assert within(slot, slot.default)
    assert all(slot.display_name == slot.id for slot in schema.outputs)


def test_every_type_of_input_is_judged_or_known_not_to_need_it(schemas, pack):
    judged = sys.modules["pack_x_varedit.nodes.inputs"].JUDGED
    widgets = {"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"}
    asked = {"MODEL", "CLIP", "VAE"}
    own = {slot.kind for schema in schemas.values() for slot in schema.outputs if slot.kind.startswith("VAREDIT_")}
    found = {slot.kind for schema in schemas.values() for slot in schema.inputs}
    assert found <= {*judged} | widgets | asked | own, "say in `inputs.JUDGED` who judges it"


def test_what_the_node_api_has_not_is_a_mistake_in_the_stand_in(comfy):
    io = comfy["comfy_api.latest"].io
    for wrong in (
        lambda: io.Model.Input("model", default=1),
        lambda: io.Int.Input("seed", maximum=3),
        lambda: io.Combo.Input("size", multiline=True),
        lambda: io.Latent.Output("latent", optional=True),
        lambda: io.Schema(node_id="a", output_node=True),
        lambda: io.Schema(node_id="a", hidden=["UNIQUE_ID"]),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="unique"):
        io.Schema(node_id="a", inputs=[io.Vae.Input("vae"), io.Image.Input("vae")])


_ASK_COMFYUI = """
import inspect, json, sys
from comfy.cli_args import args
args.cpu = True
from comfy_api.latest import ComfyExtension, io, ui
import folder_paths, server
names = lambda call: [name for name in inspect.signature(call).parameters if name != "self"]
print(json.dumps({
    "kinds": {
        kind: [one.io_type, names(one.Input.__init__), names(one.Output.__init__)]
        for kind in sys.argv[1:] for one in [getattr(io, kind)]
    },
    "custom": [io.Custom("X").io_type, names(io.Custom("X").Input.__init__), names(io.Custom("X").Output.__init__)],
    "io.Schema": names(io.Schema), "io.NodeOutput": names(io.NodeOutput), "io.Hidden": [one.name for one in io.Hidden],
    "ui.PreviewText": names(ui.PreviewText), "ui.PreviewImage": names(ui.PreviewImage),
    "ComfyExtension": [name for name in vars(ComfyExtension) if not name.startswith("_")],
    "folder_paths": {name: names(getattr(folder_paths, name)) for name in FOLDER_PATHS},
    "send_progress_text": names(server.PromptServer.send_progress_text),
}))
""".replace("FOLDER_PATHS", repr(FOLDER_PATHS))


def test_the_stand_in_has_nothing_that_comfyui_has_not(comfyui, comfy):
    real = comfyui.run("-c", _ASK_COMFYUI, *KINDS)
    api, folder_paths = comfy["comfy_api.latest"], comfy["folder_paths"]
    made, (kind, *arguments) = api.io.Custom("X"), real["custom"]
    assert kind == made.Input("x").kind == "X"
    for slot, known in zip((made.Input("x"), made.Output("x")), arguments):
        assert vars(slot).keys() - {"kind"} <= set(known)
    for kind, (type_name, input_names, output_names) in real["kinds"].items():
        assert KINDS[kind][0] == type_name
        assert {"id", *KINDS[kind][1]} <= set(input_names), kind
        output = vars(getattr(api.io, kind).Output("x")).keys() - {"kind"}
        assert output <= set(output_names), kind
    calls = {
        "io.Schema": api.io.Schema, "io.NodeOutput": api.io.NodeOutput,
        "ui.PreviewText": api.ui.PreviewText, "ui.PreviewImage": api.ui.PreviewImage,
    }  # fmt: skip
    for name, call in calls.items():
        assert set(parameters(call)) <= set(real[name]), name
    assert {member.name for member in api.io.Hidden} <= set(real["io.Hidden"])
    assert {name for name in vars(api.ComfyExtension) if not name.startswith("_")} <= set(real["ComfyExtension"])
    for name, names in real["folder_paths"].items():
        assert parameters(getattr(folder_paths, name)) == names
    server = comfy["server"].PromptServer.instance
    assert parameters(server.send_progress_text) == real["send_progress_text"]


def test_released_inputs_are_only_ever_appended(schemas):
    """`schemas.json` is what the nodes' inputs and outputs were."""
    known, found = released.read(), released.facts_of(schemas)
    assert not released.broken(known, found), released.RULE
    assert known == found, "something was appended, as it may be: run python dev.py render, and look at the difference"
    assert released.written(known, found) == released.FILE.read_text(encoding="utf-8"), "byte for byte"
    assert released.declared() == found


ONE = {
    "A": {
        "inputs": [{"id": "x", "kind": "INT", "default": 1, "min": 0, "max": 9}],
        "outputs": [{"id": "o", "kind": "IMAGE"}],
    }
}
TWO = ONE | {"B": {"inputs": [{"id": "c", "kind": "COMBO", "default": "b", "options": ["a", "b"]}], "outputs": []}}


def slot(kind: str, **facts) -> dict:
    return {"id": "late", "kind": kind, **facts}


def other(node: str, side: str, *slots: dict, **changes) -> dict:
    """TWO with a change to the first slot of a side, and slots behind it."""
    first, *rest = TWO[node][side] or [{}]
    changed = [{**first, **changes}] if first else []
    return TWO | {node: {**TWO[node], side: [*changed, *rest, *slots]}}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (TWO, ""),
        (TWO | {"C": ONE["A"]}, ""),
        (ONE, "B is gone"),
        (other("A", "inputs", slot("INT", optional=True, default=2)), ""),
        (other("A", "inputs", slot("MASK", optional=True)), ""),
        (other("A", "inputs", slot("INT", default=2)), "A: late must be optional, as graphs lack it"),
        (other("A", "outputs", slot("MASK")), ""),
        (other("A", "outputs", kind="MASK"), "A: o of the outputs is not what it was"),
        (other("A", "inputs", id="y"), "A: x of the inputs is not what it was"),
        (other("A", "inputs", default=2), "A: x of the inputs is not what it was"),
        (other("A", "inputs", optional=True), "A: x of the inputs is not what it was"),
        (other("A", "inputs", min=-1, max=10), ""),
        (other("A", "inputs", min=1), "A: x of the inputs is not what it was"),
        (other("A", "inputs", max=8), "A: x of the inputs is not what it was"),
        (TWO | {"A": {**TWO["A"], "inputs": []}}, "A: x of the inputs is not what it was"),
        (TWO | {"A": {**TWO["A"], "inputs": [slot("INT", optional=True), *TWO["A"]["inputs"]]}},
         "A: x of the inputs is not what it was; A: x must be optional, as graphs lack it"),
        (other("B", "inputs", options=["a", "c", "b"]), ""),
        (other("B", "inputs", options=["b", "a"]), ""),
        (other("B", "inputs", options=["b", "c"]), "B: c of the inputs is not what it was"),
        (other("B", "inputs", options=["a", "b", "c"], default="c"), "B: c of the inputs is not what it was"),
    ],
)  # fmt: skip
def test_what_released_inputs_may_become(now, said):
    """schemas.json is written where the rule holds, and only there."""
    assert "; ".join(released.broken(TWO, now)) == said
    if said:
        with pytest.raises(ValueError, match=f"stays as it is .*{re.escape(said)}$"):
            released.written(TWO, now)
    else:
        text = released.written(TWO, now)
        assert json.loads(text) == now and json.loads(released.written(now, now)) == now


def test_a_new_input_is_one_line_more_of_the_file():
    """Whatever the order of the nodes now."""
    before = released.written(TWO, TWO)
    now = other("A", "inputs", slot("INT", optional=True, default=2))
    after = released.written(TWO, dict(reversed(now.items())))
    lines = [line.rstrip(",") for line in after.splitlines()]
    assert [line for line in lines if line not in map(lambda one: one.rstrip(","), before.splitlines())] == [
        '      {"id": "late", "kind": "INT", "optional": true, "default": 2}'
    ]
    assert list(json.loads(after)) == list(TWO) and len(lines) == len(before.splitlines()) + 1


def test_the_defaults_are_those_of_the_library(schemas):
    settings = DEFAULT_SETTINGS
    side = next(side for side, area in defaults.SIZES.items() if area == defaults.SIZE)
    wanted = {
        ("VAREditModelLoader", "precision"): (defaults.PRECISIONS[0], defaults.PRECISIONS),
        ("VAREditModelLoader", "kind"): (defaults.KINDS[0], defaults.KINDS),
        ("VAREditTextEncode", "cache"): ("off", ("off", "on")),
        ("VAREditSourceEncode", "size"): (side, tuple(defaults.SIZES)),
        ("VAREditEmptySource", "size"): (side, tuple(defaults.SIZES)),
        ("VAREditEmptySource", "ratio"): (defaults.RATIO, tuple(defaults.RATIOS)),
        ("VAREditEmptySource", "batch_size"): (1, None),
        ("VAREditSourceEncode", "fit"): (defaults.FIT, tuple(FITS)),
        ("VAREditSampler", "seed"): (settings.seed, None),
        ("VAREditSampler", "guidance"): (settings.guidance, None),
        ("VAREditSampler", "temperature"): (settings.temperature, None),
        ("VAREditSampler", "top_p"): (settings.top_p, None),
        ("VAREditSampler", "preview"): (defaults.PREVIEWS[0], defaults.PREVIEWS),
        ("VAREditSampler", "variations"): (1, None),
        ("VAREditScalePreview", "pictures"): (defaults.SCALE_PICTURES[0], defaults.SCALE_PICTURES),
        ("VAREditMemoryPlan", "size"): (side, tuple(defaults.SIZES)),
        ("VAREditMemoryPlan", "images"): (1, None),
        ("VAREditMemoryPlan", "guided"): (settings.guided, None),
        ("VAREditSampleImage", "picture"): ("scene.png", ("scene.png", "cat.jpg")),
        ("VAREditCropRegion", "margin"): (defaults.CROP_MARGIN, None),
        ("VAREditCropRegion", "shape"): (defaults.FIT, tuple(FITS)),
        ("VAREditStitch", "feather"): (defaults.FEATHER, None),
        **{("VAREditExtendCanvas", side): (0, None) for side in ("left", "top", "right", "bottom")},
        ("VAREditExtendCanvas", "unit"): (defaults.LENGTHS[0], defaults.LENGTHS),
        ("VAREditExtendCanvas", "fill"): (defaults.FILL, defaults.FILLS),
        ("VAREditExtendCanvas", "overlap"): (defaults.OVERLAP, None),
        ("VAREditSaveTokens", "filename_prefix"): ("varedit/tokens", None),
        ("VAREditFirstScales", "scales"): (4, None),
        ("VAREditChangeMap", "amount"): (0.5, None),
        ("VAREditSweep", "seed"): (settings.seed, None),
        ("VAREditSweep", "guidance"): (settings.guidance, None),
        ("VAREditSweep", "temperature"): (settings.temperature, None),
        ("VAREditSweep", "x"): ("guidance", SWEPT),
        ("VAREditSweep", "x_values"): ("1, 2, 3", None),
        ("VAREditSweep", "y"): ("none", ("none", *SWEPT)),
        ("VAREditSweep", "y_values"): ("", None),
        **{
            (node, knob.name): (vars(values)[knob.name], knob.choices or None)
            for node, group, values in (
                ("VAREditShortcuts", "shortcuts", NO_SHORTCUTS),
                ("VAREditControls", "controls", NEUTRAL),
            )
            for knob in knobs(group)
        },
        ("VAREditControls", "score"): ("likelihood", SCORES),
        ("VAREditCurves", "preset"): (PRESET, (*PRESETS, "own")),
        **{
            ("VAREditCurves", f"{curve}_{end}"): (getattr(FLAT, end), None)
            for curve in ("guidance", "temperature")
            for end in ("start", "end")
        },
        ("VAREditDecode", "seam"): (0, None),
    }
    found = {
        (name, slot.id): (slot.default, tuple(slot.options) if slot.kind == "COMBO" else None)
        for name, schema in schemas.items()
        for slot in schema.inputs
        if has_widget(slot) and slot.default is not None
    }
    assert found == wanted
    assert settings == SamplingSettings()


def test_the_library_takes_all_that_the_sampler_offers(schemas):
    slots = {slot.id: slot for slot in schemas["VAREditSampler"].inputs}
    for field in dataclasses.fields(SamplingSettings):
        for value in (slots[field.name].min, slots[field.name].max):
            SamplingSettings(**{field.name: value})


def test_the_library_takes_all_shortcuts_that_the_node_offers(nodes, schemas):
    slots = {slot.id: slot for slot in schemas["VAREditShortcuts"].inputs}
    assert list(slots) == [field.name for field in dataclasses.fields(Shortcuts)]
    execute = nodes["VAREditShortcuts"].execute
    assert vars(execute(*(slot.default for slot in slots.values())).result[0]) == vars(NO_SHORTCUTS)
    for name, slot in slots.items():
        for value in ends(slot):
            (chosen,) = execute(**{**vars(NO_SHORTCUTS), name: value}).result
            assert vars(chosen) == {**vars(NO_SHORTCUTS), name: value}


def test_the_library_takes_all_controls_that_the_node_offers(nodes, schemas):
    slots = {slot.id: slot for slot in schemas["VAREditControls"].inputs}
    assert list(slots) == [field.name for field in dataclasses.fields(Controls)]
    execute, neutral = nodes["VAREditControls"].execute, vars(NEUTRAL)
    assert vars(execute(**{name: slot.default for name, slot in slots.items()}).result[0]) == neutral
    for name, slot in slots.items():
        for value in ends(slot):
            (chosen,) = execute(**{**neutral, name: value}).result
            assert vars(chosen) == {**neutral, name: value}
    advanced = [name for name, slot in slots.items() if slot.advanced]
    assert {"best_of", "best_at", "score"} <= {*advanced}
    assert advanced == [knob.name for knob in knobs("controls") if knob.advanced]


def test_curves_are_the_presets_or_ones_own(nodes, schemas):
    own = sys.modules["pack_x_varedit.varedit_core.sampling.settings"]  # curves of the same class as the node's
    bent = sys.modules["pack_x_varedit.varedit_core.controls.curves"].bent
    execute, settings = nodes["VAREditCurves"].execute, own.SamplingSettings(3.0, 0.5)
    slots = {slot.id: slot for slot in schemas["VAREditCurves"].inputs}
    for preset in PRESETS:
        (curves,) = execute(preset, 9.0, 9.0, 9.0, 9.0).result
        assert vars(bent(settings, *curves)) == vars(settings.preset(preset))
    (curves,) = execute("own", 0.5, 2.0, 4.0, 0.0).result
    rising = bent(settings, *curves)
    assert rising.guidance == own.Curve(2.0, 5.0) and rising.temperature == own.Curve(2.0, 0.0)
    assert bent(settings, *execute(*(slot.default for slot in slots.values())).result[0]) is settings
    for end in ("min", "max"):
        bent(settings, *execute("own", *(getattr(slot, end) for slot in list(slots.values())[1:])).result[0])


def test_every_node_has_a_help_page(pack, schemas):
    docs = ROOT / pack.WEB_DIRECTORY / "docs"
    assert {page.stem for page in docs.glob("*.md")} == set(schemas)
    assert {page.relative_to(docs).as_posix() for page in docs.glob("*/*")} == {f"{name}/zh.md" for name in schemas}
    chinese = json.loads(read("locales", "zh", "nodeDefs.json"))
    for name, schema in schemas.items():
        for page, title in (
            (docs / f"{name}.md", schema.display_name),
            (docs / name / "zh.md", chinese[name]["display_name"]),
        ):
            text = page.read_text(encoding="utf-8")
            assert text.startswith(f"# {title}\n"), page
            rows = re.findall(r"^\| `(\w+)` \|", text, re.M)
            assert rows == [slot.id for slot in slots_of(schema)], f"{page}: one row a slot, in the schema's order"
            assert not re.search(r"\]\((?!https://)", text), (
                f"{page}: a page of the repository cannot be reached from here"
            )


@pytest.mark.parametrize("name", NODES)
def test_help_pages_name_the_choices_and_the_other_nodes_rightly(schemas, name):
    others = {schema.display_name for schema in schemas.values()}
    english, chinese = read("web", "docs", f"{name}.md"), read("web", "docs", name, "zh.md")
    named = set(re.findall(r"\*\*(VAREdit [A-Z]\w+(?: [A-Z]\w+)*)\*\*", english))
    assert named <= others
    titles = {texts["display_name"] for texts in json.loads(read("locales", "zh", "nodeDefs.json")).values()}
    assert set(re.findall(r"\*\*(VAREdit [^*]+)\*\*", chinese)) <= titles
    for slot in schemas[name].inputs:
        if slot.kind == "COMBO" and not lists_files(slot):
            for page in (english, chinese):
                assert all(f"`{option}`" in page for option in slot.options), f"{slot.id}: every choice is explained"
    assert re.findall(r"^- \*(.+?)\*", english, re.M) == re.findall(r"^- \*(.+?)\*", chinese, re.M), "the same errors"


def messages_of_the_code() -> str:
    """The strings of the nodes and the library, with a mark where a value is filled in."""
    texts = []
    for path in [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "varedit_core").rglob("*.py")]:
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(part, ast.JoinedStr):
                texts.append("".join(one.value if isinstance(one, ast.Constant) else "…" for one in part.values))
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                texts.append(part.value)
    return "\n".join(texts)


def test_the_errors_on_the_help_pages_are_the_nodes_own():
    known = messages_of_the_code()
    for page in (ROOT / "web" / "docs").glob("*.md"):
        quoted = re.findall(r"^- \*(.+?)\*", page.read_text(encoding="utf-8"), re.M)
        assert quoted, page
        for message in quoted:
            for part in filter(None, map(str.strip, message.split("..."))):
                assert part in known, f"{page.name}: nothing says {part!r}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_translations_cover_the_schemas(schemas, language):
    texts = json.loads(read("locales", language, "nodeDefs.json"))
    assert list(texts) == list(schemas)
    for name, schema in schemas.items():
        assert list(texts[name]) == ["display_name", "description", "inputs", "outputs"]
        assert list(texts[name]["inputs"]) == [slot.id for slot in schema.inputs]
        assert list(texts[name]["outputs"]) == [str(index) for index in range(len(schema.outputs))]
        slots = [*texts[name]["inputs"].values(), *texts[name]["outputs"].values()]
        assert all(list(slot) == ["name", "tooltip"] for slot in slots)
        shown = [texts[name]["description"], *(slot["tooltip"] for slot in slots)]
        if language == "en":
            assert texts[name]["display_name"] == schema.display_name
            assert [slot["name"] for slot in slots] == [slot.display_name or slot.id for slot in slots_of(schema)]
            assert shown == [schema.description, *(slot.tooltip for slot in slots_of(schema))]
        else:
            assert all(re.search(r"[\u4e00-\u9fff]", text) and text.endswith("。") for text in shown)
            assert texts[name]["display_name"].startswith("VAREdit ")
        written = [texts[name]["display_name"], *shown, *(slot["name"] for slot in slots)]
        # The page takes these texts for messages with placeholders, links and plural forms.
        assert not [text for text in written if re.search(r"[{}@|$]", text)]


def test_the_translations_have_different_names_for_different_nodes():
    for language in LANGUAGES:
        names = [texts["display_name"] for texts in json.loads(read("locales", language, "nodeDefs.json")).values()]
        assert len(set(names)) == len(names)


def test_the_node_list_names_the_nodes(schemas):
    assert json.loads(read("node_list.json")) == {name: schema.display_name for name, schema in schemas.items()}


@pytest.mark.parametrize(("script", "result"), [("file_info.js", "PreviewText"), ("pictures.js", "PreviewImage")])
def test_a_page_script_names_the_nodes_that_show_something(nodes, schemas, script, result):
    (named,) = re.findall(r"new Set\(\[(.*?)\]\)", read("web", script))
    shown = {name.strip(' "') for name in named.split(",")}
    assert shown == {name for name, node in nodes.items() if result in inspect.getsource(node.execute)}
    assert all(schemas[name].is_output_node or schemas[name].has_intermediate_output for name in shown)


@pytest.mark.parametrize(("name", "folder"), LOADERS.items())
def test_a_loader_offers_the_files_of_its_folder(nodes, models, name, folder):
    def choices():
        return nodes[name].define_schema().inputs[0].options

    assert choices() == ["no file found"]
    for other in FOLDERS:
        (models / other / "sub").mkdir()
        (models / other / "sub" / f"{other}.safetensors").touch()
        (models / other / "README.md").touch()
    assert choices() == [f"sub/{folder}.safetensors"]


@pytest.mark.parametrize(("name", "folder"), LOADERS.items())
def test_a_loader_says_where_a_missing_file_belongs(nodes, models, name, folder, monkeypatch):
    adapter = {"diffusion_models": "model", "text_encoders": "text_encoder", "vae": "vae"}[folder]
    module = type(sys)(f"pack_x_varedit.nodes.adapters.{adapter}")  # the real one imports ComfyUI's own modules
    module.load_model = module.load_clip = module.load_vae = None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rest = [slot.default for slot in nodes[name].define_schema().inputs[1:]]
    for file, lack in (("gone.safetensors", "gone.safetensors is not"), ("no file found", "there is no file")):
        with pytest.raises(ValueError) as error:
            nodes[name].execute(file, *rest)
        assert nodes[name].validate_inputs(file) == str(error.value), "said before a run, too"
        assert re.fullmatch(
            rf"{re.escape(lack)} in ComfyUI's folder models/{folder}; put .*https://huggingface\.co/.* there, press R "
            "and choose it",
            str(error.value),
        )
    (models / folder / "here.safetensors").touch()
    assert nodes[name].validate_inputs("here.safetensors") is nodes[name].validate_inputs(None) is True


@pytest.mark.parametrize(("name", "folder"), LOADERS.items())
def test_a_loaders_fingerprint_changes_with_the_file(nodes, models, name, folder):
    def fingerprint(file):
        return nodes[name].fingerprint_inputs(file, *rest)

    rest = [slot.default for slot in nodes[name].define_schema().inputs[1:]]
    file = models / folder / "a.safetensors"
    file.write_bytes(b"1")
    first = fingerprint(file.name)
    assert first == fingerprint(file.name)
    file.write_bytes(b"12")
    assert fingerprint(file.name) != first
    assert fingerprint(None) is None and math.isnan(fingerprint("gone.safetensors"))


def test_a_memory_plan_is_made_anew_every_time(nodes):
    assert math.isnan(nodes["VAREditMemoryPlan"].fingerprint_inputs(None, "512", 1, True))


def test_the_demo_model_is_offered_once_the_pack_is_loaded(pack, comfy, models):
    found = {node.define_schema().node_id: node for node in nodes_of(pack, loaded=True)}

    def choices(name):
        return found[name].define_schema().inputs[0].options

    assert choices("VAREditModelLoader") == ["varedit_demo.safetensors", "varedit_demo_refiner.safetensors"]
    assert choices("VAREditTextEncoderLoader") == ["varedit_demo_t5.safetensors"], "not what lies beside it"
    assert choices("VAREditVAELoader") == ["varedit_demo_tokenizer.safetensors"]
    assert comfy["folder_paths"].get_filename_list("loras") == ["varedit_demo_duotone.safetensors"]
    assert "vae/varedit_demo_tokenizer.safetensors" in choices("VAREditFileInfo")
    for name, folder in LOADERS.items():
        for file in choices(name):
            assert Path(comfy["folder_paths"].get_full_path(folder, file)) == ROOT / "demo" / folder / file
    own = models / "vae" / "varedit_demo_tokenizer.safetensors"
    own.touch()
    assert comfy["folder_paths"].get_full_path("vae", own.name) == str(own), "a user's file comes first"
    assert choices("VAREditVAELoader") == [own.name]
    nodes_of(pack, loaded=True)
    assert choices("VAREditVAELoader") == [own.name]


def test_a_pack_without_the_demo_model_offers_the_users_files(pack, models, monkeypatch):
    monkeypatch.setattr(sys.modules["pack_x_varedit.nodes.files"], "DEMO", models / "nothing")
    loader = next(node for node in nodes_of(pack, loaded=True) if node.__name__ == "VAREditVAELoader")
    assert loader.define_schema().inputs[0].options == ["no file found"]


def test_files_in_folders_have_one_name_on_every_system(nodes, comfy, monkeypatch):
    """That of the workflows; the page would miss a file that is listed by another."""
    names = ["flan-t5-xl\\a.safetensors"]  # as on Windows
    monkeypatch.setattr(sys.modules["pack_x_varedit.nodes.files"], "os", SimpleNamespace(sep="\\"))
    monkeypatch.setattr(comfy["folder_paths"], "get_filename_list", lambda folder: names)
    for name, folder in LOADERS.items():
        assert nodes[name].define_schema().inputs[0].options == ["flan-t5-xl/a.safetensors"], folder
    assert "text_encoders/flan-t5-xl/a.safetensors" in nodes["VAREditFileInfo"].define_schema().inputs[0].options


def test_a_node_tells_the_page_and_the_log(pack, comfy, nodes, monkeypatch, caplog):
    tell, node = sys.modules["pack_x_varedit.nodes._api"].tell, nodes["VAREditSampler"]
    server = comfy["server"].PromptServer.instance
    with caplog.at_level(logging.INFO, "VAREdit"):
        tell(node, "outside a run")
        monkeypatch.setattr(node, "hidden", type(sys)("hidden"), raising=False)
        node.hidden.unique_id = "7"
        for text in ("on the node", "and another", "on the node"):
            tell(node, text)
        monkeypatch.setattr(comfy["server"].PromptServer, "instance", None)
        tell(node, "without a page")
    assert server.told == [("7", "on the node"), ("7", "on the node\nand another")], "a text takes the other's place"
    assert caplog.messages == ["outside a run", "on the node", "and another", "without a page"]


def test_the_nodes_that_tell_something_ask_for_their_id(nodes, schemas, comfy):
    hidden = comfy["comfy_api.latest"].io.Hidden
    for name, node in nodes.items():
        tells = "tell(cls" in inspect.getsource(node.execute)
        keeps = [hidden.prompt, hidden.extra_pnginfo] if "graph_of(cls" in inspect.getsource(node.execute) else []
        assert list(schemas[name].hidden) == [*keeps, *([hidden.unique_id] if tells else [])], name


def test_the_files_of_three_folders_are_offered(file_info, models):
    assert file_info.define_schema().inputs[0].options == ["no weight file found"]
    (models / "vae" / "sub").mkdir()
    for name in ("vae/sub/b.safetensors", "diffusion_models/a.pth", "text_encoders/c.safetensors"):
        (models / name).touch()
    (models / "loras" / "d.safetensors").touch()
    assert file_info.define_schema().inputs[0].options == [
        "diffusion_models/a.pth",
        "vae/sub/b.safetensors",
        "text_encoders/c.safetensors",
    ]


def test_the_text_says_what_the_file_is(file_info, models):
    shutil.copy(RECORD, models / "diffusion_models" / "small.safetensors")
    output = file_info.execute("diffusion_models/small.safetensors")
    (text,) = output.result
    assert output.ui.as_dict() == {"text": (text,)}
    assert text.splitlines() == [
        "small.safetensors",
        "is a VAREdit transformer, 4 blocks of width 128 with its VAE",
        "VAREdit transformer:",
        "  depth 4, width 128, heads 2, token bits 56, text width 256,",
        "  text length 512, hidden 512, levels 15",
        "VAREdit VAE:",
        "  bits 14, stem 32, encoder widths 32/64/128/128,",
        "  decoder widths 32/64/128/128, encoder blocks 2,",
        "  decoder blocks 3, stride 8",
        "7.38 million parameters in 360 tensors:",
        "  float8_e4m3fn 6.62 million, uint8 400,510, float16 196,608,",
        "  float32 161,504, int64 28",
        "0.00806 GB",
    ]


def test_a_published_file_is_described(file_info, models, published_file):
    shutil.copy(published_file, models / "diffusion_models")
    (text,) = file_info.execute("diffusion_models/8B-512.pth").result
    assert "8B-512.pth\nis a VAREdit transformer, 8 blocks of width 128\n" in text


def test_large_numbers_are_readable(pack):
    describe = sys.modules["pack_x_varedit.nodes.file_info"].describe
    facts = {
        "is": "a model",
        "parameters": 8_380_000_000,
        "tensors": 7,
        "types": {"float32": 380_000_000, "bfloat16": 8_000_000_000},
        "bytes": 17_520_000_000,
        "metadata": {"a": "b"},
    }
    assert (
        describe("x", facts)
        == "x\nis a model\n8.38 billion parameters in 7 tensors:\n  bfloat16 8 billion, float32 380 million\n17.5 GB"
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "vae/broken.safetensors",
            r"/vae/broken\.safetensors is truncated or not a safetensors file \(.*\); download or convert it again",
        ),
        (
            "vae/unsafe.pth",
            r"/vae/unsafe\.pth is damaged or holds more than tensors, .*; download it again, or convert it .*",
        ),
        (
            "vae/gone.safetensors",
            r"vae/gone\.safetensors is not in ComfyUI's folders diffusion_models, vae, text_encoders; put the file "
            "there, press R and choose it",
        ),
        ("loras/x.safetensors", r"loras/x\.safetensors is not in ComfyUI's folders .*"),
        (
            "no weight file found",
            r"there is no weight file in ComfyUI's folders .*; put the file there, press R and choose it",
        ),
    ],
)
def test_errors_are_one_sentence(file_info, models, file, message):
    shutil.copy(RECORD, models / "loras" / "x.safetensors")
    (models / "vae" / "broken.safetensors").write_bytes(RECORD.read_bytes()[:5000])
    (models / "vae" / "unsafe.pth").write_bytes(b"\x80\x02cos\nsystem\nq\x00.")
    with pytest.raises(ValueError) as error:
        file_info.execute(file)
    assert type(error.value) is ValueError, "ComfyUI would show another class under a long path"
    assert re.fullmatch(f"({re.escape(str(models))})?{message}", str(error.value)), str(error.value)


def test_the_fingerprint_changes_with_the_file(file_info, models):
    file = models / "vae" / "a.safetensors"
    file.write_bytes(b"1")
    first = file_info.fingerprint_inputs("vae/a.safetensors")
    assert first == file_info.fingerprint_inputs("vae/a.safetensors")
    os.utime(file, ns=(1, 1))
    touched = file_info.fingerprint_inputs("vae/a.safetensors")
    file.write_bytes(b"12")
    os.utime(file, ns=(1, 1))
    assert len({first, touched, file_info.fingerprint_inputs("vae/a.safetensors")}) == 3
    assert math.isnan(file_info.fingerprint_inputs(None)) and math.isnan(
        file_info.fingerprint_inputs("vae/gone.safetensors")
    )


def test_nothing_heavy_is_imported_before_the_first_use(models):
    """In a fresh process: loading the pack and declaring its nodes loads of the library its settings and controls
    alone, and beside it torch, which ComfyUI has loaded long before any pack, and what torch brings."""
    code = """
import json
import sys
from pathlib import Path
import torch
brought = set(sys.modules)
import test_nodes
for name in [name for name in sys.modules if name.split(".")[0] == "varedit_core"]:
    del sys.modules[name]
sys.modules.update(test_nodes.modules(Path(sys.argv[1])))
known = set(sys.modules)
for node in test_nodes.nodes_of(test_nodes.load_pack(), loaded=True):
    node.define_schema()
print(json.dumps([sorted(brought), sorted(set(sys.modules) - known)]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(models)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    brought, loaded = json.loads(done.stdout)
    heavy = ("safetensors", "PIL", "transformers", "tokenizers", "comfy", "comfy_execution")
    assert not [name for name in (*brought, *loaded) if name.split(".")[0] in heavy]
    assert not [name for name in loaded if name.split(".")[0] != "pack_x_varedit"], "nothing beside the pack"
    own = [name.removeprefix("pack_x_varedit.") for name in loaded if name.startswith("pack_x_varedit.")]
    controls = [path.stem for path in (ROOT / "varedit_core" / "controls").glob("*.py") if path.stem != "__init__"]
    assert {name.removeprefix("varedit_core.") for name in own if name.startswith("varedit_core")} == {
        "varedit_core", "defaults", "controls", *(f"controls.{name}" for name in controls),
        "files", "files.token_header", "fitting",
        "sampling", "sampling.settings", "tokenizer", "tokenizer.quantizer", "tokenizer.schedule",
    }  # fmt: skip
    assert {name for name in own if name.startswith("nodes.")} == {
        f"nodes.{name}"
        for name in (
            "_api",
            "canvas",
            "change",
            "controls",
            "decode",
            "encode",
            "file_info",
            "files",
            "inputs",
            "loaders",
            "sample_image",
            "sampler",
            "shortcuts",
            "sweep",
            "token_files",
            "tokens",
            "widgets",
        )  # fmt: skip
    }


def test_an_old_comfyui_is_told_so(models, monkeypatch):
    floor = re.search(r'requires-comfyui = ">=(.*)"', read("pyproject.toml"))[1]
    for version, present in (("0.3.75", True), ("0.33.0", False)):
        made = modules(models, version)
        if not present:
            made["comfy_api.latest"] = None
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(
            ImportError, match=rf"^VAREdit needs ComfyUI {re.escape(floor)} or newer; update ComfyUI \(.+\)$"
        ):
            load_pack()
        unload_pack()


def test_only_one_module_knows_the_node_api():
    users = [
        path.name
        for path in (ROOT / "nodes").glob("*.py")
        if re.search(r"^\s*(from|import) comfy_api", path.read_text(), re.M)
    ]
    assert users == ["_api.py"]


def test_every_graph_has_its_api_twin():
    assert WORKFLOWS
    assert [path.name for path in WORKFLOWS] == [
        path.name for path in sorted((ROOT / "workflows" / "api").glob("*.json"))
    ]


def runs(graph: dict) -> list[dict]:
    """A graph's nodes but its notes."""
    return [node for node in graph["nodes"] if node["type"] not in NOTES]


def widget_values(node: dict, schema: Schema | None) -> dict:
    """The values of a node's widgets by their names. A seed is followed by what becomes of it after a run."""
    slots = {slot.id: slot for slot in schema.inputs} if schema else {}
    names = []
    for slot in (slot for slot in node["inputs"] if "widget" in slot):
        names.append(slot["name"])
        seed = (
            slots[slot["name"]].control_after_generate
            if slot["name"] in slots and slots[slot["name"]].kind == "INT"
            else None
        )
        names += ["control_after_generate"] if seed else []
    assert schema is None or len(node["widgets_values"]) == len(names)
    return dict(zip(names, node["widgets_values"]))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_graphs_fit_the_nodes(path, schemas, pack):
    graph = json.loads(path.read_text())
    assert graph["version"] == 0.4
    assert graph["last_node_id"] == max(node["id"] for node in graph["nodes"])
    assert graph["last_link_id"] == max((link[0] for link in graph["links"]), default=0)
    ours = [node for node in graph["nodes"] if node["type"] in schemas]
    assert ours and not [node for node in runs(graph) if node["type"].startswith("VAREdit") and node not in ours]
    version = re.search(r'^version = "(.*)"', read("pyproject.toml"), re.M)[1]
    for node in ours:
        schema = schemas[node["type"]]
        properties = {key: value for key, value in node["properties"].items() if key != "models"}
        assert properties == {"cnr_id": "varedit", "ver": version, "Node name for S&R": node["type"]}
        # The page keeps a node's sockets before its widgets; within each the order is the schema's. A graph may lack
        # the last ones, which have come since it was made.
        for widgets in (False, True):
            has = [(slot["name"], slot["type"]) for slot in node["inputs"] if ("widget" in slot) is widgets]
            slots = [slot for slot in schema.inputs if has_widget(slot) is widgets]
            assert has == [(slot.id, slot.kind) for slot in slots[: len(has)]]
            assert all(slot.optional for slot in slots[len(has) :]), "graphs lack optional inputs alone"
        assert [(slot["name"], slot["type"]) for slot in node["outputs"]] == [
            (slot.display_name, slot.kind) for slot in schema.outputs
        ]
        values = widget_values(node, schema)
        for slot in (slot for slot in schema.inputs if slot.id in values):
            if slot.kind in ("INT", "FLOAT"):
                assert within(slot, values[slot.id])
            elif slot.kind == "COMBO" and not lists_files(slot):
                assert values[slot.id] in slot.options
        for model in node["properties"].get("models", ()):
            assert model["name"] in values.values() and model["directory"] in FOLDERS
            assert model["url"].startswith("https://")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_api_twin_is_the_same_graph(path, schemas):
    graph, twin = json.loads(path.read_text()), json.loads((path.parent / "api" / path.name).read_text())
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    nodes = {str(node["id"]): node for node in runs(graph)}
    assert {key: node["class_type"] for key, node in twin.items()} == {key: node["type"] for key, node in nodes.items()}
    for key, node in nodes.items():
        values = widget_values(node, schemas.get(node["type"]))
        linked = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        expected = {name: value for name, value in values.items() if name != "control_after_generate"} | linked
        assert twin[key]["inputs"] == expected


def test_a_prefix_of_tokens(pack):
    named = sys.modules["pack_x_varedit.nodes.token_files"].named
    now = datetime.now()
    dated = {
        "a/%date:yyyy-MM-dd%": f"a/{now:%Y-%m-%d}",
        "%date:yy%_%year%": f"{now:%y}_%year%",
        "100% b/c.d": "100% b/c.d",
    }
    for prefix, wanted in dated.items():
        assert named(prefix) == wanted
    for prefix in ("", ".", "a/", "a/..", "a\\", "a\0b", "a\udcff", "a/ . "):
        with pytest.raises(ValueError, match="names no file; write one such as varedit/edit"):
            named(prefix)
    with pytest.raises(ValueError, match="^ComfyUI replaces %KSampler.seed% for its own save nodes alone"):
        named("a_%KSampler.seed%")


@pytest.mark.parametrize("key", ["mask", "noise_mask"])
def test_a_mask_a_little_beyond_is_a_mask(pack, key):
    """Whatever carries it: in 8 bits, what is above 1 would begin anew at 0."""
    given = importlib.import_module("pack_x_varedit.nodes.adapters.given")
    mask, x = torch.full((1, 4, 4), 1.004), torch.zeros(1, 2, 3, 3)
    if key == "mask":
        ((_, facts),) = given.checked_conditioning([[x, {key: mask, "strength": 0.5}]], "positive")
        assert facts["strength"] == 0.5
    else:
        facts = given.checked_latent({"samples": x, key: mask})
    assert facts[key].max() == 1 and mask.max() > 1
