"""Tokens and their files: no size in a file is believed, all in it comes back, a VAE that does not fit is named."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageCms
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import GOLDEN
from typer.testing import CliRunner

from varedit_core import Controls, Editor, SamplingSettings
from varedit_core.cli.app import app, main
from varedit_core.defaults import PUBLISHED_VAES
from varedit_core.demo import SAMPLES, demo_files
from varedit_core.files.token_header import MAX_HEADER
from varedit_core.files.tokens import DIGEST, MAX_CHAIN, MAX_EDITS, load_tokens, save_tokens
from varedit_core.pictures.images import Fitting
from varedit_core.sampling.results import joined
from varedit_core.sampling.tokens import LOST, Tokens
from varedit_core.tokenizer.schedule import TABLES, Schedule, schedule_for

SCENE = SAMPLES / "scene.png"
SQUARE = "in the bottom centre, add a pink square"
SMALL = schedule_for("0.06M")


def drawn(
    seed: int = 0, schedule: Schedule = SMALL, images: int = 2, channels: int = 3, patch: int = 2, scales: int = 99
) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, h * patch, w * patch) for h, w in schedule.grids[:scales]]
    bits = tuple(torch.rand(shape, generator=generator) > 0.5 for shape in shapes)
    height, width = schedule.grids[-1]
    return Tokens(schedule, bits, (height * patch, width * patch))


def held(seed: int = 0, **more) -> Tokens:
    """An edit of an edit with an auto mask, of a picture of 300x230."""
    tokens = drawn(seed, **more)
    free = torch.rand(tokens.images, 1, *tokens.grid, generator=torch.Generator().manual_seed(seed)) > 0.5
    under = replace(drawn(seed + 1, **more), auto_mask=0.25)
    return replace(tokens, free=free, under=under, fitting=Fitting(SMALL, (300, 300), (300, 230)), auto_mask=0.5)


def same(a: Tokens | None, b: Tokens | None) -> bool:
    if a is None or b is None:
        return a is b
    masks = (a.free is b.free is None) or torch.equal(a.free, b.free)
    facts = [(x.schedule, x.grid, x.fitting, x.auto_mask, x.lost, len(x)) for x in (a, b)]
    return facts[0] == facts[1] and all(map(torch.equal, a.bits, b.bits)) and masks and same(a.under, b.under)


KINDS = {
    "plain": drawn(),
    "held": held(),
    "draft": drawn(scales=3),
    "a patch of one": drawn(patch=1),
    "held of a draft": replace(held(), under=drawn(1, scales=4)),
    "of a picture with more": replace(drawn(), lost=("transparency", "details")),
    "one mask for all": replace(held(), free=torch.ones(1, 3, 32, 32, dtype=torch.bool)),
    **{f"ratio {ratio}": drawn(schedule=Schedule(ratio, TABLES[ratio][:9])) for ratio in TABLES},
}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_back(tmp_path, kind):
    KINDS[kind].save(tmp_path / "a.safetensors")
    assert same(Tokens.load(tmp_path / "a.safetensors"), KINDS[kind])


def facts_of(path) -> dict:
    """What a file says, as one of before there were digests: whoever lies can leave it out."""
    with safe_open(path, "pt") as file:
        return without(json.loads(file.metadata()["tokens"]), DIGEST)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An honest file: its tensors and facts."""
    path = tmp_path_factory.mktemp("tokens") / "a.safetensors"
    held().save(path)
    return load_file(path), facts_of(path)


def told(facts: dict, **lies) -> dict:
    return {**copy.deepcopy(facts), **lies}


def without(facts: dict, name: str) -> dict:
    return {key: value for key, value in facts.items() if key != name}


def shapes(facts: dict, k: int, *shape) -> dict:
    lie = told(facts)
    lie["shapes"][k] = list(shape)
    return lie


def beneath(facts: dict, **lies) -> dict:
    return told(facts, under=told(facts["under"], **lies))


def chain(facts: dict, depth: int) -> dict:
    for _ in range(depth):
        facts = told(facts, under=facts)
    return facts


def sized(padded, size) -> dict:
    return {"fitting": {"padded_size": padded, "size": size}}


