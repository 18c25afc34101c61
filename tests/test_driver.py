"""The driver: results that do not depend on how a job was split, on what ran out of memory, or on what else runs."""

import gc
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Event, Lock, Thread

import numpy as np
import pytest
import torch
from PIL import Image
from support import sources, words

from varedit_core import Editor
from varedit_core.controls.registry import Controls, Shortcuts
from varedit_core.demo import SAMPLES, demo_files
from varedit_core.model.config import AutoencoderConfig
from varedit_core.model.transformer import Transformer
from varedit_core.runtime import memory
from varedit_core.runtime.memory import engine_of
from varedit_core.runtime.plan import STORES, Job, Plan
from varedit_core.runtime.session import Session
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling import driver, loop
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.driver import Wanted
from varedit_core.sampling.settings import SamplingSettings
from varedit_core.sampling.tokens import Tokens
from varedit_core.tokenizer.quantizer import encode, latent_grids
from varedit_core.tokenizer.vae import Autoencoder

DRAWN = SamplingSettings(guidance=[3, 3, 2, 3, 1, 1, 1], temperature=0.7, seed=5)
ALL = Wanted(scales=True, before=True, confidence=True)
DRAFT = Shortcuts(stop=4)
SIZE = "0.06M"


class RanOut(RuntimeError):
    """The device's memory, of a device that is not there."""


class Rows:
    """Memory that lasts for so many rows at a time, counted without those for guidance.

    failures: so many first attempts run out of it, the n-th at its n-th scale. kept: whether what is left of an attempt
    stays for the next engine.
    """

    movable, exact = 0, True

    def __init__(self, networks, rows: float = math.inf, failures: int = 0, kept: bool = True) -> None:
        self.networks, self.rows, self.failures = networks, rows, failures
        self.workspaces = [Workspace(kept=kept) for _ in networks]
        self.plans: list[Plan] = []
        self.told: list[str] = []

    def free(self, job: Job) -> float:
        return math.inf if self.rows == math.inf else replace(job, images=self.rows).needed("exact")

    def host(self) -> float:
        return math.inf

    def counted(self, job: Job) -> Job:
        return job

    def within(self, plan: Plan, drafts: bool, run):
        self.plans.append(plan)
        exact = plan.store == "exact" and not plan.rows_at_once
        work = Workspace(STORES[plan.store], kept=False, rows_at_once=plan.rows_at_once)
        engine = engine_of(self.networks[: 1 + drafts], self.workspaces if exact else [work, Workspace(kept=False)])
        return run(Failing(engine, len(self.plans)) if len(self.plans) <= self.failures else engine)

    def ran_out(self, error: Exception) -> bool:
        return isinstance(error, RanOut)

    def recover(self) -> None:
        for work in self.workspaces:
            assert not work.busy, "what ran out of memory was closed"
            work.forget()

    def tell(self, text: str) -> None:
        self.told.append(text)


class Failing:
    """An engine whose memory runs out at its n-th scale."""

    def __init__(self, engine, left: int) -> None:
        self.engine, self.left = engine, left
        self.configs, self.prefill = engine.configs, engine.prefill
        self.computed, self.close = engine.computed, engine.close

    def logits(self, *args, **more):
        self.left -= 1
        if not self.left:
            raise RanOut
        return self.engine.logits(*args, **more)


def box(count: int) -> torch.Tensor:
    mask = torch.zeros(count, 16, 16)
    for row, own in enumerate(mask):
        own[4 * row : 4 * row + 6, 3:11] = 1
    return mask


def edit(record, count: int, **more) -> EditBatch:
    return EditBatch.of(sources(record, count), words(record, count), record.schedule, DRAWN, **more)


def of_regions(record, count: int, **more) -> EditBatch:
    areas = torch.zeros(count, 2, 16, 16)
    areas[:, 0, :10], areas[:, 1, 7:] = 1, 1
    texts = [words(record, 2), words(record, 3)[1:]][:count]
    return EditBatch.of(sources(record, count), texts, record.schedule, DRAWN, areas=areas, **more)


def tokens(record, count: int) -> Tokens:
    """The sources as edits."""
    features = sources(record, count)
    bits = encode(features, latent_grids(record.schedule, 2))[0]
    return Tokens(record.schedule, tuple(bits), tuple(features.shape[-2:]))


