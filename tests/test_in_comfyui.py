"""The pack's nodes inside ComfyUI's modules, in one process of ComfyUI's Python (see `in_comfyui.py`)."""

import re

import pytest
from support import ROOT

from varedit_core.controls.registry import knobs
from varedit_core.defaults import PUBLISHED_VAES
from varedit_core.files.convert import FORMS

SENTENCE = "builtins.ValueError: "


@pytest.fixture(scope="module")
def found(comfyui, tmp_path_factory) -> dict:
    return comfyui.run(ROOT / "tests" / "in_comfyui.py", tmp_path_factory.mktemp("in_comfyui"), seconds=2400)


def facts(found: dict, name: str):
    """What a part of the probe found; its traceback where it failed."""
    result = found[name]
    assert not (isinstance(result, dict) and "failed" in result), result["failed"]
    return result


def test_the_pack_equals_the_library_bit_for_bit(found):
    differences = facts(found, "same_as_the_library")
    assert len(differences) == 2 and set(differences.values()) == {0}


def test_stock_nodes_take_our_types(found):
    result = facts(found, "stock_nodes")
    assert result["text"] and result["after lora"]
    assert result["decoded"] == result["from stock"] == [1, 256, 256, 3] and result["encoded"] == [1, 16, 32, 32]
    assert 0 < result["tiled"] < 0.05
    assert result["odd"].startswith(SENTENCE) and result["odd"].endswith("use VAREdit Source Encode")


def test_a_stock_lora_loader_does_what_the_library_does(found):
    result = facts(found, "stock_nodes")
    assert result["lora changes"] > 0.1
    # ComfyUI rounds the updated weights to the file's bf16, the library keeps fp32.
    assert result["lora as the library"] > 0.8


def test_every_form_of_a_checkpoint_loads_as_the_bare_one(found):
    result = dict(facts(found, "forms"))
    lacking = result.pop("lacking")
    assert len(result) == 6 and all(result.values()), result
    assert lacking.startswith(SENTENCE) and "lacks net-00001-of-00002.safetensors, without which" in lacking


def test_compilation_attention_and_device_nodes_work(found):
    result = facts(found, "wrappers")
    assert result["equal"] == [True, True, True] and result["again"]
    # Self- and cross-attention of eight blocks in seven scales, of seven in the source's pass, which asks no more of
    # the last, the text's pooling, and a question before.
    assert result["attention calls"] == 7 * 8 * 2 + 7 * 2 + 1 + 1
    assert result["without scale"] < 0.01, "an attention that ignores its scale is given queries that carry it"
    assert result["restored"] == "Transformer"
    assert result["graphs"] and result["nodes"] > 8, "the compiler was really asked"


def test_pictures_of_all_kinds(found):
    result = facts(found, "pictures")
    assert result["plain"] == [2, 37, 61, 3] and result["alpha"] == [[2, 37, 61, 4], True]
    assert result["rows"] == [1.0, 1.0], "a picture of a batch is its single run with its own seed"
    assert result["aspect"] == [1, 16, 18, 54] and result["grey"] == [1, 20, 20, 3]
    assert result["untouched"]
    crop = result["crop"]
    assert crop["beside"] == 37 * (61 - 37) and crop["kept"] and crop["edited"] and crop["white"] == 1
    assert len(crop["told"]) == 1 and "only the 37x37 in the middle of the 61x37" in crop["told"][0]
    assert "connect the picture that was encoded" in crop["warned"][0]


def test_kept_features_load_no_text_encoder(found):
    result = facts(found, "text_cache")
    assert result["equal"] == [True, True] and result["marked"]
    assert result["facts"][0] == result["facts"][1] == result["facts"][2]
    assert result["loads"] == [1, 2], "the second text loads nothing, the changed encoder does"
    assert len(result["files"]) == 1 and len(result["files"][0]) == 64 + len(".safetensors")
    assert result["words"] == [False], "the text itself is not kept"
    assert len(result["said"]) == 1 and "a LoRA or a hook changes this text encoder" in result["said"][0]


