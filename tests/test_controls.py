"""Controls: neutral ones change nothing, extreme ones are exact, and locked parts are the source's, bit for bit."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from varedit_core import Editor
from varedit_core.controls.auto_mask import changed
from varedit_core.controls.best_of import Candidates
from varedit_core.controls.confidence import Confidence
from varedit_core.controls.curves import PRESETS
from varedit_core.controls.preserve import Preserve
from varedit_core.controls.regions import Regions, exclusive
from varedit_core.controls.registry import NEUTRAL, Controls, Shortcuts
from varedit_core.controls.strength import Strength
from varedit_core.demo import GUIDANCE, SAMPLES, SIZE, demo_files
from varedit_core.pictures.composite import Region, masked
from varedit_core.pictures.images import fit_mask
from varedit_core.runtime.session import sample
from varedit_core.sampling import driver
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.settings import Curve, SamplingSettings
from varedit_core.sampling.tokens import Tokens
from varedit_core.tokenizer.quantizer import encode, latent_grids
from varedit_core.tokenizer.schedule import schedule_for

DRAWN = SamplingSettings(guidance=GUIDANCE, temperature=0.5, seed=3)
SCENE = SAMPLES / "scene.png"
STAR = "recolour the black star in purple"
SQUARE = "in the bottom centre, add a pink square"


@pytest.fixture(scope="module")
def editor():
    return Editor.load(*demo_files(), device="cpu")


@pytest.fixture(scope="module")
def task(editor):
    image = editor.fit(SCENE, SIZE)
    features, texts = editor.encode([image], [STAR])
    return features, texts, image.schedule


@pytest.fixture(scope="module")
def free(editor, task):
    return list(editor.sample(*task, DRAWN))


def own(editor, task):
    features, _, schedule = task
    return encode(features, latent_grids(schedule, 2))


def test_neutral_controls_change_nothing(editor, task, free):
    again = list(editor.sample(*task, DRAWN, controls=Controls()))
    assert NEUTRAL == Controls()
    assert all(
        torch.equal(a.bits, b.bits) and torch.equal(a.logits, b.logits) for a, b in zip(free, again, strict=True)
    )


@pytest.mark.parametrize("controls", [Controls(strength=0.0), Controls(preserve=1.0)])
def test_the_far_end_is_the_source_through_the_tokenizer(editor, task, controls):
    bits, total = own(editor, task)
    scales = list(editor.sample(*task, DRAWN, controls=controls))
    assert all(torch.equal(scale.bits, own_bits) for scale, own_bits in zip(scales, bits, strict=True))
    assert torch.equal(scales[-1].running_sum, total)


@pytest.mark.parametrize(("strength", "whole", "part"), [(0.75, 1, 0.75), (0.5, 3, 0.5), (0.25, 5, 0.25)])
def test_strength_holds_so_many_scales_and_a_part_of_the_next(editor, task, strength, whole, part):
    scales = list(editor.sample(*task, DRAWN, controls=Controls(strength=strength)))
    held = [0.0 if s.free is None else 1 - s.free.expand_as(s.bits).float().mean().item() for s in scales]
    assert held[:whole] == [1.0] * whole and not any(held[whole + 1 :])
    assert held[whole] == pytest.approx(part, abs=0.1)
    source = own(editor, task)[0]
    assert all(torch.equal(s.bits, b) for s, b in zip(scales[:whole], source))


def test_strength_is_nested(editor, task):
    """What a stronger edit holds of a scale, a weaker one holds too."""
    found = []
    for strength in (0.6, 0.62, 0.65):  # all end in the third of seven scales
        scales = list(editor.sample(*task, DRAWN, controls=Controls(strength=strength)))
        found.append(~scales[2].free)
    weak, middle, strong = found
    assert (weak | ~middle).all() and (middle | ~strong).all() and weak.sum() > middle.sum() > strong.sum() > 0


def test_preserve_pulls_towards_the_source(editor, task):
    base = own(editor, task)[1]

    def distance(amount: float) -> float:
        *_, last = editor.sample(*task, replace(DRAWN, temperature=0.0), controls=Controls(preserve=amount))
        return (last.running_sum - base).square().mean().item()

    far = [distance(amount) for amount in (0.0, 0.5, 0.8, 1.0)]
    assert far == sorted(far, reverse=True) and far[-1] == 0 < far[2] < far[0]


def test_source_attention_weighs_the_sources_keys(patchify):
    """Against a plain softmax with the source's keys' logits shifted, for a scale in the middle and for the last."""
    seen = []

    def watched(q, k, v, *, scale, mask=None):
        weights = (scale * q @ k.transpose(-1, -2) + (0 if mask is None else mask)).softmax(-1)
        if mask is not None and mask.shape[:3] == (1, 1, 1):
            seen.append(mask.flatten())
        return (weights @ v).transpose(1, 2).flatten(2)

    features, texts = patchify["ref.vae_features"].float(), patchify.texts("text")
    more = dict(settings=SamplingSettings(temperature=0.0), controls=Controls(source_attention=0.25))
    args = (patchify.transformer, features, texts, patchify.schedule)
    *_, last = sample(*args, **more)
    *_, watched_last = sample(*args, attention=watched, **more)
    torch.testing.assert_close(watched_last.logits, last.logits, atol=2e-5, rtol=0)
    tokens = patchify.schedule.tokens
    depth = patchify.transformer.config.depth
    for k, count in enumerate(tokens):
        first, second = seen[k * depth], seen[k * depth + 1]
        for bias, source in ((first, count), (second, tokens[-1])):
            assert len(bias) == source + sum(tokens[: k + 1])
            held = bias.nonzero().flatten()
            begin = count if k + 1 == len(tokens) else 0  # the last scale's own keys lie in front
            assert held.tolist() == list(range(begin, begin + source))
            assert torch.allclose(bias[held], torch.tensor(0.25).log())
    *_, other = sample(*args, settings=more["settings"])
    assert not torch.equal(other.logits, last.logits)


def test_no_source_attention_sees_no_source(patchify):
    """With 0 two pictures give the same edit but for the source's own pass."""
    features, texts = patchify["ref.vae_features"].float(), patchify.texts("text")
    more = dict(settings=SamplingSettings(temperature=0.0), controls=Controls(source_attention=0.0))
    sums = [
        list(sample(patchify.transformer, x, texts, patchify.schedule, **more))[-1].running_sum
        for x in (features, features.flip(-1))
    ]
    assert torch.equal(*sums) and sums[0].isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_outside_any_mask_latents_and_pixels_are_the_sources(editor, task, data):
    """Latents of tokens that the mask and its feather do not reach; pixels wherever the mask is black."""
    boxes = data.draw(st.lists(st.tuples(*[st.integers(0, 40)] * 4), min_size=1, max_size=3))
    mask = Image.new("L", (60, 60))
    for x, y, width, height in boxes:
        mask.paste(255, (x, y, x + 1 + width, y + 1 + height))
    feather = data.draw(st.integers(0, 2))
    features, texts, schedule = task
    result = editor.run(SCENE, texts, size=SIZE, settings=DRAWN, mask=mask, controls=Controls(feather=feather))
    base = own(editor, task)[1]
    if result.tokens.free is not None:
        outside = ~result.tokens.free.expand_as(base)
        assert torch.equal(result.tokens.total()[outside], base[outside])
        cells = torch.nn.functional.adaptive_max_pool2d(fit_mask(mask, editor.fit(SCENE, SIZE).fitting), (32, 32))
        cells = torch.nn.functional.max_pool2d(cells, 2 * feather + 1, 1, feather) > 0
        assert torch.equal(result.tokens.free[:, 0], cells)
    source = editor.fit(SCENE, SIZE).source.rgb
    shown = mask.resize(source.size, Image.Resampling.BILINEAR).point(lambda v: 255 * (v == 0))
    difference = ImageChops.difference(result.pictures[0], source)
    assert Image.composite(difference, Image.new("RGB", source.size), shown).getbbox() is None