def of_tokens(record, count: int, **more) -> EditBatch:
    total = tokens(record, count).total()
    return EditBatch.of(total, words(record, count), record.schedule, DRAWN, source_total=total, **more)


def best(at: int = 2, **more) -> dict:
    return {"controls": Controls(best_of=3, best_at=at, **more)}


JOBS = {
    "three pictures": lambda r: edit(r, 3, shortcuts=DRAFT),
    "variations": lambda r: edit(r, 1, variations=3, shortcuts=DRAFT),
    "variations of two pictures, negatives": lambda r: edit(
        r, 2, variations=2, negatives=[words(r, 2)[1], None], shortcuts=DRAFT
    ),
    "regions and variations": lambda r: of_regions(r, 2, variations=2, shortcuts=DRAFT),
    "a mask each": lambda r: edit(r, 3, mask=box(3)),
    "one mask for all": lambda r: edit(r, 2, mask=box(1), variations=2),
    "an auto mask": lambda r: edit(r, 2, controls=Controls(auto_mask=0.5)),
    "the best of three, two of them": lambda r: edit(r, 1, variations=2, shortcuts=DRAFT, **best()),
    "the best of three for two pictures": lambda r: edit(r, 2, shortcuts=DRAFT, **best(score="instruction")),
    "the best of three, of regions": lambda r: of_regions(r, 2, shortcuts=DRAFT, **best(score="near")),
    "the best of three, begun": lambda r: edit(r, 2, prefix=tokens(r, 2).bits[:1], shortcuts=DRAFT, **best(3)),
    "branches": lambda r: edit(r, 1, variations=3, prefix=tokens(r, 1).bits[:2], shortcuts=DRAFT),
    "branches of two pictures": lambda r: edit(r, 2, variations=2, prefix=tokens(r, 2).bits[:2], shortcuts=DRAFT),
    "tokens with a mask each": lambda r: of_tokens(r, 2, variations=2, mask=box(2)),
    "drafted": lambda r: edit(r, 2, variations=2, shortcuts=Shortcuts(drafted=2, stop=4)),
}


def rows_of(batch: EditBatch) -> int:
    return batch.pictures * batch.regions * max(batch.copies, batch.controls.best_of)


def networks(record) -> list[Transformer]:
    """The record's transformer, and another one that drafts."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(1)
    drafter = Transformer(replace(record.transformer.config, depth=2)).requires_grad_(False)
    torch.random.set_rng_state(generator)
    return [record.transformer, drafter]


class Seen:
    """What a watch callback saw of every attempt."""

    def __init__(self, room: Rows, copies: int) -> None:
        self.room, self.copies, self.attempts = room, copies, {}

    def __call__(self, scale, results, pictures) -> None:
        assert list(pictures) == [result // self.copies for result in results]
        counts = self.attempts.setdefault(len(self.room.plans), Counter())
        counts.update((result, scale.index) for result in results)

    def last(self) -> Counter:
        return self.attempts[len(self.room.plans)]


def run(record, name: str, room: Rows | None = None):
    """A job's result, and what was seen on the way."""
    batch = JOBS[name](record)
    room = room or Rows(networks(record))
    known = tokens(record, 2) if "tokens" in name else None
    seen = Seen(room, batch.copies)
    return driver.run(batch, room, seen, known=known, wanted=ALL), seen


