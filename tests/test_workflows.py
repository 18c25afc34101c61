"""The workflows that are shipped: whole and readable as files, and run by a real ComfyUI with the demo model."""

import copy
import json
import re
import shutil
import urllib.request
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import GOLDEN, ROOT

from benchmarks.real_size import published_shapes, random_tensor
from varedit_core.defaults import PUBLISHED_VAES
from varedit_core.files.checkpoints import TOKENIZER, canonical
from varedit_core.files.shards import numbered
from varedit_core.files.weights import open_weights
from varedit_core.text.t5 import T5Config, T5Encoder

FOLDER = ROOT / "workflows"
GRAPHS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
TWINS = {name: json.loads((FOLDER / "api" / f"{name}.json").read_text()) for name in GRAPHS}
BLUEPRINT = json.loads((ROOT / "subgraphs" / "VAREdit Edit Picture.json").read_text())
SCHEMAS = json.loads((ROOT / "tests" / "schemas.json").read_text())
INFO = "file_info"  # one node that looks at a file; it edits nothing
EDITS = [name for name in GRAPHS if name != INFO]
LARGER = "outpaint"  # the result is larger than its source, at the same scale
TEXT = "text_to_image_published"  # it makes pictures of words alone
PUBLISHED = [name for name in EDITS if "published" in name]
DEMO = [name for name in EDITS if name not in PUBLISHED]
NOTE, SOURCE = "MarkdownNote", "VAREditSampleImage"
ENCODER = "flan-t5-xl/model-00001-of-00002.safetensors"
TITLE, THUMBNAIL = 30, 60_000  # pixels above a node; bytes
LOADERS = {
    "VAREditModelLoader": "model_name",
    "VAREditTextEncoderLoader": "text_encoder_name",
    "VAREditVAELoader": "vae_name",
}
FOLDERS = ("diffusion_models", "text_encoders", "vae")
"""Of the loaders' files."""
SMALL = {PUBLISHED_VAES["8B"]: ("patchify_256.safetensors", 56), PUBLISHED_VAES["2B"]: ("plain_256.safetensors", 32)}
"""A recording with a small VAE of the same layout, and the bits of its tokens."""

every_graph = pytest.mark.parametrize("name", GRAPHS)
every_edit = pytest.mark.parametrize("name", EDITS)


def running(graph: dict) -> list[dict]:
    """A graph's nodes but its notes, which are the page's."""
    return [node for node in graph["nodes"] if node["type"] != NOTE]


def of_type(twin: dict, *kinds: str) -> dict[str, dict]:
    """The inputs of a twin's nodes of some types, by the nodes' ids."""
    return {key: node["inputs"] for key, node in twin.items() if node["class_type"] in kinds}


def widgets(node: dict) -> dict:
    """A node's widget values by name, as the page sends them.

    A seed is followed by what becomes of it after a run, a box by its four numbers.
    """
    values, found = iter(node["widgets_values"]), {}
    for slot in node["inputs"]:
        if "widget" not in slot:
            continue
        found[slot["name"]] = value = next(values)
        if slot["name"] == "seed":
            assert next(values) == "fixed", "a shared graph gives the same picture every time"
        if slot["type"] == "BOUNDING_BOX":
            assert [next(values) for _ in range(4)] == list(value.values())
    assert list(values) == []
    return found


def as_twin(graph: dict) -> dict:
    """A graph in API format, without titles."""
    origins = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": widgets(node)
            | {slot["name"]: origins[slot["link"]] for slot in node["inputs"] if slot["link"] is not None},
        }
        for node in running(graph)
    }


def unpacked(blueprint: dict) -> dict:
    """A blueprint in API format: its nodes with their own values, between the pack's picture and one to save."""
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    slots = {(node["id"], i): slot["name"] for node in subgraph["nodes"] for i, slot in enumerate(node["inputs"])}
    sources = {-10: "load"} | {node["id"]: str(node["id"]) for node in subgraph["nodes"]}
    twin = {str(node["id"]): {"class_type": node["type"], "inputs": widgets(node)} for node in subgraph["nodes"]}
    twin["load"] = {"class_type": SOURCE, "inputs": {"picture": "scene.png"}}
    for link in subgraph["links"]:
        origin = [sources[link["origin_id"]], link["origin_slot"]]
        if link["target_id"] == -20:
            twin["save"] = {"class_type": "SaveImage", "inputs": {"images": origin, "filename_prefix": "blueprint"}}
        elif link["origin_id"] != -10 or link["type"] == "IMAGE":
            twin[str(link["target_id"])]["inputs"][slots[link["target_id"], link["target_slot"]]] = origin
    return twin