def test_masks_keep_pixels_exactly(found):
    result = facts(found, "pictures")
    assert all(result[name] for name in ("kept below", "edited above", "inverse", "noise mask", "empty mask"))


@pytest.mark.parametrize("name", ["mask without image", "three masks", "other image", "nan image", "resized latent"])
def test_pictures_that_do_not_belong_are_one_sentence(found, name):
    message = facts(found, "pictures")["errors"][name]
    assert message.startswith(SENTENCE) and "\n" not in message and ";" in message


def test_every_input_of_every_node_is_judged_by_its_type(found):
    """By the nodes' schemas: a new node, or a new input, is judged or fails here."""
    result = facts(found, "given")
    assert len({name.split(":")[0] for name in result["errors"]}) >= 26 and len(result["errors"]) >= 570
    for name, message in result["errors"].items():
        assert message.startswith(SENTENCE) and "\n" not in message and "; " in message, (name, message)
        assert not any(word in message for word in ("has no attribute", "expected", "Tensor.")), (name, message)


def test_unusual_pictures_and_masks_are_taken_as_they_are_meant(found):
    result = facts(found, "given")
    assert len(result["ends"]) == 7 and all(0 <= low < high <= 1 for low, high in result["ends"].values())
    assert result["masks"] == {"bool": "", "flat": "", "whole": ""}


def test_pictures_of_text_alone(found):
    result = facts(found, "text_to_image")
    assert result["library"] == [0, 0] and result["size"] == [2, 336, 224, 3] and result["greedy"] == [2, 16, 42, 28]
    assert result["kept"] and result["by latent"] and result["masked differs"] and result["not read"]
    assert result["delegate"] and result["chained"]
    assert result["told before"] == [] and len(result["told"]) == 1 and "only the source's size" in result["told"][0]
    for name, words in (
        ("edit model", "this model edits pictures but the source is empty"),
        ("mask", "nothing to keep"),
    ):
        assert result["errors"][name].startswith(SENTENCE) and words in result["errors"][name]


def test_the_sum_after_every_scale(found):
    result = facts(found, "scales")
    assert result["sums"] == [7, 16, 32, 32] and result["last"]
    for method in ("full", "own", "fast"):
        pictures, sheet = result[method]
        assert len(pictures) == 7 and sheet[0] == 1 and sheet[3] == 3
    assert result["full"][0] == [[1, 300, 451, 3]] * 7
    ratios = [shape[2] / shape[1] for shape in (*result["own"][0], *result["fast"][0])]
    assert all(abs(ratio - 451 / 300) < 0.02 for ratio in ratios), "only the picture's part of the padded square"
    assert result["wrong"].startswith(SENTENCE)


def test_previews_follow_the_choice_and_the_setting(found):
    results = facts(found, "previews")
    shown = {name: result for name, result in results.items() if name not in ("sweep", "no vae")}
    assert all(result["same"] for result in shown.values()), "looking changes nothing"
    counts = {choice: sum(size is not None for *_, size in result["calls"]) for choice, result in shown.items()}
    assert counts == {"auto, none": 0, "auto, latent2rgb": 7, "fast, none": 7, "decoded, none": 7, "off, none": 0}
    sizes = [size for result in shown.values() for *_, size in result["calls"] if size]
    assert all(max(size) <= 512 and abs(size[0] / size[1] - 451 / 300) < 0.02 for size in sizes)


def test_progress_counts_the_real_cost(found):
    calls = facts(found, "previews")["fast, none"]["calls"]
    values = [value for value, total, _ in calls]
    assert {total for _, total, _ in calls} == {1000} and values == sorted(values) and values[-1] == 1000
    steps = [b - a for a, b in zip(values, values[1:])]
    assert values[0] > 2 * steps[0] and steps[-1] == max(steps), "the source's pass and the last scale take longest"