def same(found, wanted) -> None:
    """Equal bits, sums and tokens; how sure the model was, up to rounding."""
    pairs = zip(found.tokens.bits, wanted.tokens.bits, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for name in ("total", "scales", "before"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    torch.testing.assert_close(found.confidence, wanted.confidence, atol=1e-5, rtol=0)
    assert torch.equal(found.tokens.total(), wanted.tokens.total())
    assert (found.tokens.free is None) == (wanted.tokens.free is None)
    if found.tokens.free is not None:
        shape = wanted.tokens.bits[0].shape[:2] + wanted.tokens.grid
        assert torch.equal(found.tokens.free.expand(shape), wanted.tokens.free.expand(shape))
        assert torch.equal(found.tokens.under.total(), wanted.tokens.under.total())


@pytest.mark.parametrize("name", JOBS)
def test_a_result_does_not_depend_on_how_its_job_was_split(patchify, name):
    wanted, seen = run(patchify, name)
    batch = JOBS[name](patchify)
    assert len(wanted.total) == len(batch.seeds)
    everything = {(result, k): 1 for result in range(len(batch.seeds)) for k in range(len(batch.plan))}
    assert seen.last() == everything
    splits = [rows for rows in range(batch.regions, rows_of(batch)) if rows < 4 or rows == rows_of(batch) - 1]
    for rows in splits:
        room = Rows(networks(patchify), rows)
        found, seen = run(patchify, name, room)
        assert [plan.job.images for plan in room.plans] == [rows] and room.told
        assert seen.last() == everything, "every result once"
        same(found, wanted)


def test_a_result_is_the_edit_of_its_own_seed(patchify):
    """Result c of picture p draws with the seed p * variations + c after the first, alone or among others."""
    found, _ = run(patchify, "variations of two pictures, negatives")
    features, texts, unwanted = sources(patchify, 2), words(patchify, 2), [words(patchify, 2)[1], None]
    for number in range(4):
        picture = number // 2
        own = replace(DRAWN, seed=DRAWN.seed + number)
        given = features[[picture]], [texts[picture]], patchify.schedule, own, [unwanted[picture]]
        alone = driver.run(EditBatch.of(*given, shortcuts=DRAFT), Rows([patchify.transformer]))
        assert all(torch.equal(a[number], b[0]) for a, b in zip(found.tokens.bits, alone.tokens.bits, strict=True))
    assert not torch.equal(found.total[0], found.total[1])


@pytest.mark.parametrize("name", ["variations of two pictures, negatives", "the best of three, two of them", "drafted"])
def test_memory_that_runs_out_on_the_way_changes_nothing(patchify, name):
    """However often: on each rung of the ladder the whole job is done anew, and nothing of an attempt stays."""
    wanted, _ = run(patchify, name)
    batch = JOBS[name](patchify)
    everything = {(result, k): 1 for result in range(len(batch.seeds)) for k in range(len(batch.plan))}
    stores = set()
    for failures in range(1, 12):
        room = Rows(networks(patchify), failures=failures)
        try:
            found, seen = run(patchify, name, room)
        except ValueError as error:
            assert "free memory or use a smaller model" in str(error) and failures > 2
            break
        assert len(room.plans) == failures + 1 == len({id(plan) for plan in room.plans}) == len(room.told) + 1
        assert all(text.startswith("memory ran out") for text in room.told)
        needed = [plan.needed for plan in room.plans]
        assert needed == sorted(needed, reverse=True)
        assert seen.last() == everything, "of the last attempt every result once"
        same(found, wanted)
        stores.add(room.plans[-1].store)
    assert stores == {"exact", "host"} and failures < 11, "down to the last rung"


def test_memory_for_less_than_the_rows_of_one_result_is_a_sentence(patchify):
    with pytest.raises(ValueError, match="memory lasts for 1 of 2 rows of regions; use fewer"):
        run(patchify, "regions and variations", Rows(networks(patchify), 1))


def test_an_error_of_another_kind_is_not_tried_again(patchify):
    room = Rows([patchify.transformer])

    def stop(scale, results, pictures):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        driver.run(edit(patchify, 2), room, stop)
    assert len(room.plans) == 1 and not room.workspaces[0].busy


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_best_of_several_reads_each_source_once(patchify, monkeypatch, pictures):
    """Candidates and the one that goes on alone have the same memory, so that it finds the source read."""
    read, original = [], Transformer.read_source
    monkeypatch.setattr(
        Transformer, "read_source", lambda self, x, *more: read.append(len(x)) or original(self, x, *more)
    )
    batch = edit(patchify, pictures, shortcuts=DRAFT, **best())
    wanted = driver.run(batch, Rows([patchify.transformer]))
    assert read == [2 * pictures], "a row with the instruction and one without, for each picture"
    read.clear()
    found = driver.run(batch, Rows([patchify.transformer], 3))
    assert read == [2] * pictures, "also where memory lasts for the candidates of one picture"
    assert torch.equal(found.total, wanted.total)
    read.clear()
    driver.run(replace(batch, controls=Controls()), Rows([patchify.transformer]))
    assert read == [2 * pictures], "as without candidates"


# --- what is given beside pictures ---


@pytest.fixture(scope="module")
def editor(patchify):
    """The recorded transformer with a small VAE of random weights."""
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    autoencoder = Autoencoder(AutoencoderConfig(14, 32, (32,) * 4, (32,) * 4, 1, 1, 8)).requires_grad_(False)
    torch.random.set_rng_state(state)
    return Editor(patchify.transformer, autoencoder)


@pytest.fixture
def reading(editor, patchify, monkeypatch):
    """The editor with a text encoder for some prompts."""
    known = dict(zip(("a", "b", "c"), words(patchify, 3)))
    monkeypatch.setattr(editor, "encode_text", lambda prompts: [known[prompt] for prompt in prompts])
    return editor


def shapes(count: int) -> list[Image.Image]:
    """Different small pictures."""
    return [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (5, 5, 3), np.uint8)).resize((40, 40))
        for n in range(count)
    ]


