"""Our T5 encoder against transformers', on random weights."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT
from torch import nn
from transformers import T5Config as ReferenceConfig
from transformers import T5EncoderModel

from varedit_core.demo import demo_files
from varedit_core.files.weights import WeightError
from varedit_core.model.layers import Operations
from varedit_core.text.encoder import load_text_encoder, unread
from varedit_core.text.t5 import T5Config, T5Encoder, position_buckets
from varedit_core.training.settings import NewText
from varedit_core.training.tasks import save_text
from varedit_core.training.words import make_vocabulary, new_text_encoder

SIZES = dict(vocab_size=50, d_model=48, d_kv=8, d_ff=96, num_layers=3, num_heads=5)
KINDS = {
    "gated": dict(feed_forward_proj="gated-gelu"),
    "relu": dict(feed_forward_proj="relu"),
    "odd buckets": dict(feed_forward_proj="gated-gelu", relative_attention_num_buckets=13),
    "near": dict(feed_forward_proj="relu", relative_attention_num_buckets=7, relative_attention_max_distance=20),
    "epsilon": dict(feed_forward_proj="gated-gelu", layer_norm_epsilon=0.1),
}


@cache
def reference_of(kind: str) -> nn.Module:
    """transformers' encoder with random weights."""
    torch.manual_seed(0)
    reference = T5EncoderModel(ReferenceConfig(**SIZES, **KINDS[kind])).eval()
    for name, parameter in reference.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.2)
        elif "SelfAttention" in name:
            parameter.data *= 3  # sharper attention, so that a wrong bias shows
    return reference


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, T5Encoder]:
    """transformers' encoder, and ours with the same weights."""
    reference = copy.deepcopy(reference_of(kind))
    state = {key: tensor for key, tensor in reference.state_dict().items() if "embed_tokens" not in key}
    ours = T5Encoder(T5Config.from_json(reference.config.to_dict()), dtype=dtype).eval()
    ours.load_state_dict(state)
    return reference, ours


def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of three rows, and which are real: all, all but the last, and a third."""
    ids = torch.randint(50, (3, length), generator=torch.Generator().manual_seed(length))
    lengths = torch.tensor([length, max(1, length - 1), max(1, length // 3)])
    return ids, torch.arange(length)[None] < lengths[:, None]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind, length):
    reference, ours = pair(kind)
    ids, real = tokens(length)
    assert distance(ours(ids), reference(input_ids=ids).last_hidden_state) < 1e-5
    expected = reference(input_ids=ids, attention_mask=real.long()).last_hidden_state
    for mask in (real, real.long()):
        assert distance(ours(ids, mask)[real], expected[real]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated", "relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_that_of_transformers(kind, dtype):
    reference, ours = pair(kind, dtype)
    ids, real = tokens(150)
    features = ours(ids, real)
    assert features.dtype == dtype
    exact = reference(input_ids=ids, attention_mask=real.long()).last_hidden_state[real]
    for name, parameter in reference.named_parameters():
        if dtype != torch.float16 or not name.endswith("wo.weight"):
            parameter.data = parameter.to(dtype)
    theirs = reference(input_ids=ids, attention_mask=real.long()).last_hidden_state[real]
    assert distance(features[real].float(), exact) <= 1.1 * distance(theirs.float(), exact)
    assert distance(features[real].float(), exact) < {torch.float16: 0.02, torch.bfloat16: 0.2}[dtype]


@torch.no_grad()
def test_fp16_does_not_overflow():
    """A residual stream beyond fp16's 65504, as the published encoders have."""
    reference, ours = pair("gated", torch.float16)
    for network in (reference, ours):
        network.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(3e4)
    ids, _ = tokens(7)
    stream = reference(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert stream.abs().max() > 65504
    features = ours(ids)
    assert features.isfinite().all() and distance(features.float(), reference(input_ids=ids).last_hidden_state) < 5e-3


def test_gradients_equal_those_of_transformers():
    reference, ours = pair("gated")
    ids, real = tokens(20)
    weights = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(1)) * real[..., None]
    (ours(ids, real) * weights).sum().backward()
    (reference(input_ids=ids, attention_mask=real.long()).last_hidden_state * weights).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert distance(parameter.grad, expected[name].grad) < 1e-4, name


def test_buckets():
    offsets = torch.tensor([-500, -128, -127, -9, -8, -7, -1, 0, 1, 7, 8, 500])
    assert position_buckets(offsets, 32, 128).tolist() == [15, 15, 15, 8, 8, 7, 1, 0, 17, 23, 24, 31]


