"""What an edit takes: the stores beside the plain one, the estimates, the way chosen within a budget, the previews."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from varedit_core import SamplingSettings, load_autoencoder, sample, schedule_for
from varedit_core.defaults import SIZES
from varedit_core.demo import demo_files
from varedit_core.files.published import TRANSFORMERS
from varedit_core.fitting import schedule_of
from varedit_core.pictures.preview import at_own_size, enlarged, fit_colours
from varedit_core.runtime.eight_bit_cache import EightBitCache
from varedit_core.runtime.host_cache import HostCache
from varedit_core.runtime.kv_caches import DeviceCache
from varedit_core.runtime.plan import STORES, Job, described, plan, plans, too_large
from varedit_core.runtime.workspace import Workspace
from varedit_core.tokenizer.quantizer import area_resize, encode
from varedit_core.tokenizer.schedule import AREAS

JOB = Job(TRANSFORMERS["8B"], schedule_for("1M"), images=3, guided=True, dtype=torch.bfloat16)


def scales(record, store, guidance=3.0, forced=None):
    """Bits and logits of every scale of a recorded run with a store, by the bits of `forced` where given."""
    features = record.autoencoder.encode(record["in.image_u8"].float() / 127.5 - 1)
    settings = SamplingSettings(guidance, temperature=0.0)
    found = []
    work = Workspace(store, kept=False)
    for scale in sample(record.transformer, features, record.texts("text"), record.schedule, settings, workspace=work):
        if forced:
            scale.bits = forced[scale.index][0]
        found.append((scale.bits, scale.logits))
    return found


@pytest.mark.parametrize("guidance", [3.0, [3, 3, 3, 3, 1, 1, 1]])
def test_the_host_store_changes_nothing(patchify, guidance):
    for (bits, logits), (expected_bits, expected) in zip(
        scales(patchify, HostCache, guidance), scales(patchify, DeviceCache, guidance), strict=True
    ):
        assert torch.equal(logits, expected) and torch.equal(bits, expected_bits)


@pytest.mark.parametrize("guidance", [3.0, [3, 3, 3, 3, 1, 1, 1]])
def test_eight_bits_are_close(patchify, guidance):
    exact = scales(patchify, DeviceCache, guidance)
    coded = scales(patchify, EightBitCache, guidance, forced=exact)
    errors = [(a - b).abs().mean().item() for (_, a), (_, b) in zip(coded, exact)]
    spread = torch.cat([logits.flatten() for _, logits in exact]).std().item()
    assert 0 < max(errors) < 0.01 * spread


@pytest.mark.parametrize("name", STORES)
def test_a_store_holds_what_it_says(patchify, name, monkeypatch):
    kept = []
    monkeypatch.setattr(STORES[name], "release", lambda self: kept.append(self))
    scales(patchify, STORES[name])
    (store,) = kept
    parts = [store.keys, store.values, store.references, getattr(store, "staged", ())]
    parts += [[slot.staged for slot in getattr(store, "slots", ())]]
    parts += [(p.codes, p.scales, p.exact, p.order) for p in getattr(store, "packed", ())]
    size = patchify.transformer.config
    job = Job(size, patchify.schedule, 1, True, torch.float32, exact_keys=0)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for part in parts for t in part if t.numel()}
    assert sum(storage.nbytes() for storage in storages.values()) == job.stored(name)
    assert sum(tensor.nbytes for tensor in getattr(store, "host", ())) == job.needed_on_host(name)


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_let_go_of_however_the_loop_ends(patchify, name, monkeypatch):
    class Watched(STORES[name]):
        made = []

        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            self.made.append(self)

    features = patchify.autoencoder.encode(patchify["in.image_u8"].float() / 127.5 - 1)
    work = Workspace(Watched, kept=False)
    run = sample(patchify.transformer, features, patchify.texts("text"), patchify.schedule, workspace=work)
    next(run)
    (store,) = Watched.made
    assert store.keys
    run.close()
    tensors = [value for value in vars(store).values() if isinstance(value, list)]
    assert tensors and not any(tensors)


def test_figures_of_the_8b_model_at_1024():
    job = replace(JOB, images=1)
    assert job.stored("exact") == pytest.approx(12.37e9, rel=0.01)
    coded = replace(job, exact_keys=0).stored("8-bit")
    assert 0.5 < coded / job.stored("exact") < 0.65 and job.stored("host") < 1.6e9
    assert coded < replace(job, exact_keys=100).stored("8-bit") < job.stored("8-bit"), "unknown: as if of all heads"
    assert job.needed("exact") == job.stored("exact") + job.activations()
    assert replace(job, guided=False).stored("exact") * 2 == job.stored("exact")


def test_rows_one_after_the_other_take_less():
    job = replace(JOB, images=1, text_tokens=20)
    one_text = 2 * 40 * 20 * 3584 * 2
    assert job.activations(1) - one_text == replace(job, guided=False).activations() < 0.55 * job.activations()
    assert job.stored("exact", 1) == job.stored("exact")
    assert all(job.stored(name, 1) < job.stored(name) for name in ("8-bit", "host"))


def named(way):
    return way.job.images, way.store, way.rows_at_once, bool(way.movable)


def test_the_ways_in_their_order():
    on_the_device = [(3, "exact", None), (2, "exact", None), (1, "exact", None), (1, "exact", 1)]
    ways = [*on_the_device, *((1, store, rows) for store in ("host", "8-bit") for rows in (None, 1))]
    assert [named(way) for way in plans(JOB)] == [(*way, False) for way in ways]
    assert [way.store for way in plans(JOB, exact=True)] == ["exact"] * 4 + ["host"] * 2
    assert [way.rows_at_once for way in plans(replace(JOB, guided=False))] == [None] * 5
    assert [named(way) for way in plans(JOB, movable=7)] == [
        *((*way, moved) for moved in (False, True) for way in on_the_device),
        *((1, store, rows, moved) for store in ("host", "8-bit") for moved in (False, True) for rows in (None, 1)),
    ]


def test_the_best_way_within_a_budget():
    ways = plans(JOB)[:6]
    assert [way.needed for way in ways] == sorted((way.needed for way in ways), reverse=True)
    for way in ways:
        found = plan(JOB, way.needed)
        assert named(found) == named(way)
        assert bool(found.reasons) == (way is not ways[0])
    reasons = plan(JOB, ways[-1].needed).reasons
    assert len(reasons) == 3 and "3 pictures at once with the KV cache on the device would take" in reasons[0]
    assert described(ways[3]) == (
        "one picture at a time, with and without the text one after the other, with the KV cache on the device"
    )


def test_other_networks_make_way_before_keys_and_values_do():
    *_, least = (way for way in plans(JOB) if way.store == "exact")
    found = plan(JOB, least.needed - 2e9, movable=int(2.5e9))
    assert named(found) == (1, "exact", 1, True) and found.needed_on_host == int(2.5e9)
    assert described(found).endswith("on the device, other networks in host memory meanwhile")
    assert plan(replace(JOB, exact_keys=0), least.needed - 2e9, 2e9, int(2.5e9)).store == "8-bit", "nor host memory"


def test_host_memory_counts_too():
    host, rounded = (next(way for way in plans(JOB) if way.store == store) for store in ("host", "8-bit"))
    need = host.needed_on_host
    assert need > 10e9 and plan(JOB, host.needed, need).store == "host"
    found = plan(JOB, rounded.needed, need - 1)
    assert found.store == "8-bit" and not found.exact and "of host memory, which are not free" in found.reasons[-1]
    for more in ({"budget": host.needed}, {"budget": rounded.needed, "exact": True}):
        with pytest.raises(ValueError, match="at the size"):
            plan(JOB, host_budget=need - 1, **more)


def test_longer_texts_take_more():
    short, long = replace(JOB, images=1, text_tokens=10), replace(JOB, images=1, text_tokens=512)
    assert long.activations() - short.activations() == pytest.approx(2 * 2 * 40 * 502 * 3584 * 2)
    assert replace(JOB, images=1).activations() == long.activations()


def test_what_does_not_fit_names_a_size_that_does():
    least = min(way.needed for way in plans(JOB))
    with pytest.raises(
        ValueError, match=r"an edit at 1024x1024 takes at least .* GB .*; encode the source at the size 768"
    ):
        plan(JOB, least - 1)
    side = next(side for side, area in SIZES.items() if area == "0.25M")
    fitting = min(way.needed for way in plans(replace(JOB, images=1, schedule=schedule_for("0.25M"))))
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
        assert schedule_of(schedule_for(area, 1.5).grids[-1]) == schedule_for(area, 1.5)
    assert schedule_of((7, 9)) is None


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
