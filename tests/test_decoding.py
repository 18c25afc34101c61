"""The loop: cached == uncached, batch rows == single rows, rows dropped and kept, draws, forcing, injection."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from varedit_core.model.config import TransformerConfig
from varedit_core.model.kv_cache import SOURCE
from varedit_core.model.layers import sdpa
from varedit_core.runtime.kv_caches import DeviceCache
from varedit_core.runtime.session import sample
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.tokenizer.quantizer import decode, latent_grids, linear_resize, to_tokens
from varedit_core.tokenizer.schedule import schedule_for
from varedit_core.training.parallel import BlockCausal, TeacherForced, parallel_logits

GREEDY = SamplingSettings(temperature=0.0)
FREE = SamplingSettings(temperature=0.0, guidance=1.0)


def run(record, texts, features=None, settings=GREEDY, negatives=None, schedule=None, attention=sdpa):
    features = record["ref.vae_features"].float() if features is None else features
    return list(
        sample(
            record.transformer, features, texts, schedule or record.schedule, settings, negatives, attention=attention
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("store", [TeacherForced, BlockCausal])
@pytest.mark.parametrize("layout", ["patchify", "plain"])
def test_cached_decoding_equals_uncached_forward(layout, store, request):
    if store is BlockCausal:  # training has a later floor of torch than editing
        pytest.importorskip("torch.nn.attention.flex_attention")
    record = request.getfixturevalue(layout)
    scales = run(record, record.texts("text"), settings=FREE)
    schedule, patch, bits = record.schedule, 2 if layout == "patchify" else 1, [s.bits for s in scales]
    network, grids = record.transformer, latent_grids(schedule, patch)

    source, *inputs = (
        to_tokens(x, patch)
        for x in [record["ref.vae_features"].float()]
        + [linear_resize(decode(bits[:k], grids[-1]), grids[k]) for k in range(1, len(schedule))]
    )
    store = store(schedule, network.config.head_size, "cpu")
    logits = parallel_logits(network, source, inputs, record.texts("text"), store)
    for scale, expected in zip(scales, logits):
        torch.testing.assert_close(scale.logits, expected, atol=2e-5, rtol=0)


def test_batch_rows_equal_single_rows(patchify):
    torch.manual_seed(0)
    text = patchify.texts("text")[0]
    texts = [
        text,
        torch.randn(3, text.shape[1]) * 0.3,
        torch.randn(3, text.shape[1]) * 0.3,
        torch.randn(19, text.shape[1]) * 0.3,
    ]
    negatives = [None, torch.randn(5, text.shape[1]) * 0.3, None, torch.randn(1, text.shape[1]) * 0.3]
    features = patchify["ref.vae_features"].float()
    features = torch.cat([features, features.flip(-1), features * 0.5, features.flip(-2)])
    settings = SamplingSettings(guidance=[3, 2, 3, 1, 3, 1, 1], temperature=0.7, seed=11)
    together = run(patchify, texts, features, settings, negatives)
    for row in range(4):
        alone = run(
            patchify,
            [texts[row]],
            features[row : row + 1],
            dataclasses.replace(settings, seed=11 + row),
            [negatives[row]],
        )
        for a, b in zip(together, alone):
            torch.testing.assert_close(a.log_odds[row], b.log_odds[0], atol=2e-4, rtol=0)
            assert torch.equal(a.bits[row], b.bits[0])


def test_rows_follow_the_guidance(patchify):
    """Where guidance is 1 the unconditional head is not run; after its last use the row is gone."""
    with pytest.MonkeyPatch.context() as patch:
        rows_seen, kept = [], []
        forward = type(patchify.transformer).forward

        def watched(self, x, condition, step, *a):
            rows_seen.append(len(x))
            kept.append((step.rows.start, step.rows.stop))
            return forward(self, x, condition, step, *a)

        patch.setattr(type(patchify.transformer), "forward", watched)
        scales = run(
            patchify, patchify.texts("text"), settings=SamplingSettings(guidance=[3, 1, 3, 3, 1, 1, 1], temperature=0)
        )
    assert [len(s.logits) for s in scales] == [2, 1, 2, 2, 1, 1, 1]
    assert rows_seen == [2, 2, 2, 2, 1, 1, 1]
    assert kept == [(0, rows) for rows in rows_seen]


def test_dropping_rows_changes_nothing(patchify):
    early = run(
        patchify, patchify.texts("text"), settings=SamplingSettings(guidance=[3, 3, 3, 3, 1, 1, 1], temperature=0)
    )
    almost = [3, 3, 3, 3, 1 + 1e-12, 1 + 1e-12, 1 + 1e-12]  # too little to matter, enough to keep the row
    late = run(patchify, patchify.texts("text"), settings=SamplingSettings(guidance=almost, temperature=0))
    assert [len(s.logits) for s in late] == [2] * 7
    for a, b in zip(early, late):
        torch.testing.assert_close(a.log_odds, b.log_odds, atol=1e-4, rtol=0)


def test_guidance_one_needs_no_unconditional_text(patchify, monkeypatch):
    monkeypatch.setattr(type(patchify.transformer), "unconditional", lambda *a: pytest.fail("not needed"))
    scales = run(patchify, patchify.texts("text"), settings=FREE)
    assert all(len(s.logits) == 1 for s in scales)


def test_probability_of_a_bit_follows_temperature_guidance_and_top_p(patchify):
    settings = SamplingSettings(guidance=2.5, temperature=0.4, top_p=0.8)
    scale = next(
        iter(
            sample(
                patchify.transformer,
                patchify["ref.vae_features"].float(),
                patchify.texts("text"),
                patchify.schedule,
                settings,
            )
        )
    )
    probabilities = (scale.logits[0] / 0.4 * 2.5 + scale.logits[1] / 0.4 * (1 - 2.5)).softmax(-1)[..., 1]
    expected = scale.on_grid(probabilities[None])
    expected = torch.where(expected <= 0.2, 0, torch.where(expected >= 0.8, 1, expected))
    torch.testing.assert_close(scale.probability, expected, atol=1e-5, rtol=0)
    assert (expected == 0).any() and (expected == 1).any() and ((expected > 0) & (expected < 1)).any()


def test_draws_follow_the_probability(patchify):
    """Among bits of about the same probability, as many are 1 as it says (within 4.5 deviations)."""
    scales = run(
        patchify, patchify.texts("text"), settings=SamplingSettings(guidance=1.0, temperature=1.0, top_p=1.0, seed=3)
    )
    p = torch.cat([s.probability.flatten() for s in scales]).double()
    bits = torch.cat([s.bits.flatten() for s in scales]).double()
    checked = 0
    for low in torch.arange(0, 1, 0.05):
        near = (p >= low) & (p < low + 0.05)
        if near.sum() > 100:
            checked += 1
            assert (bits[near] - p[near]).sum().abs() < 4.5 * (p[near] * (1 - p[near])).sum().sqrt()
    assert checked > 5
    assert 0.05 < (bits - (p > 0.5).double()).abs().mean() < 0.5, "drawn, not rounded"


def test_one_seed_one_image_another_seed_another(patchify):
    settings = SamplingSettings(temperature=1.0)
    first, again, other = (
        run(patchify, patchify.texts("text"), settings=dataclasses.replace(settings, seed=seed)) for seed in (5, 5, 6)
    )
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(first, again))
    assert any(not torch.equal(a.bits, b.bits) for a, b in zip(first, other))


def test_forced_bits_steer_the_rest_and_the_sum(patchify):
    free, forced = run(patchify, patchify.texts("text")), []
    for scale in sample(
        patchify.transformer, patchify["ref.vae_features"].float(), patchify.texts("text"), patchify.schedule, GREEDY
    ):
        if scale.index == 2:
            scale.bits = ~scale.bits
        forced.append(scale)
    assert torch.equal(forced[2].bits, ~free[2].bits)
    assert not torch.equal(forced[3].logits, free[3].logits)
    expected = decode([s.bits for s in forced], forced[-1].log_odds.shape[-2:])
    torch.testing.assert_close(forced[-1].running_sum, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="bits must be of the shape"):
        forced[0].bits = free[3].bits


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda s: s.lock(torch.ones(1, 1, 12, 12)), "a lock must be boolean, got torch.float32"),
        (lambda s: s.lock(torch.ones(1, 1, 1, 12, dtype=torch.bool)), "a lock must be of the shape .*, got"),
        (lambda s: setattr(s, "bits", [True]), "bits must be boolean, got list"),
        (lambda s: setattr(s, "log_odds", None), "log_odds must be numbers, got NoneType"),
        (lambda s: setattr(s, "log_odds", s.log_odds[:, :1]), "log_odds must be of the shape .*, got"),
    ],
)  # fmt: skip
def test_what_is_set_on_a_scale_has_its_shape_and_type(patchify, wrong, said):
    *_, scale = run(patchify, patchify.texts("text"))[:3]
    scale._bits = None
    with pytest.raises(ValueError, match=said):
        wrong(scale)


def test_log_odds_can_be_steered_before_the_draw(patchify):
    for scale in sample(
        patchify.transformer,
        patchify["ref.vae_features"].float(),
        patchify.texts("text"),
        patchify.schedule,
        SamplingSettings(),
    ):
        scale.log_odds = torch.full_like(scale.log_odds, 50.0)
        assert scale.bits.all()


def sizes(depth: int, heads: int, head_size: int = 8) -> TransformerConfig:
    """Of a transformer whose cache alone is looked at."""
    return TransformerConfig(depth, heads * head_size, heads, 56, 8, 512, 16, 15)


def test_the_store_never_holds_the_last_scale():
    schedule = schedule_for("0.25M")
    config = sizes(depth=2, heads=4)
    store = DeviceCache(config, schedule, rows=2, dtype=torch.bfloat16, device="cpu")
    assert {tuple(t.shape) for t in (*store.keys, *store.values)} == {(2, 4, 1024 + 1024 + 2521 - 1024, 8)}
    assert store.keys[1].data_ptr() - store.keys[0].data_ptr() == (1024 + 2521 - 1024) * 8 * 2, "they share the 1024"
    assert {t.dtype for t in (*store.keys, *store.values)} == {torch.bfloat16}
    steps = store.passes("cpu")
    assert [s.index for s in steps] == [SOURCE, *range(10)] and steps[-1].begin == store.length
    for step in steps:
        x = torch.randn(2, 4, step.end - step.begin, 8)
        for block in range(2):
            qkv = torch.cat((x, x, x), dim=1).transpose(1, 2).flatten(2).bfloat16()
            store.keep(block, block == 0, qkv, torch.ones(4), step)
            keys, _ = store.seen(block, block == 0, step)
    assert keys.shape[2] == 1024 + 2521
    storages = {t.data_ptr(): t for t in (x.untyped_storage() for x in (*store.keys, *store.values, *store.references))}
    taken = sum(storage.nbytes() for storage in storages.values())
    assert taken == DeviceCache.nbytes(config, schedule, rows=2, dtype=torch.bfloat16)


def test_attention_is_the_injected_one_everywhere(patchify, monkeypatch):
    calls = []

    def injected(q, k, v, *, scale, mask=None):
        calls.append(scale)
        return ((q @ k.transpose(-2, -1) * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)

    expected = run(patchify, patchify.texts("text"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: pytest.fail("not the injected attention"))
    given = run(patchify, patchify.texts("text"), attention=injected)
    for a, b in zip(expected, given):
        torch.testing.assert_close(a.logits, b.logits, atol=2e-5, rtol=0)
    depth, scales = patchify.transformer.config.depth, len(patchify.schedule)
    # The two rows' texts have one length: one pooling, then self- and cross-attention a block and pass, but for the
    # source's last block, of which only keys and values stay.
    assert len(calls) == 1 + 2 * depth * (1 + scales) - 2
    assert sum(scale == 1.0 for scale in calls) == depth * (1 + scales) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: dict(texts=[]), "1 images need 1 instructions"),
        (lambda r: dict(texts=[torch.randn(4, 7)]), "use the text encoder it was trained with"),
        (lambda r: dict(texts=[torch.randn(0, 256)]), "use the text encoder"),
        (lambda r: dict(negatives=[torch.randn(3, 128)]), "use the text encoder it was trained with"),
        (lambda r: dict(texts=[torch.randn(600, 256)]), "600 text tokens but the model takes 512"),
        (lambda r: dict(features=torch.randn(1, 14, 30, 32)), "encode the image at 256x256"),
        (lambda r: dict(features=torch.randn(1, 16, 32, 32)), "with the model's VAE"),
        (
            lambda r: dict(settings=SamplingSettings(guidance=[1, 2])),
            "guidance has 2 values but the edit runs 7 scales",
        ),
    ],
)
def test_inputs_that_do_not_belong_together(patchify, change, message):
    arguments = dict(texts=patchify.texts("text")) | change(patchify)
    with pytest.raises(ValueError, match=message):
        run(patchify, **arguments)


@pytest.mark.parametrize(
    "values",
    [
        dict(guidance="30"),
        *(dict(guidance=value) for value in ([], (), 10**400, True, {1: 2}, torch.ones(2, 2))),
        dict(guidance=None),
        dict(seed=1.5),
        dict(seed="1"),
        dict(temperature=-1),
        dict(top_p=0.3),
        dict(top_p=1.5),
        dict(guidance=float("nan")),
        dict(seed=-1),
    ],
)
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match="must be"):
        SamplingSettings(**values)


def test_settings_take_lists_and_arrays():
    import numpy as np

    settings = SamplingSettings(guidance=[3, 1], temperature=np.array([1, 0.5]), seed=np.int64(3))
    assert settings == SamplingSettings(guidance=(3.0, 1.0), temperature=torch.tensor([1, 0.5]), seed=3)
    assert settings.per_scale(2) == [(3.0, 1.0, 0.97), (1.0, 0.5, 0.97)] and hash(settings)


def test_steering_after_the_draw_is_refused(patchify):
    features, texts = patchify["ref.vae_features"].float(), patchify.texts("text")
    scale = next(iter(sample(patchify.transformer, features, texts, patchify.schedule)))
    with pytest.raises(ValueError, match="bits must be boolean"):
        scale.bits = torch.ones_like(scale.log_odds)
    assert scale.bits.any()
    with pytest.raises(ValueError, match="are drawn already"):
        scale.log_odds = scale.log_odds + 1


def test_undefined_numbers_are_an_error(patchify):
    with pytest.raises(ValueError, match="undefined numbers"):
        run(patchify, [patchify.texts("text")[0] * float("nan")])


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_the_last_scale_leaves_the_source_of_every_block_as_it_is(ratio):
    """It borrows memory of the block before, from which a re-roll reads the source again."""
    schedule = schedule_for("0.06M", ratio)
    store = DeviceCache(sizes(depth=3, heads=1), schedule, rows=1, dtype=torch.float32, device="cpu")
    source, *_, last = store.passes("cpu")
    for block in range(3):
        store.keep(block, block == 0, torch.randn(1, store.source, 24), torch.ones(1), source)
    before = [x[:, :, store.source : 2 * store.source].clone() for x in (*store.keys[1:], *store.values[1:])]
    for block in range(3):
        store.keep(block, block == 0, torch.randn(1, schedule.tokens[-1], 24), torch.ones(1), last)
    after = [x[:, :, store.source : 2 * store.source] for x in (*store.keys[1:], *store.values[1:])]
    assert all(map(torch.equal, before, after)) and all(x.any() for x in before)
