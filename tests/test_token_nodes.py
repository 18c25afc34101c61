"""The nodes that know an edit by its tokens, and the sweep: their lists of files, and their work in a real ComfyUI."""

import copy
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support import GOLDEN, ROOT
from test_nodes import comfy, models, nodes, pack  # noqa: F401
from test_tokens import drawn
from typer.testing import CliRunner

from varedit_core.cli.app import app
from varedit_core.controls.registry import NEUTRAL
from varedit_core.sampling.tokens import Tokens

TOKENS = json.loads((ROOT / "workflows" / "api" / "tokens.json").read_text())
VAE, PICTURE, SAMPLER = ["4", 0], ["5", 0], "8"


@pytest.fixture
def tokens(models) -> Path:  # noqa: F811
    """A file of tokens outside of ComfyUI's folders for pictures, which lie beside it."""
    for folder in ("input", "output"):
        (models / folder).mkdir()
    drawn().save(models / "outside.safetensors")
    return models / "outside.safetensors"


def put(tokens: Path, *names: str) -> None:
    for name in names:
        (tokens.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokens, tokens.parent / name)


def choices(nodes) -> list[str]:  # noqa: F811
    return nodes["VAREditLoadTokens"].define_schema().inputs[0].options


def test_the_list_has_files_of_both_folders(nodes, models, tokens):  # noqa: F811
    assert choices(nodes) == ["no file found"]
    put(tokens, "input/b.safetensors", "input/sub/a.safetensors", "input/a.png", "output/varedit/c.safetensors")
    assert choices(nodes) == ["b.safetensors", "sub/a.safetensors", "varedit/c.safetensors [output]"]
    check = nodes["VAREditLoadTokens"].validate_inputs
    assert all(check(name) is True for name in (*choices(nodes), None))
    assert check("gone.safetensors") == (
        "gone.safetensors is not in ComfyUI's folders input and output; save some with VAREdit Save Tokens, or put a "
        "file into input, press R and choose it"
    )
    assert check("no file found").startswith("there are no tokens in ")


def test_the_list_has_files_of_tokens_alone_and_follows_what_happens(nodes, models, tokens):  # noqa: F811
    save_file({"a": torch.zeros(3)}, models / "input" / "weights.safetensors")
    os.mkfifo(models / "input" / "pipe.safetensors")
    (models / "input" / "empty.safetensors").touch()
    (models / "input" / "device.safetensors").symlink_to("/dev/zero")
    (models / "input" / "gone.safetensors").symlink_to(models / "nowhere")
    (models / "input" / "folder.safetensors").mkdir()
    with open(models / "output" / "large.safetensors", "wb") as large:
        large.write(tokens.read_bytes())
        large.truncate(1 << 40)
    assert choices(nodes) == ["no file found"]
    put(tokens, "input/a.safetensors")
    assert choices(nodes) == ["a.safetensors"]
    put(tokens, "input/empty.safetensors")  # in its place: its folder's time stamp stays
    assert choices(nodes) == ["a.safetensors", "empty.safetensors"]
    (models / "input" / "a.safetensors").unlink()
    put(tokens, "input/new/b.safetensors")
    assert choices(nodes) == ["empty.safetensors", "new/b.safetensors"]
    shutil.rmtree(models / "input" / "new")
    assert choices(nodes) == ["empty.safetensors"]


def test_a_folder_is_read_when_it_changes_and_a_file_once(nodes, models, tokens, monkeypatch):  # noqa: F811
    listing = sys.modules["pack_x_varedit.nodes.token_files"]
    put(tokens, *(f"output/{n % 7}/{n}.safetensors" for n in range(70)))
    for path in (models / "input", *(models / "output").rglob("*"), models / "output"):
        os.utime(path, (1, 1))
    found = choices(nodes)
    assert len(found) == 70
    counted = {"_read": 0, "holds_tokens": 0}
    for name in counted:
        true = getattr(listing, name)

        def count(*arguments, name=name, true=true):
            counted[name] += 1
            return true(*arguments)

        monkeypatch.setattr(listing, name, count)
    assert [choices(nodes) for _ in range(5)] == [found] * 5 and counted == {"_read": 0, "holds_tokens": 0}
    put(tokens, "output/3/new.safetensors")
    assert len(choices(nodes)) == 71 and counted == {"_read": 1, "holds_tokens": 1}
    (models / "output" / "3" / "x.png").touch()
    monkeypatch.setattr(listing.LISTING.folders[str(models / "output" / "3")], "until", float("inf"))
    assert len(choices(nodes)) == 71 and counted["_read"] == 1, "a folder that takes long is not read again at once"


