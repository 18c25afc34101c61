"""The fast engine gives what the plain one gives: equal bits, and logits that differ by rounding alone."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from support import recordings, sources, words

from varedit_core.controls.registry import Controls, Shortcuts
from varedit_core.model.engine import PlainEngine
from varedit_core.parity import Record
from varedit_core.runtime.session import Session
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.drafting import Drafting
from varedit_core.sampling.loop import sample
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.tokenizer.quantizer import encode, latent_grids

ROUNDING = 1e-5
"""Of logits in fp32. Measured: at most 4.1e-6, where rows are multiplied beside others, or texts are pooled alone. A
weight that is off by a thousandth moves them by 9e-4."""
DRAWN = SamplingSettings(temperature=0.7, seed=5)
WHOLE = ("an edit", "variations", "a mask", "unguided")
"""Run to the last scale, whose keys and values lie elsewhere; the others take less time."""


@pytest.fixture(scope="module", params=recordings(), ids=lambda path: path.stem)
def record(request):
    return Record.open(request.param)


def guided(record, *values: float) -> SamplingSettings:
    """One a scale, the last one to the end."""
    count = len(record.schedule)
    return replace(DRAWN, guidance=[*values, *[values[-1]] * count][:count])


def own_bits(record, count: int) -> list[torch.Tensor]:
    """The bits of the sources, as what an edit goes on from."""
    features = sources(record, count)
    patch = features.shape[-2] // record.schedule.grids[-1][0]
    return encode(features, latent_grids(record.schedule, patch))[0]


def box(count: int = 1) -> torch.Tensor:
    mask = torch.zeros(count, 16, 16)
    for row, own in enumerate(mask):
        own[4 * row : 4 * row + 6, 3:11] = 1
    return mask


def halves(pictures: int) -> torch.Tensor:
    areas = torch.zeros(pictures, 2, 16, 16)
    areas[:, 0, :10], areas[:, 1, 7:] = 1, 1
    return areas


def edit(record, count: int = 1, settings: SamplingSettings = DRAWN, **more) -> EditBatch:
    """A batch of so many pictures with an instruction each."""
    return EditBatch.of(sources(record, count), words(record, count), record.schedule, settings, **more)


def of_regions(record, count: int = 1, **more) -> EditBatch:
    texts = [words(record, 2)] * count
    return EditBatch.of(sources(record, count), texts, record.schedule, DRAWN, areas=halves(count), **more)


BATCHES = {
    "an edit": edit,
    "two pictures": lambda r: edit(r, 2),
    "negatives": lambda r: edit(r, 2, negatives=[None, words(r, 2)[1]]),
    "no guidance": lambda r: edit(r, settings=guided(r, 1.0)),
    "guidance that ends early": lambda r: edit(r, 2, guided(r, 3.0, 2.0, 3.0, 1.0)),
    "guidance that comes back": lambda r: edit(r, settings=guided(r, 3.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0)),
    "regions": lambda r: of_regions(r),
    "regions of two pictures, with variations": lambda r: of_regions(r, 2, variations=2),
    "a mask": lambda r: edit(r, 2, mask=box()),
    "a mask each": lambda r: edit(r, 2, mask=box(2)),
    "a prefix": lambda r: edit(r, 2, prefix=own_bits(r, 2)[:3]),
    "branches": lambda r: edit(r, 2, prefix=own_bits(r, 2)[:3], variations=2),
    "source attention": lambda r: edit(r, controls=Controls(source_attention=0.4)),
    "no source attention": lambda r: edit(r, controls=Controls(source_attention=0.0)),
    "variations": lambda r: edit(r, 2, variations=2),
    "an auto mask": lambda r: edit(r, controls=Controls(auto_mask=0.5, preserve=0.3, strength=0.9)),
    "unguided": lambda r: edit(r, shortcuts=Shortcuts(unguided=2)),
}


def stopped(batch: EditBatch) -> EditBatch:
    return replace(batch, shortcuts=replace(batch.shortcuts, stop=4))


def run(engine, batch: EditBatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Bits, logits and running sum of every scale."""
    return [(scale.bits, scale.logits, scale.running_sum) for scale in sample(engine, batch)]


def same(found, wanted) -> None:
    for (bits, logits, total), (expected, exact, summed) in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits, exact, atol=ROUNDING, rtol=0)
        assert torch.equal(bits, expected) and torch.equal(total, summed)


@pytest.mark.parametrize("name", BATCHES)
def test_the_fast_engine_is_the_plain_one(record, name):
    batch = BATCHES[name](record)
    batch = batch if name in WHOLE and len(batch.schedule) < 10 or name == "an edit" else stopped(batch)
    same(run(Session(record.transformer), batch), run(PlainEngine(record.transformer), batch))