def test_feather_is_of_tokens_drawn_and_of_latents_kept(editor, task):
    mask = torch.zeros(1, 256, 256)
    mask[:, 100:160, 100:160] = 1  # touches tokens 6 to 9, latents 12 to 19
    base = own(editor, task)[1]
    for feather, side in ((0, 4), (1, 6), (2, 8), (4, 12)):
        *_, last = editor.sample(*task, DRAWN, mask=mask, controls=Controls(feather=feather))
        assert last.free[0, 0, ::2, ::2].sum() == side**2
        reach = slice(12 - feather, 20 + feather)
        assert last.edited[0, 0, reach, reach].all() and last.edited.sum() == (8 + 2 * feather) ** 2
        changed_latents = (last.running_sum != base).any(1)
        assert changed_latents.any() and not (changed_latents & ~last.edited[:, 0]).any()


def test_tokens_are_saved_loaded_and_decoded_to_the_same_picture(editor, task, tmp_path):
    mask = Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 128, 128))
    for name, more in (("plain", {}), ("masked", {"mask": mask})):
        result = editor.run(SCENE, task[1], size=SIZE, settings=DRAWN, **more)
        result.tokens.save(tmp_path / f"{name}.safetensors")
        loaded = Tokens.load(tmp_path / f"{name}.safetensors")
        assert torch.equal(loaded.total(), result.tokens.total()) and loaded.fitting == result.tokens.fitting
        assert (tmp_path / f"{name}.safetensors").stat().st_size < 20_000
        if name == "plain":
            (again,) = editor.decode(loaded.total(), [editor.fit(SCENE, SIZE)])
            assert again.tobytes() == result.pictures[0].tobytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        loaded.save(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="suffix"):
        loaded.save(tmp_path / "plain.bin")
    with pytest.raises(ValueError, match="not a file of tokens"):
        Tokens.load(demo_files()[0])


