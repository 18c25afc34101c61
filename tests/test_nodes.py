"""The nodes and all that is shipped beside them, without ComfyUI: a small stand-in takes its place."""

import asyncio
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from support import GOLDEN, ROOT

RECORD = GOLDEN / "patchify_256.safetensors"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LANGUAGES = ("en", "zh")


class Slot(SimpleNamespace):
    """An input or output as it was declared; anything the node API does not have is a mistake here too."""

    def __init__(self, kind: str, id: str, *, display_name=None, tooltip=None, options=None) -> None:
        super().__init__(kind=kind, id=id, display_name=display_name, tooltip=tooltip, options=options)


class Schema(SimpleNamespace):
    def __init__(
        self, *, node_id, display_name, category, description, inputs, outputs, search_aliases=(), is_output_node=False
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})


class NodeOutput(SimpleNamespace):
    def __init__(self, *result, ui=None) -> None:
        super().__init__(result=result, ui=ui)


def kind(name: str) -> SimpleNamespace:
    return SimpleNamespace(Input=lambda id, **kw: Slot(name, id, **kw), Output=lambda id, **kw: Slot(name, id, **kw))


def stand_in(models, version: str = "0.33.0") -> dict[str, ModuleType]:
    """The modules of ComfyUI that the pack imports; `models` is the folder of weight files."""
    api, comfy_api, folder_paths, comfyui_version = map(
        ModuleType, ("comfy_api.latest", "comfy_api", "folder_paths", "comfyui_version")
    )
    comfyui_version.__version__ = version
    api.ComfyExtension = type("ComfyExtension", (), {})
    api.io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=Schema,
        NodeOutput=NodeOutput,
        Combo=kind("COMBO"),
        String=kind("STRING"),
    )
    api.ui = SimpleNamespace(PreviewText=lambda text: {"text": (text,)})
    folder_paths.get_filename_list = lambda folder: sorted(
        str(p.relative_to(models / folder)) for p in (models / folder).rglob("*") if p.is_file()
    )
    folder_paths.get_full_path = lambda folder, name: (
        str(models / folder / name) if (models / folder / name).is_file() else None
    )
    return {module.__name__: module for module in (api, comfy_api, folder_paths, comfyui_version)}


