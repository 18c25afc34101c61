"""Every workflow of the pack in ComfyUI's page: loaded, run, looked at, and still there after a reload.

VAREDIT_SCREENSHOTS names a folder to keep a picture of each workflow in.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NotFound, Page, chromium
from drop_in import RECORD
from safetensors.torch import save_file
from support import ROOT
from test_workflows import PUBLISHED, TWINS, enlarger, files, first_of_two, write_small

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SHOWN = ("VAREditSampleImage", "VAREditScalePreview")  # nodes of the pack that show a picture
RUN = ("quick_edit", "masked_edit", "scale_preview", "file_info")
MODEL = "diffusion_models/8B-1024.safetensors"  # what file_info.json looks at; the others use the pack's demo model
UPSCALER = "upscale_models/RealESRGAN_x4plus.safetensors"


@pytest.fixture(scope="module")
def browser():
    try:
        with chromium() as running:
            yield running
    except NotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def server(browser, comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    (base / "input").mkdir()
    shutil.copy(ROOT / "samples" / "scene.png", base / "input")
    model, upscaler = base / "models" / MODEL, base / "models" / UPSCALER
    for file in (model, upscaler):
        file.parent.mkdir(parents=True)
    shutil.copy(RECORD, model)
    save_file(enlarger(), upscaler)
    with comfyui.server(base) as running:
        yield running


@pytest.fixture(scope="module")
def page(browser, server) -> Page:
    return Page(browser, server)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def links(workflow: dict) -> set[tuple]:
    return {tuple(map(str, link[:5])) for link in workflow["links"]}


def connected(workflow: dict) -> set[str]:
    """The links that the nodes' inputs hold."""
    slots = [slot for node in workflow["nodes"] for slot in node.get("inputs") or []]
    return {str(slot["link"]) for slot in slots if slot.get("link") is not None}


def widgets(workflow: dict) -> dict[str, list]:
    return {f"{node['id']} {node['type']}": node.get("widgets_values") or [] for node in workflow["nodes"]}


