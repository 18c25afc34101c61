"""LATENTs that ComfyUI's own nodes hand on, in one process of ComfyUI's Python (see `core_latents.py`).

Every node with a LATENT on both sides is drawn from ComfyUI's list, so that a new one is judged by itself.
"""

import pytest
from core_latents import SIZE
from support import ROOT

SENTENCE = "builtins.ValueError: "
MASKS = {"SetLatentNoiseMask"}
"""Nodes that are there to change what an edit gives, and do it in the way of our own inputs."""
DRAWS = {"RepeatLatentBatch"}
"""Nodes whose further rows draw by further numbers, as in KSampler."""
FEWEST = 30
"""Nodes of the oldest ComfyUI that have a LATENT on both sides."""


@pytest.fixture(scope="module")
def found(comfyui, tmp_path_factory) -> dict:
    return comfyui.run(ROOT / "tests" / "core_latents.py", tmp_path_factory.mktemp("core_latents"), seconds=2400)


def one_sentence(text: str) -> bool:
    return text.startswith(SENTENCE) and "\n" not in text and "; " in text


def faults(name: str, way: str, seen: dict) -> str:
    """What is wrong with what came of a node's LATENT; "" for nothing."""
    if "error" in seen:
        kind, text, ours = seen["error"]
        return "" if kind == "ValueError" and ours and one_sentence(SENTENCE + text) else f"{kind}: {text}"
    if "saved" in seen:
        return ""
    if seen["size"] != list(SIZE) and not seen["said"]:
        return f"a picture of {seen['size']}, not a word"
    if not seen["same"] and not seen["said"] and name not in MASKS | DRAWS:
        return "another picture, not a word"
    return ""


def test_every_core_node_between_ours_is_right_or_one_sentence(found):
    walk, wrong = found["walk"], {}
    for name, ways in walk.items():
        for way, result in ways.items():
            for seen in result.get("made", ()):
                if fault := faults(name, way, seen):
                    wrong[f"{name} {way}"] = fault
    assert not wrong and len(walk) >= FEWEST


def test_most_nodes_run(found):
    """A node that refuses our LATENTs itself says so in its own words; those that work on any do not."""
    ran = {name for name, ways in found["walk"].items() if any(result.get("made") for result in ways.values())}
    assert ran >= {
        "LatentAdd", "LatentBatch", "LatentBlend", "LatentComposite", "LatentCrop", "LatentFlip", "LatentFromBatch",
        "LatentRotate", "LatentUpscale", "LatentUpscaleBy", "RebatchLatents", "RepeatLatentBatch", "SaveLatent",
        "SetLatentNoiseMask",
    }  # fmt: skip


def test_rows_of_a_batch_keep_their_draws_and_are_edits_like_any_other(found):
    result = found["graphs"]["batches"]
    assert result["third"] > 0.999 > 0.9 > result["not the first"], "picture 3 of the batch"
    assert min(result["fixed"]) > 0.999 and result["random"] > 0.999 and result["numbered on"] > 0.999
    assert result["a row's tokens"] and result["saved"] == 2 and result["a row's draft"][0] == 2
    assert min(result["variations"]) > 0.999
    assert one_sentence(result["lengths"]) and "4 rows of a latent of 2" in result["lengths"]


@pytest.mark.parametrize("kind", ["sources", "edits"])
def test_pictures_of_two_sizes_are_told_and_each_has_its_own_when_alone(found, kind):
    result = found["graphs"]["sizes"][kind]
    words = "this batch of latents is of pictures of different sizes (300x200 and 200x300); take them one by one"
    assert all(words in result[name] and one_sentence(result[name]) for name in ("sampled", "decoded"))
    assert kind == "sources" or words in result["saved"]
    assert result["picked"] == [1, 300, 200, 3]
    assert result["apart"] == [[1, 200, 300, 3], [1, 300, 200, 3]], "also where a node keeps the numbers alone"


@pytest.mark.parametrize("name", ["SetLatentNoiseMask", "VAEEncodeForInpaint", "InpaintModelConditioning"])
def test_masks_of_core_nodes_are_used_as_the_samplers_own(found, name):
    as_ours, as_without = found["graphs"]["masks"][name]
    assert as_ours and not as_without


def test_two_masks_hold_both(found):
    result = found["graphs"]["masks"]
    assert result["both"] and one_sentence(result["nothing in common"])
    assert result["of variations"] == [256 * 128.0] * 4 and "leave no place in common" in result["nothing in common"]


def test_numbers_of_unknown_pictures_are_told(found):
    """As of Load Latent, which keeps nothing but the numbers."""
    for seen in found["graphs"]["numbers alone"]:
        (said, *_) = seen["said"]
        assert seen["size"] == [256, 256] and "exactly 256x256" in said and "VAREdit Save Tokens" in said


def test_a_draft_is_no_source(found):
    result = found["graphs"]["drafts"]
    assert one_sentence(result["source"]) and "4 of 7 scales" in result["source"] and result["begun"][0] == 1
