"""The plain KV cache and what stands in its place for speed: the same network, whatever keeps keys and values."""

from collections import Counter
from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varedit_core.defaults import SamplingSettings
from varedit_core.model import functional
from varedit_core.model.kv_cache import KVCache
from varedit_core.model.layers import sdpa
from varedit_core.model.transformer import Text
from varedit_core.runtime import kernels
from varedit_core.runtime.folded_text import CountedText, counted
from varedit_core.runtime.kernels import plain
from varedit_core.runtime.kv_caches import DeviceCache, RowPass
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling.loop import sample
from varedit_core.tokenizer.quantizer import codes, from_tokens, latent_grids, linear_resize, to_tokens
from varedit_core.tokenizer.vae import ResidualBlock

GUIDANCE = [3.0, 3.0, 2.0, 3.0, 1.0, 1.0, 1.0]


def patch_of(record) -> int:
    return record["ref.vae_features"].shape[-1] // record.schedule.grids[-1][1]


def decode_plainly(record, network, source_bias: float = 0.0):
    """An edit with nothing of the runtime: greedy bits and logits of every scale."""
    schedule, patch = record.schedule, patch_of(record)
    grids, features = latent_grids(schedule, patch), record["ref.vae_features"].float()
    texts = record.texts("text")
    texts = [*texts, network.unconditional(len(texts[0]), "cpu")]
    condition = network.condition(texts)
    cache = KVCache(network.config, schedule, 2, torch.float32, "cpu")
    source, *steps = cache.passes("cpu")
    if network.config.source:
        tokens = network.embed(to_tokens(features, patch), len(schedule) - 1)
        network.read_source(tokens.repeat(2, 1, 1), condition, source, cache)
    total, found = torch.zeros_like(features), []
    for k, (step, guidance) in enumerate(zip(steps, GUIDANCE)):
        rows = 1 if guidance == 1 and all(g == 1 for g in GUIDANCE[k:]) else 2
        own = condition.rows(slice(0, rows))
        if k:
            x = network.embed(to_tokens(linear_resize(total, grids[k]), patch), k).repeat(rows, 1, 1)
        else:
            x = network.start(own)
        x = network(x, own, replace(step, source_bias=source_bias), cache)
        logits = network.logits(x[: 1 if guidance == 1 else 2], own)
        odds = logits[..., 1] - logits[..., 0]
        odds = odds if len(odds) == 1 else guidance * odds[:1] + (1 - guidance) * odds[1:]
        bits = from_tokens(odds, schedule.grids[k], patch) > 0
        found.append((bits, logits))
        total = total + linear_resize(codes(bits), grids[-1])
    return found


@torch.no_grad()
@pytest.mark.parametrize("layout", ["patchify", "plain"])
@pytest.mark.parametrize("case", ["edit", "source attention", "text alone"])
def test_the_plain_cache_gives_what_the_fast_one_gives(layout, case, request):
    record = request.getfixturevalue(layout)
    network, attention = record.transformer, 0.4 if case == "source attention" else 1.0
    if case == "text alone":
        network = copy(network)
        network.config = replace(network.config, source=False)
    settings = SamplingSettings(guidance=GUIDANCE, temperature=0)
    given = record["ref.vae_features"].float(), record.texts("text"), record.schedule, settings
    scales = list(sample(network, *given, source_attention=attention))
    bias = torch.tensor(attention).log().item()
    for (bits, logits), scale in zip(decode_plainly(record, network, bias), scales, strict=True):
        torch.testing.assert_close(logits, scale.logits, atol=2e-5, rtol=0)
        assert torch.equal(bits, scale.bits)


def test_passes_lie_one_behind_the_other(patchify):
    config, schedule = patchify.transformer.config, patchify.schedule
    for source in (True, False):
        sizes = replace(config, source=source)
        plain = KVCache(sizes, schedule, 2, torch.float32, "cpu")
        fast = DeviceCache(sizes, schedule, 4, torch.float32, "cpu", copies=2)
        assert plain.keys.shape[3] == sum(schedule.tokens) + source * schedule.tokens[-1]
        for one, other in zip(plain.passes("cpu"), fast.passes("cpu"), strict=True):
            assert (one.index, one.begin, one.end) == (other.index, other.begin, other.end)
            assert torch.equal(one.rotary, other.rotary) and isinstance(other, RowPass)
        assert [step.shared for step in fast.passes("cpu")] == [2] + [1] * len(schedule)
        ends = [step.end for step in plain.passes("cpu")]
        assert [step.begin for step in plain.passes("cpu")] == [0, *ends[:-1]]