def keep_screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("VAREDIT_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_in_the_page(page, path):
    workflow, published = read(path), "published" in path.stem
    shown = sorted(f"node {node['id']}, {node['type']}" for node in workflow["nodes"] if node["type"] in SHOWN)
    page.load(workflow, path.name)
    # Weights of gigabytes are not here: the page may say so, but must know every node.
    problems = page.missing() + page.complaints if published else page.problems()
    assert not problems, problems
    graph = page.graph()
    assert links(graph) == links(workflow)
    assert connected(graph) == {link for link, *_ in links(workflow)}
    assert widgets(graph) == widgets(workflow)
    # All run through the API too (test_workflows); here those that show the most, and all for a set of screenshots.
    if path.stem in RUN or (not published and os.environ.get("VAREDIT_SCREENSHOTS")):
        assert page.run() == {}
        assert not page.problems(), page.problems()
        assert page.pictured(*SHOWN, count=len(shown)) == shown
    keep_screenshot(page, path.stem)
    if path.stem == "scale_preview":  # has all that is kept
        page.reload()
        assert not page.problems(), page.problems()
        assert page.pictured(*SHOWN, count=len(shown)) == shown


@pytest.fixture(scope="module")
def other_page(browser, server) -> Iterator[Page]:
    """Beside the others', as the list of what is missing stays open."""
    page = Page(browser, server)
    yield page
    page.page.close()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_offers_all_files_of_a_published_workflow(other_page, name):
    other_page.load(read(ROOT / "workflows" / f"{name}.json"))
    assert other_page.missing_models() == files(TWINS[name])


def test_a_published_workflow_runs_with_what_download_all_brings(other_page, server, tmp_path):
    """With small networks under the published addresses: what the browser saved is moved to where the page says."""
    name, models = "edit_512_2b_published", server.base / "models"
    workflow, wanted = read(ROOT / "workflows" / f"{name}.json"), files(TWINS[name])
    listed = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    hub = {}
    for made in write_small(TWINS[name], tmp_path / "hub", first_of_two):
        shutil.copy(made, server.base / "input")
        (address,) = (model["url"] for model in listed if model["url"].endswith(f"/{made.name}"))
        hub[address] = f"{server.url}/view?type=input&filename={made.name}"
    other_page.load(workflow)
    offered = other_page.missing_models()
    saved = {path.name: path for path in other_page.download_all(hub, tmp_path)}
    assert len(saved) == len(wanted)
    places = [models / folder / file for file, folder in offered.items()]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        saved[place.name].rename(place)
    other_page.refresh()
    other_page.load(workflow)
    assert not other_page.problems(), other_page.problems()
    assert other_page.run() == {}
    assert list((server.base / "output" / "varedit").glob("edit_512_2b_*.png"))
    for place in places:
        place.unlink()
        (server.base / "input" / place.name).unlink()


def graph_of(*nodes: dict) -> dict:
    """A workflow of unconnected nodes."""
    rest = {"size": [300, 200], "flags": {}, "mode": 0, "inputs": [], "outputs": [], "properties": {}}
    placed = [rest | {"id": i, "order": i, "pos": [100 + 400 * i, 100]} | node for i, node in enumerate(nodes)]
    return {"last_node_id": len(nodes), "last_link_id": 0, "nodes": placed, "links": [], "groups": [], "version": 0.4}


def file_info(file: str) -> dict:
    return {"type": "VAREditFileInfo", "widgets_values": [file]}


def test_pictures_that_are_gone_are_forgotten(page):
    gone = {"shown_pictures": [{"filename": "gone.png", "subfolder": "", "type": "temp"}]}
    page.load(graph_of({"type": "VAREditSampleImage", "widgets_values": ["scene.png"], "properties": gone}))
    assert page.problems() == [] and page.pictured(*SHOWN, seconds=1) == []
    assert "shown_pictures" not in page.graph()["nodes"][0]["properties"]


def test_a_file_of_tokens_opens_the_graph_that_made_it(page, server):
    workflow = read(ROOT / "workflows" / "tokens.json")
    page.load(workflow)
    assert page.run() == {}
    (file,) = (server.base / "output").rglob("*.safetensors")
    page.load(graph_of(file_info(MODEL)))
    page.drop(file.read_bytes(), file.name)
    assert not page.problems(), page.problems()
    graph = page.graph()
    assert links(graph) == links(workflow) and widgets(graph) == widgets(workflow)


# What the tests above would say of broken workflows, so that their silence means something.


def test_an_unknown_node_would_be_noticed(page):
    page.load(graph_of(file_info(MODEL), {"type": "VAREditNothing"}))
    assert page.missing() == ["node 1, VAREditNothing"]
    assert any(problem.startswith("dialog: ") and "VAREditNothing" in problem for problem in page.problems())
    assert page.run() != {}


def test_a_broken_value_would_be_noticed(page):
    page.load(graph_of(file_info("vae/nothing.safetensors")))
    errors = page.run()
    assert list(errors) == ["0"] and "vae/nothing.safetensors" in errors["0"]
    assert page.missing() == [] and page.red() == ["node 0, VAREditFileInfo"] and page.dialogs()


def test_a_node_that_fails_would_be_noticed(page, server):
    broken = server.base / "models" / "vae" / "broken.safetensors"
    broken.write_bytes(RECORD.read_bytes()[:100_000])
    page.load(graph_of(file_info("vae/broken.safetensors")))
    page.refresh()
    errors = page.run()
    assert list(errors) == ["0"] and "is truncated" in errors["0"]
    assert page.dialogs()


def test_a_lost_widget_or_link_would_be_noticed(page):
    workflow = graph_of({"type": "LoadImage", "widgets_values": ["scene.png"]}, {"type": "PreviewImage"})
    workflow["links"] = [[1, 0, 7, 1, 0, "IMAGE"]]
    page.load(workflow)
    graph = page.graph()
    assert widgets(graph) != widgets(workflow)
    assert connected(graph) != {"1"}


def test_a_picture_is_seen_only_where_one_is(page):
    page.load(graph_of({"type": "LoadImage", "widgets_values": ["scene.png", "image"]}, {"type": "PreviewImage"}))
    assert page.problems() == []
    assert page.pictured("LoadImage") == ["node 0, LoadImage"]
    assert page.pictured("PreviewImage", seconds=1) == []


def test_an_error_of_the_packs_script_would_be_noticed(page):
    page.load(graph_of(file_info(MODEL)))
    assert page.problems() == []
    page.page.evaluate("() => { setTimeout(() => app.graph.nodes[0].onExecuted({ text: 5 })) }")
    page.page.wait_for_timeout(500)
    assert any(problem.startswith("console: ") and "file_info.js" in problem for problem in page.problems())
