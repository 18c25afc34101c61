"""Work left out at late scales: what does not change, what does, and that nothing else does."""

from dataclasses import replace

import pytest
import torch

from varedit_core import Editor
from varedit_core.controls import window
from varedit_core.controls.mask import token_masks
from varedit_core.controls.registry import Shortcuts
from varedit_core.controls.window import BAND, bands
from varedit_core.demo import demo_files
from varedit_core.model.layers import sdpa
from varedit_core.model.transformer import Transformer
from varedit_core.runtime.eight_bit_cache import EightBitCache
from varedit_core.runtime.kv_caches import DeviceCache
from varedit_core.runtime.memory import engine_of
from varedit_core.runtime.session import sample
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling import loop
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.shapeedit.evaluate import draw, evaluate
from varedit_core.tokenizer.quantizer import area_resize
from varedit_core.tokenizer.schedule import schedule_for

GREEDY = SamplingSettings(temperature=0.0)


def run(record, settings=GREEDY, **more):
    features = record["ref.vae_features"].float()
    return list(sample(record.transformer, features, record.texts("text"), record.schedule, settings, **more))


def draft_and_refine(drafter, refiner, *given, **more):
    """The scales of an edit of which `drafter` draws the first ones."""
    return loop.sample(engine_of([refiner, drafter], [None, None]), EditBatch.of(*given, **more))


def bits(scales):
    return [scale.bits for scale in scales]


def test_unguided_scales_are_a_guidance_of_one(patchify):
    short = run(patchify, shortcuts=Shortcuts(unguided=3))
    listed = run(patchify, replace(GREEDY, guidance=[3, 3, 3, 3, 1, 1, 1]))
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(short, listed, strict=True))
    assert [len(scale.logits) for scale in short] == [2, 2, 2, 2, 1, 1, 1]


def test_a_draft_is_the_beginning_of_the_edit(patchify):
    whole, draft = run(patchify), run(patchify, shortcuts=Shortcuts(stop=4))
    assert len(draft) == 4 and torch.equal(draft[-1].running_sum, whole[3].running_sum)


@pytest.mark.parametrize("layout", ["patchify", "plain"])
def test_a_window_of_the_whole_height_changes_nothing(layout, request):
    record = request.getfixturevalue(layout)
    whole, banded = run(record), run(record, shortcuts=Shortcuts(window=1.0))
    for a, b in zip(whole, banded):
        torch.testing.assert_close(a.logits, b.logits, atol=2e-5, rtol=0)


def test_a_window_hides_what_is_far(monkeypatch, patchify):
    """With a small window a change of the source's last rows does not reach the first rows of the last scale, but for
    what coarse scales and blocks before carry there; here: the keys that each band sees."""
    monkeypatch.setattr(window, "WHOLE", 4)
    schedule = schedule_for("0.06M")
    last = len(schedule) - 1
    seen = []

    def watched(q, k, v, *, scale, mask=None):
        seen.append((q.shape[2], k.shape[2]))
        return sdpa(q, k, v, scale=scale, mask=mask)

    run(patchify, shortcuts=Shortcuts(window=0.125), attention=watched)
    everything = schedule.tokens[-1] + sum(schedule.tokens)
    late = [keys for queries, keys in seen if queries == BAND and keys > schedule.tokens[last]]
    assert late and max(late) < 0.85 * everything


def test_bands_cover_every_query_once_and_stay_within_their_window():
    schedule = schedule_for("1M", 1.5)
    for index in (11, 12):
        height, width = schedule.grids[index]
        for first in (False, True):
            found = bands(schedule, index, 0.1, True, first)
            offset = schedule.grids[index] if first else schedule.grids[-1]
            own = offset[0] * offset[1] + sum(schedule.tokens[:index])
            assert found.tokens * len(found.listed) >= height * width > found.tokens * (len(found.listed) - 1)
            for band, (pieces, table) in enumerate(zip(found.listed, found.pieces.tolist(), strict=True)):
                assert [[p.start, p.stop] for p in pieces] == [pair for pair in table if pair != [0, 0]]
                keys = torch.cat([torch.arange(own + height * width)[piece] for piece in pieces])
                if index == 12:  # the last scale's own come first
                    keys = (keys - height * width) % (own + height * width)
                assert len(keys.unique()) == len(keys)
                rows = (keys[keys >= own] - own) // width
                top = band * BAND // width
                bottom = (min((band + 1) * BAND, height * width) - 1) // width
                assert top - 0.1 * height - 1 <= rows.min() and rows.max() <= bottom + 0.1 * height + 1
                assert set(range(top, bottom + 1)) <= set(rows.tolist()), "its own rows"
                assert (keys < own).sum() >= 16 * 11, "coarse scales are seen whole"