@torch.no_grad()
def test_layers_come_from_the_namespace():
    """No parameter but those of injected layers, which are only called."""
    made = []

    def counted(kind):
        def make(*args, **kw):
            made.append(kind(*args, **kw))
            return made[-1]

        return make

    class Counted:
        Linear, RMSNorm, Embedding = map(counted, (nn.Linear, nn.RMSNorm, nn.Embedding))

    _, ours = pair("gated")
    injected = T5Encoder(ours.config, Counted)
    assert sum(p.numel() for layer in made for p in layer.parameters()) == sum(p.numel() for p in ours.parameters())
    injected.load_state_dict(ours.state_dict())
    ids, real = tokens(7)
    torch.testing.assert_close(injected(ids, real), ours(ids, real))


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_goes_round(kind):
    config = T5Config.from_json(ReferenceConfig(**SIZES, **KINDS[kind]).to_dict())
    assert T5Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert T5Config.from_json(ReferenceConfig(**config.to_json()).to_dict()) == config
    shapes = {key: tuple(t.shape) for key, t in T5Encoder(config, device="meta").state_dict().items()}
    read = T5Config.from_shapes(shapes)  # distance and epsilon are not in the shapes
    assert replace(read, max_distance=config.max_distance, eps=config.eps) == config


def test_defaults_are_those_of_transformers():
    sizes = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
    assert T5Config.from_json(sizes) == T5Config.from_json(ReferenceConfig().to_dict())


def test_new_encoder_has_the_random_weights_of_transformers(tmp_path):
    """The same spread by layer; the folder written is read by transformers, and by us, to the same features."""
    torch.manual_seed(0)
    ours = new_text_encoder(NewText(width=64, layers=2, heads=4, hidden=96), 300)
    make_vocabulary(tmp_path / "tokenizer.json", 300)
    reference = T5EncoderModel(ReferenceConfig(**ours.config.to_json()))
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.shape == expected[name].shape
        error = 0.25 if "relative" in name else 0.1
        assert float(parameter.detach().std()) == pytest.approx(float(expected[name].detach().std()), rel=error), name
    save_text(tmp_path, ours, tmp_path)
    read = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    encoder = load_text_encoder(tmp_path)
    ids = encoder.ids("add a red circle")
    (features,) = encoder.encode(["add a red circle"])
    with torch.no_grad():
        assert distance(features, read(input_ids=torch.tensor([ids])).last_hidden_state[0]) < 1e-5
    assert load_file(tmp_path / "model.safetensors").keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": None}, "is not a readable T5 configuration"),
        ({"num_heads": "many"}, "is not a readable T5 configuration: num_heads is 'many' where a whole number"),
        ({"feed_forward_proj": "gated-silu"}, "is 'gated-silu' where relu or gated-gelu was expected"),
        ({"relative_attention_num_buckets": 2}, "2 position buckets do not reach"),
        ({"d_ff": 7}, "of shape .* was expected; nothing was loaded"),
    ],
)
def test_unusable_configuration(tmp_path, change, message):
    ours = new_text_encoder(NewText(width=32, layers=1, heads=2, hidden=32), 300)
    make_vocabulary(tmp_path / "tokenizer.json", 300)
    save_text(tmp_path, ours, tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | change))
    with pytest.raises(WeightError, match=message):
        load_text_encoder(tmp_path)
    del content["d_model"]
    file.write_text(json.dumps(content))
    with pytest.raises(WeightError, match="it lacks 'd_model'"):
        load_text_encoder(tmp_path)


def test_norm_reads_weights_of_another_precision():
    torch.manual_seed(0)
    norm = Operations.RMSNorm(8, eps=1e-6, dtype=torch.float16)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 8) * 1e5
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.float()
    torch.testing.assert_close(norm(x), expected)


def test_loading_imports_no_transformers():
    code = f"""
import sys
sys.modules["transformers"] = None
from varedit_core import Editor
editor = Editor.load(*{tuple(map(str, demo_files()))!r}, device="cpu")
assert editor.encode_text(["make it sepia"])[0].isfinite().all()
import varedit_core.training.tasks
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


PLAIN = [
    "make it sepia",
    "make it (very) dark",
    "a clock at 12:30",
    "{a}",
    "break it",
    "10:1, no, 2:1",
    "a < b: c > d",
]
MARKED = {
    "make it (sepia:1.3)": "'(sepia:1.3)'", "((a cat:0.8))": "'(a cat:0.8)'", "dark <lora:x:1>": "'<lora:x:1>'",
    "embedding:bad, dark": "'embedding:bad,'", "make it {sepia|dark}": "'{sepia|dark}'",
    "__colour__ sky": "'__colour__'",
    "red BREAK blue": "'BREAK'",
}  # fmt: skip


@pytest.mark.parametrize("text", [*PLAIN, *MARKED])
def test_signs_that_are_orders_elsewhere_are_told(text):
    said = unread(text, [5, 1], 2)
    assert [one.partition(" is read as plain words")[0] for one in said] == ([MARKED[text]] if text in MARKED else [])
