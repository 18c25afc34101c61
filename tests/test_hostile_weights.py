"""Weight files, LoRAs, tokenizers and configurations that are broken or mean harm: each is used rightly or refused with
one sentence, in bounded memory and time. The files are in `hostile_weights`."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from hostile_weights import FILES, archive, dictionary, number, sizes, storage, tensor, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import GOLDEN, ROOT
from typer.testing import CliRunner

from benchmarks.real_size import published_shapes
from varedit_core import load_autoencoder, load_text_encoder, load_transformer
from varedit_core.cli.app import app, main
from varedit_core.files.checkpoints import TOKENIZER, TRANSFORMER, blank, canonical
from varedit_core.files.convert import convert
from varedit_core.files.info import inspect
from varedit_core.files.lora import apply_lora, check_lora, merge_lora
from varedit_core.files.pickles import Unread, find_tensors
from varedit_core.files.weights import DTYPES, WeightError, Weights, open_weights
from varedit_core.text.t5 import T5Config, T5Encoder
from varedit_core.text.tokenizers import MAX_GROWTH, load_tokenizer

RECORD = GOLDEN / "patchify_256.safetensors"
USABLE = {"info", "read"}
"""Ways in which a file that is whole, but no model of ours, may be used."""


def refused(use, *words: str, error: type[ValueError] = WeightError) -> None:
    """The use ends in one printable sentence that holds the words."""
    with pytest.raises(error) as raised:
        use()
    said = str(raised.value)
    assert said.isprintable() and len(said) < 1500 and all(word in said for word in words), said


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(ROOT / "tests" / "hostile_weights.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_used_or_refused_in_every_way(outcomes, name):
    """Under a limit on memory and time; no code runs, nothing is written."""
    found = outcomes[name]
    assert found.pop("left") == ""
    for way, said in found.items():
        assert said.startswith("refused: ") or (said == "used" and way in USABLE), (way, said)
        assert said.isprintable() and len(said) < 1500, (way, said)


# Networks. What weights are is judged by their types and shapes, before a network is built.

SHAPES = published_shapes(depth=2, width=128, heads=2, token_bits=56, text=256)


def in_memory(tensors: dict[str, torch.Tensor]) -> Weights:
    return Weights(ROOT / "a.pth", {key: one.to("meta") for key, one in tensors.items()}, tensors.__getitem__)


def transformer(**changes: torch.Tensor) -> Weights:
    meta = {key: torch.empty(shape, device="meta") for key, shape in SHAPES.items()}
    return in_memory(meta | changes)


def vae(**changes: torch.Tensor) -> Weights:
    kept = {key: one for key, one in open_weights(RECORD).meta.items() if key.startswith("vae.") and ".lfq." not in key}
    return in_memory(kept | changes)


def judged(weights: Weights, part: str) -> None:
    blank(canonical(weights, part), part)


def test_the_whole_ones_are_taken():
    judged(transformer(), TRANSFORMER)
    judged(vae(), TOKENIZER)


VARIANTS = {
    "a number": lambda t: t.new_empty(()), "empty": lambda t: t.new_empty((0, *t.shape[1:])),
    "empty behind": lambda t: t.new_empty((*t.shape[:-1], 0)), "another axis": lambda t: t[None],
    "longer": lambda t: t.new_empty((t.shape[0] + 1, *t.shape[1:])),
    "huge": lambda t: t.new_empty((1 << 40, *t.shape[1:])),
    **{name: lambda t, dtype=dtype: t.to(dtype) for name, dtype in DTYPES.items() if not dtype.is_floating_point},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_of_another_shape_or_type_is_refused(variant):
    """Each of a block and some of a VAE. Tables may have more rows, and vectors are taken in any shape."""
    allowed = {"longer": r"cfg_uncond|lvl_embed\.weight", "another axis": r".*(mat_q|pos_start|ada_gss|scale_mul_1H11)"}
    for part, whole, step in ((TRANSFORMER, transformer(), 1), (TOKENIZER, vae(), 40)):
        for key in list(whole)[::step]:
            if ".module.1." in key or re.fullmatch(allowed.get(variant, "-"), key):
                continue
            changed = in_memory(dict(whole.meta) | {key: VARIANTS[variant](whole.meta[key])})
            refused(partial(judged, changed, part), "a.pth")


def test_every_weight_that_is_left_out_is_missed():
    for part, whole, step in ((TRANSFORMER, transformer(), 1), (TOKENIZER, vae(), 40)):
        for key in list(whole)[::step]:
            rest = {name: one for name, one in whole.meta.items() if name != key}
            if key.endswith("zero_k_bias"):
                continue  # zeros, then
            refused(partial(judged, in_memory(rest), part), "a.pth")


FAR = torch.empty(4, device="meta")
FEED = "transformer.block_chunks.0.module.1.ffn.fc1."


@pytest.mark.parametrize(
    "key",
    [
        "block_chunks.0.module.30000000.ffn.fc1.weight", "block_chunks.30000000.module.0.ffn.fc1.weight",
        "blocks.30000000.ffn.fc1.weight", f"blocks.{'9' * 900}.ffn.fc1.weight", "blocks.-1.ffn.fc1.weight",
        "blocks.0.ffn.fc1.weight", "blocks.٣.ffn.fc1.weight",
    ],
)  # fmt: skip
def test_a_block_of_any_number_is_doubted_before_it_is_built(key):
    refused(lambda: judged(transformer(**{key: FAR}), TRANSFORMER), "a.pth")


@pytest.mark.parametrize(
    "key", ["vae.encoder.down.30000000.block.0.conv1.conv.weight",
    "vae.encoder.down.0.block.30000000.conv1.conv.weight",
            "vae.encoder.down.30000000.downsample.conv.weight"]
)  # fmt: skip
def test_a_level_of_any_number_is_doubted_before_it_is_built(key):
    refused(lambda: judged(vae(**{key: FAR}), TOKENIZER), "a.pth")


def test_more_blocks_than_any_network_has():
    blocks = {f"blocks.{i}.ffn.fc1.weight": torch.empty(512, 128, device="meta") for i in range(5000)}
    rest = {
        key: one for key, one in canonical(transformer(), TRANSFORMER).meta.items() if "blocks.0" in key or "." in key
    }
    refused(lambda: judged(in_memory(rest | blocks), TRANSFORMER), "would be 5000, which is not from 1 to 1000")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("load", [load_transformer, load_autoencoder])
def test_undefined_numbers_are_not_loaded(tmp_path, value, load):
    state = {name: one.float() for name, one in load_file(RECORD).items() if name.startswith(("vae.", "transformer."))}
    key = "vae.decoder.conv_out.conv.bias" if load is load_autoencoder else FEED + "bias"
    state[key][0] = value
    save_file(state, tmp_path / "a.safetensors")
    refused(lambda: load(tmp_path / "a.safetensors"), "infinite or undefined numbers in", "download it again")


def test_numbers_that_a_type_does_not_hold(tmp_path):
    state = {name: one.double() for name, one in load_file(RECORD).items() if name.startswith("transformer.")}
    state[FEED + "weight"][0, 0] = 1e200
    save_file(state, tmp_path / "a.safetensors")
    refused(lambda: load_transformer(tmp_path / "a.safetensors"), "infinite or undefined numbers in", "ffn.fc1.weight")
    refused(lambda: convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "fp32"))
    assert not (tmp_path / "b.safetensors").exists()


SCALES = {
    "another shape": ("blocks.0.ffn.fc1.weight_scale", torch.ones(7)), "whole numbers": (
        "blocks.0.ffn.fc1.weight_scale", torch.ones((), dtype=torch.int64)),
    "undefined": ("blocks.0.ffn.fc1.weight_scale", torch.tensor(math.nan)),
    "beside a table": ("lvl_embed.weight_scale", torch.ones(())), "of ComfyUI": (
        "blocks.0.ffn.fc1.comfy_quant", torch.zeros(9, dtype=torch.uint8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALES)
def test_scales_that_are_none(published_file, tmp_path, kind):
    convert(published_file, tmp_path / "8.safetensors", "fp8")
    state = load_file(tmp_path / "8.safetensors")
    load_transformer(tmp_path / "8.safetensors")
    key, value = SCALES[kind]
    save_file(state | {key: value}, tmp_path / "8.safetensors")
    for linears in ("exact", "8-bit"):
        refused(partial(load_transformer, tmp_path / "8.safetensors", linears=linears), "8.safetensors")


# Text encoders.

T5 = T5Config(40, 32, 8, 48, 2, 4, True)


@pytest.fixture
def encoder(tmp_path):
    """The folder of a small text encoder."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(T5Encoder(T5).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(T5.to_json()))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    return folder


