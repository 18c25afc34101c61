"""Edits in memory that stays: nothing depends on what was there before, and only what may be reused is."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from test_quantizer import LAYOUTS

from varedit_core.model.layers import sdpa
from varedit_core.runtime import workspace
from varedit_core.runtime.folded_text import FoldedText, fill, room
from varedit_core.runtime.graphs import State
from varedit_core.runtime.kv_caches import DeviceCache
from varedit_core.runtime.session import sample
from varedit_core.runtime.workspace import Shape, Workspace
from varedit_core.sampling.settings import SamplingSettings

SETTINGS = SamplingSettings(temperature=0.7, seed=5)


@pytest.fixture
def folding(monkeypatch):
    """Workspaces on the CPU take the form they have on CUDA: memory that stays, folded texts; nothing is recorded."""
    monkeypatch.setattr(Workspace, "_recording", property(lambda self: self.kept))
    monkeypatch.setattr(Workspace, "_run", lambda self, name, step, function, *inputs: function(*inputs))


@pytest.fixture
def passes(monkeypatch, patchify):
    """Counts of the source's passes and of the scales'."""
    counts = {"source": 0, "scales": 0}
    kind = type(patchify.transformer)
    for name, method in (("source", "read_source"), ("scales", "forward")):
        original = getattr(kind, method)

        def counted(self, *args, name=name, original=original):
            counts[name] += 1
            return original(self, *args)

        monkeypatch.setattr(kind, method, counted)
    return counts


def edit(record, workspace=None, settings=SETTINGS, features=None, texts=None, **more):
    features = record["ref.vae_features"].float() if features is None else features
    texts = texts or record.texts("text")
    scales = sample(record.transformer, features, texts, record.schedule, settings, workspace=workspace, **more)
    return [(scale.bits.clone(), scale.logits.clone()) for scale in scales]


def same(found, wanted, atol=0.0):
    """Equal numbers; with a tolerance, up to the first scale where a draw was so close that it fell the other way."""
    for (bits, logits), (expected_bits, expected) in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits, expected, atol=atol, rtol=0)
        if atol and not torch.equal(bits, expected_bits):
            assert (bits != expected_bits).sum() <= 1 + bits.numel() / 1000
            return
        assert torch.equal(bits, expected_bits)


def test_a_reroll_reads_the_source_once(patchify, passes):
    work = Workspace()
    for settings in (SETTINGS, replace(SETTINGS, seed=6), replace(SETTINGS, guidance=2.0, temperature=0.3)):
        same(edit(patchify, work, settings), edit(patchify, None, settings))
    assert passes["source"] == 1 + 3


@pytest.mark.parametrize("lay", LAYOUTS, ids=lambda lay: lay.__name__)
@pytest.mark.parametrize("known", [False, True])
def test_how_features_lie_is_nothing_to_an_edit(patchify, lay, known):
    """A VAE that runs channels-last gives them so, and the same VAE recorded, or another, does not."""
    features, seen = patchify["ref.vae_features"].float(), []
    for given in (features, lay(features)):
        more = {"source_total": given} if known else {}
        scales = [*sample(patchify.transformer, given, patchify.texts("text"), patchify.schedule, SETTINGS, **more)]
        seen.append([(scale.logits, scale.bits) for scale in scales])
        assert all(scale.running_sum.is_contiguous() and scale.total.is_contiguous() for scale in scales)
    assert all(torch.equal(a, b) for before, after in zip(*seen) for a, b in zip(before, after))


@pytest.mark.parametrize("change", ["picture", "text", "weights", "guidance", "forget"])
def test_what_the_source_depends_on_is_read_again(patchify, passes, change):
    work = Workspace()
    edit(patchify, work)
    arguments, weight = {}, patchify.transformer.blocks[1].ffn.fc1.bias
    if change == "picture":
        arguments["features"] = patchify["ref.vae_features"].float().flip(-1)
    if change == "text":
        arguments["texts"] = [patchify.texts("text")[0] * 1.01]
    if change == "guidance":
        arguments["settings"] = replace(SETTINGS, guidance=1.0)
    if change == "forget":
        work.forget()
    if change == "weights":
        weight.data.add_(0)  # written, so perhaps changed
        weight.add_(0)
    same(edit(patchify, work, **arguments), edit(patchify, None, **arguments))
    assert passes["source"] == 3


def test_a_stopped_edit_leaves_nothing_wrong_behind(patchify, passes):
    work = Workspace()
    run = sample(
        patchify.transformer, patchify["ref.vae_features"].float(), patchify.texts("text"), patchify.schedule,
        SETTINGS, workspace=work,
    )  # fmt: skip
    next(run), next(run), run.close()
    same(edit(patchify, work), edit(patchify))
    assert passes["source"] == 2


def test_an_edit_that_fails_in_the_source_is_not_taken_for_read(patchify, monkeypatch):
    work, kind = Workspace(), type(patchify.transformer)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "read_source", lambda *args: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            edit(patchify, work)
    same(edit(patchify, work), edit(patchify))


@pytest.mark.parametrize("layout", ["patchify", "plain"])
def test_folded_texts_change_nothing_but_rounding(layout, request, folding):
    record = request.getfixturevalue(layout)
    work = Workspace()
    for texts in (record.texts("text"), [record.texts("text")[0][:3]], [record.texts("text")[0].repeat(4, 1)[:33]]):
        found, wanted = edit(record, work, texts=texts), edit(record, texts=texts)
        assert isinstance(work.static.blocks[0].text, FoldedText)
        same(found, wanted, atol=3e-5)


def test_long_texts_are_not_folded(patchify, folding):
    work, texts = Workspace(), [patchify.texts("text")[0].repeat(10, 1)[:70]]
    same(edit(patchify, work, texts=texts), edit(patchify, texts=texts), atol=3e-5)
    assert not isinstance(work.static.blocks[0].text, FoldedText) and work.shape.text == 128


def test_a_folded_text_is_cross_attention(patchify):
    network, texts = patchify.transformer, [patchify.texts("text")[0], patchify.transformer.unconditional(9, "cpu")]
    features = torch.zeros(2, 32, texts[0].shape[1])
    for row, text in zip(features, texts):
        row[: len(text)] = text
    real = torch.arange(32) < torch.tensor([len(text) for text in texts])[:, None]
    constants = network.constants(features.device)
    folded, plain = room(network.config, constants, 4, 2, 32, True, torch.float32), network.condition(texts)
    fill(folded, network, features, real, sdpa)
    torch.manual_seed(0)
    h = torch.randn(2, 7, network.config.width)
    for block, one, other in zip(network.blocks, plain.blocks, folded.blocks):
        wanted = block.ca(h, one.text, torch_attention)
        found = block.ca(h.repeat_interleave(2, 0), other.text, torch_attention)
        torch.testing.assert_close(found, wanted.repeat_interleave(2, 0), atol=3e-6, rtol=0)
        torch.testing.assert_close(other.modulation, one.modulation.repeat_interleave(2, 0), atol=1e-6, rtol=0)


def torch_attention(q, k, v, *, scale, mask=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("form", ["plain", "folding"])
def test_copies_are_edits_with_the_next_seeds(patchify, passes, form, request):
    if form == "folding":
        request.getfixturevalue("folding")
    features = torch.cat([patchify["ref.vae_features"].float(), patchify["ref.vae_features"].float().flip(-1)])
    texts = [patchify.texts("text")[0], patchify.texts("text")[0][:4]]
    settings = replace(SETTINGS, guidance=[3, 3, 2, 1, 3, 1, 1])
    found = edit(patchify, Workspace(), settings, features, texts, variations=3)
    assert passes["source"] == 1
    for image in range(2):
        for copy in range(3):
            own = replace(settings, seed=settings.seed + 3 * image + copy)
            wanted = edit(patchify, None, own, features[image : image + 1], [texts[image]])
            # Rows round differently beside others, so a draw may fall the other way where it was close.
            equal = torch.cat([(a[0][3 * image + copy] == b[0][0]).flatten() for a, b in zip(found, wanted)])
            assert equal.float().mean() > 0.999


def test_rows_one_after_the_other(patchify):
    settings = replace(SETTINGS, guidance=[3, 3, 3, 1, 3, 1, 1])
    found, wanted = edit(patchify, Workspace(rows_at_once=1), settings), edit(patchify, None, settings)
    assert [logits.shape for _, logits in found] == [logits.shape for _, logits in wanted]
    equal = torch.cat([(a == b).flatten() for (a, _), (b, _) in zip(found, wanted)])
    assert equal.float().mean() > 0.999, "rounding differs, and with it a draw that was close"
    torch.testing.assert_close(found[0][1], wanted[0][1], atol=2e-5, rtol=0)


def test_nothing_stays_where_nothing_is_to_be_kept(patchify):
    work = Workspace(kept=False)
    edit(patchify, work)
    assert work.store is None and work.condition is None and not work.source and not work.nbytes
    kept = Workspace()
    edit(patchify, kept)
    assert kept.nbytes > 0
    store = weakref.ref(kept.store)
    kept.forget()
    gc.collect()
    assert store() is None


def test_another_shape_takes_the_place_of_the_one_before(patchify, plain):
    work = Workspace()
    edit(patchify, work)
    before = weakref.ref(work.store)
    edit(patchify, work, replace(SETTINGS, guidance=1.0))
    gc.collect()
    assert before() is None and work.shape.rows == 1


def test_prompts_of_many_lengths_have_few_shapes(patchify):
    texts = [torch.zeros(count, 8) for count in range(1, 513)]
    shapes = {Shape.of(patchify.schedule, [text], 1, torch.float32, torch.device("cpu")).text for text in texts}
    assert shapes == {32, 64, 128, 192, 256, 320, 384, 448, 512}


def test_the_state_of_a_network_tells_of_every_change():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4)))
    network.requires_grad_(False)
    state = State()
    seen = [state(network)]
    assert state(network) == seen[0]
    network[0].weight.add_(1)
    seen.append(state(network))
    network[0].weight = torch.nn.Parameter(network[0].weight.clone(), requires_grad=False)
    seen.append(state(network))
    network[1][0] = torch.nn.Linear(4, 4)
    seen.append(state(network))
    network[1][0].weight.data = torch.zeros(4, 4)
    seen.append(state(network))
    assert len(set(seen)) == len(seen)


def test_a_store_of_another_kind(patchify):
    class Counted(DeviceCache):
        made = 0

        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            type(self).made += 1

    work = Workspace(Counted)
    same(edit(patchify, work), edit(patchify))
    edit(patchify, work)
    assert Counted.made == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_recorded_pass_serves_other_lengths_only_where_a_kernel_reads_them(patchify, monkeypatch, fused):
    """Torch's attention to the text is recorded with the lengths of that edit; the kernel looks at the device's."""
    names = set()
    monkeypatch.setattr(Workspace, "_recording", property(lambda self: self.kept))
    monkeypatch.setattr(workspace, "can_attend_to_text", lambda q, keys: fused)
    monkeypatch.setattr(
        Workspace, "_run", lambda self, name, tokens, function, *inputs: (names.add(name), function(*inputs))[1]
    )
    work, text = Workspace(), patchify.texts("text")[0].repeat(20, 1)
    found = [edit(patchify, work, texts=[text[:count]]) for count in (90, 70)]
    passes = len(patchify.schedule) + 1
    assert len(names) == 1 + (passes if fused else 2 * passes)
    assert not isinstance(work.static.blocks[0].text, FoldedText)
    for own, count in zip(found, (90, 70)):
        same(own, edit(patchify, None, texts=[text[:count]]), atol=2e-5)


def test_copies_of_a_source_are_not_taken_apart(patchify):
    found, wanted = (edit(patchify, Workspace(rows_at_once=rows), variations=2) for rows in (1, None))
    same(found, wanted, atol=2e-5)


def test_an_edit_that_cannot_begin_leaves_nothing(patchify, monkeypatch):
    work = Workspace(kept=False)
    monkeypatch.setattr(
        type(patchify.transformer), "condition", lambda *args, **kw: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError, match="stop"):
        edit(patchify, work)
    assert work.store is None and work.transformer is None