@every_graph
def test_ids_and_links_agree(name):
    graph = GRAPHS[name]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["version"] == 0.4 and len(nodes) == len(graph["nodes"])
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == len(graph["links"])
    assert [link[0] for link in graph["links"]] == list(range(1, len(graph["links"]) + 1))
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    for number, origin, out, target, into, kind in graph["links"]:
        source, sink = nodes[origin]["outputs"][out], nodes[target]["inputs"][into]
        assert number in source["links"] and sink["link"] == number
        assert source["type"] == sink["type"] == kind or "*" in (source["type"], sink["type"])
        assert nodes[origin]["order"] < nodes[target]["order"]
    held = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    given = [link for node in nodes.values() for slot in node["outputs"] for link in slot["links"] or ()]
    assert sorted(held) == sorted(given) == [link[0] for link in graph["links"]]


def test_ids_of_graphs_are_their_own():
    assert len({graph["id"] for graph in (*GRAPHS.values(), BLUEPRINT)}) == len(GRAPHS) + 1


@every_graph
def test_the_api_twin_is_what_the_page_would_send(name):
    twin = {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in TWINS[name].items()}
    assert twin == as_twin(GRAPHS[name])
    titles = {str(node["id"]): node["title"] for node in running(GRAPHS[name]) if "title" in node}
    assert titles.items() <= {key: node["_meta"]["title"] for key, node in TWINS[name].items()}.items()


@pytest.mark.parametrize("twin", [*TWINS.values(), unpacked(BLUEPRINT)], ids=[*TWINS, "blueprint"])
def test_the_inputs_of_our_nodes_are_those_of_the_schemas(twin):
    ours = {key: node for key, node in twin.items() if node["class_type"].startswith("VAREdit")}
    assert ours
    for node in ours.values():
        slots = {slot["id"]: slot for slot in SCHEMAS[node["class_type"]]["inputs"]}
        assert node["inputs"].keys() <= slots.keys()
        assert {key for key, slot in slots.items() if not slot.get("optional")} <= node["inputs"].keys()
        for key, value in node["inputs"].items():
            assert "options" not in slots[key] or value in slots[key]["options"]


@every_graph
def test_properties_tell_where_the_nodes_are_from(name):
    for node in running(GRAPHS[name]):
        ours = node["type"].startswith("VAREdit")
        properties = {key: value for key, value in node["properties"].items() if key != "models"}
        version = "0.1.0" if ours else "0.33.0"
        pack = "varedit" if ours else "comfy-core"
        assert properties == {"cnr_id": pack, "ver": version, "Node name for S&R": node["type"]}


@every_edit
def test_files_that_are_not_bundled_say_where_they_are(name):
    """The page offers a download where a model's name is the chosen value and its address is of a file."""
    bundled = {path.name for path in (ROOT / "demo").rglob("*.safetensors")}
    for node in running(GRAPHS[name]):
        chosen = [value for value in widgets(node).values() if str(value).endswith((".safetensors", ".pth"))]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == [value for value in chosen if value not in bundled]
        for model in models:
            assert model.keys() == {"name", "url", "directory"}
            assert model["url"].startswith("https://huggingface.co/") and "/resolve/main/" in model["url"]
            assert model["url"].endswith("/" + model["name"].split("/")[-1])
            (note,) = (node["widgets_values"][0] for node in GRAPHS[name]["nodes"] if node["type"] == NOTE)
            assert model["url"] in note and f"`models/{model['directory']}" in note.replace("| `", "| `models/")


@every_edit
def test_a_note_explains_the_workflow(name):
    (note,) = (node for node in GRAPHS[name]["nodes"] if node["type"] == NOTE)
    (text,) = note["widgets_values"]
    assert text.startswith("# ") and all(
        f"\n## {part}\n" in text for part in ("What to change", "Files", "What to expect")
    )
    assert note["pos"][0] + note["size"][0] < min(node["pos"][0] for node in running(GRAPHS[name]))