@pytest.mark.parametrize("scales", [1, 4, 6])
def test_going_on_from_any_scale_is_the_uninterrupted_run(editor, task, free, scales):
    draft = editor.run(SCENE, task[1], size=SIZE, settings=DRAWN, shortcuts=Shortcuts(stop=scales)).tokens
    assert len(draft) == scales
    whole = editor.run(SCENE, task[1], size=SIZE, settings=DRAWN, given=draft).tokens
    assert all(torch.equal(a, b.bits) for a, b in zip(whole.bits, free, strict=True))
    assert torch.equal(whole.total(), free[-1].running_sum)


def test_branches_are_the_runs_of_their_seeds_from_there(editor, task, free):
    begun = Tokens(task[2], tuple(s.bits for s in free[:4]), (32, 32))
    branches = editor.run(SCENE, task[1], size=SIZE, settings=DRAWN, given=begun, variations=3)
    assert len(branches.pictures) == 3
    for number in range(3):
        seeded = replace(DRAWN, seed=DRAWN.seed + number)
        alone = editor.run(SCENE, task[1], size=SIZE, settings=seeded, given=begun).tokens
        assert all(torch.equal(a[number], b[0]) for a, b in zip(branches.tokens.bits, alone.bits, strict=True))
    assert torch.equal(branches.tokens.bits[-1][0], free[-1].bits[0]), "the first branch is the run itself"
    assert not torch.equal(*branches.tokens.bits[-1][:2])
    assert all(torch.equal(bits[0], bits[1]) for bits in branches.tokens.bits[:4])


