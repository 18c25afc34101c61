"""ComfyUI's own nodes and start-up flags on the pack's types, in ComfyUI's Python (see `core_nodes.py`).

Every node that takes a MODEL, CLIP, VAE or CONDITIONING has one of these ends: the picture is the one without it, it
changes as the node means (`CHANGED`), or there is one sentence. What else there is has a reason in `OWN`. A node that a
newer ComfyUI brings fails here until its end is one of these.
"""

from itertools import chain

import pytest
from support import ROOT

SENTENCE = "ValueError"
CHANGED = {
    "LoraLoader": "a LoRA", "LoraLoaderModelOnly": "a LoRA", "LoraLoaderBypass": "a LoRA",
    "LoraLoaderBypassModelOnly": "a LoRA", "LoraModelLoader": "a LoRA",
    "ModelMergeAdd": "twice the weights", "ModelMergeSubtract": "no weights", "CLIPMergeAdd": "twice the weights",
    "ConditioningSetArea": "a region", "ConditioningSetAreaPercentage": "a region",
    "ConditioningSetAreaPercentageVideo": "a region", "ConditioningSetMask": "a region",
    "ConditioningSetProperties": "a region", "PairConditioningSetProperties": "a region",
    "CLIPTextEncodeLumina2": "a longer text",
}  # fmt: skip
SILENT = {
    **dict.fromkeys(["LoraLoader", "LoraLoaderBypass"], "the LoRA has nothing for the text encoder"),
    **dict.fromkeys(["CLIPTextEncode", "TextEncodeAceStepAudio1.5", "TextEncodeMageFlowEdit"], "the text itself"),
    **dict.fromkeys(["TextEncodeBooguEdit", "TextEncodeJoyImageEdit"], "the text itself, where there is no picture"),
    **dict.fromkeys(["TextEncodeHunyuanVideo_ImageToVideo", "CLIPMergeSimple"], "the text itself"),
    **dict.fromkeys(["ConditioningAverage", "ConditioningMultiply"], "a factor of 1"),
    **dict.fromkeys(["ConditioningSetAreaStrength", "CLIPAttentionMultiply"], "a factor of 1"),
    **dict.fromkeys(["ConditioningSetTimestepRange", "CLIPSetLastLayer"], "the whole range"),
    **dict.fromkeys(["UNetCrossAttentionMultiply", "UNetSelfAttentionMultiply"], "a factor of 1"),
    **dict.fromkeys(["UNetTemporalAttentionMultiply", "ChromaRadianceOptions"], "factors of 1"),
    **dict.fromkeys(["SelectModelDevice", "SelectCLIPDevice", "MultiGPU_WorkUnits"], "the same device"),
    **dict.fromkeys(["ModelAttentionBackend", "wanBlockSwap", "FluxDisableGuidance"], "what there is anyway"),
    **dict.fromkeys(["MakeTrainingDataset", "ResolutionBucket", "MiniMaxH3ReferenceToVideo"], "the text itself"),
    "LoraModelLoader": "an empty LoRA",
    "TorchCompileModel": "the same numbers, compiled",
    "T5TokenizerOptions": "lengths of another encoder's padding; ours has none",
}
"""Nodes whose defaults change nothing, so that there is nothing to tell; and all `ModelMerge...` of one model."""
ANOTHER = "it needs a model or an object of another kind, and stops at its stand-in"
VIDEO = "it puts our VAE's latents into those of a video model; the error is ComfyUI's own, on shapes"
VISION = "it asks a vision model, not a diffusion model, for its parts; the error is ComfyUI's own"
OWN = {
    **dict.fromkeys(
        [
            "AnimaLLLiteApply", "DiffControlNetLoader", "HypernetworkLoader", "LTXVDurationPredictor",
            "LTXVLatentUpsampler", "QwenImageDiffsynthControlnet", "USOStyleReference", "WanUni3CControlnetApply",
            "ZImageFunControlnet", "PhotoMakerEncode", "Trellis2ShapeStage", "Trellis2TextureStage",
            "Trellis2UpsampleStage", "TripoSplatConditioning", "VaeDecodeTextureTrellis", "WanDancerVideo",
            "WanHuMoImageToVideo", "WanSoundImageToVideo", "WanSoundImageToVideoExtend",
        ],
        ANOTHER,
    ),
    **dict.fromkeys(
        [
            "CosmosImageToVideoLatent", "CosmosPredict2ImageToVideoLatent", "HunyuanVideo15ImageToVideo",
            "HunyuanVideo15SuperResolution", "LTXVAddGuide", "LTXVCropGuides", "LTXVImgToVideo",
            "LTXVImgToVideoInplace", "Wan22FunControlToVideo", "WanCameraImageToVideo", "WanFunControlToVideo",
            "WanSCAILToVideo", "Wan22ImageToVideoLatent", "WanVaceToVideo",
        ],
        VIDEO,
    ),
    **dict.fromkeys(["RTDETR_detect", "SAM3_Detect", "SAM3_VideoTrack", "TripoSplatSamplingPreview"], VISION),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(comfyui, tmp_path_factory) -> dict:
    return comfyui.run(ROOT / "tests" / "core_nodes.py", tmp_path_factory.mktemp("core_nodes"), seconds=3000)


def facts(found: dict, name: str) -> dict:
    assert "failed" not in found[name], found[name]["failed"]
    return found[name]


def is_sentence(error) -> bool:
    """Whether an error is a ValueError of one sentence."""
    kind, message = error[0], error[1]
    return kind == SENTENCE and "\n" not in message and not message.startswith("not enough values")


def ends_well(name: str, result: dict) -> bool:
    """Whether what came of a node is one of the ends that are right."""
    outputs = result.get("outputs", {}).values()
    errors = [end["error"] for end in (result, *outputs) if "error" in end]
    ends = [end for end in outputs if "error" not in end]
    changed = any(not end["same"] for end in ends)
    silent = any(end["same"] and not end["said"] for end in ends)
    told = not silent or name in SILENT or name in CHANGED or name.startswith("ModelMerge")
    return all(map(is_sentence, errors)) and told and (not changed or name in CHANGED)


def test_every_core_node_with_one_of_our_types_ends_well(found):
    results = facts(found, "everything")
    assert len(results) > 200
    wrong = {name: result for name, result in results.items() if not ends_well(name, result)}
    assert {name: result for name, result in wrong.items() if name not in OWN} == {}
    assert OWN.keys() & results.keys() == wrong.keys(), "what has become right needs no reason"


def test_masks_and_areas_of_stock_nodes_are_regions(found):
    result = facts(found, "conditioning")
    for name in ("mask", "default", "area in shares", "area in pixels", "alone", "strength 0", "region of a region"):
        assert result[name], name
    assert "strength of 0" in result["all of strength 0"]


def test_a_zeroed_negative_is_no_negative_prompt(found):
    assert facts(found, "conditioning")["zero as negative"]


@pytest.mark.parametrize("name", ["concat", "average", "multiply", "combine"])
def test_mixtures_of_texts_are_one_sentence(found, name):
    for message in facts(found, "conditioning")[name]:
        assert message.startswith("builtins.ValueError: ") and "which this model cannot; write one" in message


def test_what_a_conditioning_carries_in_vain_is_told_once(found):
    result = facts(found, "conditioning")
    assert result["average of 1"] and result["whole range"] == [True, []]
    for name, words in (("half", "a strength other than 0 and 1"), ("unknown", "of_tomorrow")):
        same, (said,) = result[name]
        assert same and words in said


def test_saved_models_are_read_by_the_packs_loaders(found):
    result = facts(found, "saves")
    assert all(result.values()) and len(result) == 10, result


@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"])
def test_equal_strengths_are_equal_pictures(found, loader):
    strengths = [1.0, 0.5, 1.0, 0.0, -0.5, 1.0, 0.0, 1.0]  # without a LoRA counts as 0
    assert facts(found, "loras")[loader] == [[a == b for b in strengths] for a in strengths]


def test_a_bypass_is_the_normal_loader(found):
    assert facts(found, "loras")["bypass"] > 0.98


@pytest.mark.parametrize("guider", ["BasicGuider", "CFGGuider", "DualCFGGuider"])
def test_advanced_samplers_say_one_sentence(found, guider):
    message = facts(found, "guiders")[guider]
    assert "connect it to VAREdit Sampler instead of a diffusion sampler" in message and "\n" not in message


def test_merged_models_of_other_sizes_are_one_sentence(found):
    result = facts(found, "models")
    assert "merge models of one size" in result["unlike"] and result["after"]


def test_every_cache_gives_the_same_edits(found):
    result = facts(found, "caches")
    first, *others = result.pop("same")
    assert all(result.values()) and len(others) >= 3 and set(others) == {first}


def test_inputs_of_wrong_kinds_are_one_sentence(found):
    result = facts(found, "wrong")
    assert result.pop("beyond")
    wrong = {name: error for name, error in result.items() if not error.startswith("builtins.ValueError: ")}
    assert not wrong and not any("\n" in error for error in result.values())


EXACT = 99.0
"""The error, in dB, of equal pictures."""
FLAGS = {
    **dict.fromkeys(["fp32_unet", "fp64_unet", "bf16_unet", "fp16_unet", "fp32_vae", "cpu_vae"], EXACT),
    **dict.fromkeys(["fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet", "fp16_vae"], EXACT),
    **dict.fromkeys(["fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc", "fp16_text_enc"], EXACT),
    **dict.fromkeys(["fp32_text_enc", "bf16_text_enc", "force_channels_last", "supports_fp8_compute"], EXACT),
    "bf16_vae": 45.0,  # the decoder in bf16
    "fp16_intermediates": 45.0,  # pictures and latents between nodes
}
"""Flags of numbers that ComfyUI heeds whenever a model is loaded, and the least PSNR to the picture without them: the
demo model's weights are small enough to be kept, so that most of these change nothing on a CPU."""
TOGETHER = [
    ["force_fp16", "use_split_cross_attention", "lowvram", "deterministic", "disable_mmap"],
    ["force_fp32", "use_quad_cross_attention", "novram", "force_upcast_attention", "disable_smart_memory"],
    [
        "use_pytorch_cross_attention", "dont_upcast_attention", "gpu_only", "mmap_torch_files", "disable_dynamic_vram",
        "disable_async_offload",
    ],
    ["highvram"],
]  # fmt: skip
"""Flags that are heeded while ComfyUI starts, in sets that go together."""
ELSEWHERE = {
    **dict.fromkeys(["cache_ram", "cache_classic", "cache_lru", "cache_none", "high_ram"], "every cache, above"),
    **dict.fromkeys(
        [
            "cuda_malloc", "disable_cuda_malloc", "use_sage_attention", "use_flash_attention", "use_ck_attention",
            "disable_xformers", "enable_triton_backend", "disable_triton_backend", "reserve_vram", "vram_headroom",
            "disable_nvml_pressure", "async_offload", "enable_dynamic_vram", "fast_disk", "disable_cuda_graphs",
            "force_non_blocking", "disable_pinned_memory", "fast",
        ],
        "a GPU alone",
    ),
}  # fmt: skip
UNRELATED = {
    "listen", "port", "tls_keyfile", "tls_certfile", "enable_cors_header", "max_upload_size", "base_directory",
    "extra_model_paths_config", "output_directory", "temp_directory", "input_directory", "auto_launch",
    "disable_auto_launch", "cuda_device", "default_device", "directml", "oneapi_device_selector", "preview_method",
    "preview_size", "enable_manager", "disable_manager_ui", "enable_manager_legacy_ui", "cpu", "debug_hang",
    "default_hashing_function", "dont_print_server", "quick_test_for_ci", "windows_standalone_build",
    "disable_metadata", "disable_all_custom_nodes", "whitelist_custom_nodes", "disable_api_nodes", "multi_user",
    "verbose", "log_stdout", "front_end_version", "front_end_root", "user_directory", "models_directory",
    "enable_compress_response_body", "comfy_api_base", "database_url", "enable_assets", "enable_asset_hashing",
    "feature_flag", "list_feature_flags",
}  # fmt: skip


@pytest.fixture(scope="module")
def flagged(comfyui, tmp_path_factory) -> dict:
    script, scratch = ROOT / "tests" / "core_flags.py", tmp_path_factory.mktemp("core_flags")
    return comfyui.run(script, scratch, ",".join(FLAGS), seconds=2000)


def test_every_start_up_flag_is_decided(flagged):
    assert set(flagged["flags"]) <= FLAGS.keys() | set(chain(*TOGETHER)) | ELSEWHERE.keys() | UNRELATED


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_numbers_leaves_the_picture_right(flagged, flag):
    psnr = flagged["under"][flag]
    assert isinstance(psnr, float) and psnr >= FLAGS[flag], psnr


@pytest.mark.parametrize("flags", TOGETHER, ids=" ".join)
def test_flags_of_the_start_leave_the_picture_right(comfyui, flagged, tmp_path, flags):
    found = comfyui.run(ROOT / "tests" / "core_flags.py", tmp_path, "", *flags, seconds=1000)
    assert found["mean"] == pytest.approx(flagged["mean"], abs=1e-4)