def test_progress_of_a_sweep_goes_on_from_edit_to_edit(found):
    values = [value for value, total, _ in facts(found, "previews")["sweep"]]
    assert values == sorted(values) and values[-1] == 1000
    assert values[0] < 500 and any(500 < value < 1000 for value in values)


def test_a_preview_without_its_vae_is_one_sentence(found):
    assert facts(found, "previews")["no vae"].startswith(SENTENCE + "the preview decoded needs the VAE")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ksampler", "connect it to VAREdit Sampler instead of a diffusion sampler"),
        ("empty text", "the text is empty"),
        ("empty stock text", "the instruction is empty"),
        ("two texts", "write one instruction"),
        ("foreign text", "use a clip from VAREdit Text Encoder Loader"),
        ("foreign latent", "encode it with VAREdit Source Encode"),
        ("large", "use one of at most 7, such as 256"),
        ("vae as model", "connect one from VAREdit Model Loader"),
        ("model as vae", "connect one from VAREdit VAE Loader"),
        ("vae as clip", "connect one from VAREdit Text Encoder Loader"),
        ("vae file as model", "is a VAREdit VAE, not a VAREdit transformer"),
        ("model file as vae", "is a VAREdit transformer, not a VAE"),
        ("model file as clip", "is a VAREdit transformer, not a T5 encoder"),
        ("nan weights", "check the weights"),
        ("nan vae", "the decoded picture holds undefined numbers"),
        ("missing", "https://huggingface.co/HiDream-ai/VAREdit"),
    ],
)
def test_bad_input_is_one_sentence(found, name, message):
    error = facts(found, "bad_input")[name]
    assert error.startswith(SENTENCE) and message in error and "\n" not in error


@pytest.mark.parametrize(("size", "vae"), PUBLISHED_VAES.items())
def test_parts_of_two_sizes_are_refused_by_the_name_of_the_right_one(found, size, vae):
    result = dict(facts(found, "wrong_pairs")[size])
    assert result.pop("right") == [1, 300, 451, 3]
    assert len(result) == 10
    for way, error in result.items():
        assert error.startswith(SENTENCE) and "\n" not in error, (way, error)
        own = {"begun": "; go on with the model that made them", "drafter": "; choose another drafter"}
        assert error.endswith(own.get(way, f" ({vae} for {size})")), (way, error)


def test_an_empty_negative_is_none(found):
    assert facts(found, "bad_input")["empty negative"]


def test_a_long_text_is_cut_and_says_so(found):
    result = facts(found, "long_text")
    assert len(result["chinese"]) == 1 and result["chinese"][0].endswith("unknown to the text encoder; write English")
    assert result["tokens"] == 512 and result["said"] == ["the text has 902 tokens; at most the first 512 are used"]


def test_the_ladder_of_ways_to_run(found):
    result = facts(found, "ladder")
    assert result["2 exact"] == 1.0
    for exact, host in (("1 exact", "1 host"), ("1 exact apart", "1 host apart")):
        assert result[exact] == result[host] > 0.99, "rounding, and what it makes of a draw"
    assert 0.5 < result["1 8-bit"] < 1.0 and 0.5 < result["1 8-bit apart"] < 1.0
    (said,) = result["said of 1 exact"]
    assert said.startswith("2 pictures at once") and "running one picture at a time with" in said
    assert result["said of 2 exact"] == []
    assert result["nothing fits"].startswith(SENTENCE + "an edit at 256x256 takes at least")


def test_memory_that_runs_out_is_answered_by_the_next_way(found):
    result = facts(found, "ladder")
    assert result["tried"] == ["2 exact", "1 exact", "1 exact apart"]
    assert result["held"] == [0, 0, 0], "nothing of an attempt is left when the next one starts"
    assert result["said"][0].startswith("memory ran out 2 pictures at once")
    assert result["never enough"].startswith(SENTENCE)