def drawn(editor, pictures, instructions, **more):
    return editor.run(pictures, instructions, size=SIZE, settings=DRAWN, shortcuts=Shortcuts(stop=3), **more).tokens


def test_one_instruction_serves_all_pictures(reading):
    pictures = shapes(2)
    wanted = drawn(reading, pictures, ["a", "a"]).total()
    assert not torch.equal(drawn(reading, pictures[1], "a").total(), wanted[:1]), "pictures count"
    (text,) = reading.encode_text(["a"])
    for one in ("a", text, [text, "a"]):
        assert torch.equal(drawn(reading, pictures, one).total(), wanted)
    for one in ("a", ["a"], text, [text]):
        assert torch.equal(drawn(reading, pictures[0], one).total(), wanted[:1])
    unwanted = drawn(reading, pictures, "a", negatives="b").total()
    assert torch.equal(drawn(reading, pictures, "a", negatives=["b", "b"]).total(), unwanted)
    mixed = drawn(reading, pictures, "a", negatives=["", "b"]).total()
    assert torch.equal(mixed, torch.cat([wanted[:1], unwanted[1:]])) and not torch.equal(unwanted, wanted)


WHITE = Image.new("L", (8, 8), 255)
WRONG = [
    (1, dict(instructions=["a", "b"]), "there is 1 picture but 2 instructions in the list; give one each"),
    (2, dict(instructions=["a"]), "there are 2 pictures but 1 instruction in the list; give one each, or a single one"),
    (2, dict(instructions=["a"] * 3), "there are 2 pictures but 3 instructions in the list"),
    (2, dict(instructions=[]), "there is no instruction; say what to change in the picture, or give regions"),
    (1, dict(instructions="a", negatives=["b", "c"]), "there is 1 picture but 2 negative prompts in the list"),
    (2, dict(instructions="a", negatives=["b"]), "there are 2 pictures but 1 negative prompt in the list"),
    (2, dict(instructions="a", negatives=["b"] * 3), "there are 2 pictures but 3 negative prompts in the list"),
    (1, dict(instructions="a", mask=[WHITE] * 2), "there are 2 masks for 1 pictures; give one, or one for each"),
    (2, dict(instructions="a", mask=[WHITE] * 3), "there are 3 masks for 2 pictures; give one, or one for each"),
    (2, dict(instructions="a", mask=[]), "there are 0 masks for 2 pictures; give one, or one for each"),
]


@pytest.mark.parametrize(("count", "given", "message"), WRONG)
def test_lists_of_another_length_are_a_sentence(reading, count, given, message):
    given = dict(given)
    with pytest.raises(ValueError, match=message):
        drawn(reading, shapes(count), given.pop("instructions"), **given)


@pytest.mark.parametrize(
    ("count", "more", "message"),
    [
        (2, dict(texts=1), "2 images need 2 instructions and negative prompts, got 1 and 2"),
        (1, dict(texts=2), "1 images need 1 instructions and negative prompts, got 2 and 1"),
        (2, dict(negatives=1), "2 images need 2 instructions and negative prompts, got 2 and 1"),
        (2, dict(regions=[1, 2]), r"all pictures of a batch need as many regions, at least one each, got .1, 2."),
        (1, dict(regions=[2]), r"2 instructions a picture need as many areas .pictures, regions, y, x."),
        (1, dict(features=3), r"features must be a tensor .pictures, channels, height, width."),
        (
            1,
            dict(prompts=["make it red"]),
            "texts must be features .tokens, channels., got 'm'; see Editor.encode_text",
        ),
        (1, dict(controls=[print]), "controls must be Controls, got list"),
        (2, dict(seeds=3), "3 seeds are not the same number for each of 2 pictures; give one a result"),
        (1, dict(seeds=0), "0 seeds are not the same number for each of 1 pictures; give one a result"),
        (2, dict(mask=3), "the mask has the shape .3, 16, 16. for 2 images; give one .1, y, x., or one for each"),
    ],
)
def test_so_they_are_in_a_batch(patchify, count, more, message):
    texts = words(patchify, more.get("texts", count))
    negatives = words(patchify, more["negatives"]) if "negatives" in more else None
    mask = box(more["mask"]) if "mask" in more else None
    if "regions" in more:
        texts = [[text] * regions for text, regions in zip(texts, more["regions"])]
    features, own = sources(patchify, count), {name: more[name] for name in ("controls",) if name in more}
    features, texts = features[0] if "features" in more else features, more.get("prompts", texts)
    with pytest.raises(ValueError, match=message):
        batch = EditBatch.of(features, texts, patchify.schedule, DRAWN, negatives, mask=mask, **own)
        replace(batch, seeds=tuple(range(more["seeds"])))