def test_shared_passes_of_branches_run_once(editor, task, free, monkeypatch):
    """The first scales' passes have a row for each text, the others one for each copy."""
    rows = []
    transformer = editor.transformer
    forward = type(transformer).forward
    monkeypatch.setattr(
        type(transformer), "forward", lambda self, x, *a: (rows.append(len(x)), forward(self, x, *a))[1]
    )
    given = [s.bits for s in free[:4]]
    list(editor.sample(*task, DRAWN, variations=3, prefix=given))
    assert rows == [2] * 4 + [6] * 3


def test_an_edit_of_tokens_reads_their_sum(editor, task):
    first = editor.run(SCENE, STAR, size=SIZE, settings=DRAWN)
    second = editor.run(first.tokens, SQUARE, settings=DRAWN)
    features = first.tokens.total()
    (text,) = editor.encode_text([SQUARE])
    *_, last = editor.sample(features, [text], task[2], DRAWN, source_total=features)
    assert torch.equal(second.tokens.total(), last.running_sum)
    kept = editor.run(first.tokens, SQUARE, settings=DRAWN, controls=Controls(strength=0.0))
    assert torch.equal(kept.tokens.total(), features), "held to tokens, an edit is these tokens"
    assert kept.pictures[0].tobytes() == first.pictures[0].tobytes()


def test_a_chain_of_masked_edits_keeps_what_no_mask_touched(editor, task, tmp_path):
    """Exactly, through a file, over several links."""
    tokens = editor.run(SCENE, STAR, size=SIZE, settings=DRAWN).tokens
    begun = tokens.total()
    untouched = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    for number, left in enumerate((0, 64, 128)):
        mask = Image.new("L", (256, 256))
        mask.paste(255, (left, 96, left + 32, 128))
        tokens = editor.run(tokens, SQUARE, settings=replace(DRAWN, seed=number), mask=mask).tokens
        untouched &= ~tokens.free
        tokens.save(tmp_path / f"{number}.safetensors")
        tokens = Tokens.load(tmp_path / f"{number}.safetensors")
    kept = untouched.expand_as(begun)
    assert kept.float().mean() > 0.5 and torch.equal(tokens.total()[kept], begun[kept])
    assert not torch.equal(tokens.total(), begun)


def test_exclusive_regions_follow_their_order():
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 0], masks[0, 1, :2], masks[0, 2, :, :2] = 0.5, 1, 0.2
    found = exclusive(masks)
    assert torch.equal(found.sum(1), torch.ones(1, 4, 4))
    assert found[0, 2].sum() == 8 and found[0, 1].sum() == 4 and found[0, 0].sum() == 4


def test_a_picture_that_no_region_touches_weighs_all_alike():
    """Beside one that is touched, where the nearest region counts."""
    masks = torch.zeros(2, 2, 16, 16)
    masks[0, 0, :2, :2] = masks[0, 1, 14:, 14:] = 1
    weights = Regions(masks)._weights(torch.zeros(4, 14, 8, 8))
    assert (weights[1] == 0.5).all() and weights[0, 0, 0, 0] == weights[0, 1, 7, 7] == 1
    assert torch.allclose(weights.sum(1), torch.ones(2, 8, 8)) and set(weights[0].unique().tolist()) == {0, 0.5, 1}


def test_a_region_for_everything_is_the_plain_edit(editor, task, free):
    result = editor.run(SCENE, size=SIZE, settings=DRAWN, regions=[Region(STAR)])
    assert torch.equal(result.tokens.total(), free[-1].running_sum)
    twice = editor.run(SCENE, size=SIZE, settings=DRAWN, regions=[Region(SQUARE), Region(STAR)])
    torch.testing.assert_close(twice.tokens.total(), free[-1].running_sum, atol=0.8, rtol=0)
    assert (twice.tokens.bits[2] == free[2].bits).float().mean() > 0.95, "the later region covers the earlier one"