ONE = {"scales": 13, "grid": [1024, 1024], "shapes": [[2, 250, 16, 16]], "fitting": None}
LIES = {
    "no table": (lambda f: told(f, ratio=1.1), "there is no scale table for the ratio 1.1"),
    "a ratio that is a list": (lambda f: told(f, ratio=[1]), "no scale table"),
    "a ratio that is none": (lambda f: told(f, ratio=float("nan")), "no scale table"),
    "true for a ratio": (lambda f: told(f, ratio=True), "no scale table"),
    "no scales": (lambda f: told(f, scales=0), "its scales are 0 where the table has 13"),
    "more scales than the table": (lambda f: told(f, scales=14), "its scales are 14"),
    "a part of a scale": (lambda f: told(f, scales=6.5), "its scales are 6.5"),
    "scales in words": (lambda f: told(f, scales="7"), "its scales are '7'"),
    "a huge grid": (lambda f: told(f, grid=[10**9, 10**9]), "is none of the latents of 16x16 tokens"),
    "a grid of another shape": (lambda f: told(f, grid=[32, 16]), "is none of the latents"),
    "a grid between": (lambda f: told(f, grid=[48, 48]), "is none of the latents"),
    "a grid of one side": (lambda f: told(f, grid=[32]), "is none of the latents"),
    "a negative grid": (lambda f: told(f, grid=[-32, -32]), "is none of the latents"),
    "a grid of fractions": (lambda f: told(f, grid=[32.0, 32.0]), "is none of the latents"),
    "a grid of another patch": (lambda f: told(f, grid=[64, 64]), "scale 1 has the shape"),
    "no shapes": (lambda f: told(f, shapes=[]), "its shapes are not of 1 to 7 scales"),
    "more shapes than scales": (lambda f: told(f, shapes=f["shapes"] * 2), "its shapes are not of 1 to 7 scales"),
    "shapes of fewer scales": (lambda f: told(f, scales=6), "its grid [32, 32] is none of the latents of 12x12 tokens"),
    "a scale of another size": (
        lambda f: shapes(f, 3, 2, 3, 999, 999),
        "scale 4 has the shape [2, 3, 999, 999] where its grid is 12x12",
    ),
    "other edits in a scale": (lambda f: shapes(f, 2, 10**9, 3, 8, 8), "scale 3 has the shape"),
    "other bits in a scale": (lambda f: shapes(f, 0, 2, 10**9, 2, 2), "scale 2 has the shape"),
    "no edits": (lambda f: told(f, shapes=[[0, 3, *s[2:]] for s in f["shapes"]]), "scale 1 has the shape [0, 3"),
    "a shape of true": (lambda f: shapes(f, 0, True, 3, 2, 2), "scale 1 has the shape"),
    "a shape that is none": (lambda f: told(f, shapes=[7] * 7), "scale 1 has the shape 7"),
    "many edits": (
        lambda f: told(f, fitting=None, shapes=[[MAX_EDITS + 1, 3, *s[2:]] for s in f["shapes"]]),
        "it has 4097 edits where at most 4096 are read",
    ),
    "many bits": (
        lambda f: told(f, fitting=None, shapes=[[2, 257, *s[2:]] for s in f["shapes"]]),
        "it has 257 bits a position where at most 256 are read",
    ),
    "a huge sum": (
        lambda f: told(without(without(f, "free"), "under"), **ONE),
        "its sum has 524288000 numbers where at most 67108864 are read",
    ),
    "a huge canvas": (lambda f: told(f, **sized([10**6, 10**6], [10**6, 10**6])), "of more than 268435456 pixels"),
    "a canvas beyond numbers": (lambda f: told(f, **sized([10**400, 1], [1, 1])), "of more than 268435456 pixels"),
    "a picture beyond its canvas": (
        lambda f: told(f, **sized([300, 300], [10**6, 10**6])),
        "of more than 268435456 pixels",
    ),
    "a picture larger than its canvas": (
        lambda f: told(f, **sized([300, 300], [301, 230])),
        "its picture of 301x230 does not fit a canvas of 300x300",
    ),
    "a canvas of another shape": (
        lambda f: told(f, **sized([600, 300], [300, 230])),
        "does not fit a canvas of 600x300",
    ),
    **{
        f"a part {where}": (lambda f, box=box: told(f, fitting={**sized([4, 4], [9, 4])["fitting"], "box": box}), what)
        for where, box, what in (
            ("that is none", 7, "the part of its picture is 7, no left"),
            ("of three sides", [0, 0, 4], "no left, top, right and bottom"),
            ("of fractions", [0.5, 0, 4.5, 4], "no left, top, right and bottom"),
            ("outside", [6, 0, 10, 4], "the part of its picture [6, 0, 10, 4] does not lie in 9x4"),
            ("turned round", [4, 0, 0, 4], "does not lie in 9x4"),
            ("that is all", [0, 0, 9, 4], "does not lie in 9x4"),
            ("of another shape", [0, 0, 5, 4], "its picture of 5x4 does not fit a canvas of 4x4"),
        )
    },
    "a picture of nothing": (lambda f: told(f, **sized([300, 300], [0, 230])), "its picture has no size"),
    "half a fitting": (lambda f: told(f, fitting={"size": [300, 230]}), "its picture has no size"),
    "a fitting that is none": (lambda f: told(f, fitting=3), "its picture has no size: 3"),
    "free in another shape": (lambda f: told(f, free=[2, 1, 64, 64]), "it is free in the shape [2, 1, 64, 64]"),
    "free of other edits": (lambda f: told(f, free=[3, 1, 32, 32]), "it is free in the shape"),
    "free of other bits": (lambda f: told(f, free=[2, 2, 32, 32]), "it is free in the shape"),
    "held to nothing": (lambda f: without(f, "under"), "it does not say what its tokens are of"),
    "held nowhere": (lambda f: without(f, "free"), "it is free in the shape None"),
    "held before its end": (lambda f: told(f, shapes=f["shapes"][:5]), "it is held to a source before its last scale"),
    "a source of another size": (
        lambda f: beneath(f, scales=10, grid=[64, 64], shapes=[[2, 3, 2 * h, 2 * w] for h, w in TABLES[1.0][:10]]),
        "its source has other sizes than the edit",
    ),
    "a source of other bits": (
        lambda f: beneath(f, shapes=[[2, 4, *s[2:]] for s in f["shapes"]]),
        "its source has other sizes than the edit",
    ),
    "a source that lies": (lambda f: beneath(f, **sized([10**6, 10**6], [9, 9])), "of more than 268435456 pixels"),
    "a source that is none": (lambda f: told(f, under=[]), "it does not say what its tokens are of"),
    "a long chain": (lambda f: chain(f, MAX_CHAIN), "it is a chain of more than 100 edits"),
    "too much of an auto mask": (lambda f: told(f, auto_mask=1.5), "its auto mask is 1.5, not a number from 0 to 1"),
    "an auto mask that is none": (lambda f: told(f, auto_mask=float("nan")), "its auto mask is nan"),
    "something lost that is none": (
        lambda f: told(f, lost=["weight"]),
        "what its picture had is ['weight'], not some of",
    ),
    "something lost in words": (lambda f: told(f, lost="details"), "what its picture had is 'details'"),
    "something lost twice": (lambda f: told(f, lost=["details", "details"]), "what its picture had is"),
    "an auto mask in words": (lambda f: told(f, auto_mask="half"), "its auto mask is 'half'"),
    **{
        f"no {name}": (lambda f, name=name: without(f, name), f"it has no {name}")
        for name in ("ratio", "scales", "grid", "fitting", "shapes")
    },
    "a list": (lambda f: [f], "it does not say what its tokens are of"),
}