@pytest.mark.parametrize("layout", ["patchify", "plain"])
@pytest.mark.parametrize("name", ["an edit", "a mask", "branches", "variations"])
def test_so_it_is_for_text_alone(request, layout, name):
    record = request.getfixturevalue(layout)
    network = copy(record.transformer)
    network.config = replace(network.config, source=False)
    batch = stopped(BATCHES[name](record))
    found, wanted = (run(engine(network), batch) for engine in (Session, PlainEngine))
    same(found, wanted)
    reading = run(Session(record.transformer), batch)
    assert not torch.equal(found[0][1], reading[0][1]), "the source is not read"


def test_one_engine_of_each_kind_serves_batch_after_batch(patchify):
    """In memory that stays, whatever came before; an edit that was left in its middle is one of them."""
    fast, plain = Session(patchify.transformer, Workspace()), PlainEngine(patchify.transformer)
    for name in ("an edit", "variations", "no guidance", "an edit", "branches", "regions", "an edit"):
        batch = replace(BATCHES[name](patchify), shortcuts=Shortcuts(stop=4))
        left = sample(fast, batch)
        next(left)
        left.close()
        same(run(fast, batch), run(plain, batch))


def test_drafting_takes_engines_of_either_kind(patchify):
    network = patchify.transformer
    batch = edit(patchify, 2, shortcuts=Shortcuts(drafted=3, stop=5), variations=2)
    found, wanted = (
        run(Drafting(kind(network), kind(network), (network.config, network.config)), batch)
        for kind in (Session, PlainEngine)
    )
    same(found, wanted)
    alone = run(PlainEngine(network), replace(batch, shortcuts=Shortcuts(stop=5)))
    assert all(torch.equal(bits, expected) for (bits, *_), (expected, *_) in zip(found, alone, strict=True))


@pytest.mark.parametrize("shortcuts", [Shortcuts(inside=2), Shortcuts(window=0.2)])
def test_the_plain_engine_refuses_what_it_cannot_skip(patchify, shortcuts):
    with pytest.raises(ValueError, match="computes and sees every scale whole; leave out inside and window"):
        run(PlainEngine(patchify.transformer), edit(patchify, mask=box(), shortcuts=shortcuts))


def test_a_tolerance_sees_a_wrong_weight(patchify):
    """What two engines may differ by is far less than what a wrong number somewhere does."""
    network, batch = patchify.transformer, edit(patchify, shortcuts=Shortcuts(stop=3))
    wanted = run(PlainEngine(network), batch)
    weight = network.blocks[0].sa.proj.weight
    saved = weight.clone()
    try:
        with torch.no_grad():
            weight.mul_(1.001)
        found = run(Session(network), batch)
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert (found[1][1] - wanted[1][1]).abs().max() > 10 * ROUNDING


def test_an_engine_in_the_middle_of_a_batch_takes_no_other(patchify):
    """And goes on with its own: whoever was refused closes nothing."""
    fast, batch = Session(patchify.transformer), edit(patchify, shortcuts=Shortcuts(stop=3))
    wanted = run(fast, batch)
    begun = sample(fast, batch)
    found = [next(begun)]
    for _ in range(2):
        with pytest.raises(ValueError, match="in the middle of another batch; close that first"):
            run(fast, batch)
    found += begun
    same([(scale.bits, scale.logits, scale.running_sum) for scale in found], wanted)
    same(run(fast, batch), wanted)


@pytest.mark.parametrize("kind", [Session, PlainEngine])
def test_an_engine_has_one_batch_at_a_time(patchify, kind):
    engine, batch = kind(patchify.transformer), stopped(edit(patchify))
    wanted = run(kind(patchify.transformer), batch)
    first = sample(engine, batch)
    begun = [next(first)]
    with pytest.raises(ValueError, match="in the middle of another batch; close that first"):
        next(sample(engine, batch))
    same([(scale.bits, scale.logits, scale.running_sum) for scale in (*begun, *first)], wanted)
    same(run(engine, batch), wanted)


@pytest.mark.parametrize("kind", [Session, PlainEngine])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(controls=Controls(best_of=2)), "does not choose the best of several"),
        (dict(shortcuts=Shortcuts(drafted=2)), "need a second transformer"),
    ],
)
def test_the_loop_says_what_it_does_not_do(patchify, kind, more, said):
    with pytest.raises(ValueError, match=said):
        next(sample(kind(patchify.transformer), edit(patchify, **more)))