def test_two_regions_do_both_edits_and_nothing_else(editor, task):
    source = editor.fit(SCENE, SIZE).source.rgb
    halves = []
    for box in ((0, 0, 256, 150), (0, 150, 256, 256)):
        halves.append(Image.new("L", (256, 256)))
        halves[-1].paste(255, box)
    settings = SamplingSettings(guidance=GUIDANCE)
    alone = [
        editor.edit(SCENE, words, size=SIZE, settings=settings, mask=m)[0] for words, m in zip((STAR, SQUARE), halves)
    ]
    both = editor.run(SCENE, size=SIZE, settings=settings, regions=[Region(STAR, halves[0]), Region(SQUARE, halves[1])])

    def far(a, b, box) -> float:
        difference = ImageChops.difference(a.crop(box), b.crop(box))
        return sum(difference.convert("L").histogram()[60:])

    for box, single in (((0, 0, 256, 140), alone[0]), ((0, 160, 256, 256), alone[1])):
        assert far(both.pictures[0], single, box) < 0.2 * far(source, single, box)
    assert both.tokens.images == 1


def test_an_auto_mask_finds_the_edit_and_keeps_the_rest(editor, task):
    result = editor.run(
        SCENE, SQUARE, size=SIZE, settings=SamplingSettings(guidance=GUIDANCE), controls=Controls(auto_mask=0.5)
    )
    (mask,) = result.masks
    left, top, right, bottom = mask.getbbox()
    assert 70 < left and right < 190 and top > 150, "a square in the bottom centre"
    source = editor.fit(SCENE, SIZE).source.rgb
    difference = ImageChops.difference(result.pictures[0], source)
    black = mask.point(lambda v: 255 * (v == 0))
    assert Image.composite(difference, Image.new("RGB", source.size), black).getbbox() is None
    base = own(editor, task)[1]
    locked = ~result.tokens.free.expand_as(base)
    assert locked.float().mean() > 0.5 and torch.equal(result.tokens.total()[locked], base[locked])


def test_a_seam_fades_an_edit_in_and_keeps_the_outside_exactly(editor):
    source, mask = editor.fit(SCENE, SIZE), Image.new("L", (256, 256))
    mask.paste(255, (60, 60, 200, 200))
    edited = Image.new("RGB", (256, 256), "white")
    hard, soft = (masked(edited, source, mask, seam) for seam in (0, 12))
    with pytest.raises(ValueError, match="at least 0 pixels"):
        masked(edited, source, mask, -1)
    outside = ImageChops.invert(mask)
    for result in (hard, soft):
        difference = ImageChops.difference(result, source.source.rgb)
        assert Image.composite(difference, Image.new("RGB", (256, 256)), outside).getbbox() is None

    def step(result) -> float:
        """Between the last pixels outside and the first inside, at the mask's left edge."""
        levels = torch.from_numpy(np.array(result)).float()[100:160]
        return (levels[:, 60] - levels[:, 59]).abs().mean().item()

    assert step(soft) < 0.2 * step(hard)
    assert hard.getpixel((130, 130)) == soft.getpixel((130, 130)) == (255, 255, 255)
    run = dict(size=SIZE, settings=SamplingSettings(guidance=GUIDANCE), mask=mask)
    (result,), (plain,) = (editor.run(SCENE, STAR, seam=seam, **run).pictures for seam in (12, 0))
    assert result.tobytes() != plain.tobytes(), "it reaches the composite"


def test_changed_says_how_much_pixels_differ():
    before = torch.zeros(1, 3, 20, 20)
    after = before.clone()
    after[:, 1, 5:10, 5:10] = 0.3
    found = changed(after, before)
    assert found.shape == (1, 20, 20) and found[0, 7, 7] > 0.999 and not found[0, 12:].any()
    assert torch.allclose(changed(after, before, 0.25)[0, 7, 7], torch.tensor(0.5))


def test_certainty_is_between_nought_and_one(editor, task, free):
    sure = Confidence()
    for scale in free:
        sure(scale)
    assert sure.map.shape == (1, 32, 32) and 0 <= sure.map.min() and sure.map.max() <= 1
    assert 0.3 < sure.map.mean() < 1


