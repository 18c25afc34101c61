"""ShapeEdit: scenes are what their instructions say, the splits share nothing, the metrics tell right from wrong."""

import json
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from varedit_core import Editor, SamplingSettings
from varedit_core.cli.app import app
from varedit_core.model.config import AutoencoderConfig
from varedit_core.shapeedit import evaluate as making
from varedit_core.shapeedit.edits import FAMILIES, draw_sample, near_misses
from varedit_core.shapeedit.evaluate import draw, evaluate, evaluate_reconstruction, make, picture
from varedit_core.shapeedit.metrics import Score, background, changed, distance, judge, regions, succeeds
from varedit_core.shapeedit.render import render, restyle
from varedit_core.shapeedit.scenes import (
    CELL,
    COLOURS,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    Background,
    Object,
    Scene,
)
from varedit_core.tokenizer.vae import Autoencoder
from varedit_core.training.data import check_pairs, open_pairs
from varedit_core.training.settings import NewText, NewTransformer
from varedit_core.training.tasks import new_transformer, save_text
from varedit_core.training.words import make_vocabulary, new_text_encoder

PLAIN = Background("plain", "white")
COUNT = len(FAMILIES)


@pytest.fixture(scope="module")
def samples():
    return draw(0, COUNT)


@pytest.fixture(scope="module")
def pictures(samples):
    """Sources and targets of the samples."""
    return render([s.source for s in samples]), render([s.target for s in samples])


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small random network in files: transformer, tokenizer, text encoder's folder."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    tokenizer = Autoencoder(AutoencoderConfig(14, 32, (32,) * 4, (32,) * 4, 1, 1, 8))
    text = new_text_encoder(NewText(width=32, layers=1, heads=2, hidden=32), 300)
    transformer = new_transformer(NewTransformer(2, 64, 1, 64), tokenizer.config, 32, 64, 0)
    make_vocabulary(folder / "text" / "tokenizer.json", 300)
    save_text(folder / "text", text, folder / "text")
    save_file(transformer.state_dict(), folder / "transformer.safetensors")
    save_file(tokenizer.state_dict(), folder / "tokenizer.safetensors")
    return folder / "transformer.safetensors", folder / "tokenizer.safetensors", folder / "text"


def run(*arguments):
    return CliRunner().invoke(app, ["shapeedit", *map(str, arguments)])


# Scenes and pictures


def test_shapes_stay_in_their_cells_and_have_soft_edges():
    empty = render([Scene(PLAIN)])
    for shape in SHAPES:
        it = Object(shape, "black", "plain", 4, radius=38.0, tilt=0.3)
        pixels = render([Scene(PLAIN, (it,))])
        rows, columns = changed(pixels, empty)[0].nonzero().unbind(1)
        assert len(rows) > 500, shape
        for place in (rows, columns):
            assert CELL - 3 < place.min() and place.max() < 2 * CELL + 3, shape
        inside, outside = pixels[0, 0].min(), pixels[0, 0].max()
        between = (pixels[0, 0] > inside + 0.05) & (pixels[0, 0] < outside - 0.05)
        assert 20 < between.sum() < 1500, f"{shape}: one pixel of antialiasing along its edge"


def test_one_seed_is_one_picture(samples, pictures):
    assert draw(0, COUNT) == samples and draw(1, COUNT) != samples
    assert torch.equal(*(render([samples[1].source]) for _ in range(2)))
    assert torch.allclose(render([samples[3].source]), pictures[0][3:4], atol=1e-5), "whatever the batch"


def test_styles(pictures):
    x = (pictures[0][:2] + 1) / 2
    for style in STYLES[1:]:
        styled = restyle(x, style)
        assert styled.shape == x.shape and -1e-5 <= styled.min() and styled.max() <= 1 + 1e-5
        assert (styled - x).abs().max() > 0.1, style
    with pytest.raises(ValueError, match="unknown style"):
        restyle(x, "cubist")
    scene = Scene(PLAIN, (Object("star", "red", "plain", 0),))
    plain, grey = render([scene, Scene(scene.background, scene.objects, "greyscale")])
    assert torch.allclose(grey, restyle((plain[None] + 1) / 2, "greyscale")[0] * 2 - 1, atol=1e-6)