def test_files_are_looked_into_for_a_time_and_the_newest_first(nodes, models, tokens, monkeypatch):  # noqa: F811
    listing = sys.modules["pack_x_varedit.nodes.token_files"]
    for n, name in enumerate("bca"):
        put(tokens, f"output/{name}.safetensors")
        os.utime(models / "output" / f"{name}.safetensors", (n, n))
    looked, clock = [], [0.0]

    def look(path) -> bool:
        looked.append(Path(path).stem)
        clock[0] += listing.READS / 2
        return True

    monkeypatch.setattr(listing, "holds_tokens", look)
    monkeypatch.setattr(listing.time, "monotonic", lambda: clock[0])
    assert [len(choices(nodes)) for _ in range(3)] == [2, 3, 3] and looked == ["a", "c", "b"]


OUT = ["../outside.safetensors", "../outside.safetensors [output]", "sub/../../outside.safetensors", "..", ".", "",
       "{}/outside.safetensors", "{}/outside.safetensors [output]", "/etc/passwd", "link/../../outside.safetensors",
       "../input/../outside.safetensors", "\0", "../gone.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_names_that_lead_out_of_the_folders_are_none_whatever_lies_there(name, nodes, models, tokens):  # noqa: F811
    """Also where ComfyUI does not ask, and in words that do not tell whether there is such a file."""
    (models / "input" / "sub").mkdir()
    name, load = name.format(models), nodes["VAREditLoadTokens"]
    words = (
        f"{name} is not in ComfyUI's folders input and output; save some with VAREdit Save Tokens, or put a file into "
        "input, press R and choose it"
    )
    assert load.validate_inputs(name) == words
    with pytest.raises(ValueError) as error:
        load.execute(name)
    assert str(error.value) == words
    assert math.isnan(load.fingerprint_inputs(name) or float("nan")), "nor by its time stamp"
    put(tokens, "input/in.safetensors")
    assert load.validate_inputs("sub/../in.safetensors") is True


def test_a_loaded_files_fingerprint_changes_with_the_file(nodes, models, tokens):  # noqa: F811
    fingerprint = nodes["VAREditLoadTokens"].fingerprint_inputs
    put(tokens, "output/a.safetensors")
    first = fingerprint("a.safetensors [output]")
    assert first == fingerprint("a.safetensors [output]") and fingerprint(None) is None
    (models / "output" / "a.safetensors").write_bytes(b"12")
    assert fingerprint("a.safetensors [output]") != first


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with comfyui.server(tmp_path_factory.mktemp("comfyui"), "--cache-classic") as running:
        shutil.copy(GOLDEN / "patchify_256.safetensors", running.base / "models" / "vae" / "other.safetensors")
        yield running


def node(kind: str, **inputs) -> dict:
    """A node of ComfyUI's, or +Name of the pack."""
    return {"class_type": kind.replace("+", "VAREdit"), "inputs": inputs}


def edit(*extra: dict, scene: str = "scene.png", **settings) -> dict:
    """Models, picture, source and sampler of the workflow, with other settings of the sampler, and further nodes."""
    graph = {key: copy.deepcopy(TOKENS[key]) for key in map(str, range(2, 9))}
    graph["5"]["inputs"]["picture"] = scene
    graph[SAMPLER]["inputs"] |= settings
    for more in extra:
        graph |= more
    return graph


def shown(latent: list, name: str = "s", image: list = PICTURE) -> dict:
    """A latent decoded and saved."""
    decode = node("+Decode", vae=VAE, latent=latent, **({"image": image} if image else {}))
    return {f"{name}d": decode, name: node("SaveImage", images=[f"{name}d", 0], filename_prefix="shown")}


def levels(server, done: dict, key: str = "s") -> list[np.ndarray]:
    assert done["status"]["status_str"] == "success", done["status"]
    files = done["outputs"][key]["images"]
    found = [Image.open(server.base / f["type"] / f["subfolder"] / f["filename"]).convert("RGB") for f in files]
    return [np.asarray(picture, dtype=np.int16) for picture in found]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all((x == y).all() for x, y in zip(a, b))


def error(server, graph: dict) -> str:
    """What stopped a graph; it must be one sentence."""
    done = server.run(graph)
    (message,) = [more["exception_message"] for kind, more in done["status"]["messages"] if kind == "execution_error"]
    assert "\n" not in message.strip() and ("; " in message or ", " in message)
    return message.strip()


def saved(server, done: dict, key: str = "t") -> tuple[str, Path]:
    """Name for the loader, and path, of the file that a node says it saved."""
    name, facts = done["outputs"][key]["text"][0].splitlines()
    assert facts.endswith(" kB")
    return f"{name} [output]", server.base / "output" / name


def written(path: Path) -> tuple[dict, dict]:
    """A file's tensors, as bytes, and what it says of them: their order in the file is safetensors' own."""
    with safe_open(path, "np") as file:
        facts = {name: text for name, text in file.metadata().items() if name != "prompt"}
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}, facts


