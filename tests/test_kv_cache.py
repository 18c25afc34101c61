"""The plain KV cache and what stands in its place for speed: the same network, whatever keeps keys and values."""

from copy import copy
from dataclasses import replace

import pytest
import torch

from varedit_core.controls.registry import Controls
from varedit_core.model.kv_cache import KVCache
from varedit_core.model.layers import sdpa
from varedit_core.model.transformer import Text
from varedit_core.runtime.folded_text import CountedText, counted
from varedit_core.runtime.kv_caches import DeviceCache, RowPass
from varedit_core.runtime.session import sample
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.tokenizer.quantizer import codes, from_tokens, latent_grids, linear_resize, to_tokens

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
    scales = list(sample(network, *given, controls=Controls(source_attention=attention)))
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
