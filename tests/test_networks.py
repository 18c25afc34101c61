"""Sizes are read off the weights; layers come from the injected namespace and nothing reads a weight."""

import ast
import subprocess
import sys

import pytest
import torch
from support import GOLDEN, ROOT
from torch import nn

from benchmarks.real_size import published_shapes
from varedit_core import load_autoencoder, load_transformer, sample
from varedit_core.files.checkpoints import TRANSFORMER, canonical
from varedit_core.files.published import AUTOENCODERS, TRANSFORMERS
from varedit_core.files.shapes import autoencoder_config, transformer_config
from varedit_core.files.weights import Weights
from varedit_core.model.config import AutoencoderConfig, TransformerConfig
from varedit_core.model.layers import Operations
from varedit_core.model.transformer import Transformer
from varedit_core.sampling.checks import patch_size
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.tokenizer.vae import Autoencoder

CORE = sorted((ROOT / "varedit_core").rglob("*.py"))


def hidden(layer):
    """The layer with its weight and bias out of reach: whoever reads them from outside fails."""

    class Hidden(nn.Module):
        def __init__(self, *args, **kw):
            super().__init__()
            self.inner = [layer(*args, **kw)]

        def _load_from_state_dict(self, state, prefix, local, strict, missing, unexpected, errors):
            own = {key: state[prefix + key] for key in self.inner[0].state_dict() if prefix + key in state}
            self.inner[0].load_state_dict(own, assign=True)

        def forward(self, x):
            return self.inner[0](x)

    return Hidden


class HiddenOperations:
    Linear, Conv2d, GroupNorm = hidden(nn.Linear), hidden(nn.Conv2d), hidden(nn.GroupNorm)
    LayerNorm, RMSNorm, Embedding = hidden(nn.LayerNorm), hidden(nn.RMSNorm), hidden(nn.Embedding)


def test_nothing_outside_the_layers_reads_a_weight(patchify):
    """Networks built from layers that hide their weights give the same numbers."""
    transformer = Transformer(patchify.transformer.config, HiddenOperations)
    autoencoder = Autoencoder(patchify.autoencoder.config, HiddenOperations)
    assert not list(transformer.parameters()) and not list(transformer.buffers()), (
        "a parameter outside the namespace's layers"
    )
    assert not list(autoencoder.parameters()) and not list(autoencoder.buffers())
    transformer.load_state_dict(patchify.transformer.state_dict(), strict=False)
    autoencoder.load_state_dict(patchify.autoencoder.state_dict(), strict=False)
    features = autoencoder.encode(patchify["in.image_u8"].float() / 127.5 - 1)
    settings = SamplingSettings(temperature=0)
    final, expected = (
        list(sample(network, features, patchify.texts("text"), patchify.schedule, settings))[-1]
        for network in (transformer, patchify.transformer)
    )
    assert torch.equal(final.logits, expected.logits)
    assert torch.equal(autoencoder.decode(final.running_sum), patchify.autoencoder.decode(expected.running_sum))
    inner = transformer.blocks[3].sa.proj.inner[0]
    inner.weight = nn.Parameter(
        torch.zeros_like(inner.weight)
    )  # not in place: the record's network has the same memory
    changed = list(sample(transformer, features, patchify.texts("text"), patchify.schedule, settings))[-1]
    assert not torch.equal(changed.logits, expected.logits), "the hidden layers were not the ones used"


def test_every_parameter_is_a_leaf_layers(patchify):
    leaves = tuple(
        getattr(Operations, name) for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "RMSNorm", "Embedding")
    )
    for network in (patchify.transformer, patchify.autoencoder):
        for name, module in network.named_modules():
            if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
                assert isinstance(module, leaves), name