@every_graph
def test_the_layout_is_tidy(name):
    """Nothing overlaps, links go to the right or down, and every group holds its nodes whole."""
    nodes = {node["id"]: node for node in GRAPHS[name]["nodes"]}
    boxes = {
        key: (
            node["pos"][0],
            node["pos"][1] - TITLE,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for key, node in nodes.items()
    }
    for a, b in combinations(boxes.values(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for _, origin, _, target, *_ in GRAPHS[name]["links"]:
        assert nodes[origin]["pos"][0] <= nodes[target]["pos"][0]
    frames = [(x, y, x + wide, y + high) for x, y, wide, high in (g["bounding"] for g in GRAPHS[name]["groups"])]
    for a, b in combinations(frames, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    if frames:
        for key, box in boxes.items():
            inside = [f for f in frames if f[0] <= box[0] and f[1] <= box[1] and box[2] <= f[2] and box[3] <= f[3]]
            assert len(inside) == (nodes[key]["type"] != NOTE)


@every_graph
def test_a_thumbnail_lies_beside_it(name):
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size <= THUMBNAIL
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and 400 <= picture.width <= 480


@pytest.mark.parametrize("name", DEMO)
def test_the_demo_model_gets_its_own_settings(name):
    twin = TWINS[name]
    assert {inputs["guidance"] for inputs in of_type(twin, "VAREditSampler", "VAREditSweep").values()} == {2.0}
    assert {inputs["size"] for inputs in of_type(twin, "VAREditSourceEncode").values()} == {"256"}
    for kind, key in LOADERS.items():
        (loader,) = of_type(twin, kind).values()
        assert loader[key].startswith("varedit_demo")
    assert of_type(twin, SOURCE), "it runs without a picture of the user's"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != TEXT])
def test_the_published_weights_get_their_size(name):
    size = name.split("_")[1]
    assert {inputs["size"] for inputs in of_type(TWINS[name], "VAREditSourceEncode", "VAREditMemoryPlan").values()} == {
        size
    }
    assert {inputs["guidance"] for inputs in of_type(TWINS[name], "VAREditSampler").values()} == {3.0}
    model = "2B" if "2b" in name else "8B"
    assert [*files(TWINS[name])] == [f"{model}-{size}.pth", ENCODER, PUBLISHED_VAES[model]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_page_offers_to_download_is_all_that_a_graph_needs(name):
    """The page lists a loader's file where it is not there, with the address that the node gives for that very name,
    and downloads what is of a hub and of a kind that it knows; nothing else in `models` is ever listed."""
    wanted = files(TWINS[name])
    listed = [model for node in running(GRAPHS[name]) for model in node["properties"].get("models", [])]
    assert {model["name"]: model["directory"] for model in listed} == wanted and len(listed) == len(wanted) == 3
    for model in listed:
        address = re.fullmatch(
            r"https://huggingface\.co/[\w-]+/[\w-]+/resolve/main/([\w.-]+\.(safetensors|pth))", model["url"]
        )
        assert address and address[1] == model["name"].split("/")[-1] and "\\" not in model["name"]
        folder = "/".join([model["directory"], *model["name"].split("/")[:-1]])
        (note,) = (node["widgets_values"][0] for node in GRAPHS[name]["nodes"] if node["type"] == NOTE)
        assert f"| `{folder}` | [{address[1]}]({model['url']}) |" in note
        assert numbered(Path(address[1]))[0].name == address[1], "a model in one file, or its first"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != TEXT])
def test_a_note_has_the_measured_figures(name):
    cases = json.loads((ROOT / "benchmarks" / "comfyui_speed_h200.json").read_text())["cases"]
    model, size = next(iter(files(TWINS[name]))).removesuffix(".pth").split("-")
    chosen = {"way": "default", "model": model, "size": size, "edit": "plain", "limit_gb": 0}
    (case,) = (case for case in cases if chosen.items() <= case.items())
    (note,) = (node["widgets_values"][0] for node in GRAPHS[name]["nodes"] if node["type"] == NOTE)
    for figure in (f" {case['all']:.2f} s for an edit", f" {case['other_seed']:.2f} s for another seed"):
        assert figure in note
    assert f" {case['taken_gb']:.1f} GB of GPU memory" in note


def test_the_text_to_image_graph_has_infinitys_settings():
    twin = TWINS[TEXT]
    (sampler,) = of_type(twin, "VAREditSampler").values()
    (empty,) = of_type(twin, "VAREditEmptySource").values()
    assert (sampler["guidance"], sampler["temperature"]) == (3.0, 0.5)
    assert {inputs["size"] for inputs in of_type(twin, "VAREditEmptySource", "VAREditMemoryPlan").values()} == {"1024"}
    (loader,) = of_type(twin, "VAREditModelLoader").values()
    assert loader["model_name"].startswith("infinity_") and loader["kind"] == "auto" and empty["batch_size"] == 1


def test_the_blueprint_is_one_node_with_what_one_changes():
    (node,), (subgraph,) = BLUEPRINT["nodes"], BLUEPRINT["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and BLUEPRINT["links"] == []
    assert node["title"] == subgraph["name"] == "VAREdit: edit picture"
    assert subgraph["category"] == "VAREdit" and subgraph["description"]
    names = [slot["name"] for slot in node["inputs"]]
    assert names == ["image", "instruction", "size", "seed", "guidance", "model", "text_encoder", "vae"]
    assert [(slot["name"], slot["type"]) for slot in subgraph["inputs"]] == [
        (s["name"], s["type"]) for s in node["inputs"]
    ]
    assert [slot["name"] for slot in subgraph["outputs"]] == [slot["name"] for slot in node["outputs"]] == ["image"]
    inner = {str(inside["id"]): widgets(inside) for inside in subgraph["nodes"]}
    promoted = node["properties"]["proxyWidgets"]
    assert len(promoted) == len([slot for slot in node["inputs"] if "widget" in slot])
    assert all(name in inner[key] for key, name in promoted)


def test_the_links_of_the_blueprint_agree():
    (subgraph,) = BLUEPRINT["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    assert len(links) == len(subgraph["links"]) == subgraph["state"]["lastLinkId"]
    assert subgraph["state"]["lastNodeId"] == max(nodes)
    for number, link in links.items():
        origin, target = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        outer = subgraph["inputs"][link["origin_slot"]] if origin is None else None
        assert number in (outer["linkIds"] if outer else origin["outputs"][link["origin_slot"]]["links"])
        end = target["inputs"][link["target_slot"]] if target else subgraph["outputs"][link["target_slot"]]
        assert number == end["link"] if target else number in end["linkIds"]
        assert end["type"] == link["type"]


# With ComfyUI: the demo model and the pictures lie in the pack.


def enlarger() -> dict[str, torch.Tensor]:
    """An upscale model (ESRGAN, four times) that repeats every pixel: some convolutions hand on, others add 0."""
    state = {}

    def add(name: str, outputs: int, inputs: int, hands_on: bool = True) -> None:
        weight = torch.zeros(outputs, inputs, 3, 3)
        weight[range(3), range(3), 1, 1] = float(hands_on)
        state.update({f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)})

    for name in ("conv_first", "conv_up1", "conv_up2", "conv_hr", "conv_last"):
        add(name, 3, 3)
    add("conv_body", 3, 3, hands_on=False)
    for block in range(1, 4):
        for i in range(1, 6):
            add(f"body.0.rdb{block}.conv{i}", 32 if i < 5 else 3, 3 + 32 * (i - 1), hands_on=False)
    return state


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    ((upscaler,),) = (inputs.values() for inputs in of_type(TWINS["edit_then_upscale"], "UpscaleModelLoader").values())
    (base / "models" / "upscale_models").mkdir(parents=True)
    save_file(enlarger(), base / "models" / "upscale_models" / upscaler)
    with comfyui.server(base) as started:
        yield started


def levels(path) -> np.ndarray:
    """A picture's levels, [y, x, 3], as numbers that can be subtracted."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


FINISHED: dict[tuple, dict] = {}
"""Runs' history entries by server and graph: most graphs are judged by several tests, and run once."""


def pictures(server, twin: dict, kinds: tuple[str, ...] = ("SaveImage",)) -> list[np.ndarray]:
    """Run a twin, if it was not run before, and read the pictures that its nodes of these types show."""
    key = (server.url, json.dumps(twin, sort_keys=True))
    done = FINISHED[key] = FINISHED.get(key) or server.run(twin, 300)
    assert done["status"]["status_str"] == "success", done["status"]
    files = [file for key in of_type(twin, *kinds) for file in done["outputs"][key]["images"]]
    return [levels(server.base / file["type"] / file["subfolder"] / file["filename"]) for file in files]


def source(server, twin: dict) -> np.ndarray:
    """The first picture that a twin takes, as ComfyUI reads it."""
    load = next(node for node in twin.values() if node["class_type"] == SOURCE)
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "source"}}
    return pictures(server, {"1": load, "2": save})[0]