TOKENIZER_JSON = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None, "decoder": None,
    "model": {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["a", -1], ["b", -1]]},
}  # fmt: skip
NO_SIZES = [0, -1, 30_000_000, 2**70, math.inf, -math.inf, math.nan, 1.5, "8", "many", None, [], {}, True]


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize(
    "name", [name for name, value in T5.to_json().items() if isinstance(value, int | float) and "_id" not in name
             and not isinstance(value, bool) and name != "dropout_rate"] + ["feed_forward_proj"]
)  # fmt: skip
def test_configurations_of_what_is_no_size(encoder, name, value):
    facts = T5.to_json()
    if name == "layer_norm_epsilon" and value == 0:
        value = 1e9
    (encoder / "config.json").write_text(json.dumps(facts | {name: value}))
    refused(lambda: load_text_encoder(encoder), "config.json" if name != "num_layers" else "")
    refused(lambda: convert(encoder, encoder / "out.safetensors"))


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "[" * 10**5, "{", "", '{"d_model": 1e999}'])
def test_configurations_that_are_none(encoder, content):
    (encoder / "config.json").write_text(content)
    refused(lambda: load_text_encoder(encoder), "config.json")


@pytest.mark.parametrize(
    "change", ["fewer layers named", "more layers named", "incomplete", "whole numbers", "a scale"]
)
def test_text_encoders_that_are_not_whole(encoder, change):
    state = load_file(encoder / "model.safetensors")
    key = "encoder.block.1.layer.0.SelfAttention.o.weight"
    if "named" in change:
        facts = T5.to_json() | {"num_layers": 1 if "fewer" in change else 3}
        (encoder / "config.json").write_text(json.dumps(facts))
    elif change == "incomplete":
        del state[key]
    elif change == "whole numbers":
        state[key] = state[key].int()
    else:
        state[key.replace(".weight", ".scale_weight")] = torch.ones(())
    save_file(state, encoder / "model.safetensors")
    target = encoder / "converted.safetensors"
    refused(lambda: load_text_encoder(encoder), "where its configuration names 1" if "fewer" in change else "model")
    refused(lambda: convert(encoder, target))
    assert not target.exists() and inspect(encoder)["is"].startswith("a T5 text encoder, but not whole: ")