QUANTISED = ["float8_e4m3fn", "int8_tensorwise", "nvfp4", "mxfp8", *(f"our {precision}" for precision in FORMS)]


@pytest.mark.parametrize("name", [*QUANTISED, "plain fp8", "fp32"])
def test_quantised_files_are_run_by_comfyuis_layers(found, name):
    result = facts(found, "formats")
    if name not in result:
        pytest.skip(f"this ComfyUI does not know {name}")
    plain = name in ("plain fp8", "fp32")
    assert result["matrices"] == 56
    assert result[name]["coded"] == (0 if plain else 56)
    assert result[name]["psnr"] > result["other instruction"]["psnr"] + (3 if "nvfp4" in name else 8)
    assert (result[name]["bytes"] < 0.7 * 10485936) == (name != "fp32")
    # ComfyUI makes the numbers in bf16.
    assert result[name].get("apart", 0) < 0.01, "the library reads the same numbers of the file"
    if name == "fp32":
        assert result[name]["psnr"] > 100, "the same weights"


def test_files_that_cannot_be_used_say_so(found):
    result = facts(found, "formats")
    assert "in the format mxfp8, which only ComfyUI runs" in result["library"]
    for said in result["unknown"]:
        assert said.startswith(SENTENCE) and "int8_tensorwise" in said and "update ComfyUI" in said
    assert result["not whole"].startswith(SENTENCE) and "lacks 1 tensors such as head.bias" in result["not whole"]


@pytest.mark.parametrize("network", ["model", "vae", "clip"])
def test_no_tensor_stays_behind_in_a_partial_load(found, network):
    result = facts(found, "partial")[network]
    assert result["homeless"] == []
    for share in ("0.5", "0.0"):
        assert result[share]["stuck"] == [] and result[share]["end"] == "ran" and result[share]["behind"]


def test_keys_and_values_are_freed_however_a_run_ends(found):
    result = facts(found, "leftovers")
    assert result["success"] == 0
    assert result["error"] == ["RuntimeError", 0, 61] and result["cancel"] == ["InterruptProcessingException", 0, 61]
    assert result["flag"] == "obeyed" and result["next"]


def test_only_what_changes_the_sources_pass_reads_it_again(found):
    result = facts(found, "keeping")
    read = result["read"]
    assert set(read.values()) == {0, 1} and [name for name, count in read.items() if count] == [
        "first", "text", "variations", "lora", "lora strength", "override", "after override"
    ]  # fmt: skip
    assert all(result["equal"].values()), "the same as from a fresh model"


def test_what_stays_is_in_comfyuis_hands(found):
    result = facts(found, "keeping")
    count, size = result["listed"]
    assert count == 2 and size > 10e6, "listed with its size, one for each loaded model"
    assert result["pushed out"] == [2, True], "it goes before weights do"
    assert result["unloaded"] == [0, 0] and result["after"]
    assert result["gone"] == [True, True, 1, []], "with its model, and without a collection"
    assert result["scarce"] == 0, "nothing stays where memory is short"


def test_variations_are_edits_with_the_next_seeds(found):
    result = facts(found, "variations")
    assert min(result["equal"]) > 0.98 and result["different"]
    assert all(result["batches"])
    assert all(share > 0.97 for share in result["ways"].values()), result["ways"]
    assert {"4 exact", "3 exact", "1 exact", "1 host"} <= set(result["ways"])


def test_pictures_of_variations(found):
    result = facts(found, "variations")
    assert result["sums"] == [28, 16, 32, 32] and [shape[0] for shape in result["pictures"]] == [4] * 7
    assert result["decoded"] == [4, 300, 451, 3] and all(result["kept"]), "each on its own picture"
    assert result["three images"].startswith(SENTENCE + "there are 3 images for 4 edits")
    assert result["progress"] == [1000, 7]


