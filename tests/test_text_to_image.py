"""Pictures of text alone: Infinity's checkpoints through the same loop, by figures of its code and a plain network."""

import math
import shutil
from copy import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from support import GOLDEN, ROOT
from typer.testing import CliRunner

from benchmarks.real_size import published_shapes, random_tensor
from varedit_core import Editor, SamplingSettings, load_transformer, sample, schedule_for
from varedit_core.cli.app import app
from varedit_core.controls.mask import token_masks
from varedit_core.controls.registry import Shortcuts
from varedit_core.controls.window import bands
from varedit_core.defaults import KINDS, RATIOS
from varedit_core.demo import demo_files
from varedit_core.files.checkpoints import KIND
from varedit_core.files.convert import convert
from varedit_core.files.info import inspect
from varedit_core.files.lora import merge_lora
from varedit_core.files.published import TRANSFORMERS
from varedit_core.files.weights import open_weights
from varedit_core.model.positions import rotary
from varedit_core.pictures.images import load_mask
from varedit_core.runtime.memory import engine_of
from varedit_core.runtime.plan import STORES, Job
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling import loop
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.settings import TEXT_SETTINGS
from varedit_core.tokenizer.schedule import TABLES

GREEDY = SamplingSettings(temperature=0.0)
DRAWN = SamplingSettings(temperature=0.7, seed=5)
CAT = ROOT / "samples" / "cat.jpg"


@pytest.fixture(scope="module", params=["patchify", "plain"])
def network(request, tmp_path_factory):
    """A small transformer of random weights, known by its file's name, and its latents along a token's edge."""
    bits, patch = (56, 2) if request.param == "patchify" else (32, 1)
    torch.manual_seed(3)
    shapes = published_shapes(depth=8, width=128, heads=2, token_bits=bits, text=256)
    path = tmp_path_factory.mktemp(request.param) / "infinity_8b.pth"
    torch.save({key: random_tensor(key, shape, "cpu") for key, shape in shapes.items()}, path)
    return load_transformer(path), patch


@pytest.fixture(scope="module")
def texts():
    return [torch.randn(9, 256, generator=torch.Generator().manual_seed(1))]