HALF = {
    "a": node("SolidMask", value=0.0, width=256, height=256),
    "b": node("SolidMask", value=1.0, width=128, height=256),
    "m": node("MaskComposite", destination=["a", 0], source=["b", 0], x=128, y=0, operation="add"),
}


@pytest.mark.parametrize(
    ("settings", "more", "bytes_at_most"),
    [({}, {}, 6000), ({"variations": 3}, {}, 16000), ({"mask": ["m", 0]}, HALF, 14000)],
    ids=["one", "variations", "masked"],
)
def test_an_edit_is_saved_loaded_and_decoded_to_the_same_pictures(server, settings, more, bytes_at_most):
    save = {"t": node("+SaveTokens", latent=[SAMPLER, 0], filename_prefix="sub/kept")}
    graph = edit(more, save, shown([SAMPLER, 0]), **settings)
    done = server.run(graph)
    name, path = saved(server, done)
    with safe_open(path, "np") as file:
        kept = json.loads(file.metadata()["prompt"])
    size = path.stat().st_size - len(json.dumps(json.dumps(kept)))
    assert name.startswith("sub/kept_0") and size < bytes_at_most
    assert {key: one["class_type"] for key, one in kept.items()} == {
        key: one["class_type"] for key, one in graph.items()
    }, "the graph that made it"
    assert Tokens.load(path).complete and len(written(path)[1]) == 2
    load = {"l": node("+LoadTokens", file=name)}
    again = server.run(edit(load, shown(["l", 0])))
    assert same(levels(server, done), levels(server, again))
    coloured = {"l": node("+LoadTokens", file=name, vae=VAE)}
    second = server.run(edit(coloured, {"t": node("+SaveTokens", latent=["l", 0], filename_prefix="sub/kept")}))
    _, other = saved(server, second)
    assert other != path and written(other) == written(path), "a new number, the same tokens"


def test_a_loaded_edit_has_the_pictures_size(server):
    crop = {"i": node("ImageCrop", image=PICTURE, width=251, height=190, x=0, y=0)}
    save = {"t": node("+SaveTokens", latent=[SAMPLER, 0], filename_prefix="odd")}
    graph = edit(crop, save, shown([SAMPLER, 0], image=["i", 0]))
    graph["7"]["inputs"]["image"] = ["i", 0]
    done = server.run(graph)
    load = {"l": node("+LoadTokens", file=saved(server, done)[0])}
    again = levels(server, server.run(edit(load, shown(["l", 0], image=None))))
    assert again[0].shape == (190, 251, 3) and same(levels(server, done), again)


def test_a_loaded_edit_is_the_next_ones_source(server):
    words = {"w": node("+TextEncode", clip=["3", 0], text="in the bottom centre, add a pink square")}
    save = {"t": node("+SaveTokens", latent=[SAMPLER, 0], filename_prefix="chain")}

    def second(source):
        next_edit = copy.deepcopy(TOKENS[SAMPLER])
        next_edit["inputs"] |= {"source": source, "positive": ["w", 0]}
        return {"x": next_edit}

    done = server.run(edit(words, save, second([SAMPLER, 0]), shown(["x", 0])))
    load = {"l": node("+LoadTokens", file=saved(server, done)[0])}
    again = server.run(edit(words, load, second(["l", 0]), shown(["x", 0])))
    assert same(levels(server, done), levels(server, again))
    assert not same(levels(server, done), levels(server, server.run(edit(shown([SAMPLER, 0])))))