@torch.no_grad()
def test_a_counted_text_is_the_text(patchify):
    texts = [patchify.texts("text")[0], patchify.texts("text")[0][:4]]
    plain = patchify.transformer.condition(texts)
    condition = counted(plain)
    h = torch.randn(2, 5, patchify.transformer.config.width)
    for block, one, other in zip(patchify.transformer.blocks, plain.blocks, condition.blocks):
        assert type(one.text) is Text and type(other.text) is CountedText
        assert other.text.counts.tolist() == [len(text) for text in texts]
        assert torch.equal(block.ca(h, one.text, sdpa), block.ca(h, other.text, sdpa))
        assert torch.equal(other.text.rows(slice(1, 2)).counts, other.text.counts[1:])


@torch.no_grad()
@pytest.mark.parametrize("long", [False, True])
def test_every_operation_that_has_a_kernel_asks_for_it(patchify, monkeypatch, long):
    """As on a GPU, only that what runs in a kernel's place is the plain form: as often as there are places for it."""
    calls = Counter()

    def heads_into(qkv, query_scale, rotary, keys, values):
        q, k, v = functional.split_heads(qkv, query_scale, rotary)
        keys.copy_(k), values.copy_(v)
        return q

    def text_attention(q, keys, values, lengths, scale):
        (length,) = set(lengths.tolist())
        heads = q.unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
        return sdpa(heads, keys[:, :, :length], values[:, :, :length], scale=scale)

    forms = dict(
        add_norm=lambda *args: functional.add_norm.plain(*args[:-1]),
        heads_into=heads_into,
        text_attention=text_attention,
        text_weights=plain.text_weights,
        group_norm_silu=lambda x, groups, weight, bias, eps, offset: F.silu(
            F.group_norm(x if offset is None else x + offset[:, None, None], groups, weight, bias, eps)
        ),
        add_pictures=lambda x, y, offset: x + y + offset[:, None, None],
        double_picture=functional.double_picture.plain,
    )

    class Kernels:
        def __getattr__(self, name):
            return lambda *args: (calls.update([name]), forms[name](*args))[1]

    network, autoencoder, schedule = patchify.transformer, deepcopy(patchify.autoencoder), patchify.schedule
    texts = [patchify.texts("text")[0].repeat(10, 1)[:70]] if long else patchify.texts("text")
    given = patchify["ref.vae_features"].float(), texts, schedule, SamplingSettings(temperature=0)
    wanted, latents = [scale.logits for scale in sample(network, *given)], torch.randn(1, 14, 8, 8)
    picture = autoencoder.decode(latents)
    monkeypatch.setattr(kernels, "fusable", lambda x: True)
    monkeypatch.setattr(kernels, "_triton", lambda name: Kernels())
    if not long:
        monkeypatch.setattr(Workspace, "_recording", property(lambda self: self.kept))
        monkeypatch.setattr(Workspace, "_run", lambda self, name, tokens, function, *inputs: function(*inputs))
    for scale, logits in zip(sample(network, *given, workspace=Workspace()), wanted, strict=True):
        torch.testing.assert_close(scale.logits, logits, atol=3e-5, rtol=0)
    depth, passes = network.config.depth, len(schedule)
    own = depth * passes + depth - 1  # the source's last block only keeps keys and values
    text = "text_attention" if long else "text_weights"  # short texts are folded
    # The first block's source is split plainly, to be pooled.
    assert calls == {"add_norm": 3 * own + 1 + passes, "heads_into": own, text: own}
    calls.clear()
    autoencoder.to(memory_format=torch.channels_last)
    torch.testing.assert_close(autoencoder.decode(latents), picture, atol=1e-4, rtol=0)
    blocks = sum(isinstance(module, ResidualBlock) for module in autoencoder.decoder.modules())
    doubled = sum(hasattr(level, "upsample") for level in autoencoder.decoder.up)
    assert calls == {"add_pictures": blocks, "group_norm_silu": 2 * blocks + 1, "double_picture": doubled}