@pytest.mark.parametrize(
    ("depth", "width", "heads", "bits", "text", "count"),
    [(40, 3584, 28, 56, 2048, 8.38e9), (32, 2048, 16, 32, 2048, 2.20e9), (5, 192, 3, 56, 128, None)],
    ids=["8B", "2B", "small"],
)
def test_transformer_sizes_are_read_off_the_shapes(depth, width, heads, bits, text, count):
    meta = {
        key: torch.empty(shape, device="meta")
        for key, shape in published_shapes(depth, width, heads, bits, text).items()
    }
    weights = canonical(Weights(ROOT / "x.pth", meta, meta.__getitem__), TRANSFORMER)
    config = transformer_config(weights.shapes)
    assert config == TransformerConfig(depth, width, heads, bits, text, 512, round(4 * width / 256) * 256, 15)
    assert count is None or config in TRANSFORMERS.values()
    network = Transformer(config, device="meta")
    assert {key: tuple(t.shape) for key, t in network.state_dict().items()} == weights.shapes
    if count:
        assert abs(sum(t.numel() for t in network.parameters()) / count - 1) < 0.005


@pytest.mark.parametrize(
    "config",
    [
        *AUTOENCODERS.values(),
        AutoencoderConfig(14, 64, (64, 64, 64, 64), (64, 64, 96, 48), 2, 3, 8),
        AutoencoderConfig(6, 32, (64, 32), (32, 64), 1, 2, 2),
    ],
)
def test_autoencoder_sizes_are_read_off_the_shapes(config):
    network = Autoencoder(config, device="meta")
    assert autoencoder_config({key: tuple(t.shape) for key, t in network.state_dict().items()}) == config


@torch.no_grad()
def test_autoencoder_shapes_and_range():
    config = AutoencoderConfig(6, 32, (32, 64), (32, 64), 1, 2, 2)
    torch.manual_seed(0)
    network = Autoencoder(config)
    latents = network.encode(torch.rand(2, 3, 12, 20) * 2 - 1)
    assert latents.shape == (2, 6, 6, 10) and latents.dtype == torch.float32
    picture = network.decode(latents * 100)
    assert picture.shape == (2, 3, 12, 20) and picture.abs().max() <= 1


@torch.no_grad()
def test_strides_do_not_change_the_picture(plain):
    """Pictures and recorded bits arrive as permuted views; in channels-last layout the numbers would differ."""
    latents = plain["ref.tokenizer_features"]
    pixels = plain["in.image_u8"].float() / 127.5 - 1
    for run, x in ((plain.autoencoder.decode, latents), (plain.autoencoder.encode, pixels)):
        permuted = x.contiguous(memory_format=torch.channels_last)
        assert permuted.stride() != x.stride()
        assert torch.equal(run(permuted), run(x))


def test_parts_that_do_not_belong_together(patchify, plain):
    assert patch_size(patchify.transformer.config, patchify.autoencoder.config) == 2
    assert patch_size(plain.transformer.config, plain.autoencoder.config) == 1
    with pytest.raises(ValueError, match="56 bits but the VAE .* makes tokens of 32; load the VAE"):
        patch_size(patchify.transformer.config, plain.autoencoder.config)


def test_group_width_is_explained():
    with pytest.raises(ValueError, match="level of 20 channels"):
        Autoencoder(AutoencoderConfig(6, 20, (20,), (20,), 1, 2, 1))


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_imports_no_comfyui(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    assert not names & {
        "comfy",
        "comfy_api",
        "comfy_extras",
        "comfy_execution",
        "folder_paths",
        "nodes",
        "server",
        "execution",
    }


def test_core_runs_where_comfyui_cannot_be_imported():
    """A whole edit with every ComfyUI module blocked."""
    code = f"""
import sys
for name in ("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"): sys.modules[name] = None
from varedit_core import Editor, SamplingSettings
from varedit_core.files.weights import open_weights
path = {str(GOLDEN / "patchify_256.safetensors")!r}
editor = Editor.load(path, path, device="cpu")
text = open_weights(path)["in.text.0"]
(picture,) = editor.edit({str(ROOT / "samples" / "cat.jpg")!r}, [text], size="0.06M", settings=SamplingSettings())
print(picture.size)
assert not [name for name in sys.modules if name.split(".")[0] == "transformers"], "imported before it is needed"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "(451, 300)", done.stderr


def test_loaders_give_inference_networks(published_file):
    network = load_transformer(published_file)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in load_autoencoder(GOLDEN / "plain_256.safetensors").parameters())