def changed(twin: dict, **inputs) -> dict:
    """A twin with other values where its nodes have inputs of these names."""
    twin = json.loads(json.dumps(twin))
    for node in twin.values():
        node["inputs"] |= {key: value for key, value in inputs.items() if key in node["inputs"]}
    return twin


def without(twin: dict, kind: str, name: str) -> dict:
    """A twin in which an input is not connected."""
    twin = json.loads(json.dumps(twin))
    for inputs in of_type(twin, kind).values():
        del inputs[name]
    return twin


def test_the_page_lists_the_workflows_and_the_blueprint(server):
    assert sorted(server.get("/workflow_templates")["varedit"]) == sorted(GRAPHS)
    (key,) = (key for key, entry in server.get("/global_subgraphs").items() if "varedit" in entry["info"]["node_pack"])
    assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == BLUEPRINT


@every_graph
def test_the_page_can_open_the_workflow_and_its_thumbnail(server, name):
    """ComfyUI serves the first folder that a pack has of example_workflows, example, examples, workflow, workflows."""
    address = f"/api/workflow_templates/varedit/{name}"
    assert server.get(f"{address}.json") == GRAPHS[name]
    with urllib.request.urlopen(f"{server.url}{address}.jpg", timeout=30) as answer:
        assert answer.read() == (FOLDER / f"{name}.jpg").read_bytes()