def test_a_whole_t5_converts_without_its_decoder(encoder):
    state = load_file(encoder / "model.safetensors")
    more = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2),
            "encoder.embed_tokens.weight": state["shared.weight"].clone()}  # fmt: skip
    save_file(state | more, encoder / "model.safetensors")
    convert(encoder, encoder.parent / "converted.safetensors", "fp32")
    assert load_file(encoder.parent / "converted.safetensors").keys() == state.keys()


def replaced(*contents: str) -> list[dict]:
    return [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for content in contents]


GROWING = {
    "one rule": {"normalizer": replaced("a" * 1000)[0]},
    "many rules": {"normalizer": {"type": "Sequence", "normalizers": replaced(*["aa"] * 40)}},
    "rules within rules": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": replaced(*["aa"] * 4)}] * 4}},
    "before the text": {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
    "tokens": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [], "special_tokens": {"x": {"id": "x", "ids": [1] * 1000, "tokens": ["x"] * 1000}}}},
    "of parts of words": {"model": {
    "type": "WordPiece", "unk_token": "<unk>", "max_input_chars_per_word": 100, "vocab": {
        "a": 0}, "continuing_subword_prefix": "a" * 1000}},
}  # fmt: skip


@pytest.mark.parametrize("kind", GROWING)
def test_tokenizers_that_multiply_text(encoder, kind):
    (encoder / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON | GROWING[kind]))
    refused(lambda: load_tokenizer(encoder), "tokenizer.json", "of one; download the tokenizer again")