@pytest.mark.parametrize("score", ["likelihood", "instruction", "near", "far"])
def test_the_best_beginning_goes_on(editor, task, score):
    noisy = replace(DRAWN, temperature=2.0)
    found = Candidates(score)
    for scale in editor.sample(*task, noisy, variations=4, shortcuts=Shortcuts(stop=3)):
        found(scale)
    best = int(found.scores.argmax())
    assert found.scores.unique().numel() == 4
    wanted = [bits[best] for bits in found.bits]
    batch = EditBatch.of(*task, noisy, controls=Controls(best_of=4, best_at=3, score=score))
    chosen = driver.run(batch, editor.memory).tokens.bits
    assert len(chosen) == 7 and all(torch.equal(bits[0], w) for bits, w in zip(chosen, wanted))


def test_the_score_instruction_wants_guidance(editor, task):
    with pytest.raises(ValueError, match="guidance other than 1"):
        controls = Controls(best_of=2, score="instruction")
        driver.run(EditBatch.of(*task, replace(DRAWN, guidance=1.0), controls=controls), editor.memory)


def test_the_loop_goes_on_from_the_best_beginning_too(editor, task):
    noisy, controls = replace(DRAWN, temperature=2.0), Controls(best_of=4, best_at=3, score="far")
    wanted = driver.run(EditBatch.of(*task, noisy, controls=controls), editor.memory).tokens.bits
    for drawn in (editor.sample, partial(sample, editor.transformer)):
        found = [scale.bits for scale in drawn(*task, noisy, controls=controls)]
        assert len(found) == 7 and all(map(torch.equal, found, wanted))
    free = [scale.bits for scale in editor.sample(*task, noisy)]
    assert not all(map(torch.equal, free, wanted))


def test_curves_and_presets():
    assert Curve(4, 1).over(4) == (4, 3, 2, 1) and Curve(2, 3).over(1) == (2,)
    settings = SamplingSettings(guidance=Curve(3, 1), temperature=0.2)
    assert [g for g, *_ in settings.per_scale(3)] == [3, 2, 1] and settings.guided
    plain = SamplingSettings()
    assert plain.preset("balanced") is plain
    faithful = plain.preset("faithful").per_scale(5)
    assert faithful[0][0] == 3 and faithful[-1][0] == 1, "guidance ends"
    assert set(PRESETS) == {"balanced", "faithful", "creative"}
    with pytest.raises(ValueError, match="one number"):
        SamplingSettings(guidance=[3, 2]).preset("faithful")
    with pytest.raises(ValueError, match="unknown preset"):
        plain.preset("bold")


def test_numbers_of_numpy_and_torch_are_pythons():
    made = Controls(strength=np.float64(0.5), best_of=torch.tensor(3), feather=np.int64(2))
    assert made == Controls(strength=0.5, best_of=3, feather=2) and type(made.feather) is int


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"strength": 1.5}, "strength must be a number from 0 to 1"),
        ({"strength": torch.tensor([0.5, 0.5])}, "strength must be a number from 0 to 1, got tensor"),
        ({"strength": True}, "strength must be a number from 0 to 1, got True"),
        ({"preserve": "much"}, "preserve must be"),
        ({"source_attention": -1}, "source_attention must be"),
        ({"feather": 9}, "whole number from 0 to 4"),
        ({"best_of": 0}, "whole number from 1 to 64"),
        ({"best_at": 0}, "whole number from 1 to 13, got 0"),
        ({"score": "nice"}, "choose one of likelihood"),
    ],
)
def test_controls_out_of_range_say_so(wrong, said):
    with pytest.raises(ValueError, match=said):
        Controls(**wrong)