@pytest.mark.parametrize("inside", [0, 3])
def test_outside_a_mask_stands_the_source(patchify, inside):
    mask = torch.zeros(1, 64, 64)
    mask[:, 40:50, 8:20] = 1
    scales = run(patchify, replace(GREEDY, temperature=1.0), shortcuts=Shortcuts(inside=inside), mask=mask)
    features = patchify["ref.vae_features"].float()
    total = torch.zeros_like(features)
    for scale, free in zip(scales, token_masks(mask, patchify.schedule), strict=True):
        free = free.repeat_interleave(2, -1).repeat_interleave(2, -2).expand_as(scale.bits)
        wanted = area_resize(features - total, scale.bits.shape[-2:]) > 0
        assert torch.equal(scale.bits[~free], wanted[~free])
        total = scale.running_sum
    assert not torch.equal(scales[-1].bits, wanted), "inside the edit is free"
    tokens = [scale.logits.shape[1] for scale in scales]
    skipped = [count < whole for count, whole in zip(tokens, patchify.schedule.tokens)]
    assert skipped == [False] * (7 - inside) + [True] * inside
    if inside:
        wide = torch.nn.functional.max_pool2d(token_masks(mask, patchify.schedule)[-1].float(), 5, stride=1, padding=2)
        assert tokens[-1] == wide.sum(), "what is computed sees two tokens more than may change"


def test_shapeedit_of_single_pictures_skips_what_a_batch_computes(monkeypatch):
    """The union of many masks covers everything, so what skipping costs shows in batches of one only."""
    counts, original = [], EditBatch.steps

    def counted(*args):
        made = original(*args)
        counts.append(sum(step.tokens is not None for step in made))
        return made

    monkeypatch.setattr(EditBatch, "steps", counted)
    editor = Editor.load(*demo_files())
    samples = draw(77, 6, families=["recolour"])
    for batch in (1, 6):
        evaluate(
            editor, samples, SamplingSettings(guidance=1.0), batch, shortcuts=Shortcuts(inside=3, stop=5), masked=True
        )
    assert sum(counts[:6]) > counts[6]


def test_a_mask_of_everything_changes_nothing(patchify):
    whole = run(patchify)
    masked = run(patchify, shortcuts=Shortcuts(inside=3), mask=torch.ones(1, 5, 5))
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(masked)))


@pytest.mark.parametrize("store", [DeviceCache, EightBitCache])
def test_every_copy_has_its_pictures_mask(patchify, store):
    features = patchify["ref.vae_features"].float().repeat(2, 1, 1, 1)
    mask = torch.zeros(2, 16, 16)
    mask[0, :4], mask[1, 12:] = 1, 1
    *_, last = sample(
        patchify.transformer, features, patchify.texts("text") * 2, patchify.schedule, GREEDY,
        workspace=Workspace(store, kept=False), variations=2, mask=mask,
    )  # fmt: skip
    free = token_masks(mask, patchify.schedule)[-1].repeat_interleave(2, dim=0)
    assert torch.equal(last.free[..., ::2, ::2], free) and len(last.bits) == 4


def test_assigned_bits_do_not_leave_the_mask(patchify):
    mask = torch.zeros(1, 16, 16)
    mask[:, :4] = 1
    features = patchify["ref.vae_features"].float()
    for scale in sample(patchify.transformer, features, patchify.texts("text"), patchify.schedule, GREEDY, mask=mask):
        scale.bits = torch.zeros_like(scale.bits)
        free = scale.free.expand_as(scale.bits)
        assert not scale.bits[free].any() and torch.equal(scale.bits[~free], scale.source_bits[~free])


def test_a_refiner_goes_on_from_the_drafters_bits(patchify):
    record = patchify
    torch.manual_seed(1)
    refiner = Transformer(replace(record.transformer.config, depth=2)).requires_grad_(False)
    features = record["ref.vae_features"].float()
    args = (features, record.texts("text"), record.schedule)
    drafted = run(record)
    both = list(draft_and_refine(record.transformer, refiner, *args, GREEDY, shortcuts=Shortcuts(drafted=4)))
    assert [scale.index for scale in both] == list(range(7))
    assert all(torch.equal(a, b) for a, b in zip(bits(both[:4]), bits(drafted[:4])))
    forced = []
    for scale in sample(refiner, *args, GREEDY):
        if scale.index < 4:
            scale.bits = drafted[scale.index].bits
        forced.append(scale)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(both[4:], forced[4:]))
    same = list(draft_and_refine(record.transformer, record.transformer, *args, GREEDY, shortcuts=Shortcuts(drafted=4)))
    assert all(torch.equal(a, b) for a, b in zip(bits(same), bits(drafted)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(unguided=-1), "unguided must be a whole number"),
        (dict(stop=1.5), "stop must be a whole number"),
        (dict(window=2), "window must be a number from 0 to 1"),
        (dict(window=0.1, inside=2), "do not go together"),
    ],
)
def test_shortcuts_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Shortcuts(**values)


def test_what_does_not_belong_together(patchify, plain):
    given = patchify["ref.vae_features"].float(), patchify.texts("text"), patchify.schedule
    with pytest.raises(ValueError, match="needs one; give a mask"):
        run(patchify, shortcuts=Shortcuts(inside=2))
    with pytest.raises(ValueError, match="the mask is empty"):
        run(patchify, mask=torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="for 1 images"):
        run(patchify, mask=torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="need a second transformer"):
        run(patchify, shortcuts=Shortcuts(drafted=2))
    with pytest.raises(ValueError, match="must share VAE"):
        next(draft_and_refine(patchify.transformer, plain.transformer, *given, shortcuts=Shortcuts(drafted=3)))
    with pytest.raises(ValueError, match="from 1 to 6"):
        next(draft_and_refine(patchify.transformer, patchify.transformer, *given, shortcuts=Shortcuts(drafted=7)))
