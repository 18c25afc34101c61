"""The controls on the command line: files in, files out, and what does not go together."""

import sys

import pytest
from PIL import Image, ImageChops
from typer.testing import CliRunner

from varedit_core.cli.app import app, main
from varedit_core.demo import SAMPLES
from varedit_core.sampling.tokens import Tokens

SCENE = SAMPLES / "scene.png"
STAR = "recolour the black star in purple"
SQUARE = "in the bottom centre, add a pink square"


def varedit(*arguments):
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with an edit, its tokens and its maps."""
    folder = tmp_path_factory.mktemp("edit")
    varedit("edit", SCENE, STAR, "-o", folder / "a.png", "--save-tokens", folder / "a.safetensors", "--maps", folder)
    mask = Image.new("L", (256, 256))
    mask.paste(255, (160, 0, 256, 90))
    mask.save(folder / "mask.png")
    return folder


def outside(path, mask, other=SCENE):
    """Whether two pictures are equal where a mask is black."""
    black = Image.open(mask).convert("L").point(lambda v: 255 * (v == 0))
    difference = ImageChops.difference(Image.open(path).convert("RGB"), Image.open(other).convert("RGB"))
    return Image.composite(difference, Image.new("RGB", difference.size), black).getbbox() is None


def test_an_edit_leaves_tokens_and_maps(begun):
    assert (begun / "a.safetensors").stat().st_size < 10_000
    changed, sure = (Image.open(begun / f"a-{kind}.png") for kind in ("changed", "certainty"))
    assert changed.size == sure.size == (256, 256)
    assert {level for _, level in changed.getcolors()} == {0, 255}, "a mask for other edits"
    left, top, right, bottom = changed.getbbox()
    assert left > 180 and bottom < 70, "the star"


def test_tokens_are_decoded_again(begun, tmp_path):
    varedit("decode", begun / "a.safetensors", "-o", tmp_path / "again.png")
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(begun / "a.png").tobytes()
    varedit("decode", begun / "a.safetensors", "--scales", 3, "-o", tmp_path / "draft.png")
    assert Image.open(tmp_path / "draft.png").tobytes() != Image.open(begun / "a.png").tobytes()


def test_an_edit_is_finished_from_a_scale_and_branches(begun, tmp_path):
    more = ("--begun", begun / "a.safetensors", "--from-scale", 5)
    varedit("edit", SCENE, STAR, "-o", tmp_path / "b.png", *more)
    assert Image.open(tmp_path / "b.png").tobytes() == Image.open(begun / "a.png").tobytes()
    varedit("edit", SCENE, STAR, "-o", tmp_path / "c.png", *more, "--variations", 2, "--temperature", 2)
    one, two = (Image.open(tmp_path / f"c-{number}.png").tobytes() for number in (1, 2))
    assert one != two


def test_an_edit_goes_on_from_tokens(begun, tmp_path):
    varedit("edit", begun / "a.safetensors", SQUARE, "-o", tmp_path / "b.png", "--mask", begun / "mask.png")
    assert outside(tmp_path / "b.png", begun / "mask.png", begun / "a.png")
    varedit("edit", begun / "a.safetensors", SQUARE, "-o", tmp_path / "c.png", "--strength", 0)
    assert Image.open(tmp_path / "c.png").tobytes() == Image.open(begun / "a.png").tobytes()


@pytest.mark.parametrize("option", ["--mask", "--crop", "--protect"])
def test_masks_hold_the_rest(begun, tmp_path, option):
    mask = begun / "mask.png"
    inverted = tmp_path / "inverted.png"
    ImageChops.invert(Image.open(mask)).save(inverted)
    given = {
        "--mask": ("--mask", mask),
        "--crop": ("--mask", mask, "--crop", 0.3),
        "--protect": ("--protect", inverted),
    }
    varedit("edit", SCENE, STAR, "-o", tmp_path / "b.png", *given[option], "--seam", 3)
    assert outside(tmp_path / "b.png", mask) and not outside(tmp_path / "b.png", inverted)


def test_an_extended_picture_keeps_its_middle(tmp_path):
    varedit("edit", SCENE, "make the background cyan", "-o", tmp_path / "b.png", "--extend", "32,0,10%,0")
    found = Image.open(tmp_path / "b.png")
    assert found.size == (256 + 32 + 26, 256)
    middle = (32 + 16, 0, 32 + 256 - 16, 256)  # the overlap is repainted
    inner = (16, 0, 240, 256)
    assert ImageChops.difference(found.crop(middle), Image.open(SCENE).convert("RGB").crop(inner)).getbbox() is None


def test_regions_and_presets(begun, tmp_path):
    below = tmp_path / "below.png"
    Image.open(begun / "mask.png").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(below)
    varedit(
        "edit",
        SCENE,
        "--region",
        f"{STAR}@{begun / 'mask.png'}",
        "--region",
        f"{SQUARE}@{below}",
        "--preset",
        "faithful",
        "-o",
        tmp_path / "b.png",
        "--save-tokens",
        tmp_path / "b.safetensors",
    )
    assert not outside(tmp_path / "b.png", below)
    assert Tokens.load(tmp_path / "b.safetensors").images == 1


def test_the_best_of_several_and_an_auto_mask(tmp_path):
    varedit(
        "edit",
        SCENE,
        SQUARE,
        "-o",
        tmp_path / "b.png",
        "--auto-mask",
        0.5,
        "--best-of",
        3,
        "--best-at",
        2,
        "--score",
        "near",
    )
    found = ImageChops.difference(Image.open(tmp_path / "b.png"), Image.open(SCENE).convert("RGB"))
    assert found.crop((0, 0, 256, 150)).getbbox() is None, "exactly the picture, but for the square"
    assert found.getbbox() is not None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--mask", SCENE, "--protect", SCENE], "opposites"),
        (["--region", f"a@{SCENE}"], "not both"),
        (["--crop", "0.2"], "give a --mask"),
        (["--extend", "10", "--mask", SCENE], "a mask of its own"),
        (["--from-scale", "3"], "--begun"),
        (["--strength", "2"], "strength must be a number from 0 to 1"),
        (["--best-of", "2", "--score", "nice"], "choose one of likelihood"),
        (["--preset", "bold"], "choose one of balanced"),
        (["--guidance", "3,2,1,1,1,1,1", "--preset", "faithful"], "one number"),
        (["--save-tokens", "a.png"], "its suffix must be .safetensors"),
        (["--begun", SCENE], "not a file of tokens"),
        (["--source-attention", "0.5", "--window", "0.2"], "do not go together"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(monkeypatch, capsys, tmp_path, more, said):
    monkeypatch.setattr(
        sys, "argv", ["varedit", "edit", str(SCENE), STAR, "-o", str(tmp_path / "x.png"), *map(str, more)]
    )
    with pytest.raises(SystemExit):
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and not (tmp_path / "x.png").exists()


def test_a_region_without_words_and_tokens_that_cannot_be_cropped(monkeypatch, capsys, begun, tmp_path):
    for arguments, said in (
        ([SCENE, "--region", f"@{begun / 'mask.png'}"], "has no instruction"),
        ([begun / "a.safetensors", STAR, "--extend", "10"], "want a picture"),
    ):
        monkeypatch.setattr(sys, "argv", ["varedit", "edit", *map(str, arguments), "-o", str(tmp_path / "x.png")])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err
