"""The plain KV cache and what stands in its place for speed: the same network, whatever keeps keys and values."""

from collections import Counter
from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varedit_core.controls.registry import Controls
from varedit_core.model import functional
from varedit_core.model.engine import PlainEngine
from varedit_core.model.kv_cache import KVCache
from varedit_core.model.layers import sdpa
from varedit_core.model.transformer import Text
from varedit_core.runtime import kernels
from varedit_core.runtime.folded_text import CountedText, counted
from varedit_core.runtime.kernels import plain
from varedit_core.runtime.kv_caches import DeviceCache, RowPass
from varedit_core.runtime.session import Session, sample
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling import loop
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.tokenizer.vae import ResidualBlock

SETTINGS = SamplingSettings(guidance=[3, 3, 2, 3, 1, 1, 1], temperature=0)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["patchify", "plain"])
@pytest.mark.parametrize("case", ["edit", "source attention", "text alone"])
def test_the_plain_cache_gives_what_the_fast_one_gives(layout, case, request):
    record = request.getfixturevalue(layout)
    network, controls = record.transformer, Controls(source_attention=0.4 if case == "source attention" else 1.0)
    if case == "text alone":
        network = copy(network)
        network.config = replace(network.config, source=False)
    given = record["ref.vae_features"].float(), record.texts("text"), record.schedule, SETTINGS
    batch = EditBatch.of(*given, controls=controls)
    plainly, fast = (list(loop.sample(kind(network), batch)) for kind in (PlainEngine, Session))
    for one, other in zip(plainly, fast, strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=2e-5, rtol=0)
        assert torch.equal(one.bits, other.bits)


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