# --- first scales that are given ---


@pytest.mark.parametrize(
    ("begun", "at", "fine"), [(1, 1, False), (2, 1, False), (3, 3, False), (4, 3, False), (2, 3, True)]
)
def test_the_best_is_chosen_of_scales_that_are_drawn(patchify, begun, at, fine):
    batch = edit(patchify, 1, prefix=tokens(patchify, 1).bits[:begun], shortcuts=Shortcuts(stop=5), **best(at))
    room = Rows([patchify.transformer])
    if fine:
        found = driver.run(batch, room).tokens.bits
        assert all(torch.equal(a, b) for a, b in zip(found[:begun], batch.prefix))
        return
    with pytest.raises(
        ValueError, match=f"{begun} scales are begun but the best is chosen after {at}; set best_at to more"
    ):
        driver.run(batch, room)
    assert not room.plans, "said before anything runs"


def test_a_drafter_draws_what_is_left(patchify):
    """As if it had gone on from the given scales alone, and the other had gone on from what it drew."""
    refiner, drafter = both = networks(patchify)
    given, stop = tokens(patchify, 2).bits[:1], Shortcuts(stop=5)
    found = driver.run(edit(patchify, 2, prefix=given, shortcuts=Shortcuts(drafted=3, stop=5)), Rows(both)).tokens.bits
    first = driver.run(edit(patchify, 2, prefix=given, shortcuts=Shortcuts(stop=3)), Rows([drafter])).tokens.bits
    rest = driver.run(edit(patchify, 2, prefix=first, shortcuts=stop), Rows([refiner])).tokens.bits
    assert len(found) == 5 and all(torch.equal(a, b) for a, b in zip(found, rest, strict=True))
    assert torch.equal(found[0], given[0]), "what was given stays"
    alone = driver.run(edit(patchify, 2, prefix=given, shortcuts=stop), Rows([refiner])).tokens.bits
    assert not all(torch.equal(a, b) for a, b in zip(found, alone)), "the drafter had a part in it"


@pytest.mark.parametrize("begun", [3, 4])
def test_a_drafter_that_has_nothing_left_to_draw_is_refused(patchify, begun):
    batch = edit(patchify, 1, prefix=tokens(patchify, 1).bits[:begun], shortcuts=Shortcuts(drafted=3))
    with pytest.raises(ValueError, match=f"would draw 3 scales but {begun} are begun already"):
        driver.run(batch, Rows(networks(patchify)))


# --- one editor for many ---


@pytest.fixture(scope="module")
def texts(patchify):
    return words(patchify, 3)


