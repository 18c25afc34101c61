"""The pack in a real ComfyUI: a server that runs the node, and the networks built from ComfyUI's own layers."""

import json
import re
import shutil

import pytest
from drop_in import RECORD
from support import ROOT

GRAPH = json.loads((ROOT / "workflows" / "api" / "file_info.json").read_text())
MODEL = "diffusion_models/8B-1024.safetensors"


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models"
    (models / "vae" / "old").mkdir(parents=True)
    (models / "diffusion_models").mkdir()
    shutil.copy(RECORD, models / MODEL)
    (models / "vae" / "old" / "broken.safetensors").write_bytes(RECORD.read_bytes()[:100_000])
    with comfyui.server(base) as running:
        yield running


@pytest.fixture(scope="module")
def found(comfyui, tmp_path_factory) -> dict:
    return comfyui.drop_in(tmp_path_factory.mktemp("drop_in"))


def graph_of(file: str) -> dict:
    graph = json.loads(json.dumps(GRAPH))
    graph["1"]["inputs"]["file"] = file
    return graph


def test_the_pack_starts_silently_and_at_once(server):
    lines = [line for line in server.log.splitlines() if "custom_nodes/varedit" in line]
    assert len(lines) == 1, lines
    seconds = re.search(r"(\d+\.\d+) seconds: \S+/custom_nodes/varedit$", lines[0])
    assert seconds and float(seconds[1]) < 1


def test_the_server_knows_the_node_and_its_pages(server):
    (info,) = server.get("/object_info/VAREditFileInfo").values()
    assert info["display_name"] == "VAREdit File Info" and info["output_node"] and info["output"] == ["STRING"]
    files = info["input"]["required"]["file"][1]["options"]
    assert {MODEL, "vae/old/broken.safetensors", "vae/varedit_demo_tokenizer.safetensors"} <= set(files)
    assert info["python_module"] == "custom_nodes.varedit"
    assert "/extensions/varedit/file_info.js" in server.get("/extensions")
    assert server.text("/extensions/varedit/docs/VAREditFileInfo.md").startswith("# VAREdit File Info")
    assert server.get("/i18n")["zh"]["nodeDefs"]["VAREditFileInfo"]["inputs"]["file"]["name"]
    assert set(server.get("/workflow_templates")["varedit"]) == {
        path.stem for path in (ROOT / "workflows").glob("*.json")
    }


def test_the_server_knows_all_nodes_and_the_blueprint(server):
    nodes = json.loads((ROOT / "node_list.json").read_text())
    found = {
        name: info["display_name"] for name, info in server.get("/object_info").items() if name.startswith("VAREdit")
    }
    assert found == nodes
    blueprints = server.get("/global_subgraphs").values()
    assert [b["name"] for b in blueprints if "varedit" in b["source"] or "varedit" in str(b.get("info"))]
    for folder in ("diffusion_models", "text_encoders", "vae", "loras"):
        assert any(name.startswith("varedit_demo") for name in server.get(f"/models/{folder}")), folder


def test_the_graph_runs(server):
    assert server.run(GRAPH)["outputs"]["1"]["text"][0].startswith("varedit_demo.safetensors\nis a VAREdit transformer")
    done = server.run(graph_of(MODEL))
    assert done["status"]["status_str"] == "success"
    (text,) = done["outputs"]["1"]["text"]
    assert text.startswith("8B-1024.safetensors\nis a VAREdit transformer, 4 blocks of width 128 with its VAE\n")
    assert text.endswith("\n0.00806 GB")


def test_a_replaced_file_is_read_again_and_an_unchanged_one_is_not(server):
    file = server.base / "models" / "vae" / "changing.safetensors"
    shutil.copy(RECORD, file)
    first, again = (server.run(graph_of("vae/changing.safetensors")) for _ in range(2))
    assert again["outputs"] == first["outputs"]
    assert _cached(again) == ["1"] and _cached(first) == []
    shutil.copy(RECORD.with_name("plain_256.safetensors"), file)
    changed = server.run(graph_of("vae/changing.safetensors"))
    assert "token bits 32" in changed["outputs"]["1"]["text"][0] and "token bits 56" in first["outputs"]["1"]["text"][0]


def _cached(done: dict) -> list[str]:
    return next(event["nodes"] for kind, event in done["status"]["messages"] if kind == "execution_cached")


def test_a_damaged_file_is_one_sentence_on_the_node(server):
    done = server.run(graph_of("vae/old/broken.safetensors"))
    assert done["status"]["status_str"] == "error"
    error = next(event for kind, event in done["status"]["messages"] if kind == "execution_error")
    assert error["node_id"] == "1" and error["exception_type"] == "ValueError"
    message = error["exception_message"].strip()
    assert message.startswith(
        str(server.base / "models" / "vae" / "old" / "broken.safetensors") + " is truncated or not a safetensors file"
    )
    assert message.endswith("download or convert it again") and "\n" not in message


def test_a_file_that_is_not_there_is_refused_before_the_run(server):
    (error,) = server.queue(graph_of("vae/nothing.safetensors"))["node_errors"]["1"]["errors"]
    assert error["type"] == "value_not_in_list" and error["extra_info"]["input_name"] == "file"


@pytest.mark.parametrize("layers", ["disable_weight_init", "manual_cast"])
def test_comfyui_layers_give_the_same_numbers(found, layers):
    errors = found["layers"][layers]
    assert errors["logits"] < 1e-4
    assert errors["features"] < 1e-5 and errors["pixels"] < 1e-5


def test_a_bf16_file_is_cast_at_use(found):
    assert found["bf16 file"]["stored"] == "torch.bfloat16"
    assert found["bf16 file"]["logits"] < 1e-4


def test_an_8_bit_file_is_one_for_comfyui_too(found):
    result = found["8-bit"]
    assert result["missing"] == [] and result["quantised"] == 4 * 7, "7 matrices in each of 4 blocks"
    assert result["logits"] < 1e-4, "against the plain layers reading the same file"
    assert 1e-3 < result["loss"] < 0.5, "against the unconverted file: 8 bits must show, and not much"


def test_layers_may_own_no_weight_before_the_load(found):
    assert found["weights after construction"] < 1e-4


@pytest.mark.parametrize("network", ["transformer", "autoencoder", "8-bit transformer"])
def test_comfyui_can_move_every_tensor(found, network):
    result = found["partial"][network]
    assert result["homeless"] == []
    half, none = result["0.5"], result["0.0"]
    assert half["moved"] and half["behind"] and none["moved"] == 0
    assert half["stuck"] == none["stuck"] == []
    assert half["end"] == none["end"] == "ran"


def test_a_tensor_outside_the_layers_would_be_noticed(found):
    result = found["partial"]["control"]
    assert sorted(result["homeless"]) == sorted(result["0.5"]["stuck"]) == ["blocks.0.gain", "offset"]
    assert "meta" in result["0.5"]["end"]
