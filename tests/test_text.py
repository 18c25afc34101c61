"""The text encoder: real tokens only, equal to transformers' padded run; folder and single file alike."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from varedit_core.files.convert import convert
from varedit_core.files.info import inspect
from varedit_core.files.weights import WeightError
from varedit_core.text.encoder import load_text_encoder, load_tokenizer

PROMPTS = ["make the sky red", "add a cat", "turn it into a watercolour painting of the sea at night"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random T5 v1.1 in the layout of flan-t5-xl's folder, decoder included, with a tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((c, -3.0) for c in letters),
        ("▁the", -1.0),
        ("▁a", -1.0),
        ("in", -2.0),
    ]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder)


def test_equals_the_padded_run(folder, encoder):
    reference = T5EncoderModel.from_pretrained(folder).eval()
    for prompt, features in zip(PROMPTS, encoder.encode(PROMPTS)):
        ids = encoder.ids(prompt)
        padded = torch.tensor([ids + [0] * (512 - len(ids))])
        with torch.no_grad():
            expected = reference(
                input_ids=padded, attention_mask=(torch.arange(512) < len(ids))[None]
            ).last_hidden_state[0, : len(ids)]
        assert features.shape == (len(ids), 32) and ids[-1] == 1 and 0 not in ids
        torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("style", ["encoder only", "without the encoder prefix", "embedding under the encoder"])
def test_single_files(folder, encoder, tmp_path, style):
    state = {
        key: tensor.clone()
        for key, tensor in T5EncoderModel.from_pretrained(folder).state_dict().items()
        if key != "encoder.embed_tokens.weight"
    }
    if style == "without the encoder prefix":
        state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    if style == "embedding under the encoder":
        state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, tmp_path / "t5.safetensors")
    alone = load_text_encoder(tmp_path / "t5.safetensors", tokenizer=folder)
    for a, b in zip(alone.encode(PROMPTS), encoder.encode(PROMPTS)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 0), ("bf16", 0.05), ("fp8", 0.3)])
def test_converted_folder(folder, encoder, tmp_path, precision, error):
    metadata = convert(folder, tmp_path / "t5.safetensors", precision)
    assert metadata["varedit.architecture"] == "t5-encoder" and metadata["varedit.precision"] == precision
    for a, b in zip(
        load_text_encoder(tmp_path / "t5.safetensors", tokenizer=folder).encode(PROMPTS), encoder.encode(PROMPTS)
    ):
        assert (a - b).norm() <= error * b.norm()
        assert error == 0 or not torch.equal(a, b)


def test_half_precision_keeps_the_feed_forward_output_in_fp32(folder):
    model = load_text_encoder(folder, dtype=torch.float16).model
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(3)}
    bf16 = load_text_encoder(folder, dtype=torch.bfloat16).model
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}


def test_long_instructions_are_cut_with_a_warning(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        ids = encoder.ids("a b c d e f " * 200)
    assert len(ids) == 512 and ids[-1] == 1
    assert "at most the first 512 are used" in caplog.text


def test_empty_instruction(encoder):
    with pytest.raises(ValueError, match="the instruction is empty; say what to change"):
        encoder.encode(["ok", "  "])


def test_missing_tokenizer(folder, tmp_path):
    save_file(
        {
            key: t.clone()
            for key, t in T5EncoderModel.from_pretrained(folder).state_dict().items()
            if "embed_tokens" not in key
        },
        tmp_path / "t5.safetensors",
    )
    with pytest.raises(WeightError, match="no tokenizer.json or spiece.model in"):
        load_text_encoder(tmp_path / "t5.safetensors")


@pytest.mark.parametrize(
    "lost", ["encoder.final_layer_norm.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight", "shared.weight"]
)
def test_never_a_part(folder, tmp_path, lost):
    state = {
        key: t.clone()
        for key, t in T5EncoderModel.from_pretrained(folder).state_dict().items()
        if key not in (lost, "encoder.embed_tokens.weight")
    }
    save_file(state, tmp_path / "t5.safetensors")
    with pytest.raises(WeightError, match="lacks|where"):
        load_text_encoder(tmp_path / "t5.safetensors", tokenizer=folder)


@pytest.mark.parametrize("order", ["of the network", "of the names"])
def test_the_decoder_may_be_left_out_of_a_model_in_several_files(folder, encoder, tmp_path, order):
    """The first files are enough as soon as the encoder is whole, as it is in flan-t5-xl's first of two."""
    state = T5ForConditionalGeneration.from_pretrained(folder).state_dict()
    own = [key for key in state if not key.endswith("embed_tokens.weight")]
    keys = sorted(own) if order == "of the names" else own
    count = 12
    names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    parts = [keys[len(keys) * n // count : len(keys) * (n + 1) // count] for n in range(count)]
    for name, part in zip(names, parts):
        save_file({key: state[key].clone() for key in part}, tmp_path / name)
    last = max(n for n, part in enumerate(parts) if any(not key.startswith(("decoder.", "lm_head.")) for key in part))
    assert last > 3
    for n in reversed(range(count)):
        if n >= last:
            alone = load_text_encoder(tmp_path / names[0], tokenizer=folder)
            assert all(torch.equal(a, b) for a, b in zip(alone.encode(PROMPTS), encoder.encode(PROMPTS)))
            assert inspect(tmp_path)["is"] == "a T5 text encoder"
            convert(tmp_path, tmp_path / "out" / "t5.safetensors", "bf16", overwrite=True)
        else:
            with pytest.raises(WeightError, match="lacks"):
                load_text_encoder(tmp_path / names[0], tokenizer=folder)
        (tmp_path / names[n]).unlink()


def test_sentencepiece_model(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(PROMPTS * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    tokenize = load_tokenizer(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert tokenize(PROMPTS[0]) == [*pieces.encode(PROMPTS[0]), 1]
    assert load_tokenizer(tmp_path / "spiece.model")(PROMPTS[1]) == tokenize(PROMPTS[1])


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_damaged_tokenizer(tmp_path, name):
    (tmp_path / name).write_text("garbage")
    with pytest.raises(WeightError, match=f"{name} is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(WeightError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