@pytest.mark.parametrize("name", [name for name in DEMO if name != LARGER])
def test_the_workflow_runs_and_changes_the_picture(server, name):
    twin = TWINS[name]
    first, before = pictures(server, twin)[0], source(server, twin)
    factor = first.shape[0] // before.shape[0]
    assert first.shape == (before.shape[0] * factor, before.shape[1] * factor, 3) and factor in (1, 4)
    error = np.abs(first[::factor, ::factor] - before).max(axis=2)
    assert (error > 60).mean() > 0.02, "more than the tokenizer does to it"


def test_a_mask_leaves_the_rest_as_it_was(server):
    (result,), before = pictures(server, TWINS["masked_edit"]), source(server, TWINS["masked_edit"])
    error = np.abs(result - before)
    assert error[:, :195].max() == 0, "where the mask is 0"
    assert error[:, 260:].mean() > 20, "where it is 1"


def test_a_mask_reaches_the_sampler_too(server):
    twin = TWINS["masked_edit"]
    (result,), (free,) = pictures(server, twin), pictures(server, without(twin, "VAREditSampler", "mask"))
    assert (free != result).any(), "what the sampler locks, decoding afterwards does not"


def test_the_weaker_an_edit_the_nearer_it_is_to_its_source(server):
    twin = TWINS["strength"]
    before, (shipped,) = source(server, twin), pictures(server, twin)
    free, weak = (pictures(server, changed(twin, strength=s))[0] for s in (1.0, 0.3))
    far = [np.abs(picture - before).mean() for picture in (free, shipped, weak)]
    assert far[0] > far[1] + 2 > far[2] + 4, far
    (plain,) = pictures(server, without(twin, "VAREditSampler", "controls"))
    assert (plain == free).all(), "neutral controls are none"