def test_what_does_not_belong_together_is_one_sentence(editor, task, free):
    picture = Image.open(SCENE)
    white = Image.new("L", (8, 8), 255)
    run = editor.run
    with pytest.raises(ValueError, match="3 masks for 2 pictures"):
        run([picture] * 2, [STAR] * 2, size=SIZE, mask=[white] * 3)
    with pytest.raises(ValueError, match="region 2 has no instruction"):
        run(picture, size=SIZE, regions=[Region(STAR, white), Region(" ", white)])
    with pytest.raises(ValueError, match="not both"):
        run(picture, STAR, size=SIZE, regions=[Region(SQUARE, white)])
    tokens = Tokens(task[2], tuple(s.bits for s in free[:3]), (32, 32))
    with pytest.raises(ValueError, match="no picture yet"):
        run(tokens, STAR)
    with pytest.raises(ValueError, match="1 edits for 2 pictures"):
        run([picture] * 2, [STAR] * 2, size=SIZE, given=tokens)
    with pytest.raises(ValueError, match="window and source_attention"):
        shorter = Controls(source_attention=0.5)
        run(picture, STAR, size=SIZE, shortcuts=Shortcuts(window=0.2), controls=shorter)
    with pytest.raises(ValueError, match="from 1 to 3 of them"):
        tokens.first(4)
    small = schedule_for(SIZE, 1.5)
    other = Tokens(
        small, tuple(torch.zeros(1, 16, 2 * h, 2 * w, dtype=torch.bool) for h, w in small.grids[:3]), (42, 28)
    )
    with pytest.raises(ValueError, match="same size, shape and number"):
        run(picture, STAR, size=SIZE, given=other)


def test_controls_are_functions_over_a_scale(editor, task):
    """The parts can be used alone, in one's own loop."""
    bits, total = own(editor, task)
    for scale in editor.sample(*task, DRAWN):
        Strength(0.5)(scale)
        Preserve(0.9)(scale)
    assert not torch.equal(scale.running_sum, total)


def test_a_chain_of_edits_keeps_the_first_pictures_pixels(editor):
    """Edit after edit of what came before: no decoding in between, and pixels that no mask reached are the first's."""
    picture = editor.fit(SCENE, SIZE).source.rgb
    edited, black = picture, Image.new("L", picture.size, 255)
    for number, left in enumerate((0, 96, 180)):
        mask = Image.new("L", picture.size)
        mask.paste(255, (left, 60, left + 60, 120))
        edited = editor.run(edited, SQUARE, size=SIZE, settings=replace(DRAWN, seed=number), mask=mask)
        black.paste(0, (left, 60, left + 60, 120))
    (last,) = edited.pictures
    difference = ImageChops.difference(last, picture)
    assert Image.composite(difference, Image.new("RGB", picture.size), black).getbbox() is None
    assert difference.getbbox() is not None and edited.tokens.under.under.under is not None


def test_an_edit_explains_itself(editor):
    result = editor.run(
        SCENE, SQUARE, size=SIZE, settings=SamplingSettings(guidance=GUIDANCE), explain=True, variations=2
    )
    assert len(result.changes) == len(result.certainty) == 2 and result.masks is None
    for change, sure in zip(result.changes, result.certainty):
        assert change.size == sure.size == result.pictures[0].size
        where = change.point(lambda v: 255 * (v == 255)).getbbox()
        assert where[0] > 70 and where[1] > 150 and where[2] < 190, "a square in the bottom centre"
        low, high = sure.getextrema()
        assert 0 <= low < high <= 255