def asked(texts) -> list[dict]:
    """Twelve different edits of small pictures: of other seeds and texts, with masks, variations and without."""
    pictures, mask = shapes(3), Image.new("L", (40, 40))
    mask.paste(255, (5, 5, 25, 30))
    kinds = [{}, {"variations": 2}, {"settings": replace(DRAWN, guidance=1.0)}, {"mask": mask}]
    return [
        {
            "images": pictures[n % 3], "instructions": texts[(n // 2) % 3], "size": SIZE,
            "settings": replace(DRAWN, seed=n), "shortcuts": Shortcuts(stop=2), **kinds[n % 4],
        }
        for n in range(12)
    ]  # fmt: skip


def made(editor, task: dict) -> tuple[torch.Tensor, list[bytes]]:
    result = editor.run(**task)
    return result.tokens.total(), [picture.tobytes() for picture in result.pictures]


@pytest.fixture(scope="module")
def expected(editor, texts):
    return [made(editor, task) for task in asked(texts)]


def equal(found, wanted) -> bool:
    return torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


@pytest.mark.parametrize("count", [2, 4])
def test_threads_share_an_editor(editor, texts, expected, count):
    assert len({pictures[0] for _, pictures in expected}) == 12
    other = asked(texts)[0] | {"images": shapes(2)[1]}
    assert not equal(made(editor, other), expected[0]), "pictures count"
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(lambda task: made(editor, task), asked(texts)))
    assert [equal(*pair) for pair in zip(found, expected)] == [True] * 12


def test_edits_of_an_editors_threads_run_one_after_the_other(editor, texts):
    """So that none takes the memory on which another's plan counts, and no network makes way that another needs."""
    inside, most, entered = 0, 0, Event()
    lock = Lock()

    def watch(scale, fitted):
        nonlocal inside, most
        if scale.index == 0:
            with lock:
                inside, most = inside + 1, max(most, inside + 1)
            if inside > 1:
                entered.set()
            entered.wait(0.2)  # time for the others to begin, if nothing keeps them
        if scale.index + 1 == scale.count:
            with lock:
                inside -= 1

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda task: made(editor, task | {"on_scale": watch}), asked(texts)[:3]))
    assert most == 1 and inside == 0


def sampled(editor, record, number: int, **more):
    """A generator of an edit's scales."""
    settings = replace(DRAWN, seed=number)
    given = sources(record, 3)[[number % 3]], [words(record, 3)[number % 3]], record.schedule, settings
    return editor.sample(*given, shortcuts=Shortcuts(stop=4), **more)


def bits_of(scales) -> list[torch.Tensor]:
    return [scale.bits for scale in scales]


def alike(found, wanted) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_threads_share_its_loop(editor, patchify):
    wanted = [bits_of(sampled(editor, patchify, number)) for number in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: bits_of(sampled(editor, patchify, number)), range(8)))
    assert all(map(alike, found, wanted))


def test_generators_that_take_turns_are_each_right(editor, patchify):
    wanted = [bits_of(sampled(editor, patchify, number)) for number in range(3)]
    steps = list(zip(*(sampled(editor, patchify, number) for number in range(3)), strict=True))
    assert all(alike(bits_of(scales), bits) for scales, bits in zip(zip(*steps), wanted, strict=True))
    # One begins when another has begun, and goes on when that is done.
    first = sampled(editor, patchify, 0)
    begun = [next(first), next(first)]
    assert alike(bits_of(sampled(editor, patchify, 1)), wanted[1])
    assert alike(bits_of([*begun, *first]), wanted[0])
    assert alike(bits_of(sampled(editor, patchify, 2)), wanted[2])


def test_an_edit_within_an_edit(editor, texts, expected):
    inner, tasks = [], asked(texts)

    def within(scale, fitted):
        if scale.index in (0, 1):
            inner.append(made(editor, tasks[1]))

    outer = made(editor, tasks[0] | {"on_scale": within})
    assert equal(outer, expected[0]) and len(inner) == 2
    assert all(equal(found, expected[1]) for found in inner)


@pytest.mark.parametrize("way", ["closed", "forgotten", "left open", "raised"])
def test_an_edit_that_was_left_in_its_middle_leaves_the_next_one_right(editor, patchify, texts, expected, way):
    wanted = bits_of(sampled(editor, patchify, 1))
    left = sampled(editor, patchify, 0)
    next(left), next(left)
    if way == "closed":
        left.close()
    elif way == "forgotten":
        del left
        gc.collect()
    elif way == "raised":
        with pytest.raises(KeyError):
            left.throw(KeyError("stop"))
    assert editor.workspace.busy == (way == "left open")
    assert alike(bits_of(sampled(editor, patchify, 1)), wanted)
    assert equal(made(editor, asked(texts)[2]), expected[2])
    left = None
    gc.collect()
    assert not editor.workspace.busy


# --- memory that is asked away ---