def test_an_edit_that_found_its_own_mask_keeps_the_rest(server):
    twin = TWINS["auto_mask"]
    (result,), (mask,), before = pictures(server, twin), pictures(server, twin, ("MaskPreview",)), source(server, twin)
    inside = mask[:, :, 0] > 0
    rows, columns = np.nonzero(inside)
    assert 150 < rows.min() and 80 < columns.min() and columns.max() < 176 and 1000 < inside.sum() < 6000
    error = np.abs(result - before).max(axis=2)
    assert error[~inside].max() == 0 and error[inside].mean() > 60


def test_two_regions_follow_their_own_instructions(server):
    twin = TWINS["two_regions"]
    (result,), (mask,), before = pictures(server, twin), pictures(server, twin, ("MaskPreview",)), source(server, twin)
    error = np.abs(result - before).max(axis=2)
    assert error[mask[:, :, 0] == 0].max() == 0, "outside of both"
    pink, purple = (np.abs(result - colour).max(axis=2) < 60 for colour in ((255, 119, 182), (130, 40, 200)))
    assert pink[150:].sum() > 1000 and not pink[80:150].any()
    assert purple[:80, 150:].sum() == purple.sum() > 150
    (alone,) = pictures(server, without(twin, "VAREditSampler", "regions"))
    assert np.abs(alone - before)[150:].mean() < 3, "the square is the second region's"


def test_creative_curves_make_variations_differ_more(server):
    twin = TWINS["curves"]

    def spread(results: list[np.ndarray]) -> float:
        return np.mean([np.abs(a - b).mean() for a, b in combinations(results, 2)])

    creative, balanced = (pictures(server, changed(twin, preset=name)) for name in ("creative", "balanced"))
    assert len(creative) == 4 and spread(creative) > 1.2 * spread(balanced)
    plain = pictures(server, without(twin, "VAREditSampler", "curves"))
    assert all((a == b).all() for a, b in zip(plain, balanced, strict=True)), "balanced changes nothing"


def test_the_crop_is_put_back_inside_its_mask(server):
    twin = TWINS["crop_and_stitch"]
    (result,), before = pictures(server, twin), source(server, twin)
    (place,), (stitched,) = (of_type(twin, kind).values() for kind in ("MaskComposite", "VAREditStitch"))
    part = twin[place["source"][0]]["inputs"]
    inside = np.zeros(result.shape[:2], dtype=bool)
    inside[place["y"] : place["y"] + part["height"], place["x"] : place["x"] + part["width"]] = True
    error = np.abs(result - before).max(axis=2)
    assert error[~inside].max() == 0 and error[inside].mean() > 10
    (hard,) = pictures(server, changed(twin, feather=0))
    error = np.abs(hard - result).max(axis=2)
    x, y, feather = place["x"], place["y"] + part["height"] // 2, stitched["feather"]
    assert error[y, x : x + 3].max() > 10, "the edit appears softly"
    assert error[y - 9 : y + 9, x + feather : x + part["width"] - feather].max() == 0


def test_an_extended_picture_keeps_the_old_one_and_gets_what_was_asked_for(server):
    (result,), before = pictures(server, TWINS[LARGER]), source(server, TWINS[LARGER])
    (asked,) = of_type(TWINS[LARGER], "VAREditExtendCanvas").values()
    height, width = before.shape[:2]
    left, bottom, overlap = asked["left"], asked["bottom"], asked["overlap"]
    assert (asked["top"], asked["right"]) == (0, 0) and result.shape == (height + bottom, width + left, 3)
    old = np.abs(result[:height, left:] - before).max(axis=2)
    assert old[: height - overlap, overlap:].max() == 0 < old[height - overlap :].max()
    pink = np.abs(result - (255, 119, 182)).max(axis=2) < 60
    assert pink[height:].sum() > 0.8 * pink.sum() > 1000, "in the new room, all but a little"


def test_the_upscaled_picture_is_the_edit(server):
    edited, enlarged = pictures(server, TWINS["edit_then_upscale"], ("PreviewImage", "SaveImage"))
    assert np.abs(enlarged - edited.repeat(4, axis=0).repeat(4, axis=1)).max() <= 1


def test_the_second_edit_keeps_the_first(server):
    first, second = pictures(server, TWINS["two_edits"], ("PreviewImage", "SaveImage"))
    (alone,) = pictures(server, TWINS["quick_edit"])
    assert (first == alone).all(), "the same first edit"
    error = np.abs(second - first).max(axis=2)
    assert error[180:, 100:156].mean() > 60, "the added square"
    assert error[:128].mean() < 10, "the rest"