# Samples


def test_targets_differ_inside_the_region_only(samples, pictures):
    source, target = pictures
    region = regions(source, target, [s.family for s in samples])
    outside = ((source - target).abs().amax(1) * ~region).amax((1, 2))
    assert outside.max() <= 2 * 8 / 255 + 1e-6
    for sample, inside, pair in zip(samples, region, zip(*pictures)):
        if sample.family == "keep":
            assert not inside.any() and torch.equal(*pair) and sample.source == sample.target
        else:
            assert inside.any() and sample.source != sample.target, sample.instruction
        assert sample.family != "style" or inside.all()


def test_textures_leave_no_holes_in_the_region():
    plain, dotted = (Scene(PLAIN, (Object("square", "red", t, 4),)) for t in ("plain", "dotted"))
    pair = render([plain]), render([dotted])
    bare, closed = changed(*pair), regions(*pair)
    assert (closed & ~bare).sum() > 100 and closed.sum() > 0.9 * (1.64 * 28) ** 2 * 0.8


def test_instructions_name_one_object():
    for sample in draw(0, 20 * COUNT):
        named = [o for o in sample.source.objects if _named(o, sample.instruction)]
        if sample.family in ("remove", "recolour", "texture", "move", "resize"):
            assert len(named) == 1, sample.instruction
            assert named[0] not in sample.target.objects


def _named(it: Object, instruction: str) -> bool:
    phrase = instruction.split("the colour of ")[-1]
    names = (f"{it.colour} {it.shape}", f"the {it.shape}", f"the {it.colour} object")
    return any(f"{name} " in f"{phrase} " for name in names)


def test_splits_share_nothing():
    drawn: dict[str, list] = {"train": [], "test": []}
    for split, samples in drawn.items():
        for index in range(1500):
            samples.append(draw_sample(Random(f"{split}{index}"), split, list(FAMILIES)[index % COUNT]))
    assert not any(sample.new_pair for sample in drawn["train"])
    seen = {sample.instruction for sample in drawn["train"]}
    again = [sample for sample in drawn["test"] if sample.instruction in seen]
    assert again and all(sample.family == "keep" or sample.new_pair for sample in again)
    assert {sample.source for sample in drawn["train"]}.isdisjoint(sample.source for sample in drawn["test"])


@pytest.mark.parametrize(
    ("family", "what"),
    [
        *(("add", name) for name in ("shape", "colour", "cell")),
        *(("replace", name) for name in ("shape", "colour")),
        *(("recolour", "colour"), ("texture", "texture"), ("move", "cell"), ("resize", "radius")),
    ],
)
def test_near_misses_differ_in_one_thing(family, what):
    """Of the edited object; all values of it that the picture has room for are among them."""
    sample = draw_sample(Random(3), "test", family)
    (new,) = set(sample.target.objects) - set(sample.source.objects)
    rest = set(sample.target.objects) - {new}
    others = [set(other.objects) - rest for other in near_misses(sample.source, sample.target, family)]
    values = {
        getattr(one, what)
        for (one, *more) in filter(None, others)
        if not more and vars(one) | {what: 0} == vars(new) | {what: 0}
    }
    every = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "radius": SIZES.values()}
    cells = set(range(9)) - {one.cell for one in sample.source.objects} | {new.cell}
    assert values == set(every.get(what, cells))
    assert set() in others, "the edited object erased"


def _scene() -> Scene:
    return Scene(PLAIN, tuple(Object(s, c, "plain", n) for n, (s, c) in enumerate(zip(SHAPES[:4], list(COLOURS)[:4]))))