def test_the_first_scales_are_what_a_stopped_edit_makes(server):
    cut = {"f": node("+FirstScales", latent=[SAMPLER, 0], scales=4)}
    stop = {"k": node("+Shortcuts", unguided=0, inside=0, window=0.0, stop=4, drafted=0)}
    draft = server.run(edit(cut, {"t": node("+SaveTokens", latent=["f", 0], filename_prefix="draft")}, shown(["f", 0])))
    stopped = server.run(edit(stop, shown([SAMPLER, 0]), shortcuts=["k", 0]))
    assert same(levels(server, draft), levels(server, stopped))
    assert len(Tokens.load(saved(server, draft)[1])) == 4
    load = {"l": node("+LoadTokens", file=saved(server, draft)[0])}
    assert same(levels(server, draft), levels(server, server.run(edit(load, shown(["l", 0])))))
    cut = {"f": node("+FirstScales", latent=[SAMPLER, 0], scales=7)}
    whole = server.run(edit(HALF, cut, shown(["f", 0]), shown([SAMPLER, 0], "u"), mask=["m", 0]))
    assert same(levels(server, whole), levels(server, whole, "u")), "with the mask it had"


def test_what_has_no_tokens_is_one_sentence(server):
    words = (
        "this latent holds no tokens; connect the latent of VAREdit Sampler, Load Tokens or First Scales, as it came"
    )
    scaled = {"u": node("LatentMultiply", samples=[SAMPLER, 0], multiplier=1.5)}
    for latent in (["7", 0], [SAMPLER, 1], ["u", 0]):
        for last in (
            node("+SaveTokens", latent=latent, filename_prefix="none"),
            node("PreviewAny", source=["f", 0]),
        ):
            cut = {"f": node("+FirstScales", latent=latent, scales=1), "t": last}
            assert error(server, edit(scaled, cut)) == words
    assert not list((server.base / "output").glob("none*"))


def test_more_scales_than_there_are_is_one_sentence(server):
    cut = {
        "f": node("+FirstScales", latent=[SAMPLER, 0], scales=4),
        "g": node("+FirstScales", latent=["f", 0], scales=5),
    }
    assert error(server, edit(cut, shown(["g", 0]))) == "there are tokens of 4 scales; keep from 1 to 4 of them, not 5"


def test_other_files_and_other_models_are_one_sentence(server):
    done = server.run(edit({"t": node("+SaveTokens", latent=[SAMPLER, 0], filename_prefix="kept")}))
    name, path = saved(server, done)
    (server.base / "input" / "cut.safetensors").write_bytes(path.read_bytes()[:2000])
    shutil.copy(GOLDEN / "patchify_256.safetensors", server.base / "input" / "weights.safetensors")
    for other in ("cut.safetensors", "weights.safetensors"):
        load = {"l": node("+LoadTokens", file=other)}
        assert f"{other} is not a file of tokens (" in error(server, edit(load, shown(["l", 0])))
    vae = {"o": node("+VAELoader", vae_name="other.safetensors")}
    load = {"l": node("+LoadTokens", file=name, vae=["o", 0])}
    assert error(server, edit(vae, load, shown(["l", 0]))).endswith(
        "are of 16 bits on a grid of 32x32 but the VAE takes 14 channels on 32x32; load the VAE of the model that made "
        "them"
    )
    answer = server.queue(edit({"l": node("+LoadTokens", file="../gone.safetensors")}, shown(["l", 0])))
    assert "is not in ComfyUI's folders input and output" in answer["node_errors"]["l"]["errors"][0]["details"]


def mapped(latent: list, source: list, amount: float = 0.5, vae: list = VAE) -> dict:
    made = {"c": node("+ChangeMap", vae=vae, latent=latent, source=source, amount=amount)}
    for key, slot in (("hard", 0), ("soft", 1)):
        made |= {
            f"{key}i": node("MaskToImage", mask=["c", slot]),
            key: node("SaveImage", images=[f"{key}i", 0], filename_prefix=key),
        }
    return made


def masks(server, done: dict) -> tuple[np.ndarray, np.ndarray]:
    """changed and amount, [B, y, x], from 0 to 255."""
    return tuple(np.stack(levels(server, done, key))[..., 0] for key in ("hard", "soft"))