def test_regions_go_with_other_controls_batches_and_seeds(editor, task):
    """preserve pulls regions, too; picture i draws from seed + i; candidates are scored by all of their regions."""
    halves = []
    for box in ((0, 0, 256, 150), (0, 150, 256, 256)):
        halves.append(Image.new("L", (256, 256)))
        halves[-1].paste(255, box)
    regions = [Region(STAR, halves[0]), Region(SQUARE, halves[1])]
    total = own(editor, task)[1]
    kept = editor.run(SCENE, size=SIZE, settings=DRAWN, regions=regions, controls=Controls(preserve=1.0))
    assert torch.equal(kept.tokens.total(), total)
    half = editor.run(SCENE, size=SIZE, settings=DRAWN, regions=regions, controls=Controls(preserve=0.6)).tokens.total()
    free = editor.run(SCENE, size=SIZE, settings=DRAWN, regions=regions).tokens.total()
    assert (half - total).square().mean() < (free - total).square().mean()
    hot = replace(DRAWN, temperature=2.0)
    both = editor.run([SCENE, SCENE], size=SIZE, settings=hot, regions=regions).tokens
    second = editor.run(SCENE, size=SIZE, settings=replace(hot, seed=hot.seed + 1), regions=regions).tokens
    assert all(torch.equal(a[1], b[0]) for a, b in zip(both.bits, second.bits, strict=True))
    steered = []
    editor.run(SCENE, size=SIZE, settings=DRAWN, regions=regions, steer=[lambda scale: steered.append(not scale.drawn)])
    assert all(steered)
    best = editor.run(SCENE, size=SIZE, settings=hot, regions=regions, controls=Controls(best_of=3, best_at=2))
    assert best.tokens.images == 1


def test_an_auto_mask_leaves_an_edit_of_the_whole_picture_alone(editor):
    free = editor.run(SCENE, "make it sepia", size=SIZE, settings=SamplingSettings(guidance=GUIDANCE))
    held = editor.run(
        SCENE,
        "make it sepia",
        size=SIZE,
        settings=SamplingSettings(guidance=GUIDANCE),
        controls=Controls(auto_mask=0.5),
    )
    assert held.masks[0].getextrema() == (255, 255)
    difference = ImageChops.difference(held.pictures[0], free.pictures[0]).convert("L")
    assert sum(difference.histogram()[24:]) < 0.02 * 256 * 256


def test_edits_that_do_not_chain_say_so(editor, task, free):
    wide, high = Image.open(SCENE).resize((256, 128)), Image.open(SCENE).resize((128, 256))
    pair = editor.run([wide, high], [STAR, STAR], size=SIZE, settings=DRAWN, shortcuts=Shortcuts(stop=7))
    with pytest.raises(ValueError, match="different sizes"):
        editor.run(pair, [SQUARE, SQUARE], settings=DRAWN)
    two = editor.run(SCENE, STAR, size=SIZE, settings=DRAWN, variations=2)
    assert len(editor.run(two, SQUARE, settings=DRAWN).pictures) == 2, "one instruction serves all"
    with pytest.raises(ValueError, match="nothing is left to draw"):
        editor.run(SCENE, SQUARE, size=SIZE, given=two.tokens.of([0]))
    begun = editor.run(SCENE, STAR, size=SIZE, settings=DRAWN).tokens.first(3)
    with pytest.raises(ValueError, match="256x256 picture, not of this one"):
        editor.run(wide, STAR, size=SIZE, given=begun)
    light = editor.run(SCENE, STAR, size=SIZE, settings=DRAWN, controls=Controls(strength=0.05))
    mask = Image.new("L", (256, 256))
    mask.paste(255, (60, 60, 90, 90))
    dark = editor.run(SCENE, STAR, size=SIZE, settings=DRAWN, mask=mask)
    assert len(editor.run([light, dark], [SQUARE, SQUARE], settings=DRAWN).pictures) == 2
    with pytest.raises(ValueError, match="lower best_at or inside"):
        controls = Controls(best_of=2, best_at=5)
        editor.run(SCENE, STAR, size=SIZE, mask=mask, shortcuts=Shortcuts(inside=6), controls=controls)
    with pytest.raises(ValueError, match="mask of region 1 is empty"):
        editor.run(SCENE, size=SIZE, regions=[Region(STAR, Image.new("L", (8, 8)))])