@pytest.mark.parametrize("name", ["unguided", "window", "stop", "inside", "mask", "drafted"])
def test_shortcuts_and_masks_are_the_librarys(found, name):
    same, changed = facts(found, "shortcuts")[name]
    assert same == 1.0 and changed == (name != "window"), "at 256 pixels a window sees everything"


def test_masks_of_all_kinds_reach_the_loop(found):
    result = facts(found, "shortcuts")
    assert result["noise mask"] == [True, True] and result["empty mask"]
    assert min(result["masks"]) > 0.98, "each picture of a batch by its own"


def test_a_stopped_edit_shows_the_scales_that_ran(found):
    count, sums, progress = facts(found, "shortcuts")["stopped"]
    assert count == 1 and sums == [1, 16, 32, 32] and progress[-1] == 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inside without mask", "connect one to mask, or set inside to 0"),
        ("inside with an empty mask", "connect one to mask, or set inside to 0"),
        ("three masks", "there are 3 masks for 2 pictures"),
        ("no drafter", "connect one to drafter, or set drafted to 0"),
        ("drafter of one loaded model", "load the drafter with a VAREdit Model Loader of its own"),
        ("idle drafter", "set drafted in VAREdit Shortcuts"),
        ("drafted too many", "the drafter's scales must be from 1 to 6, got 9"),
        ("inside and window", "do not go together"),
        ("latent as scales", "connect the sampler's scales"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(found, name, message):
    error = facts(found, "shortcuts")["errors"][name]
    assert error.startswith(SENTENCE) and message in error and "\n" not in error


CONTROLLED = ("strength", "preserve", "attention", "best", "preset", "own")


@pytest.mark.parametrize(
    "name",
    [*CONTROLLED, "auto, seam 0", "auto, seam 6", "region on top", "two regions", "seam", "begun", "chain"],
)
def test_controlled_edits_are_the_librarys_pictures(found, name):
    result = facts(found, "controls")
    assert set(result["off"][name]) == {0}
    assert result["changed"].get(name, True), "it does something"


def test_neutral_controls_and_curves_change_nothing(found):
    result = facts(found, "controls")
    assert result["neutral"] and result["balanced"]


def test_outside_of_what_an_auto_mask_finds_the_picture_stays_exactly(found):
    result = facts(found, "controls")
    for seam in (0, 6):
        exact, share = result[f"auto kept {seam}"]
        assert exact and 0.5 < share < 0.999 and result[f"auto soft {seam}"]
    assert result["auto soft 6"] > 2 * result["auto soft 0"], "the edit fades in"
    assert result["auto mask"], "the mask that comes out is the library's"


def test_an_auto_mask_that_cannot_be_used_is_told_and_a_mask_comes_before_it(found):
    result = facts(found, "controls")
    unconnected, changed, ones, shape = result["auto told"]
    assert "connect the picture that was edited to image" in unconnected and "another node has changed" in changed
    assert ones and shape == [2, 230, 300] and result["own mask"] == [True, True]


def test_regions_lie_on_top_of_each_other(found):
    result = facts(found, "controls")
    assert result["later on top"] > 0.95 and result["empty own"] and result["inside regions"]


def test_an_edit_goes_on_from_its_first_scales(found):
    result = facts(found, "controls")
    assert result["branches"] == [True, True], "the same beginning, other ends"
    same, (said,) = result["all begun"]
    assert same and "nothing is left to draw" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three masks", "there are 3 masks for 2 pictures"),
        ("empty region", "paint where its instruction is to count"),
        ("inside", "connect one to mask, or set inside to 0"),
        ("window", "set window to 0, or source_attention to 1"),
        ("no source", "strength holds an edit to its source, but there is none"),
        ("regions of nothing", "connect VAREdit Source Encode"),
        ("attention of a picture maker", "leave it at 1"),
        ("begun elsewhere", "connect the source that it is an edit of"),
        ("begun of two", "go on from one edit of each picture"),
        ("begun without tokens", "holds no tokens; connect one of VAREdit Sampler"),
        ("no guidance", "use a guidance other than 1"),
    ],
)
def test_controls_that_do_not_go_together_are_one_sentence(found, name, message):
    error = facts(found, "controls")["errors"][name]
    assert error.startswith(SENTENCE) and message in error and "\n" not in error


