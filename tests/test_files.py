"""Weight files: every container and key style loads alike; what cannot be used is explained in one sentence."""

import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GOLDEN

from varedit_core import load_autoencoder, load_transformer
from varedit_core.files import info
from varedit_core.files import weights as weights_module
from varedit_core.files.checkpoints import TEXT_ENCODER, TOKENIZER, TRANSFORMER, canonical, select
from varedit_core.files.convert import convert
from varedit_core.files.info import inspect
from varedit_core.files.published import AUTOENCODERS, TRANSFORMERS
from varedit_core.files.weights import WeightError, Weights, open_weights
from varedit_core.model.transformer import Transformer
from varedit_core.tokenizer.vae import Autoencoder

RECORD = GOLDEN / "patchify_256.safetensors"


def same(network, reference) -> bool:
    ours, theirs = network.state_dict(), reference.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def explained(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.fixture(scope="module")
def reference(published_file):
    return load_transformer(published_file)


@pytest.fixture(scope="module")
def vae_state():
    prefix = "vae."
    return {
        key[len(prefix) :]: tensor.float()
        for key, tensor in load_file(RECORD).items()
        if key.startswith(prefix) and tensor.is_floating_point()
    }


def sharded(state, folder, suffix, shards=3, index=True):
    folder.mkdir()
    weight_map = {}
    for number in range(shards):
        part = {key: state[key] for key in sorted(state)[number::shards]}
        name = f"model-{number + 1:05d}-of-{shards:05d}.{suffix}"
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        (folder / f"model.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def shard(number, suffix, index=False):
    """One of a model's three files, named with or without an index beside it."""
    name = f"model-{number:05d}-of-00003.{suffix}"
    return lambda state, folder: sharded(state, folder / "s", suffix, index=index) / name


CONTAINERS = {
    "pth": lambda state, folder: torch.save(state, path := folder / "a.pth") or path,
    "old pth, no zip": lambda state, folder: (
        torch.save(state, path := folder / "a.pth", _use_new_zipfile_serialization=False) or path
    ),
    "nested training state": lambda state, folder: (
        torch.save({"trainer": {"gpt_fsdp": state}, "epoch": 3, "args": None}, path := folder / "a.pt") or path
    ),
    "safetensors": lambda state, folder: save_file(state, path := folder / "a.safetensors") or path,
    "folder with one file": lambda state, folder: save_file(state, folder / "a.safetensors") or folder,
    "prefix": lambda state, folder: (
        save_file({f"model.diffusion_model.{k}": v for k, v in state.items()}, path := folder / "a.safetensors") or path
    ),
    "sharded safetensors": lambda state, folder: sharded(state, folder / "s", "safetensors"),
    "sharded pickles": lambda state, folder: sharded(state, folder / "s", "bin"),
    "index file": lambda state, folder: sharded(state, folder / "s", "safetensors") / "model.safetensors.index.json",
    "shards of torch with an index": lambda state, folder: sharded(state, folder / "s", "pth"),
    "shard beside its index": shard(2, "safetensors", index=True),
    "shards without an index": lambda state, folder: sharded(state, folder / "s", "safetensors", index=False),
    "first of the shards without an index": shard(1, "safetensors"),
    "last of the shards without an index": shard(3, "safetensors"),
    "pickled shard without an index": shard(2, "bin"),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_loads_alike(published_state, reference, tmp_path, container):
    assert same(load_transformer(CONTAINERS[container](published_state, tmp_path)), reference)


def test_blocks_in_one_list(published_state, reference, tmp_path):
    """Training checkpoints without chunks name the blocks `blocks.N`."""
    flat = {
        re.sub(r"block_chunks\.(\d+)\.module\.0", r"blocks.\1", key): tensor for key, tensor in published_state.items()
    }
    torch.save(flat, tmp_path / "a.pth")
    assert same(load_transformer(tmp_path / "a.pth"), reference)


def test_biases_are_folded(published_state, reference):
    state, prefix = reference.state_dict(), "block_chunks.5.module.0."
    q, v = published_state[prefix + "sa.q_bias"], published_state[prefix + "sa.v_bias"]
    assert torch.equal(state["blocks.5.sa.mat_qkv.bias"], torch.cat((q, torch.zeros(128), v)))
    assert torch.equal(
        state["blocks.5.ca.mat_kv.bias"], torch.cat((torch.zeros(128), published_state[prefix + "ca.v_bias"]))
    )
    assert torch.equal(state["blocks.5.ada_gss.weight"], published_state[prefix + "ada_gss"].reshape(6, 128))


@pytest.mark.parametrize("order", [("ema", "vae"), ("vae", "ema")])
def test_averaged_weights_are_not_taken_by_mistake(vae_state, tmp_path, order):
    parts = {"vae": vae_state, "ema": {key: tensor + 1 for key, tensor in vae_state.items()}}
    torch.save({name: parts[name] for name in order}, tmp_path / "vae.pth")
    assert same(load_autoencoder(tmp_path / "vae.pth"), load_autoencoder(RECORD))
    torch.save({"ema": vae_state}, tmp_path / "ema.pth")
    assert same(load_autoencoder(tmp_path / "ema.pth"), load_autoencoder(RECORD))


def test_a_key_bias_is_kept(published_state, tmp_path):
    """The published files call it zero, and add it."""
    state = dict(published_state)
    state["block_chunks.1.module.0.sa.zero_k_bias"] = torch.full((128,), 0.5)
    del state["block_chunks.2.module.0.ca.zero_k_bias"]
    torch.save(state, tmp_path / "a.pth")
    loaded = load_transformer(tmp_path / "a.pth").state_dict()
    assert (loaded["blocks.1.sa.mat_qkv.bias"][128:256] == 0.5).all()
    assert (loaded["blocks.2.ca.mat_kv.bias"][:128] == 0).all()


@pytest.mark.parametrize("style", ["wrapped", "plain", "vae container", "with training parts"])
def test_tokenizer_key_styles(vae_state, tmp_path, style):
    state = dict(vae_state)
    if style == "plain":
        state = {re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", key): tensor for key, tensor in state.items()}
        assert not any(".norm.weight" in key or "conv_in.conv" in key for key in state)
    if style == "with training parts":
        state |= {"quantizer.lfq.mask": torch.ones(14), "image_disc.0.weight": torch.ones(3)}
    torch.save({"vae": state} if style == "vae container" else state, tmp_path / "vae.pth")
    assert same(load_autoencoder(tmp_path / "vae.pth"), load_autoencoder(RECORD))


def test_dtype_reaches_the_blocks_only(published_file):
    state = load_transformer(published_file, dtype=torch.bfloat16).state_dict()
    low = {key for key, tensor in state.items() if tensor.dtype == torch.bfloat16}
    assert low == {
        key for key in state if key.startswith("blocks.") and ("mat_" in key or ".proj." in key or ".ffn." in key)
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_converted_files(published_file, reference, tmp_path, precision):
    target = tmp_path / "a" / "b.safetensors"
    metadata = convert(published_file, target, precision)
    assert metadata["varedit.architecture"] == "varedit" and metadata["varedit.precision"] == precision
    assert dict(open_weights(target).metadata) == metadata
    assert not list(target.parent.glob("*.partial"))
    load_file(target)  # the reference reader accepts the file
    network = load_transformer(target)
    for key, tensor in reference.state_dict().items():
        stored = network.state_dict()[key]
        if precision == "fp32":
            assert torch.equal(stored, tensor)
        elif not (key.startswith("blocks.") and ("mat_" in key or ".proj." in key or ".ffn." in key)):
            assert torch.equal(stored, tensor), f"{key} must stay fp32"
        elif precision == "bf16":
            assert torch.equal(stored, tensor.bfloat16().float())
        elif key.endswith(".bias"):
            assert torch.equal(stored, tensor.bfloat16().float())
        else:
            assert stored.dtype == torch.float8_e4m3fn
            value = stored.float() * network.get_buffer(f"{key}_scale")
            assert (value - tensor).abs().max() <= tensor.abs().max() / 448 * 16, "half a step of e4m3 at its top"
    if precision == "fp8":
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        assert layers["blocks.0.sa.mat_qkv"] == {"format": "float8_e4m3fn"} and len(layers) == 8 * 7
        assert open_weights(target).shapes["blocks.0.sa.mat_qkv.weight_scale"] == ()


def test_8bit_file_edits_like_its_dequantised_twin(patchify, tmp_path):
    from varedit_core import SamplingSettings, sample

    convert(RECORD, tmp_path / "8.safetensors", "fp8")
    network, twin = load_transformer(tmp_path / "8.safetensors"), load_transformer(RECORD)
    for name, module in network.named_modules():
        if getattr(module, "weight_scale", None) is not None:
            twin.get_submodule(name).weight.copy_(module.weight.float() * module.weight_scale)
            twin.get_submodule(name).bias.copy_(module.bias)
    runs = [
        list(
            sample(
                n,
                patchify["ref.vae_features"].float(),
                patchify.texts("text"),
                patchify.schedule,
                SamplingSettings(temperature=0),
            )
        )
        for n in (network, twin)
    ]
    for a, b in zip(*runs):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=0)


def test_tokenizer_converts_losslessly(tmp_path):
    metadata = convert_vae(tmp_path)
    assert metadata["varedit.architecture"] == "varedit-tokenizer" and metadata["varedit.precision"] == "fp32"
    assert same(load_autoencoder(tmp_path / "vae.safetensors"), load_autoencoder(RECORD))


def convert_vae(folder):
    state = {key: tensor for key, tensor in load_file(RECORD).items() if key.startswith("vae.")}
    save_file(state, folder / "only-vae.safetensors")
    return convert(folder / "only-vae.safetensors", folder / "vae.safetensors", "fp8")


def test_a_mapped_file_is_reopened_while_it_is_read(published_file, reference, tmp_path, monkeypatch):
    opened = []
    original = weights_module.map_tensors
    monkeypatch.setattr(weights_module, "map_tensors", lambda *a: opened.append(a) or original(*a))
    monkeypatch.setattr(weights_module, "REOPEN_AFTER", 1 << 20)
    assert same(load_transformer(published_file), reference)
    assert len(opened) > 3, "mapped, and opened anew after every megabyte"


def test_convert_never_overwrites_or_leaves_pieces(published_file, tmp_path, monkeypatch):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        convert(published_file, target)
    assert target.read_bytes() == b"precious"
    monkeypatch.setattr("varedit_core.files.convert._tensors", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(published_file, target, overwrite=True)
    assert target.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [target]


def test_convert_refuses(published_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown precision 'int4'; choose one of fp32, bf16, fp8, int8, nvfp4"):
        convert(published_file, tmp_path / "a.safetensors", "int4")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        convert(published_file, tmp_path / "a.pth")
    convert(published_file, tmp_path / "8.safetensors", "fp8")
    with pytest.raises(WeightError, match="is in fewer bits already"):
        convert(tmp_path / "8.safetensors", tmp_path / "b.safetensors")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ValueError, match="GB free but the result takes"):
        convert(published_file, tmp_path / "c.safetensors")


def test_convert_never_a_part_and_never_nan(published_state, tmp_path):
    state = dict(published_state)
    state["block_chunks.2.module.0.ffn.fc1.weight"] = state["block_chunks.2.module.0.ffn.fc1.weight"] * float("nan")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightError) as error:
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    explained(error, "infinite or undefined numbers in blocks.2.ffn.fc1.weight")
    del state["block_chunks.2.module.0.ffn.fc1.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightError) as error:
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    explained(error, "lacks 1 tensors such as blocks.2.ffn.fc1.weight")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


# What cannot be used.


def test_missing_file(tmp_path):
    with pytest.raises(WeightError) as error:
        load_transformer(tmp_path / "8B-1024.pth")
    explained(error, "8B-1024.pth does not exist")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_truncated_safetensors(published_state, tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_file(published_state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(WeightError) as error:
        load_transformer(path)
    explained(error, "a.safetensors is truncated")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_pth(published_state, tmp_path, zipped, keep):
    path = tmp_path / "a.pth"
    torch.save(published_state, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(WeightError) as error:
        load_transformer(path)
    explained(error, "a.pth")


class Payload:
    def __reduce__(self):
        return (open, ("/nonexistent/owned", "w"))


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    torch.save({"word_embed.weight": torch.ones(2), "x": Payload()}, tmp_path / "a.pth")
    with pytest.raises(WeightError) as error:
        load_transformer(tmp_path / "a.pth")
    explained(error, "a.pth", "holds more than tensors")


@pytest.mark.parametrize(
    ("keys", "described"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight"], "a Stable Diffusion or SDXL model"),
        (["double_blocks.0.img_attn.qkv.weight"], "a Flux model"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP text encoder"),
        (["model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["diffusion_model.blocks.0.attn.lora_A.weight"], "a LoRA"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["something.else"], "an unknown model with keys such as something.else"),
    ],
)
def test_unrelated_models_are_named(tmp_path, keys, described):
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(WeightError) as error:
        load_transformer(tmp_path / "x.safetensors")
    explained(error, "x.safetensors is", described, "VAREdit transformer such as 8B-1024.pth")


def test_parts_in_the_wrong_place(published_file, tmp_path):
    convert_vae(tmp_path)
    with pytest.raises(WeightError) as error:
        load_transformer(tmp_path / "vae.safetensors")
    explained(error, "is a VAREdit VAE, not a VAREdit transformer")
    with pytest.raises(WeightError) as error:
        load_autoencoder(published_file)
    explained(error, "is a VAREdit transformer, not a VAE such as infinity_vae_d56_f8_14_patchify.pth")


@pytest.mark.parametrize("name", ["infinity_2b_reg.pth", "infinity_8b_weights"])
def test_text_to_image_checkpoints_are_known_by_name(published_state, tmp_path, name):
    path = sharded(published_state, tmp_path / name, "safetensors") if "." not in name else tmp_path / name
    if path.suffix:
        torch.save(published_state, path)
    assert not load_transformer(path).config.source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("block_chunks.3.module.0.ffn.fc2.weight"),
            ("lacks 1 tensors such as blocks.3.ffn.fc2.weight",),
        ),
        (lambda s: s.pop("block_chunks.3.module.0.sa.q_bias"), ("lacks",)),
        (lambda s: s.pop("cfg_uncond"), ("not a complete VAREdit transformer", "cfg_uncond")),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("block_chunks.7.")], None),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("block_chunks.3.")], ("incomplete",)),
        (
            lambda s: s.update({"block_chunks.0.module.0.sa.extra": torch.ones(3)}),
            ("1 unknown tensors such as blocks.0.sa.extra",),
        ),
        (
            lambda s: s.update({"head.weight": torch.ones(112, 64)}),
            ("head.weight of shape [112, 64] where [112, 128] was expected",),
        ),
    ],
)
def test_never_a_part(published_state, tmp_path, change, words):
    state = dict(published_state)
    change(state)
    torch.save(state, tmp_path / "a.pth")
    if words is None:  # one chunk fewer is a smaller network, read off the file
        assert load_transformer(tmp_path / "a.pth").config.depth == 7
        return
    with pytest.raises(WeightError) as error:
        load_transformer(tmp_path / "a.pth")
    explained(error, "a.pth", *words)


def test_shards_that_are_not_there(published_state, tmp_path):
    folder = sharded(published_state, tmp_path / "s", "safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightError) as error:
        load_transformer(folder)
    explained(error, "lacks the shard model-00002-of-00003.safetensors")
    save_file({"other": torch.ones(1)}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(WeightError) as error:
        load_transformer(folder)
    explained(error, "lacks the tensor", "download the shard again")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightError, match="is not a shard index"):
        load_transformer(folder)


def test_shards_without_an_index_are_all_there_or_none_is_loaded(published_state, tmp_path):
    folder = sharded(published_state, tmp_path / "s", "safetensors", index=False)
    second = folder / "model-00002-of-00003.safetensors"
    held = load_file(second)
    for path in (folder, second.with_name("model-00003-of-00003.safetensors")):
        second.unlink(missing_ok=True)
        with pytest.raises(WeightError) as error:
            open_weights(path)
        explained(error, "lacks model-00002-of-00003.safetensors", "download it into that folder")
    twice = next(iter(load_file(folder / "model-00001-of-00003.safetensors").items()))
    save_file({**held, twice[0]: twice[1]}, second)
    with pytest.raises(WeightError, match=f"has {re.escape(twice[0])} twice, in model-00001-of-00003.safetensors and"):
        open_weights(folder)
    save_file(held, folder / "model-00004-of-00003.safetensors")  # no number of a set
    assert open_weights(folder / "model-00004-of-00003.safetensors").keys() == held.keys()


def test_folders_and_names_that_say_nothing(tmp_path):
    with pytest.raises(WeightError, match="no weight file and no"):
        open_weights(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(WeightError, match="holds a.safetensors, b.safetensors and no"):
        open_weights(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(WeightError, match="is not a weight file; expected .safetensors"):
        open_weights(tmp_path / "a.gguf")


def test_a_header_that_lies(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9999]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(WeightError, match="truncated or not a safetensors file"):
        open_weights(tmp_path / "a.safetensors")


def test_select_and_canonical_agree_on_parts():
    weights = open_weights(RECORD)
    assert "encoder.conv_in.weight" in canonical(weights, TOKENIZER) and "word_embed.weight" in select(
        weights, TRANSFORMER
    )
    with pytest.raises(WeightError, match="not a T5 encoder such as"):
        select(weights, TEXT_ENCODER)


@pytest.mark.parametrize("size", ["8B", "2B"])
def test_info_names_the_published_sizes(monkeypatch, tmp_path, size):
    networks = {
        f"a VAREdit VAE, that of {size}": Autoencoder(AUTOENCODERS[size], device="meta"),
        f"a VAREdit transformer, {size} (": Transformer(TRANSFORMERS[size], device="meta"),
    }
    for words, network in networks.items():
        weights = Weights(tmp_path / "x.safetensors", network.state_dict(), dict.__getitem__)
        monkeypatch.setattr(info, "open_weights", lambda path, enough, weights=weights: weights)
        assert inspect(tmp_path / "x.safetensors")["is"].startswith(words)


def test_info(published_file, tmp_path):
    facts = inspect(RECORD)
    assert facts["is"] == "a VAREdit transformer, 4 blocks of width 128 with its VAE"
    assert facts[TRANSFORMER]["token_bits"] == 56 and facts[TOKENIZER]["encoder_widths"] == (32, 64, 128, 128)
    save_file({"something.else": torch.ones(5, dtype=torch.int8)}, tmp_path / "x.safetensors")
    facts = inspect(tmp_path / "x.safetensors")
    assert facts["is"].startswith("an unknown model") and facts["types"] == {"int8": 5} and facts["bytes"] == 5