def refused(path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        Tokens.load(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400 and text.startswith(f"{path} is not a file of tokens (")
    assert text.endswith("; save one with VAREdit Save Tokens or varedit edit --save-tokens")
    assert all(word in text for word in words), text


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_metadata_is_one_sentence_and_costs_nothing(file, tmp_path, monkeypatch, lie):
    tensors, facts = file
    make, words = LIES[lie]
    metadata = {"format": "varedit.tokens", "tokens": json.dumps(make(facts))}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    monkeypatch.setattr(np, "unpackbits", lambda *a, **kw: pytest.fail("unpacked before it was checked"))
    refused(tmp_path / "a.safetensors", words)


def test_the_honest_file_loads(file, tmp_path):
    tensors, facts = file
    save_file(tensors, tmp_path / "a.safetensors", {"format": "varedit.tokens", "tokens": json.dumps(facts)})
    assert same(Tokens.load(tmp_path / "a.safetensors"), held())


TENSORS = {
    "cut off": lambda t: t | {"scale.03": t["scale.03"][:-1]},
    "too long": lambda t: t | {"scale.03": torch.cat([t["scale.03"], t["scale.03"]])},
    "numbers": lambda t: t | {"scale.03": t["scale.03"].float()},
    "rows": lambda t: t | {"scale.03": t["scale.03"][:, None].clone()},
    "missing": lambda t: without(t, "scale.03"),
    "no mask": lambda t: without(t, "free"),
    "no source": lambda t: without(t, "under.scale.00"),
}


@pytest.mark.parametrize("lie", TENSORS)
def test_tensors_that_are_not_what_the_metadata_says_are_one_sentence(file, tmp_path, lie):
    tensors, facts = file
    metadata = {"format": "varedit.tokens", "tokens": json.dumps(facts)}
    save_file(TENSORS[lie](tensors), tmp_path / "a.safetensors", metadata)
    refused(
        tmp_path / "a.safetensors",
        "where" if lie not in ("missing", "no mask", "no source") else "does not contain tensor",
    )


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null"])
def test_metadata_that_cannot_be_read_is_one_sentence(file, tmp_path, text):
    save_file(file[0], tmp_path / "a.safetensors", {"format": "varedit.tokens", "tokens": text})
    refused(tmp_path / "a.safetensors")
    save_file(file[0], tmp_path / "a.safetensors", {"format": "varedit.tokens"})
    refused(tmp_path / "a.safetensors")


def test_what_would_not_be_read_is_not_written(tmp_path):
    many = drawn(images=MAX_EDITS + 1, channels=1, patch=1, scales=1)
    deep = held()
    for _ in range(MAX_CHAIN):
        deep = replace(held(), under=deep)
    for tokens, words in (
        (many, "it has 4097 edits where at most 4096 are read"),
        (deep, "a chain of more than 100 edits"),
        (replace(held(), under=drawn(images=1)), "its source has other sizes"),
        (replace(drawn(), fitting=Fitting(SMALL, (10, 10), (20, 20))), "does not fit a canvas"),
    ):
        with pytest.raises(ValueError, match=f"these tokens cannot be saved .*{words}"):
            save_tokens(tokens, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_notes_are_kept_and_change_nothing(tmp_path):
    tokens, notes = drawn(), {"prompt": json.dumps({"1": {"class_type": "x", "text": "varedit.tokens"}})}
    tokens.save(tmp_path / "a.safetensors", notes=notes | {"tokens": "none", "format": "other"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata().items() >= notes.items()
    assert same(load_tokens(tmp_path / "a.safetensors"), tokens)
    with pytest.raises(ValueError, match="the notes of these tokens are too long"):
        tokens.save(tmp_path / "b.safetensors", notes={"prompt": "x" * MAX_HEADER})
    assert not (tmp_path / "b.safetensors").exists()


def test_older_files_have_no_auto_mask_or_note_it_beside_the_tokens(tmp_path, file):
    tensors, facts = file
    old = without(facts, "auto_mask")
    metadata = {"format": "varedit.tokens", "tokens": json.dumps(old)}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert load_tokens(tmp_path / "a.safetensors").auto_mask == 0
    save_file(tensors, tmp_path / "a.safetensors", metadata | {"auto_mask": "0.5"})
    assert load_tokens(tmp_path / "a.safetensors").auto_mask == 0.5
    save_file(tensors, tmp_path / "a.safetensors", metadata | {"auto_mask": "7"})
    refused(tmp_path / "a.safetensors", "its auto mask is 7.0")


def test_the_auto_mask_goes_where_the_tokens_go():
    tokens = held()
    assert tokens.of([1]).auto_mask == tokens.to("cpu").auto_mask == tokens.first(7).auto_mask == 0.5
    assert tokens.first(6).auto_mask == 0 and tokens.first(6).free is None, "a draft is shown whole"
    other = held(3)
    assert joined([tokens, other]).auto_mask == 0.5 and joined([tokens, replace(other, auto_mask=0.1)]).auto_mask == 0
    assert torch.equal(joined([tokens, other]).total(), torch.cat([tokens.total(), other.total()]))


def test_a_vae_that_does_not_fit_is_named():
    tokens = drawn()
    tokens.check_vae(3, 8)
    for vae, words in (((4, 8), "takes 4 channels on 32x32"), ((3, 16), "takes 3 channels on 16x16")):
        with pytest.raises(
            ValueError, match=f"^the tokens are of 3 bits on a grid of 32x32 but the VAE {words}; load the VAE of"
        ):
            tokens.check_vae(*vae)


# The command line and the library, with the demo model.


def varedit(*arguments) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def sentence(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["varedit", *map(str, arguments)])
    with pytest.raises(SystemExit):
        main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A folder with a picture, an edit of it with an auto mask in two variations, and the tokens."""
    folder = tmp_path_factory.mktemp("edited")
    Image.open(SCENE).convert("RGB").resize((300, 230)).save(folder / "a.png")
    tokens = ("--auto-mask", 0.5, "--variations", 2, "--save-tokens", folder / "t.safetensors")
    varedit("edit", folder / "a.png", SQUARE, "-o", folder / "e.png", *tokens)
    return folder


def pixels(path) -> bytes:
    return Image.open(path).tobytes()


def test_decoded_tokens_are_composited_as_the_edit_was(edited, tmp_path):
    assert Tokens.load(edited / "t.safetensors").auto_mask == 0.5
    said = varedit("decode", edited / "t.safetensors", "--image", edited / "a.png", "-o", tmp_path / "d.png")
    assert (
        all(pixels(tmp_path / f"d-{n}.png") == pixels(edited / f"e-{n}.png") for n in (1, 2)) and "--image" not in said
    )
    said = varedit("decode", edited / "t.safetensors", "-o", tmp_path / "whole.png")
    assert pixels(tmp_path / "whole-1.png") != pixels(edited / "e-1.png")
    assert "the edit has found its own mask; name the picture that was edited with --image" in said


def test_a_decoded_edit_keeps_the_pictures_alpha(edited, tmp_path):
    seen = Image.open(edited / "a.png")
    seen.putalpha(Image.linear_gradient("L").resize(seen.size))
    seen.save(tmp_path / "alpha.png")
    varedit("decode", edited / "t.safetensors", "--image", tmp_path / "alpha.png", "-o", tmp_path / "d.png")
    shown = Image.open(tmp_path / "d-1.png")
    assert shown.mode == "RGBA" and shown.getchannel("A").tobytes() == seen.getchannel("A").tobytes()
    varedit(
        "decode", edited / "t.safetensors", "--scales", 3, "--image", tmp_path / "alpha.png", "-o", tmp_path / "x.png"
    )
    draft = Image.open(tmp_path / "x-1.png")
    varedit("decode", edited / "t.safetensors", "--scales", 3, "-o", tmp_path / "y.png")
    assert ImageChops.difference(draft.convert("RGB"), Image.open(tmp_path / "y-1.png")).getbbox() is None


def test_a_picture_that_does_not_belong_to_the_tokens_is_one_sentence(edited, tmp_path, monkeypatch, capsys):
    decode = ("decode", edited / "t.safetensors", "-o", tmp_path / "d.png", "--image")
    said = sentence(monkeypatch, capsys, *decode, SCENE)
    assert said == f"{SCENE} is 256x256 but the edit is of a picture of 300x230; name the one that was edited"
    said = sentence(monkeypatch, capsys, *decode, edited / "a.png", "--scales", 3)
    assert said == "these tokens tell of no auto mask, so nothing of --image would show; leave it out"
    assert not list(tmp_path.iterdir())


def test_tokens_of_another_model_are_one_sentence_that_names_the_vae(edited, tmp_path, monkeypatch, capsys):
    """Whichever command reads them."""
    drawn(images=1, channels=14).save(tmp_path / "t.safetensors")
    words = " of 14 bits on a grid of 32x32 but the VAE takes 16 channels on 32x32; "
    said = sentence(monkeypatch, capsys, "decode", tmp_path / "t.safetensors")
    vae = f"({PUBLISHED_VAES['8B']} for 8B)"
    assert said == f"the tokens of t.safetensors are{words}name the VAE of the model that made them with --vae {vae}"
    said = sentence(monkeypatch, capsys, "edit", tmp_path / "t.safetensors", SQUARE)
    assert said == f"the tokens are{words}load the VAE of the model that made them {vae}"
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    varedit("decode", tmp_path / "t.safetensors", "--vae", GOLDEN / "patchify_256.safetensors")
    assert Image.open(tmp_path / "t.png").size == (256, 256)
    said = sentence(
        monkeypatch, capsys, "decode", edited / "t.safetensors", "--vae", GOLDEN / "patchify_256.safetensors"
    )
    assert said.endswith("the VAE takes 14 channels on 32x32; name the VAE of the model that made them with --vae")


def test_a_batch_of_edits_of_a_rich_picture_goes_on_and_what_is_lost_is_told(tmp_path):
    """Two variations of a picture with alpha, a profile and a text: each is edited on, told of, and has all again when
    the picture is named."""
    rich, profile, text = (
        Image.open(SCENE).convert("RGB"),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
        PngInfo(),
    )
    rich.putalpha(Image.linear_gradient("L"))
    text.add_text("Author", "A")
    rich.save(tmp_path / "a.png", icc_profile=profile.tobytes(), pnginfo=text)
    tokens, words = ("--save-tokens", tmp_path / "t.safetensors"), "the picture had more than its tokens hold ("
    assert words not in varedit(
        "edit", tmp_path / "a.png", SQUARE, "-o", tmp_path / "e.png", "--variations", 2, *tokens
    )
    assert Tokens.load(tmp_path / "t.safetensors").lost == LOST
    further = ("--save-tokens", tmp_path / "u.safetensors")
    said = varedit("edit", tmp_path / "t.safetensors", "make it sepia", "-o", tmp_path / "f.png", *further)
    assert said.count(words + ", ".join(LOST)) == 1 and "varedit decode --image" in said
    assert Tokens.load(tmp_path / "u.safetensors").lost == LOST and Tokens.load(tmp_path / "u.safetensors").images == 2
    first, second = (Image.open(tmp_path / f"f-{n}.png") for n in (1, 2))
    assert first.mode == second.mode == "RGB" and not (tmp_path / "f.png").exists()
    said = varedit("decode", tmp_path / "u.safetensors", "-o", tmp_path / "g.png")
    assert (
        said.count(words) == 1 and "name it with --image" in said and pixels(tmp_path / "g-2.png") == second.tobytes()
    )
    said = varedit("decode", tmp_path / "u.safetensors", "-o", tmp_path / "h.png", "--image", tmp_path / "a.png")
    whole = Image.open(tmp_path / "h-2.png")
    assert words not in said and whole.convert("RGB").tobytes() == second.tobytes()
    assert whole.getchannel("A").tobytes() == rich.getchannel("A").tobytes()
    assert whole.info["icc_profile"] == profile.tobytes() and whole.text["Author"] == "A"
    assert len({(tmp_path / name).stat().st_mode for name in ("a.png", "f-1.png", "h-2.png", "u.safetensors")}) == 1


def test_the_library_gives_tokens_their_auto_mask():
    editor, settings = Editor.load(*demo_files(), device="cpu"), SamplingSettings(guidance=2.0)
    first = editor.run(SCENE, SQUARE, size="0.06M", settings=settings, controls=Controls(auto_mask=0.5))
    assert first.tokens.auto_mask == 0.5
    second = editor.run(first, "recolour the black star in purple", settings=settings)
    assert second.tokens.auto_mask == 0, "an edit of an edit has its own"