def test_the_second_edit_reads_the_first_ones_tokens():
    first, second = of_type(TWINS["two_edits"], "VAREditSampler")
    assert TWINS["two_edits"][second]["inputs"]["source"] == [first, 0]
    assert len(of_type(TWINS["two_edits"], "VAREditSourceEncode")) == 1, "nothing is encoded in between"


def test_branches_share_a_beginning_and_differ(server):
    twin = copy.deepcopy(TWINS["branches"])
    first, second = of_type(twin, "VAREditSampler")
    found = pictures(server, twin, ("PreviewImage", "SaveImage"))
    assert len(found) == 5 and len({picture.tobytes() for picture in found}) == 5
    twin[second]["inputs"] |= {name: twin[first]["inputs"][name] for name in ("seed", "temperature")}
    twin[second]["inputs"]["variations"] = 1
    original, branch = pictures(server, twin, ("PreviewImage", "SaveImage"))
    assert (original == branch).all(), "with the first edit's settings, the first edit"


def test_what_did_not_change_stays_as_it_was(server):
    twin = TWINS["change_map"]
    (result,), before = pictures(server, twin), source(server, twin)
    hard, soft = pictures(server, twin, ("MaskPreview",))
    inside = hard[..., 0] > 0
    assert set(np.unique(hard)) == {0, 255} and 0.02 < inside.mean() < 0.06, "the square alone"
    error = np.abs(result - before).max(axis=2)
    assert error[~inside].max() == 0 and error[inside].mean() > 50
    assert soft[..., 0][inside].mean() > 250 > 30 > soft[..., 0][~inside].mean() > 0
    (wider,) = pictures(server, changed(twin, amount=1.0), ("MaskPreview",))[:1]
    assert (wider[..., 0] > 0).sum() > inside.sum() and wider[..., 0][inside].min() == 255


def test_the_draft_is_the_edit_without_its_detail(server):
    twin = TWINS["tokens"]
    draft, (result,) = pictures(server, twin, ("PreviewImage",))[0], pictures(server, twin)
    (finer,) = pictures(server, changed(twin, scales=6), ("PreviewImage",))
    (whole,) = pictures(server, changed(twin, scales=7), ("PreviewImage",))
    assert np.abs(draft - result).mean() > np.abs(finer - result).mean() > 0
    assert (whole == result).all()


def test_every_cell_of_the_sweep_is_saved(server):
    *cells, sheet = pictures(server, TWINS["sweep"])
    assert len({cell.tobytes() for cell in cells}) == 9 and {cell.shape for cell in cells} == {(256, 256, 3)}
    assert sheet.shape == (888, 792, 3)
    (alone,) = pictures(server, TWINS["quick_edit"])
    assert (cells[1] == alone).all(), "guidance 2, strength 1"
    before, near, far = source(server, TWINS["sweep"]), cells[7], cells[1]
    assert np.abs(near - before).mean() < np.abs(far - before).mean(), "less strength, nearer to the source"


def test_the_lora_is_what_makes_the_duotone(server):
    with_lora, without = (pictures(server, changed(TWINS["lora"], strength_model=s))[0] for s in (1.0, 0.0))
    assert np.abs(with_lora - without).mean() > 10


def test_a_batch_gives_every_picture(server):
    twin = TWINS["batch"]
    scene, cat = pictures(server, twin)
    assert scene.shape == cat.shape == (256, 256, 3)
    assert np.abs(scene - cat).mean() > 2


def test_variations_are_edits_with_the_next_seeds(server):
    twin = TWINS["variations"]
    results = pictures(server, twin)
    assert len(results) == len({picture.tobytes() for picture in results}) == 4
    (third,) = pictures(server, changed(twin, seed=2, variations=1))
    assert np.abs(third - results[2]).mean() < 0.1 < np.abs(third - results[1]).mean()


def test_every_scale_is_shown(server):
    twin = TWINS["scale_preview"]
    shown = pictures(server, twin, ("PreviewImage",))
    (result, sheet) = pictures(server, changed(twin, seed=0))
    assert len(shown) == 7 and {picture.shape for picture in shown} == {result.shape}
    assert (shown[-1] == result).all() and sheet.shape[1] > sheet.shape[0]
    errors = [np.abs(picture - result).mean() for picture in shown]
    assert errors == sorted(errors, reverse=True), "each scale comes closer"