def test_layers_with_the_activation_behind_them(found):
    result = facts(found, "layers")
    assert result["gelu"] and result["fused"] and result["patched"] and result["ours"]
    assert result["matrix"] == [False, True, False, False], "only as it is multiplied with"


def test_weights_in_hand_give_comfyuis_numbers(found):
    result = facts(found, "held")
    classes = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "RMSNorm", "Embedding")
    assert all(result[name] for name in classes) and result["matrix"]
    assert not result["classes without a case"] and not result["another type"]


def test_eight_bit_weights_are_multiplied_as_in_the_library(found):
    result = facts(found, "held")
    assert result["8 bits elsewhere"] is None, "where the device does not multiply in 8 bits, ComfyUI does its work"
    assert max(result["8 bits"]) < 0.05
    assert result["reads rounded"] == [True, False, None], "other scales are ComfyUI's to heed"
    for name, most, held in (("int8", 0.05, 3), ("int8, rotated", 0.01, 3), ("nvfp4", 1e-6, 4)):
        fewer = result["fewer bits"][name]
        assert max(fewer["off"]) <= most and fewer["off"][:2] == fewer["off"][2:], "with weights in hand and without"
        assert fewer["held"] == held and not fewer["reads rounded"]


def test_what_a_node_puts_around_a_layer_is_called_with_what_the_layer_reads(found):
    """As LoRAs do that leave weights alone."""
    result = facts(found, "held")["hooked"]
    assert result["gelu"] and result["after gelu"] < 0.05 and result["reads rounded"] is False
    assert result["matrix"] is None


def test_a_layer_that_fails_gives_its_weights_back(found):
    assert facts(found, "held")["given back"] == [1, 1]


def test_a_copy_of_a_vae_with_another_network_records_that_one(found):
    assert facts(found, "held")["copied"] == [True, False, True]


def test_streamed_weights_stand_still_for_an_edit_and_are_given_back(found):
    """Whole, layers with weights in hand, pages pinned, layers filled so far."""
    result = facts(found, "streaming")
    assert result["first"] == [True, 4, 1, 3, True, 8] and result["released"] == [False, 0, 0, 3]
    assert result["again"] == [[True, 4, 1, 3, True], 1], "nothing is filled or loaded the second time"
    assert result["pages lost"] == [None, 0] and result["filled anew"] == [True, 4, 1, 3, True]
    assert result["small"] == [True, [1.0] * 4], "small weights keep their place and take the new numbers"
    assert result["static"] == result["static again"] == [True, 4, 0]
    assert result["static in part"] == [False, 3, 0, None]
    assert result["static, apart"] == [True, True], "ComfyUI may give a parameter other storage within an edit"


def test_only_what_is_as_it_was_stands_still_without_loading(found):
    result = facts(found, "streaming")
    changed = {name: what for name, what in result.items() if name.startswith("changed: ")}
    assert changed.pop("changed: nothing") == [False, 0, False]
    assert len(changed) == 7 and all(what == [True, 0, False] for what in changed.values()), "nothing stays pinned"
    assert result["refilled"] == [True, 4, 1, 3]


def test_weights_that_cannot_all_stand_still_are_fetched_as_ever(found):
    result = facts(found, "streaming")
    assert result["no room"][:3] == result["too little room"][:3] == [False, 0, 0]
    assert result["in steps"] == [True, True] and result["in steps, again"][:3] == [True, 4, 3]
    assert result["no room for the last step"][:3] == [False, 0, 0], "steps that had room are given back"
    assert result["a function on a weight"][:3] == [False, 3, 1] and result["a function on a weight"][4] is True
    assert result["taken back"] == [0, False]
    assert result["failed: interrupt"] == result["failed: memory"] == [True, 0, False, False]
    assert result["pages given away"] == [False, 0, 0, False]
    assert result["unknown"] == [False, 0, 0, True, None], "another ComfyUI's way is left alone"