def test_a_change_map_is_of_the_edits_and_their_sources(server):
    """Two pictures with two variations each: every edit is compared with its own source."""
    batch = {"j": node("+SampleImage", picture="cat.jpg"), "i": node("ImageBatch", image1=["k", 0], image2=["5", 0])}
    batch["k"] = node("ImageScale", image=["j", 0], upscale_method="area", width=256, height=256, crop="disabled")
    both = edit(batch, mapped([SAMPLER, 0], ["7", 0]), variations=2)
    both["7"]["inputs"]["image"] = ["i", 0]
    hard, soft = masks(server, server.run(both))
    assert hard.shape == soft.shape == (4, 256, 256) and set(np.unique(hard)) == {0, 255}
    assert (hard[2:] > 0).mean() > 0.4, "the scene's background became cyan"
    assert ((soft == 255) & (hard == 0)).mean() < 0.01 and ((soft < 100) & (hard > 0)).mean() < 0.01
    alone = edit(mapped([SAMPLER, 0], ["7", 0]), seed=2)
    assert (hard[2] == masks(server, server.run(alone))[0][0]).mean() > 0.999, "as by itself"


def test_a_change_map_has_the_pictures_size_and_nothing_outside_a_mask(server):
    crop = {"i": node("ImageCrop", image=PICTURE, width=251, height=190, x=0, y=0)}
    graph = edit(crop, mapped([SAMPLER, 0], ["7", 0]))
    graph["7"]["inputs"]["image"] = ["i", 0]
    hard, soft = masks(server, server.run(graph))
    assert hard.shape == soft.shape == (1, 190, 251)
    hard, soft = masks(server, server.run(edit(HALF, mapped([SAMPLER, 0], ["7", 0], 1.0), mask=["m", 0])))
    assert hard[0, :, 140:].mean() > 100 and hard[0, :, :110].max() == soft[0, :, :110].max() == 0
    less, _ = masks(server, server.run(edit(mapped([SAMPLER, 0], ["7", 0], 0.2))))
    more, _ = masks(server, server.run(edit(mapped([SAMPLER, 0], ["7", 0], 1.0))))
    assert 0 < less.mean() < more.mean()


def test_a_change_map_of_an_edit_to_itself_is_empty(server):
    hard, soft = masks(server, server.run(edit(mapped([SAMPLER, 0], [SAMPLER, 0]))))
    assert hard.max() == soft.max() == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"i": node("ImageCrop", image=PICTURE, width=200, height=100, x=0, y=0)},
            "the edit is of a picture of 256x256 but the source of one of 200x100; connect the source that was edited",
        ),
        (
            {"i": node("RepeatImageBatch", image=PICTURE, amount=2)},
            "there are 2 sources for 1 edits; connect the sources that were edited",
        ),
    ],
)  # fmt: skip
def test_a_change_map_of_what_does_not_belong_together_is_one_sentence(server, source, message):
    other = {"q": copy.deepcopy(TOKENS["7"])}
    other["q"]["inputs"]["image"] = ["i", 0]
    assert error(server, edit(source, other, mapped([SAMPLER, 0], ["q", 0]))) == message


def test_a_change_map_needs_a_source(server):
    empty = {"q": node("+EmptySource", vae=VAE, size="256", ratio="1:1", batch_size=1)}
    message = error(server, edit(empty, mapped([SAMPLER, 0], ["q", 0])))
    assert message == "the source is empty, so that nothing was changed; connect VAREdit Source Encode"


def swept(**changes) -> dict:
    given = dict(model=["2", 0], source=["7", 0], positive=["6", 0], vae=VAE, seed=5, guidance=2.0, temperature=0.1)
    given |= dict(x="top_p", x_values="0.97", y="none", y_values="")
    return {"g": node("+Sweep", **(given | changes)), "s": node("SaveImage", images=["g", 1], filename_prefix="cell")}


def test_a_cell_of_a_sweep_is_the_samplers_edit(server):
    done = server.run(edit(swept(x="seed", x_values="5, 6", y="guidance", y_values="1, 2")))
    cells = levels(server, done)
    (sheet,) = levels(server, done, "g")
    assert len(cells) == 4 and sheet.shape[1] > 2 * 256
    for number, (guidance, seed) in enumerate([(1.0, 5), (1.0, 6), (2.0, 5), (2.0, 6)]):
        assert same(
            [cells[number]], levels(server, server.run(edit(shown([SAMPLER, 0]), seed=seed, guidance=guidance)))
        )