def test_draw_takes_families_in_turn_and_explains_mistakes():
    assert [s.family for s in draw(3, 4, ["move", "keep"])] == ["move", "keep"] * 2
    assert all("two-tone" in s.instruction or "duotone" in s.instruction for s in draw(0, 5, style="duotone"))
    for arguments, message in (
        ({"families": ["melt"]}, "unknown family"),
        ({"style": "cubist"}, "unknown style"),
        ({"style": "duotone", "families": ["add"]}, "belongs to the style family"),
        ({"count": 0}, "from 1 to 1000000"),
        ({"split": "dev"}, "train or test"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**{"seed": 0, "count": 1} | arguments)


# Metrics


@pytest.fixture(scope="module")
def tasks(samples, pictures):
    """What `judge` takes after the edit, with the source as its own reconstruction plus a little noise."""
    source, target = pictures
    region = regions(source, target, [s.family for s in samples])
    others = [render(s.distractors) if s.distractors else source[:0] for s in samples]
    noise = 0.02 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    return source, target, region, others, source + noise


def rows(tasks, count):
    return [part[:count] for part in tasks]


def test_a_perfect_edit_succeeds(tasks):
    scores = judge(tasks[1][:COUNT], *rows(tasks, COUNT))
    for score in scores:
        assert score.success and score.s == pytest.approx(1) and score.balance == pytest.approx(1, abs=1e-3)


def test_no_edit_fails_unless_asked_for(samples, tasks):
    for sample, score in zip(samples, judge(tasks[0][:COUNT], *rows(tasks, COUNT))):
        if sample.family == "keep":
            assert score.success and score.s == score.o == pytest.approx(1)
        else:
            assert not score.success and score.s == score.balance == 0
        if sample.family not in ("keep", "style"):
            assert score.o == pytest.approx(1) and score.psnr == pytest.approx(100)


def test_a_distractor_fails(samples, tasks):
    found = 0
    for n, sample in enumerate(samples):
        one = [part[n : n + 1] for part in tasks]
        for other in tasks[3][n]:
            if changed(other[None], one[1]).any():
                found += 1
                assert not succeeds(other[None], *one), sample.instruction
    assert found > 60


def test_keep_allows_three_decibels(samples, tasks):
    n = next(i for i, s in enumerate(samples) if s.family == "keep")
    one = [part[n : n + 1] for part in tasks]
    noise = one[4] - one[0]
    assert succeeds(one[0] + 1.4 * noise, *one) and not succeeds(one[0] + 1.43 * noise, *one)


def test_half_an_edit_is_at_the_threshold(samples, tasks):
    n = next(i for i, s in enumerate(samples) if s.family == "recolour")
    source, target, region, _, restored = (part[n : n + 1] for part in tasks)
    for share, success in ((0.49, False), (0.51, True)):
        mixed = source + share * (target - source)
        (score,) = judge(mixed, source, target, region, [source[:0]], restored)
        assert score.success == success and score.s == pytest.approx(share, abs=1e-4)


def test_background_figures_are_pie_benchs(samples, tasks):
    source, target, region, _, restored = rows(tasks, COUNT)
    for n, (psnr, ssim) in enumerate(background(restored, source, region)):
        if samples[n].family == "style":
            assert psnr is None and ssim is None
            continue
        mask = 1 - region[n].numpy().astype(np.float64)
        a, b = ((x[n].double().numpy() + 1) / 2 * mask for x in (restored, source))
        assert psnr == pytest.approx(10 * np.log10(1 / ((a - b) ** 2).mean()), abs=1e-3)
        assert 0.5 < ssim < 1
    assert all(ssim in (None, pytest.approx(1)) for _, ssim in background(source, source, region))
    damaged = torch.where(region[:, None], -source, source)
    assert all(psnr in (None, pytest.approx(100)) for psnr, _ in background(damaged, source, region)), "outside only"


def test_distance_and_balance():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    a[0, :, 0, 0], region = 0.5, torch.zeros(2, 4, 4, dtype=torch.bool)
    region[0, 0, :2] = True
    assert distance(a, b, region).tolist() == pytest.approx([0.5 / 2**0.5, 0.0])
    assert Score(True, 0.5, 1.0, None, None).balance == pytest.approx(2 / 3)
    assert Score(False, 0.0, 0.0, None, None).balance == 0


def test_missing_scikit_image_is_one_sentence(monkeypatch, tasks):
    monkeypatch.setitem(__import__("sys").modules, "skimage.metrics", None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        background(tasks[0][:1], tasks[0][:1], tasks[2][:1])


# Files and commands


def test_make_writes_what_training_reads(tmp_path, samples, pictures):
    done = run("make", tmp_path / "set", "--seed", 0, "--count", COUNT)
    assert done.exit_code == 0, done.output
    assert check_pairs(tmp_path / "set").good == COUNT
    lines = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    assert [(line["family"], line["instruction"]) for line in lines] == [(s.family, s.instruction) for s in samples]
    assert open_pairs(tmp_path / "set").stream().__next__().mask.mode == "L"
    for line, sample, pixels in zip(lines, samples, pictures[0]):
        with Image.open(tmp_path / "set" / line["source"]) as image:
            assert image.tobytes() == picture(pixels).tobytes()
        with Image.open(tmp_path / "set" / line["mask"]) as image:
            assert {"keep": (0, 0), "style": (255, 255)}.get(sample.family, (0, 255)) == image.getextrema()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        make(tmp_path / "set", 0, 1)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_make_began_goes_after_an_error(tmp_path, monkeypatch, error):
    written, save = [], making.save_image

    def full(image, path):
        if len(written) == 5:
            raise error
        written.append(path)
        save(image, path)

    monkeypatch.setattr(making, "save_image", full)
    with pytest.raises(type(error)):
        make(tmp_path / "new", 0, 4)
    assert len(written) == 5 and not list(tmp_path.iterdir())
    monkeypatch.setattr(making, "save_image", save)
    assert (make(tmp_path / "new", 0, 4) / "metadata.jsonl").exists()


def test_a_folder_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", denied)
    with pytest.raises(ValueError, match="cannot read the folder .* .Permission denied.; choose another"):
        make(tmp_path, 0, 4)


def test_evaluate_command(network, tmp_path):
    files = ["--model", network[0], "--vae", network[1], "--text-encoder", network[2], "--device", "cpu"]
    names = ["add", "style", "keep"]
    chosen = [part for name in names for part in ("--family", name)]
    out = tmp_path / "report" / "figures.json"
    done = run("evaluate", *files, "--count", 3, *chosen, "--json", out, "--pictures", tmp_path / "p", "--batch", 2)
    assert done.exit_code == 0, done.output
    assert "background" in done.output and "style" in done.output
    report = json.loads(out.read_text())
    assert [row["family"] for row in report["families"]] == [*names, "all"]
    assert report["families"][-1]["count"] == 3 == len(report["samples"])
    assert report["settings"]["guidance"] == SamplingSettings().guidance
    assert [s["index"] for s in report["samples"]] == [0, 1, 2]
    by_name = {row["family"]: row for row in report["families"]}
    assert by_name["style"]["psnr"] is None and by_name["style"]["s"] == by_name["style"]["o"]
    assert sorted(p.stem for p in (tmp_path / "p").iterdir()) == sorted(names)
    with Image.open(tmp_path / "p" / "add.png") as sheet:
        assert sheet.size == (768, 280)
    done = run("evaluate", *files, "--json", out)
    assert isinstance(done.exception, FileExistsError)
    again = evaluate(Editor.load(*network, device="cpu"), draw(0, 3, names), batch=1).to_json(samples=True)
    for one, other in zip(report["samples"], again["samples"]):
        assert one == pytest.approx(other, abs=1e-3), "whatever the batch"


def test_reconstruction_is_its_own_ceiling(network):
    editor = Editor.load(*network, device="cpu")
    (row, _) = evaluate_reconstruction(editor.autoencoder, draw(0, 1, style="duotone")).table()
    assert row["family"] == "style" and row["success"] == row["ceiling_success"] and row["count"] == 1