def test_tokenizers_that_add_a_little(encoder):
    (encoder / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON | {"normalizer": replaced("a" * MAX_GROWTH)[0]}))
    assert load_tokenizer(encoder)("a") == [3] * MAX_GROWTH


@pytest.mark.parametrize("part", ["normalizer", "post_processor", "model", "added_tokens", "version", "pre_tokenizer"])
@pytest.mark.parametrize("value", [3, "x", [3], {"type": []}, {"type": "Sequence", "normalizers": 3},
          {"special_tokens": 3},
                                   {"precompiled_charsmap": "x"},
                                   {"special_tokens": {"a": {"ids": 3}}}], ids=repr)  # fmt: skip
def test_tokenizers_that_are_none(encoder, part, value):
    (encoder / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON | {part: value}))
    refused(lambda: load_tokenizer(encoder), "tokenizer.json is not a readable tokenizer")


@pytest.mark.parametrize("data", [b"\x1a\xff\xff\xff\xff\x0f", b"\x80" * 99, b"\x1a\x00", b"\x0f", bytes(50)], ids=repr)
def test_pieces_that_are_none(tmp_path, data):
    (tmp_path / "spiece.model").write_bytes(data)
    refused(lambda: load_tokenizer(tmp_path), "spiece.model is not a readable tokenizer")


def test_pieces_that_multiply_text(tmp_path):
    rules = (4).to_bytes(4, "little") + bytes(4) + b"a" * 5000 + b"\0"
    inner = b"\x12" + bytes([len(rules) & 127 | 128, len(rules) >> 7]) + rules
    (tmp_path / "spiece.model").write_bytes(b"\x1a" + bytes([len(inner) & 127 | 128, len(inner) >> 7]) + inner)
    refused(lambda: load_tokenizer(tmp_path), "spiece.model")


def test_tokens_that_the_encoder_does_not_know(encoder):
    text_encoder = load_text_encoder(encoder)
    assert len(text_encoder.encode(["ab"])[0]) == 2
    for ids in ([], [3, T5.vocabulary]):
        text_encoder.tokenize = lambda prompt, ids=ids: list(ids)
        refused(lambda: text_encoder.encode(["ab"]), "choose the tokenizer of this text encoder", error=ValueError)


# LoRAs.

LAYER = "diffusion_model.blocks.0.sa.proj"


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "lora.safetensors"

    def make(**changes):
        plain = {"lora_A": torch.full((2, 128), 0.1), "lora_B": torch.full((128, 2), 0.1), "alpha": torch.tensor(2.0)}
        names = {"lora_A": f"{LAYER}.lora_A.weight", "lora_B": f"{LAYER}.lora_B.weight", "alpha": f"{LAYER}.alpha"}
        save_file({names[key]: value for key, value in (plain | changes).items()}, path)
        return path

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    convert(RECORD, path, "fp32")
    return path