def test_the_blueprint_edits_as_the_quick_edit_does(server):
    (result,), (expected,) = pictures(server, unpacked(BLUEPRINT)), pictures(server, TWINS["quick_edit"])
    assert (result == expected).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_workflow_lacks_nothing_but_its_files(server, name):
    twin = TWINS[name]
    refused = server.queue(twin)["node_errors"]
    assert refused.keys() == of_type(twin, *LOADERS).keys()
    for key, errors in refused.items():
        (error,) = errors["errors"]
        name = LOADERS[twin[key]["class_type"]]
        assert error["extra_info"]["input_name"] == name
        assert twin[key]["inputs"][name] in error["details"] and "https://huggingface.co/" in error["details"]


def files(twin: dict) -> dict[str, str]:
    """The files that a twin's loaders want, with their folders."""
    folders = dict(zip(LOADERS, FOLDERS))
    return {inputs[LOADERS[k]]: folder for k, folder in folders.items() for inputs in of_type(twin, k).values()}


def write_small(twin: dict, models: Path, write: Callable[[Path], list[Path]]) -> list[Path]:
    """Small networks of random weights in place of the published files that a twin wants. write: of its encoder."""
    transformer, encoder, vae = (models / folder / name for name, folder in files(twin).items())
    record, bits = SMALL[vae.name]
    for path in (transformer, encoder, vae):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    shapes = published_shapes(depth=8, width=128, heads=2, token_bits=bits, text=256)
    torch.save({key: random_tensor(key, shape, "cpu") for key, shape in shapes.items()}, transformer)
    state = canonical(open_weights(GOLDEN / record), TOKENIZER)
    torch.save({key: state[key] for key in state}, vae)
    return [transformer, vae, *write(encoder)]


def small_encoder(vocabulary: int) -> dict[str, torch.Tensor]:
    """A T5 encoder as wide as the small transformers want."""
    config = T5Config(vocabulary, width=256, head_size=32, hidden=128, layers=1, heads=2, gated=True)
    return {key: tensor.contiguous() for key, tensor in T5Encoder(config, dtype=torch.float32).state_dict().items()}


def first_of_two(path: Path) -> list[Path]:
    """As flan-t5-xl's first file has it, alone: the whole encoder and the decoder's beginning. The tokenizer is
    ComfyUI's."""
    save_file(small_encoder(32128) | {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(64, 256)}, path)
    return [path]


def folder_of_two(path: Path) -> list[Path]:
    """In two files, with their index and a tokenizer of their own, the demo model's."""
    state = small_encoder(456)
    keys, paths = sorted(state), [path, path.with_name("model-00002-of-00002.safetensors")]
    for n, part in enumerate(paths):
        save_file({key: state[key] for key in keys[n::2]}, part)
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {key: paths[n % 2].name for n, key in enumerate(keys)}}))
    return [*paths, index, Path(shutil.copy(ROOT / "demo" / "text_encoders" / "tokenizer.json", path.parent))]


@pytest.fixture
def small(server, request):
    """A published graph's twin, with small networks where its files belong."""
    name, write = request.param
    twin = TWINS[name]
    made = write_small(twin, server.base / "models", write)
    yield twin
    for path in made:
        path.unlink()


@pytest.mark.parametrize("small", [("edit_512_published", folder_of_two)], indirect=True)
def test_a_published_workflow_runs_with_small_weights(server, small):
    (result,), before = pictures(server, small), source(server, small)
    assert result.shape == before.shape and np.abs(result - before).mean() > 5, "random weights keep no picture"


@pytest.mark.parametrize("small", [(TEXT, first_of_two)], indirect=True)
def test_the_text_to_image_workflow_runs_with_small_weights(server, small):
    """At 512 pixels, which take less time."""
    twin = changed(small, size="512")
    (result,), (again,) = pictures(server, twin), pictures(server, changed(twin, seed=1))
    assert result.shape == (416, 624, 3) and np.abs(result - again).mean() > 5