def test_a_workspace_is_listed_without_pushing_others_out(found):
    assert facts(found, "listing") == [0, 1, True]


def test_weights_that_are_streamed_make_way_before_the_workspace(found):
    """Bytes that another model asks for where 100 of weights are streamed: how often weights and workspace must go."""
    assert facts(found, "way") == {"50": [0, 0], "150": [0, 1]}


def test_where_triton_is_missing_one_sentence_says_how_to_install_it(found):
    result = facts(found, "without_triton")
    assert "python_embeded\\python.exe -m pip install triton-windows" in result["Windows"][0]
    assert "python -m pip install triton with" in result["Linux"][0]
    assert result["Windows"][1] is result["Linux"][1] is None, "said once"
    assert result["old"] == result["there"] == [None, None] and result["CPU"] == [None]


def test_passes_may_be_recorded_only_while_all_lies_still(found):
    result = facts(found, "recording")
    assert result["still"] == [True, True, False], "on the device, wholly loaded, loaded in part"
    assert result["unchanged"] == [False, False, False, True]


def test_the_form_of_recorded_passes_edits_alike(found):
    result = facts(found, "recording")
    assert result["folded"] and result["again"]
    assert min(result["equal"]) > 0.8, "bf16 rounds differently where projections are folded into the text"


def sentences() -> dict[str, str]:
    """What the sampler says of every knob that would do nothing without another or a mask, or counts more scales than
    there are. Those of `inside` and `drafted` that are missing are errors."""
    found = {}
    for group in ("controls", "shortcuts"):
        own = [knob.name for knob in knobs(group)]
        for knob in knobs(group):
            needs = knob.needs.split()
            other = next((need for need in needs if need in own), None)
            rest = f"or leave {knob.name} at {knob.default}"
            if other:
                found[f"{knob.name} alone"] = f"{knob.name} counts only with {other}; set that too, {rest}"
            elif "mask" in needs and knob.name != "inside":
                found[f"{knob.name} alone"] = f"{knob.name} counts only beside a mask; give a mask, {rest}"
            if knob.scales and knob.name != "drafted":
                found[f"{knob.name} beyond"] = f"{knob.name} is {knob.high} but the edit has 7 scales; give at most 7"
    return found


TOLD = {
    **sentences(),
    "begun of another picture": "the latent to go on from is an edit of a 451x300 picture, and the source is one of "
    "300x300; connect the source that it is an edit of",
    "guidance of other models": "varedit_demo.safetensors edits best at a guidance of 2; 3 is for others",
}


def test_every_knob_that_would_do_nothing_is_told(found):
    known = {"feather", "best_at", "score"}, {"best_at", "unguided", "inside", "stop"}
    assert TOLD.keys() >= {f"{name} {how}" for names, how in zip(known, ("alone", "beyond")) for name in names}
    assert facts(found, "told").keys() == TOLD.keys()


@pytest.mark.parametrize("name", TOLD)
def test_a_knob_that_would_do_nothing_is_told_and_the_edit_is_right(found, name):
    assert facts(found, "told")[name] == [True, [TOLD[name]]]


MASKED = ("VAREditSampler", "VAREditDecode", "VAREditSweep", "VAREditCropRegion", "VAREditRegion", "SetLatentNoiseMask")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(("kind", "said"), [("empty", "mask.* is empty"), ("upright", "is 300x451 but the picture")])
def test_a_mask_that_is_empty_or_of_another_shape_is_told_wherever_it_comes_in(found, name, kind, said):
    told = facts(found, "stray_masks")["said"][f"{name} {kind}"]
    assert told and all(re.search(said, one) for one in told)