WRONG = {
    **{f"alpha of {name}": {"alpha": torch.ones((), dtype=dtype)} for name, dtype in (
        ("bool", torch.bool), ("complex", torch.complex64))},
    "alpha of many": {"alpha": torch.ones(3)}, "no alpha": {"alpha": torch.ones(0)},
    **{f"alpha of {value}": {"alpha": torch.tensor(value)} for value in (math.nan, math.inf)},
    **{f"{dtype} factors": {"lora_A": torch.ones(2, 128).to(dtype)}
    for dtype in (torch.int8, torch.bool, torch.complex64)},
    "too large": {"lora_A": torch.full((2, 128), 3e38), "lora_B": torch.full((128, 2), 3e38)},
    "one too large": {"lora_A": torch.full((2, 128), 3e38)}, "of twice the range": {
        "lora_A": torch.full((2, 128), 1e300, dtype=torch.float64)},
    "undefined": {"lora_B": torch.full((128, 2), math.nan)},
    "ranks that differ": {"lora_B": torch.ones(128, 3)}, "no rank": {
        "lora_A": torch.ones(0, 128), "lora_B": torch.ones(128, 0)},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_loras_with_numbers_that_are_none(lora, model, tmp_path, kind):
    path = lora(**WRONG[kind])
    if kind == "one too large":
        path = lora(lora_A=torch.full((2, 128), 3e38), lora_B=torch.full((128, 2), 10.0))
    network = load_transformer(model)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for use in (lambda: check_lora(model, path), lambda: apply_lora(network, path),
                lambda: merge_lora(model, path, tmp_path / "out.safetensors")):  # fmt: skip
        refused(use, "lora.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("strength", [1e39, -1e39, 1e308, math.inf, math.nan])
def test_strengths_that_no_weight_holds(lora, model, tmp_path, strength):
    path, out = lora(), tmp_path / "out.safetensors"
    refused(lambda: apply_lora(load_transformer(model), path, strength), "strength", error=ValueError)
    refused(lambda: merge_lora(model, path, out, strength), "strength", error=ValueError)
    refused(lambda: check_lora(model, path, strength), "strength", error=ValueError)
    assert not out.exists()


def test_how_many_layers_a_lora_changes_is_said(lora, model):
    network = load_transformer(model)
    assert [apply_lora(network, lora(), strength) for strength in (1.0, 0.0, -0.5)] == [1, 0, 1]
    assert apply_lora(network, lora(alpha=torch.tensor(2, dtype=torch.int64))) == 1  # as some save it


# What the terminal sees.

ESCAPES = "\x1b]0;owned\x07\x1b[31m\u202e\x9b31m"


@pytest.mark.parametrize("command", ["info", "info --json", "convert", "merge"])
def test_a_terminal_is_not_obeyed(tmp_path, monkeypatch, capsys, command):
    path = tmp_path / "a.safetensors"
    save_file({f"{ESCAPES}{i}": torch.ones(1) for i in range(3)}, path, {ESCAPES: ESCAPES})
    name, *options = command.split()
    more = {"convert": [str(tmp_path / "b.safetensors")], "merge": [str(path), str(tmp_path / "b.safetensors")]}
    monkeypatch.setattr(sys, "argv", ["varedit", name, str(path), *more.get(name, []), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = "".join(capsys.readouterr())
    assert (stop.value.code or 0) == (0 if name == "info" else 1)
    assert all(letter.isprintable() or letter == "\n" for letter in shown) and "x1b" in shown.replace("u001b", "x1b")


def test_types_of_files_are_told(tmp_path):
    save_file(
        {"a": torch.ones(3, dtype=torch.int32), "b": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.safetensors"
    )
    assert inspect(tmp_path / "a.safetensors")["types"] == {"int32": 3, "complex64": 2}
    assert CliRunner().invoke(app, ["info", str(tmp_path / "a.safetensors")]).exit_code == 0


# Files that nobody thought of.

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.integers(-3, 20) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
ODD = st.recursive(
    NUMBERS | st.text(max_size=5) | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PLAIN = st.builds(
    lambda dtype, shape: {"dtype": dtype, "shape": shape, "data_offsets": [0, math.prod(shape) * 4]},
    st.sampled_from(["F32", "I32", "U32"]), st.lists(st.integers(0, 3), max_size=4),
)  # fmt: skip
ENTRY = PLAIN | st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F4", "X"]) | ODD, "shape": st.lists(NUMBERS, max_size=4) | ODD,
     "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | ODD}
)  # fmt: skip
HEADERS = st.dictionaries(st.text(max_size=6) | st.sampled_from([*SHAPES][:9]), ENTRY | ODD, max_size=4)


def used_or_refused(path) -> bool:
    """Whether a file could be read; where not, it was refused with a sentence."""
    try:
        weights = open_weights(path)
        assert sum(value.numel() * value.element_size() for value in weights.values()) <= 4 * path.stat().st_size
        inspect(path)
    except WeightError as error:
        assert str(error).isprintable()
        return False
    for part in (TRANSFORMER, TOKENIZER):
        refused(partial(judged, weights, part), str(path))
    return True


@PATIENT
@given(facts=HEADERS, metadata=ODD, data=st.binary(max_size=64))
def test_headers(tmp_path_factory, facts, metadata, data):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    encoded = json.dumps(facts | ({"__metadata__": metadata} if metadata else {})).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    used_or_refused(path)


@PATIENT
@given(cut=st.integers(0, 400), at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_byte_of_a_header(tmp_path_factory, cut, at, byte):
    path = tmp_path_factory.getbasetemp() / "byte.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.int32)}, path, {"c": "d"})
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[: len(data) - cut % 9])
    used_or_refused(path)


PIECES = [b"}", b"]", b")", b"(", b"t", b"e", b"u", b"s", b"a", b"l", b"d", b"0", b"1", b"2", b"N", b"\x88", b"R",
          b"Q", b"b",
          b"q\0", b"q\1", b"h\0", b"h\1", b"\x85", b"\x86", b"\x87", b"\x81", b"\x8f", b"\x90", b"\x94",
          text("a"), text("b"),
          number(0), number(4), number(2**40), number(-1), sizes(4), sizes(2, 2), storage(), storage(count=2**40),
          tensor(),
          tensor((2, 2), (2, 1)), dictionary(a=tensor()), dictionary(), b"ccollections\nOrderedDict\n",
          b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch\nfloat16\n",
          b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n",
          b"cbuiltins\nset\n", b"cos\nsystem\n", b"\x93"]  # fmt: skip


@PATIENT
@given(
    programs=st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join) | st.binary(max_size=40), whole=st.booleans()
)
def test_pickles(tmp_path_factory, programs, whole):
    used_or_refused(archive(programs + (dictionary(a=tensor()) if whole else b""))(tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize("zipped", [True, False])
def test_every_byte_of_a_torch_file(tmp_path, zipped):
    """Every byte in turn, as 0, 255 and with each bit turned: read or refused, by the part that finds the tensors."""
    path = tmp_path / "byte.pth"
    torch.save({"a": torch.ones(3), "b": {"c": torch.ones(2, 2).t()}}, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    with open(path, "r+b", buffering=0) as file:
        for at, byte in enumerate(whole):
            for other in {0, 255, *(byte ^ 1 << bit for bit in range(8))} - {byte}:
                file.seek(at), file.write(bytes([other]))
                try:
                    find_tensors(path)
                except Unread:
                    refused += 1
            file.seek(at), file.write(bytes([byte]))
    assert path.read_bytes() == whole and refused > len(whole)
    used_or_refused(path)


def test_torch_files_are_read_as_torch_reads_them(tmp_path):
    """Every type, views, shared numbers, parameters and nested dictionaries, in every protocol and container."""
    base = torch.arange(24.0).reshape(4, 6)
    values = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES.values()}
    values |= {"view": base[1:, 2:4], "turned": base.t(), "number": torch.tensor(3.5), "empty": torch.empty(0, 3)}
    values |= {
        "parameter": torch.nn.Parameter(base),
        "module": torch.nn.Linear(3, 2).state_dict(),
        "epoch": 3,
        "args": None,
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}, *({"pickle_protocol": n} for n in (3, 4, 5))):
        torch.save(values, tmp_path / "a.pth", **options)
        known = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        known |= {f"module.{key}": value for key, value in values["module"].items()}
        read = dict(open_weights(tmp_path / "a.pth"))
        assert read.keys() == known.keys()
        for key, value in read.items():
            assert value.dtype == known[key].dtype and value.tolist() == known[key].tolist()
    assert not re.search(
        r"torch\.load\(|pickle\.load", "".join(p.read_text() for p in (ROOT / "varedit_core").rglob("*.py"))
    )