def test_memory_asked_away_in_the_middle_stays_until_the_end(editor, texts, expected):
    """By the workspace's own `forget` and by the editor's, at every scale: the edit is right, and all is given back."""
    for forget in (lambda: editor.workspace.forget(), lambda: editor.workspace.forget(host=False), editor.forget):
        for task, wanted in list(zip(asked(texts), expected))[:4]:
            kept = []

            def ask(scale, forget=forget, kept=kept):
                forget()
                kept.append(editor.workspace.nbytes)

            assert equal(made(editor, task | {"steer": [ask]}), wanted)
            assert len(kept) == 2 and all(kept), "an edit at work keeps it"
            work = editor.workspace
            assert work.store is None and not work.nbytes and not work.source and work.static is None
    assert equal(made(editor, asked(texts)[0]), expected[0]) and editor.workspace.nbytes > 0, "it is kept again"


def test_what_runs_beside_gives_its_memory_back(editor, patchify):
    """An edit that found the workspace taken has one of its own, of which nothing stays."""
    first = sampled(editor, patchify, 0)
    next(first)
    network, others = editor.transformer, []
    second = Session(network, editor.workspace)
    batch = edit(patchify, 1, shortcuts=DRAFT)
    for _ in loop.sample(second, batch):
        others.append(second.work)
    assert others[0] is not editor.workspace and others[0].store is None and not others[0].busy
    assert editor.workspace.busy and editor.workspace.nbytes > 0
    first.close()
    assert not editor.workspace.busy and editor.workspace.nbytes > 0


def test_memory_asked_away_by_another_thread(editor, patchify):
    """At any moment, again and again: while an edit begins, runs and ends."""
    wanted = [bits_of(sampled(editor, patchify, number)) for number in range(3)]
    work, stop, asked_for = editor.workspace, Event(), []

    def ask():
        while not stop.is_set():
            work.forget()
            asked_for.append(work.busy)
            stop.wait(0.0005)

    thread = Thread(target=ask)
    thread.start()
    try:
        found = [bits_of(sampled(editor, patchify, number)) for number in (0, 1, 2) * 3]
    finally:
        stop.set()
        thread.join()
    assert all(map(alike, found, wanted * 3)) and any(asked_for)
    work.forget()
    assert work.store is None and not work.busy


def test_a_workspace_of_ones_own_is_planned_by_nobody(editor, patchify, monkeypatch):
    """It is used as it is, whatever is free; given the former one back, the editor plans again."""
    before = editor.workspace
    monkeypatch.setattr(editor.memory, "device", torch.device("cuda"))
    monkeypatch.setattr(editor.memory, "elsewhere", lambda networks, device: nullcontext())
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    job = Job(patchify.transformer.config, patchify.schedule, 1, True, torch.float32, 10)
    try:
        editor.workspace = Workspace(kept=False)
        assert editor.memory.free(job) == math.inf and editor.memory.movable == 0
    finally:
        editor.workspace = before
    assert editor.memory.free(job) < 0


FORMS = {"list": list, "tuple": tuple, "iterator": iter, "generator": lambda given: (one for one in given)}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_given_in_a_row_is_gone_through_as_often_as_needed(form):
    """Pictures, instructions and functions of scales: an iterator counts at every scale, not at the first alone."""
    editor = Editor.load(*demo_files(), device="cpu")
    settings = SamplingSettings(guidance=2.0, temperature=0.7, seed=5)
    seen = []

    def turned(scale):
        seen.append(scale.index)
        scale.bits = ~scale.bits

    more = dict(size="0.06M", settings=settings)
    scene, words = SAMPLES / "scene.png", "make the background cyan"
    made = editor.run(FORMS[form]([scene]), FORMS[form]([words]), steer=FORMS[form]([turned]), **more)
    assert seen == list(range(7))
    assert torch.equal(made.tokens.total(), editor.run(scene, words, steer=[turned], **more).tokens.total())


def test_runs_of_one_batch_in_turns_remember_nothing_of_each_other():
    editor = Editor.load(*demo_files(), device="cpu")
    fitted = editor.fit(SAMPLES / "scene.png", "0.06M")
    features, texts = editor.encode([fitted], ["make the background cyan"])
    settings = SamplingSettings(guidance=2.0, temperature=2.0, seed=5)
    batch = EditBatch.of(features, texts, fitted.schedule, settings, controls=Controls(auto_mask=0.5))

    def turned(scale):
        scale.bits = ~scale.bits

    *_, alone = (scale.running_sum for scale in editor.scales(batch))
    for scale, _ in zip(editor.scales(batch), editor.scales(batch, [turned])):
        total = scale.running_sum
    assert torch.equal(total, alone)