def test_every_node_that_takes_a_mask_is_looked_at(found):
    assert set(facts(found, "stray_masks")["nodes"]) == set(MASKED) - {"SetLatentNoiseMask"}


def test_a_batchs_mask_is_asked_row_by_row(found):
    empty, vanishes = facts(found, "says")["rows"]
    assert empty == "row 2 of the mask is empty, so that it marks nothing in its picture"
    assert vanishes.startswith(SENTENCE + "the mask is too small to be seen at the model's size")


GRAPHS = {
    "workflow": (["prompt", "workflow"], ""), "list": (["prompt"], ""), "text": (["prompt"], ""),
    "nothing": (["prompt"], ""), "numbers": (["1", "prompt"], ""), "surrogate": ([], "cannot be written"),
    "bytes": ([], "cannot be written"), "long": ([], "has 5.0 MB"), "long name": ([], "has 5.0 MB"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_no_graph_costs_the_tokens(found, name):
    names, said = facts(found, "says")[name]
    assert names == GRAPHS[name][0] and len(said) == bool(GRAPHS[name][1])
    assert all(GRAPHS[name][1] in sentence for sentence in said)


@pytest.mark.parametrize("x", ["seed", "top_p", "preset"])
def test_a_sweep_of_values_that_do_nothing_is_told(found, x):
    assert any(f"{x} " in sentence for sentence in facts(found, "says")[f"sweep {x}"])


@pytest.mark.parametrize("way", ["partially_unload", "detach", "free_memory", "unload_all_models"])
def test_an_edit_at_work_keeps_its_cache_and_gives_it_back_at_its_end(found, way):
    result = facts(found, "asked_back")[way]
    assert result["same"] and result["freed"] == [0] * 7, "asked before each of seven scales, with decoded previews"
    assert len(set(result["held"])) == 1 and result["held"][0] > 10e6
    assert result["left"] == [0, True, 0] and result["again"], "all is given back, and the next edit keeps it again"


@pytest.mark.parametrize("live", ["none", "latent2rgb"])
@pytest.mark.parametrize("choice", ["auto", "fast", "decoded", "off"])
def test_colours_are_fitted_for_fast_previews_alone_and_before_the_loop(found, choice, live):
    result = facts(found, "colours")[f"{choice}, {live}"]
    fast = choice == "fast" or (choice == "auto" and live != "none")
    assert result["first"] == (["encode", "loop"] if fast else ["loop"])
    assert result["second"] == ["loop"] and result["same"]


JOBS = {
    "plain": 1, "variations": 3, "two pictures, two instructions": 2, "two pictures, variations": 4, "best of": 3,
    "best of, variations": 3, "best of, two pictures, variations": 6, "mask": 1, "mask, margin": 1, "regions": 2,
    "regions, variations": 4, "regions, best of": 6, "auto mask": 1, "auto mask, variations": 2, "begun": 1,
    "begun, variations": 2, "drafted": 1, "unguided, strength": 1,
}  # fmt: skip
"""Kinds of jobs, and how many rows each is planned with: pictures, times regions, times variations or candidates."""


def test_every_kind_of_job_is_in_the_list(found):
    assert facts(found, "same_job").keys() == JOBS.keys()


@pytest.mark.parametrize("name", JOBS)
def test_nodes_and_library_give_the_same_bits_for_the_same_job(found, name):
    result = facts(found, "same_job")[name]
    assert result["bits"] and result["sums"]
    assert result["job"] and result["images"] == JOBS[name], "both count the same rows"


def test_the_plan_states_gigabytes(found):
    lines = facts(found, "plan").splitlines()
    assert lines[0] == "256x256, pictures: 2, with guidance, float32 on cpu"
    assert [line.split(":")[0] for line in lines[1:5]] == [
        "weights",
        "KV cache",
        "activations, at most",
        "in all",
    ]
    assert all(line.endswith(" GB") for line in lines[1:5]) and "will run 2 pictures at once" in lines[-1]