def load_pack():
    """The pack as ComfyUI imports it: by path, under a name of ComfyUI's choice."""
    spec = importlib.util.spec_from_file_location(
        "pack_x_varedit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unload_pack() -> None:
    for name in [name for name in sys.modules if name.startswith("pack_x_varedit")]:
        del sys.modules[name]


@pytest.fixture
def models(tmp_path):
    for folder in ("diffusion_models", "vae", "text_encoders"):
        (tmp_path / folder).mkdir()
    return tmp_path


@pytest.fixture
def pack(models, monkeypatch):
    for name, module in stand_in(models).items():
        monkeypatch.setitem(sys.modules, name, module)
    yield load_pack()
    unload_pack()


def nodes_of(pack) -> list[type]:
    async def ask():
        return await (await pack.comfy_entrypoint()).get_node_list()

    return asyncio.run(ask())


@pytest.fixture
def nodes(pack) -> dict[str, type]:
    return {node.define_schema().node_id: node for node in nodes_of(pack)}


@pytest.fixture
def schemas(nodes) -> dict[str, Schema]:
    return {name: node.define_schema() for name, node in nodes.items()}


@pytest.fixture
def file_info(nodes) -> type:
    return nodes["VAREditFileInfo"]


def parameters(method) -> list[str]:
    return list(inspect.signature(method).parameters)


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_every_node_keeps_the_contract(nodes, schemas):
    assert schemas
    for name, schema in schemas.items():
        assert (
            re.fullmatch(r"VAREdit[A-Za-z]+", name)
            and schema.category == "VAREdit"
            and schema.display_name.startswith("VAREdit ")
        )
        assert schema.description.endswith(".") and schema.search_aliases
        ids = [slot.id for slot in schema.inputs]
        assert ids == parameters(nodes[name].execute)
        assert ids == parameters(nodes[name].fingerprint_inputs)
        for slot in (*schema.inputs, *schema.outputs):
            assert slot.tooltip and slot.tooltip.endswith("."), f"{name}.{slot.id} has no tooltip"


def test_every_node_has_a_help_page(pack, schemas):
    web = ROOT / pack.WEB_DIRECTORY
    assert {page.stem for page in (web / "docs").glob("*.md")} == set(schemas)
    for name, schema in schemas.items():
        for page in (web / "docs" / f"{name}.md", web / "docs" / name / "zh.md"):
            text = page.read_text(encoding="utf-8")
            assert text.startswith("# VAREdit ") and all(
                f"| `{slot.id}` |" in text for slot in (*schema.inputs, *schema.outputs)
            ), page
        assert (web / "docs" / f"{name}.md").read_text().startswith(f"# {schema.display_name}\n")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_translations_cover_the_schemas(schemas, language):
    texts = json.loads(read("locales", language, "nodeDefs.json"))
    assert set(texts) == set(schemas)
    for name, schema in schemas.items():
        assert set(texts[name]["inputs"]) == {slot.id for slot in schema.inputs}
        assert list(texts[name]["outputs"]) == [str(index) for index in range(len(schema.outputs))]
        slots = [*texts[name]["inputs"].values(), *texts[name]["outputs"].values()]
        shown = [texts[name]["description"], *(slot["tooltip"] for slot in slots)]
        if language == "en":
            assert texts[name]["display_name"] == schema.display_name
            assert [slot["name"] for slot in slots] == [
                slot.display_name or slot.id for slot in (*schema.inputs, *schema.outputs)
            ]
            assert shown == [schema.description, *(slot.tooltip for slot in (*schema.inputs, *schema.outputs))]
        else:
            assert all(re.search(r"[\u4e00-\u9fff]", text) for text in shown)


def test_the_page_script_and_the_node_list_name_the_nodes(schemas):
    assert json.loads(read("node_list.json")) == {name: schema.display_name for name, schema in schemas.items()}
    for script in (ROOT / "web").glob("*.js"):
        assert set(re.findall(r'comfyClass !== "(\w+)"', script.read_text())) <= set(schemas), script


def test_the_files_of_three_folders_are_offered(file_info, models):
    assert file_info.define_schema().inputs[0].options == ["no weight file found"]
    (models / "vae" / "sub").mkdir()
    for name in ("vae/sub/b.safetensors", "diffusion_models/a.pth", "text_encoders/c.safetensors"):
        (models / name).touch()
    (models / "loras").mkdir()
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
    assert output.ui == {"text": (text,)}
    assert text.splitlines() == [
        "small.safetensors",
        "is a VAREdit transformer, 4 blocks of width 128 with its tokenizer",
        "VAREdit transformer:",
        "  depth 4, width 128, heads 2, token bits 56, text width 256,",
        "  text length 512, hidden 512, levels 15",
        "VAREdit tokenizer:",
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
            r"vae/gone\.safetensors is not in ComfyUI's folders diffusion_models, vae, text_encoders; put the file there, press R and choose it",
        ),
        ("loras/x.safetensors", r"loras/x\.safetensors is not in ComfyUI's folders .*"),
        (
            "no weight file found",
            r"there is no weight file in ComfyUI's folders .*; put the file there, press R and choose it",
        ),
    ],
)
def test_errors_are_one_sentence(file_info, models, file, message):
    (models / "loras").mkdir()
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
    """In a fresh process: importing the pack and declaring its nodes loads neither torch nor the library."""
    code = """
import json
import sys
from pathlib import Path
import test_nodes
sys.modules.update(test_nodes.stand_in(Path(sys.argv[1])))
for node in test_nodes.nodes_of(test_nodes.load_pack()):
    node.define_schema()
print(json.dumps(list(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(models)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "pack_x_varedit.nodes.file_info" in loaded
    assert not [
        name
        for name in loaded
        if name.split(".")[0] in ("torch", "numpy", "safetensors", "PIL", "transformers") or "varedit_core" in name
    ]


def test_an_old_comfyui_is_told_so(models, monkeypatch):
    floor = re.search(r'requires-comfyui = ">=(.*)"', read("pyproject.toml"))[1]
    for version, present in (("0.3.75", True), ("0.33.0", False)):
        modules = stand_in(models, version)
        if not present:
            modules["comfy_api.latest"] = None
        for name, module in modules.items():
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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_graphs_fit_the_nodes(path, schemas, pack):
    graph = json.loads(path.read_text())
    assert graph["version"] == 0.4
    assert graph["last_node_id"] == max(node["id"] for node in graph["nodes"])
    assert graph["last_link_id"] == max((link[0] for link in graph["links"]), default=0)
    assert {node["type"] for node in graph["nodes"]} <= set(schemas)
    version = re.search(r'^version = "(.*)"', read("pyproject.toml"), re.M)[1]
    for node in (node for node in graph["nodes"] if node["type"] in schemas):
        schema = schemas[node["type"]]
        assert node["properties"] == {"cnr_id": "varedit", "ver": version, "Node name for S&R": node["type"]}
        assert [slot["name"] for slot in node["inputs"]] == [slot.id for slot in schema.inputs]
        assert [(slot["name"], slot["type"]) for slot in node["outputs"]] == [
            (slot.display_name, slot.kind) for slot in schema.outputs
        ]
        widgets = [slot for slot in node["inputs"] if "widget" in slot]
        assert len(node["widgets_values"]) == len(widgets)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_api_twin_is_the_same_graph(path):
    graph, twin = json.loads(path.read_text()), json.loads((path.parent / "api" / path.name).read_text())
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    expected = {}
    for node in graph["nodes"]:
        values = iter(node["widgets_values"])
        inputs = {slot["name"]: next(values) for slot in node["inputs"] if "widget" in slot}
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link")}
        expected[str(node["id"])] = (node["type"], inputs)
    assert {key: (node["class_type"], node["inputs"]) for key, node in twin.items()} == expected