def nothing(network, schedule, images=1):
    transformer, patch = network
    size = [patch * side for side in schedule.grids[-1]]
    return torch.zeros(images, transformer.config.token_bits // patch**2, *size)


def run(network, texts, schedule, settings=GREEDY, features=None, **more):
    """Bits and logits of every scale."""
    features = nothing(network, schedule, len(texts)) if features is None else features
    return [(s.bits.clone(), s.logits.clone()) for s in sample(network[0], features, texts, schedule, settings, **more)]


def editing(transformer):
    """The same weights as a transformer that reads a source."""
    other = copy(transformer)
    other.config = replace(other.config, source=True)
    return other


def equal_bits(found, wanted):
    return torch.cat([(a == b).flatten() for (a, _), (b, _) in zip(found, wanted, strict=True)]).float().mean().item()


# --- the network, once more and plainly: all scales in one sequence, one text, no keys kept, no reference ---


def inputs(bits, schedule, patch):
    """What the network reads at every scale but the first, from all bits."""
    last, total, tokens = [patch * side for side in schedule.grids[-1]], 0, []
    for x, grid in zip(bits[:-1], schedule.grids[1:]):
        codes = (2 * x.float() - 1) / math.sqrt(x.shape[1])
        total = total + F.interpolate(codes, last, mode="bilinear", align_corners=False)
        part = F.interpolate(total, [patch * side for side in grid], mode="bilinear", align_corners=False)
        tokens.append(F.pixel_unshuffle(part, patch)[0].flatten(1).T)
    return tokens


def turned(x_HnD, cells):
    size = x_HnD.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(size // 4) / (size // 4))
    angles = torch.cat([torch.outer(cells[:, axis], frequencies) for axis in (0, 1)], dim=1)
    pairs = torch.view_as_complex(x_HnD.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def plain_logits(transformer, text, tokens, schedule):
    """Logits [n, D, 2] of the tokens of all scales, where a token sees its own scale and those before."""
    state, heads = {key: x.float() for key, x in transformer.state_dict().items()}, transformer.config.heads

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def split(x, count=heads):
        return x.unflatten(-1, (count, -1)).transpose(-2, -3)

    def seen(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0).transpose(0, 1).flatten(1)

    text = text / (text.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state["text_norm.weight"]
    pool_heads = text.shape[1] // 128
    k, v = (split(x, pool_heads) for x in linear("text_proj_for_sos.ca.mat_kv", text).chunk(2, -1))
    q = split(state["text_proj_for_sos.ca.mat_q.weight"], pool_heads)
    pooled = linear("text_proj_for_sos.ca.proj", seen(q / math.sqrt(q.shape[-1]), k, v))
    memory = linear("text_proj_for_ca.2", F.gelu(linear("text_proj_for_ca.0", text), approximate="tanh"))
    level, shared = state["lvl_embed.weight"], linear("shared_ada_lin.1", F.silu(pooled)).view(6, -1)

    parts = [linear("word_embed", part) + level[k + 1] for k, part in enumerate(tokens)]
    x = torch.cat([pooled + state["pos_start.weight"] + level[0], *parts])
    scale_of = torch.cat([torch.full((h * w,), k) for k, (h, w) in enumerate(schedule.grids)])
    height, width = TABLES[schedule.ratio][-1]
    cells = torch.cat([
        torch.tensor([[round(i * (height / h)), round(j * (width / w))] for i in range(h) for j in range(w)]).float()
        for h, w in schedule.grids
    ])  # fmt: skip
    mask = scale_of[:, None] >= scale_of
    for i in range(transformer.config.depth):
        name = f"blocks.{i}"
        gain1, gain2, scale1, scale2, shift1, shift2 = shared + state[f"{name}.ada_gss.weight"]
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        q, k, v = (split(part) for part in linear(f"{name}.sa.mat_qkv", h).chunk(3, -1))
        strength = state[f"{name}.sa.scale_mul.weight"][0].clamp_max(math.log(100)).exp()[:, None, None]
        q, k = turned(F.normalize(q, dim=-1) * strength, cells), turned(F.normalize(k, dim=-1), cells)
        x = x + gain1 * linear(f"{name}.sa.proj", seen(q, k, v, mask))
        h = F.layer_norm(x, x.shape[-1:], state[f"{name}.ca_norm.weight"], state[f"{name}.ca_norm.bias"], 1e-6)
        k, v = (split(part) for part in linear(f"{name}.ca.mat_kv", memory).chunk(2, -1))
        q = split(linear(f"{name}.ca.mat_q", h))
        x = x + linear(f"{name}.ca.proj", seen(q / math.sqrt(q.shape[-1]), k, v))
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        x = x + gain2 * linear(f"{name}.ffn.fc2", F.gelu(linear(f"{name}.ffn.fc1", h), approximate="tanh"))
    scale, shift = linear("head_nm.ada_lin.1", F.silu(pooled)).view(2, -1)
    return linear("head", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).unflatten(-1, (-1, 2))


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_the_loop_equals_the_plain_network(network, texts, ratio):
    schedule = schedule_for("0.06M", ratio)
    assert not network[0].config.source
    found = run(network, texts, schedule)
    tokens = inputs([bits for bits, _ in found], schedule, network[1])
    for row, text in enumerate((texts[0], network[0].unconditional(9, "cpu"))):
        wanted = plain_logits(network[0], text, tokens, schedule).split(list(schedule.tokens))
        for (_, logits), expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(logits[row], expected, atol=3e-5, rtol=0)


def test_the_features_are_not_read(network, texts):
    schedule = schedule_for("0.06M")
    features = torch.randn(nothing(network, schedule).shape)
    for a, b in zip(run(network, texts, schedule, DRAWN), run(network, texts, schedule, DRAWN, features)):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    ("ratio", "area", "count", "figures"),
    [
        (1.0, "0.25M", 2521, {2: (1.0, 0.0, 0.656495, -0.75433), 40: (0.656495, -0.75433, 0.995257, -0.097276),
                              1260: (-0.376742, 0.926318, -0.212036, -0.977262),
                               2520: (-0.95305, -0.302813, -0.95305, -0.302813)}),
        (1.5, "0.06M", 533, {2: (1.0, 0.0, -0.465064, 0.885277), 40: (1.0, 0.0, 0.580003, -0.814614),
                             266: (-0.62768, 0.778472, -0.284847, 0.958573),
                               532: (-0.71613, -0.697966, -0.284847, 0.958573)}),
        (0.571, "1M", 11252, {2: (1.0, 0.0, 0.056361, -0.99841), 40: (0.175157, 0.984541, -0.684382, 0.729124),
                              5626: (0.248617, -0.968602, -0.306095, -0.952001),
                               11251: (0.270098, 0.962833, -0.900639, 0.434568)}),
    ],
)  # fmt: skip
def test_positions_are_those_of_infinitys_code(ratio, area, count, figures):
    """Cosine and sine of the second height and width angle of some tokens, head size 64, as in Infinity's code."""
    source, *scales = rotary(schedule_for(area, ratio), 64, False)
    tables = torch.cat(scales, dim=1)
    assert source.shape == (2, 0, 32) and tables.shape == (2, count, 32)
    for token, figure in figures.items():
        found = tables[:, token, [1, 17]].T.flatten()
        torch.testing.assert_close(found, torch.tensor(figure), atol=2e-6, rtol=0)


def test_the_names_of_ratios_are_all_tables():
    assert sorted(RATIOS.values()) == sorted(TABLES)
    for name, ratio in RATIOS.items():
        width, height = map(int, name.split(":"))
        assert height / width == pytest.approx(ratio, abs=2e-3)


# --- everything around it holds as for edits ---


def test_copies_are_runs_with_the_next_seeds(network, texts):
    schedule, settings = schedule_for("0.06M"), replace(DRAWN, guidance=[3, 3, 2, 1, 3, 1, 1])
    both = [texts[0], texts[0][:4]]
    for work in (None, Workspace()):
        found = run(network, both, schedule, settings, variations=2, workspace=work)
        for row in range(4):
            alone = run(network, [both[row // 2]], schedule, replace(settings, seed=settings.seed + row))
            equal = equal_bits([(bits[row : row + 1], None) for bits, _ in found], alone)
            assert equal > 0.999, "rows round differently beside others, and no more"


def test_a_workspace_that_stays(network, texts):
    """No picture and no text of the run before has a part in the next, also not where an edit came in between."""
    schedule, work, pair = schedule_for("0.06M"), Workspace(), (network, (editing(network[0]), network[1]))
    other = [texts[0].flip(0)]
    runs = [
        (0, texts, DRAWN),
        (0, other, DRAWN),
        (0, texts, replace(DRAWN, seed=9)),
        (1, texts, DRAWN),
        (0, texts, DRAWN),
    ]
    for edits, given, settings in runs:
        found = run(pair[edits], given, schedule, settings, workspace=work)
        for (bits, logits), (expected, wanted) in zip(found, run(pair[edits], given, schedule, settings)):
            assert torch.equal(bits, expected) and torch.equal(logits, wanted)
        assert bool(work.source) == bool(edits)


def test_memory_that_stays_in_place(network, texts, monkeypatch):
    """The form that passes have where they are recorded, only that nothing is: no pass of a source is among them."""
    schedule, work, names = schedule_for("0.06M"), Workspace(), []
    monkeypatch.setattr(Workspace, "_recording", property(lambda self: self.kept))

    def noted(self, name, tokens, function, *inputs):
        names.extend([name[0]] * self.kept)
        return function(*inputs)

    monkeypatch.setattr(Workspace, "_run", noted)
    for given in ([texts[0], texts[0][:4]], [texts[0][:5], texts[0].flip(0)]):
        found = run(network, given, schedule, GREEDY, variations=2, workspace=work)
        wanted = run(network, [text for text in given for _ in range(2)], schedule, GREEDY)
        for (_, logits), (_, expected) in zip(found[:1], wanted):
            torch.testing.assert_close(logits, expected, atol=3e-5, rtol=0)
        assert equal_bits(found, wanted) > 0.999
    assert "source" not in names and len(names) == 2 * (len(schedule) + 1)


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("ratio", [1.0, 0.333])
def test_every_store(network, texts, name, rows, ratio, monkeypatch):
    schedule, kept = schedule_for("0.06M", ratio), []
    settings = replace(GREEDY, guidance=[3, 3, 3, 3, 1, 1, 1])
    wanted = run(network, texts, schedule, settings)
    monkeypatch.setattr(STORES[name], "release", lambda self: kept.append(self))
    found = []
    work = Workspace(STORES[name], kept=False, rows_at_once=rows)
    for scale, (bits, _) in zip(
        sample(network[0], nothing(network, schedule), texts, schedule, settings, workspace=work), wanted
    ):
        found.append((scale.bits, scale.logits))
        scale.bits = bits
    spread = torch.cat([logits.flatten() for _, logits in wanted]).std().item()
    for (bits, logits), (expected, exact) in zip(found, wanted):
        if name == "8-bit":
            assert (logits - exact).abs().mean() < 0.01 * spread
        else:
            torch.testing.assert_close(logits, exact, atol=2e-5 if rows else 0, rtol=0)
            assert rows or torch.equal(bits, expected)
    (store,) = kept
    parts = [store.keys, store.values, store.references, getattr(store, "staged", ())]
    parts += [[slot.staged for slot in getattr(store, "slots", ())]]
    parts += [(p.codes, p.scales, p.exact, p.order) for p in getattr(store, "packed", ())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for part in parts for t in part if t.numel()}
    job = Job(network[0].config, schedule, 1, True, torch.float32, exact_keys=0)
    assert sum(storage.nbytes() for storage in storages.values()) == job.stored(name, rows)
    assert sum(tensor.nbytes for tensor in getattr(store, "host", ())) == job.needed_on_host(name)


def test_without_a_source_less_is_kept_and_done():
    edit = Job(TRANSFORMERS["8B"], schedule_for("1M"), 1, True, torch.bfloat16)
    text = replace(edit, config=replace(edit.config, source=False))
    assert all(text.stored(name) < 0.8 * edit.stored(name) for name in STORES)
    assert text.shares()[0] == 0 < edit.shares()[0] and sum(text.shares()) == pytest.approx(1)


@pytest.mark.parametrize(
    "shortcuts", [Shortcuts(inside=3), Shortcuts(unguided=2), Shortcuts(stop=5), Shortcuts(window=0.3)]
)
def test_shortcuts(network, texts, shortcuts):
    schedule = schedule_for("0.25M" if shortcuts.window else "0.06M")
    features, mask = torch.randn(nothing(network, schedule).shape), torch.zeros(1, 64, 64)
    mask[:, 20:40, 10:30] = 1
    mask = mask if shortcuts.inside else None
    found = run(network, texts, schedule, GREEDY, features, shortcuts=shortcuts, mask=mask)
    wanted = run(network, texts, schedule, GREEDY, features, mask=mask)
    assert len(found) == (shortcuts.stop or len(schedule))
    whole = len(schedule) - max(3 * bool(shortcuts.window), shortcuts.inside, shortcuts.unguided)
    for (bits, _), (expected, _) in list(zip(found, wanted))[:whole]:
        assert torch.equal(bits, expected)
    assert shortcuts.stop or equal_bits(found, wanted) < 1


def test_a_window_of_the_whole_height_changes_nothing(network, texts):
    schedule = schedule_for("0.25M")
    found, wanted = (run(network, texts, schedule, shortcuts=Shortcuts(window=window)) for window in (1.0, 0.0))
    assert equal_bits(found, wanted) > 0.999


@pytest.mark.parametrize("first", [False, True])
def test_bands_count_no_source(first):
    schedule = schedule_for("0.25M")
    for index, grid in enumerate(schedule.grids):
        seen = sum(schedule.tokens[: index + 1])
        assert all(pieces == (slice(0, seen),) for pieces in bands(schedule, index, 1.0, False, first).listed)
        narrow = bands(schedule, index, 0.1, False, first).listed
        assert max(piece.stop for pieces in narrow for piece in pieces) <= seen
        shortest = min(sum(piece.stop - piece.start for piece in pieces) for pieces in narrow)
        assert shortest < seen if grid[0] > 16 else shortest == seen


def test_bits_outside_the_mask_are_the_pictures(network, texts):
    schedule, patch = schedule_for("0.06M"), network[1]
    features = torch.randn(nothing(network, schedule).shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 64, 64)
    mask[:, 24:34, 8:20] = 1
    free = token_masks(mask, schedule)
    total, steered = torch.zeros_like(features), 0
    for k, scale in enumerate(sample(network[0], features, texts, schedule, DRAWN, mask=mask)):
        locked = ~free[k].repeat_interleave(patch, -1).repeat_interleave(patch, -2).expand_as(scale.bits)
        wanted = scale.source.bits(total, scale.index)
        assert torch.equal(scale.bits[locked], wanted[locked])
        steered += (scale.bits != wanted).sum().item()
        total = scale.running_sum
    assert steered > 0 and not free[-1].all()


def test_a_drafter_of_the_other_kind(network, texts):
    other, schedule = editing(network[0]), schedule_for("0.06M")
    given = nothing(network, schedule), texts, schedule, GREEDY
    batch = EditBatch.of(*given, shortcuts=Shortcuts(drafted=3))
    with pytest.raises(ValueError, match="must both edit or both make pictures of text"):
        engine_of([network[0], other], [None, None])
    drafted = [scale.bits for scale in loop.sample(engine_of([network[0]] * 2, [None, None]), batch)]
    assert equal_bits([(bits, None) for bits in drafted], run(network, texts, schedule)) > 0.999


# --- files ---


@pytest.mark.parametrize(
    ("name", "source"), [("infinity_2b_reg.pth", False), ("8B-512.pth", True), ("my_infinity.pth", True)]
)
def test_a_files_name_and_what_is_said(published_state, tmp_path, name, source):
    torch.save(published_state | {"lvl_1L": torch.zeros(1, 9)}, tmp_path / name)  # a buffer of older files
    assert load_transformer(tmp_path / name).config.source == source
    for kind in KINDS[1:]:
        assert load_transformer(tmp_path / name, kind=kind).config.source == (kind == "edit")
    with pytest.raises(ValueError, match="unknown kind 'both'; choose one of auto, edit, text-to-image"):
        load_transformer(tmp_path / name, kind="both")
    assert inspect(tmp_path / name)["is"].endswith("text-to-image") != source


def test_a_converted_file_says_what_it_is(published_state, tmp_path):
    for name in ("infinity_8b.pth", "8B-512.pth"):
        torch.save(published_state, tmp_path / name)
    cases = [
        ("infinity_8b.pth", "auto", "text-to-image"),
        ("infinity_8b.pth", "edit", "edit"),
        ("8B-512.pth", "auto", None),
        ("8B-512.pth", "text-to-image", "text-to-image"),
    ]
    for number, (name, kind, told) in enumerate(cases):
        target = tmp_path / f"infinity_{number}.safetensors"  # what is written counts more than the name
        metadata = convert(tmp_path / name, target, kind=kind)
        assert metadata.get("varedit.kind") == told
        again = load_transformer(target).config.source
        assert again == (told == "edit")
    assert load_transformer(target, kind="edit").config.source
    lora = demo_files()[0].parents[1] / "loras" / "varedit_demo_duotone.safetensors"
    shutil.copy(demo_files()[0], tmp_path / "infinity_demo.safetensors")
    assert (
        merge_lora(tmp_path / "infinity_demo.safetensors", lora, tmp_path / "merged.safetensors")[KIND]
        == "text-to-image"
    )
    assert not load_transformer(tmp_path / "merged.safetensors").config.source
    assert "varedit.kind" not in convert(demo_files()[1], tmp_path / "vae.safetensors", "fp32", kind="text-to-image")


# --- pictures ---


@pytest.fixture(scope="module")
def record():
    return GOLDEN / "patchify_256.safetensors"


@pytest.fixture(scope="module")
def editor(record):
    return Editor.load(record, record, device="cpu", kind="text-to-image")


@pytest.fixture(scope="module")
def prompt(record):
    return open_weights(record)["in.text.0"]


def test_pictures_of_the_models_size(editor, prompt):
    assert [p.size for p in editor.generate(prompt, "0.06M")] == [(256, 256)]
    made = editor.generate([prompt, prompt.flip(0)], "0.06M", 1.45, variations=2)
    assert [picture.size for picture in made] == [(224, 336)] * 4 and len({p.tobytes() for p in made}) == 4
    own = editor.generate(prompt, "0.06M", 1.5, replace(TEXT_SETTINGS, seed=1))[0]
    difference = ImageChops.difference(own, made[1])
    assert sum(difference.convert("L").histogram()[4:]) < 0.02 * own.width * own.height, "the second one's seed is 1"


def test_a_picture_is_repainted_inside_the_mask_alone(editor, prompt):
    picture = Image.open(CAT)
    mask = Image.new("L", picture.size)
    mask.paste(255, (200, 60, 400, 240))
    seen = []
    (result,) = editor.generate(
        prompt, "0.06M", picture=CAT, mask=mask, on_scale=lambda s, fitted: seen.append(s.free is not None)
    )
    assert result.size == picture.size and all(seen) and len(seen) == 7
    difference = ImageChops.difference(result, picture.convert("RGB"))
    left, upper, right, lower = difference.getbbox()
    assert left >= 200 and upper >= 60 and right <= 400 and lower <= 240


def test_what_does_not_go_together(editor, record, prompt):
    with pytest.raises(ValueError, match="makes pictures of text alone; use `generate`, or load it as the kind edit"):
        editor.edit(CAT, prompt)
    with pytest.raises(ValueError, match="edits pictures; use `edit`, or load it as the kind text-to-image"):
        Editor.load(record, record, device="cpu").generate(prompt)
    for more in ({"picture": CAT}, {"mask": load_mask(CAT)}):
        with pytest.raises(ValueError, match="give both"):
            editor.generate(prompt, "0.06M", **more)
    with pytest.raises(ValueError, match="at least one prompt"):
        editor.generate([])


def command(*more):
    model, vae, text = demo_files()
    arguments = [
        "generate",
        "a red square",
        "--model",
        model,
        "--vae",
        vae,
        "--text-encoder",
        text,
        "--size",
        "256",
        "--device",
        "cpu",
        *more,
    ]
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command(tmp_path):
    done = command("--kind", "text-to-image", "--ratio", "2:3", "-o", tmp_path / "a.png", "--variations", 2, "--json")
    assert done.exit_code == 0, done.output
    assert [Image.open(tmp_path / f"a-{i}.png").size for i in (1, 2)] == [(224, 336)] * 2
    assert '"temperature": 1.0' in done.stdout and f'"guidance": {TEXT_SETTINGS.guidance}' in done.stdout
    Image.new("L", (10, 10), 255).save(tmp_path / "mask.png")
    done = command("--kind", "text-to-image", "--image", CAT, "--mask", tmp_path / "mask.png", "-o", tmp_path / "b.png")
    assert done.exit_code == 0 and Image.open(tmp_path / "b.png").size == Image.open(CAT).size
    assert "edits pictures" in str(command("-o", tmp_path / "c.png").exception)
    assert "go together" in str(command("--image", CAT, "-o", tmp_path / "c.png").exception)
    assert "neither a number nor one of 1:1" in command("--ratio", "wide", "-o", tmp_path / "c.png").output.replace(
        "│", ""
    )
