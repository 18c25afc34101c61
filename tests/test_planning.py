"""What an edit takes: the stores beside the plain one, the estimates, the way chosen within a budget, the previews."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from varedit_core import SamplingSettings, load_autoencoder, sample, schedule_for
from varedit_core.config import TRANSFORMERS
from varedit_core.defaults import SIZES
from varedit_core.demo import demo_files
from varedit_core.kv import KeyValueStore
from varedit_core.planning import STORES, Job, described, plan, plans, too_large
from varedit_core.preview import at_own_size, enlarged, fit_colours
from varedit_core.quantizer import area_resize, encode
from varedit_core.schedule import AREAS, Schedule
from varedit_core.stores import EightBitStore, HostStore

JOB = Job(TRANSFORMERS["8B"], schedule_for("1M"), images=3, guided=True, dtype=torch.bfloat16)


def scales(record, store, guidance=3.0, forced=None):
    """Bits and logits of every scale of a recorded run with a store, by the bits of `forced` where given."""
    features = record.autoencoder.encode(record["in.image_u8"].float() / 127.5 - 1)
    settings = SamplingSettings(guidance, temperature=0.0)
    found = []
    for scale in sample(record.transformer, features, record.texts("text"), record.schedule, settings, store=store):
        if forced:
            scale.bits = forced[scale.index][0]
        found.append((scale.bits, scale.logits))
    return found


@pytest.mark.parametrize("guidance", [3.0, [3, 3, 3, 3, 1, 1, 1]])
def test_the_host_store_changes_nothing(patchify, guidance):
    for (bits, logits), (expected_bits, expected) in zip(
        scales(patchify, HostStore, guidance), scales(patchify, KeyValueStore, guidance), strict=True
    ):
        assert torch.equal(logits, expected) and torch.equal(bits, expected_bits)


@pytest.mark.parametrize("guidance", [3.0, [3, 3, 3, 3, 1, 1, 1]])
def test_eight_bits_are_close(patchify, guidance):
    exact = scales(patchify, KeyValueStore, guidance)
    coded = scales(patchify, EightBitStore, guidance, forced=exact)
    errors = [(a - b).abs().mean().item() for (_, a), (_, b) in zip(coded, exact)]
    spread = torch.cat([logits.flatten() for _, logits in exact]).std().item()
    assert 0 < max(errors) < 0.01 * spread


@pytest.mark.parametrize("name", STORES)
def test_a_store_holds_what_it_says(patchify, name, monkeypatch):
    kept = []
    monkeypatch.setattr(STORES[name], "release", lambda self: kept.append(self))
    scales(patchify, STORES[name])
    (store,) = kept
    lists = [
        store.keys,
        store.values,
        *([getattr(store, part)] for part in ("codes", "scales", "staged") if hasattr(store, part)),
    ]
    tensors = [t for part in lists for item in part for t in (item if isinstance(item, list) else [item])]
    tensors += [t for pair in store.references for t in pair]
    on_host = sum(t.nbytes for pair in getattr(store, "host", []) for t in pair)
    held = sum(t.nbytes for t in tensors)
    size = patchify.transformer.config
    said = STORES[name].nbytes(patchify.schedule, size.depth, 2, size.width, torch.float32)
    assert held <= said and (name != "exact" or held == said)
    job = Job(size, patchify.schedule, 1, True, torch.float32)
    assert on_host == job.needed_on_host(name)
    assert (name == "8-bit") == bool(getattr(store, "codes", None)) and (name == "host") == bool(
        getattr(store, "host", None)
    )


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_let_go_of_however_the_loop_ends(patchify, name, monkeypatch):
    class Watched(STORES[name]):
        made = []

        def __init__(self, *args):
            super().__init__(*args)
            self.made.append(self)

    features = patchify.autoencoder.encode(patchify["in.image_u8"].float() / 127.5 - 1)
    run = sample(patchify.transformer, features, patchify.texts("text"), patchify.schedule, store=Watched)
    next(run)
    (store,) = Watched.made
    assert store.keys
    run.close()
    tensors = [value for value in vars(store).values() if isinstance(value, list)]
    assert tensors and not any(tensors)


def test_figures_of_the_8b_model_at_1024():
    job = replace(JOB, images=1)
    assert job.stored("exact") == pytest.approx(12.37e9, rel=0.01)
    assert 0.5 < job.stored("8-bit") / job.stored("exact") < 0.75 and job.stored("host") < 1.2e9
    assert job.needed("exact") == job.stored("exact") + job.activations
    assert replace(job, guided=False).stored("exact") * 2 == job.stored("exact")


def test_the_best_way_within_a_budget():
    ways = plans(JOB)
    assert [(way.job.images, way.store) for way in ways] == [
        (3, "exact"),
        (2, "exact"),
        (1, "exact"),
        (1, "8-bit"),
        (1, "host"),
    ]
    assert [way.needed for way in ways] == sorted((way.needed for way in ways), reverse=True)
    for way in ways:
        found = plan(JOB, way.needed)
        assert (found.job, found.store) == (way.job, way.store)
        assert bool(found.reasons) == (way is not ways[0])
    assert "3 pictures at once with keys and values on the device would take" in plan(JOB, ways[-1].needed).reasons[0]
    assert described(ways[3]) == "one picture at a time with keys and values in 8 bits (close to exact)"


def test_host_memory_counts_too():
    host = plans(JOB)[-1]
    need = host.job.needed_on_host("host")
    assert need > 10e9 and plan(JOB, host.needed, need).store == "host"
    with pytest.raises(ValueError, match="at the size"):
        plan(JOB, host.needed, need - 1)


def test_longer_texts_take_more():
    short, long = replace(JOB, images=1, text_tokens=10), replace(JOB, images=1, text_tokens=512)
    assert long.activations - short.activations == pytest.approx(2 * 2 * 40 * 502 * 3584 * 2)
    assert replace(JOB, images=1).activations == long.activations


def test_what_does_not_fit_names_a_size_that_does():
    least = plans(JOB)[-1].needed
    with pytest.raises(
        ValueError, match=r"an edit at 1024x1024 takes at least .* GB .*; encode the source at the size 768"
    ):
        plan(JOB, least - 1)
    side = next(side for side, area in SIZES.items() if area == "0.25M")
    fitting = plans(replace(JOB, images=1, schedule=schedule_for("0.25M")))[-1].needed
    assert f"at the size {side}, which fits" in too_large(JOB, fitting)
    assert "no smaller size fits either" in too_large(JOB, 10)


def test_shares_of_the_passes():
    source, *shares = JOB.shares()
    assert sum(shares) + source == pytest.approx(1) and len(shares) == 13
    assert shares == sorted(shares) and 0.2 < source < 0.3 and shares[-1] > 0.25


def test_named_sizes_agree():
    assert set(SIZES.values()) == set(AREAS)
    for side, area in SIZES.items():
        assert schedule_for(area).pixels == (int(side), int(side))
        assert Schedule.of_grid(schedule_for(area, 1.5).grids[-1]) == schedule_for(area, 1.5)
    assert Schedule.of_grid((7, 9)) is None


def test_colours_follow_the_picture():
    """The map's colours of a picture's own sum are nearer to the picture than grey is."""
    autoencoder = load_autoencoder(demo_files()[1])
    colours = fit_colours(autoencoder.encode, 8)
    picture = torch.zeros(1, 3, 256, 256)
    picture[:, 0, :, :128], picture[:, 2, :, 128:] = 0.8, 0.8
    features = autoencoder.encode(picture)
    _, total = encode(features, [(n, n) for n in (2, 8, 16, 32)])
    shown, wanted = colours(total), area_resize(picture, (32, 32))
    assert shown.shape == (1, 3, 32, 32) and shown.abs().max() <= 1
    assert (shown - wanted).square().mean() < 0.3 * wanted.square().mean()
    assert (shown[:, 0, :, :12].mean() > shown[:, 2, :, :12].mean() + 0.4) and (shown[:, 2, :, 20:].mean() > 0.3)


def test_previews_keep_cells_and_shape():
    colours = torch.linspace(-1, 1, 3 * 4 * 4).reshape(3, 4, 4)
    whole = enlarged(colours, side=64)
    levels = ((colours + 1) / 2 * 255).to(torch.uint8)
    assert whole.size == (64, 64)
    assert whole.resize((4, 4), Image.Resampling.NEAREST).tobytes() == levels.permute(1, 2, 0).numpy().tobytes()
    assert whole.getpixel((0, 0)) == whole.getpixel((15, 15)) != whole.getpixel((16, 0))
    assert enlarged(colours, (1.0, 0.5), 64).size == (64, 32)


def test_a_sum_at_its_own_size():
    total = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert at_own_size(total, (2, 2)).shape == (1, 1, 2, 2)
    assert at_own_size(total, (2, 2), least=4).shape == (1, 1, 4, 4)
    assert torch.equal(at_own_size(total, (2, 2), least=16), total), "never more than there is"