def test_a_sweep_keeps_what_is_outside_a_mask_and_the_alpha(server):
    alpha = {
        "i": node("JoinImageWithAlpha", image=PICTURE, alpha=["b2", 0]),
        "b2": node("SolidMask", value=0.25, width=256, height=256),
    }
    graph = edit(HALF, alpha, swept(mask=["m", 0], image=["i", 0]))
    done = server.run(graph)
    (f,) = done["outputs"]["s"]["images"]
    picture = Image.open(server.base / f["type"] / f["filename"])
    assert picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (191, 191)
    before = np.asarray(Image.open(ROOT / "samples" / "scene.png").convert("RGB"), dtype=int)
    assert np.abs(np.asarray(picture, dtype=int)[:, :120, :3] - before[:, :120]).max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": "guidance", "x_values": "1, two"}, "guidance takes numbers with commas between them, got '1, two'"),
        ({"y": "top_p", "y_values": "1"}, "both axes are top_p; choose another setting for one of them"),
        ({"y": "preset"}, "preset has no values to sweep; give some with commas between them"),
        ({"x": "strength", "x_values": "2"}, "strength must be a number from 0 to 1, got 2.0"),
    ],
)
def test_a_wrong_sweep_is_one_sentence_in_comfyui(server, changes, message):
    assert error(server, edit(swept(**changes))) == message


LOCAL = "in the bottom centre, add a pink square"
CONTROLS = vars(NEUTRAL) | dict(auto_mask=0.5, score="near")


def test_the_auto_mask_travels_with_the_tokens_from_nodes_to_nodes_and_the_command_line(server, tmp_path):
    """Composited from a file as from the sampler's own latent, cut ones as drafts."""
    made = {"o": node("+Controls", **CONTROLS), "w": node("+TextEncode", clip=["3", 0], text=LOCAL)}
    made["t"] = node("+SaveTokens", latent=[SAMPLER, 0], filename_prefix="auto")
    whole = shown([SAMPLER, 0], "v", image=None)
    done = server.run(edit(made, shown([SAMPLER, 0]), whole, controls=["o", 0], positive=["w", 0]))
    name, path = saved(server, done)
    assert Tokens.load(path).auto_mask == 0.5 and not same(levels(server, done), levels(server, done, "v"))
    load = {"l": node("+LoadTokens", file=name), "f": node("+FirstScales", latent=["l", 0], scales=7)}
    load["g"] = node("+FirstScales", latent=["l", 0], scales=4)
    drafts = {**shown(["g", 0], "h"), **shown(["g", 0], "i", image=None)}
    again = server.run(edit(load, shown(["l", 0]), shown(["f", 0], "u"), drafts))
    assert same(levels(server, done), levels(server, again)) and same(levels(server, done), levels(server, again, "u"))
    assert same(levels(server, again, "h"), levels(server, again, "i")), "a draft is shown whole"
    arguments = ["decode", path, "--image", ROOT / "samples" / "scene.png", "-o", tmp_path / "d.png", "--device", "cpu"]
    decoded = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert decoded.exit_code == 0, decoded.output
    assert same(levels(server, done), [np.asarray(Image.open(tmp_path / "d.png"), dtype=np.int16)])


def test_the_auto_mask_travels_with_the_tokens_from_the_command_line_to_nodes(server, tmp_path):
    scene = ROOT / "samples" / "scene.png"
    tokens = ["--auto-mask", 0.5, "--save-tokens", server.base / "input" / "auto.safetensors", "--device", "cpu"]
    arguments = ["edit", scene, LOCAL, "-o", tmp_path / "e.png", *tokens]
    edited = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert edited.exit_code == 0, edited.output
    load = {"l": node("+LoadTokens", file="auto.safetensors", vae=VAE)}
    kept = np.asarray(Image.open(tmp_path / "e.png"), dtype=np.int16)
    assert same(levels(server, server.run(edit(load, shown(["l", 0])))), [kept])
    before = np.asarray(Image.open(scene).convert("RGB"), dtype=np.int16)
    assert (kept[:100] == before[:100]).all() and (kept != before).any()
