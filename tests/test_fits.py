"""Every fit: sizes come back exactly, what is not edited stays bit for bit, and masks and tokens know where it lies."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT
from test_images import noise, one_sentence

from varedit_core import Controls, Editor, Region, SamplingSettings, Tokens
from varedit_core.cli.decode import decode
from varedit_core.defaults import FIT
from varedit_core.demo import demo_files
from varedit_core.fitting import CROP, FITS, FITS_HELP, Fitting, fitting_for
from varedit_core.pictures.edited import Edited
from varedit_core.pictures.images import fit, fit_mask, load_image, restore, seen_mask, unfit_mask

WORDS, SIZE, SETTINGS = "make it sepia", "256", SamplingSettings(guidance=1, temperature=0)
SCENE = Image.open(ROOT / "samples" / "scene.png").convert("RGB").resize((150, 150)).crop((0, 20, 150, 120))
TALL = (100, 150)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load(*demo_files(), device="cpu")


@pytest.fixture(scope="module")
def cropped(editor) -> Edited:
    return editor.run(SCENE, WORDS, size=SIZE, method=CROP, settings=SETTINGS)


def levels(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def beside(fitting: Fitting) -> np.ndarray:
    """Where a picture cannot change."""
    return levels(seen_mask(fitting)) == 0


@pytest.mark.parametrize("method", FITS)
@pytest.mark.parametrize("size", [(60, 41), (41, 60), (50, 50), (1, 7)])
def test_size_and_alpha_stay_and_what_is_not_seen_stays_exactly(size, method):
    picture = load_image(Image.fromarray(noise(*size, 4)))
    fitted = fit(picture, "0.06M", method)
    result = restore(-fitted.pixels, fitted)
    assert result.size == size and result.getchannel("A").tobytes() == picture.alpha.tobytes()
    kept, changed = levels(picture.rgb), levels(result)[..., :3]
    unseen = beside(fitted.fitting)
    assert unseen.any() == (method == CROP and size[0] != size[1]) == bool(fitted.fitting.told)
    assert np.array_equal(kept[unseen], changed[unseen])
    assert abs(kept - changed)[~unseen].mean() > 20


@pytest.mark.parametrize("method", FITS)
def test_what_lies_beyond_the_border(method):
    """The parts of the canvas that no resize mixes, beside what NumPy pads."""
    picture = Image.fromarray(noise(256, 100))
    seen = levels((fit(load_image(picture), "0.06M", method).pixels[0] * 127.5 + 127.5).round().permute(1, 2, 0))
    below = {"edge": "edge", "mirror": "symmetric"}.get(method)
    if below:
        assert np.array_equal(seen, np.pad(levels(picture), ((0, 156), (0, 0), (0, 0)), below))
    elif method == CROP:
        enlarged = picture.crop((78, 0, 178, 100)).resize((256, 256), Image.Resampling.LANCZOS)
        assert np.array_equal(seen, levels(enlarged))
    elif method != "aspect":
        assert (seen[140:] == 255).all() and np.array_equal(seen[:100], levels(picture))


def test_the_square_lies_in_the_middle():
    for size, box in {(9, 4): (2, 0, 6, 4), TALL: (0, 25, 100, 125), (3, 4): (0, 0, 3, 3), (5, 5): None}.items():
        fitting = fitting_for(size, "0.06M", CROP)
        assert fitting.box == box and fitting.size == size
        assert fitting.seen.size == fitting.padded_size == (min(size),) * 2
    assert str(fitting_for((9, 4), "0.06M", CROP)) == "9x4 (its middle 4x4)"
    assert fitting_for((20000, 1), "0.06M", CROP).padded_size == (1, 1), "the one fit that needs no canvas"
    with pytest.raises(ValueError, match="20000x20000; make it smaller, or choose the fit crop") as error:
        fitting_for((20000, 1), "0.06M", FIT)
    assert one_sentence(error)


def test_masks_are_cut_with_the_picture():
    fitting = fitting_for(TALL, "0.06M", CROP)
    mask = Image.new("L", TALL)
    mask.paste(255, (0, 0, 100, 75))
    seen = fit_mask(mask, fitting)[0]
    assert (seen[:127] == 1).all() and not seen[129:].any()
    back = levels(unfit_mask(seen, fitting))
    assert back.shape == TALL[::-1] and not back[:25].any() and (back[25:74] == 255).all() and not back[77:].any()


@pytest.mark.parametrize("method", [CROP, "mirror"])
def test_tokens_know_their_fit_and_are_gone_on_from(editor, cropped, method, tmp_path):
    other = dict(size=SIZE, method=method, settings=SETTINGS)
    edited = cropped if method == CROP else editor.run(SCENE, WORDS, **other)
    path, shown, out = (tmp_path / name for name in ("a.safetensors", "picture.png", "out.png"))
    edited.tokens.save(path)
    tokens = Tokens.load(path)
    assert tokens.fitting == edited.tokens.fitting == fitting_for(SCENE.size, "0.06M", method)
    assert edited.pictures[0].size == SCENE.size
    unseen = beside(tokens.fitting)
    assert np.array_equal(levels(edited.pictures[0])[unseen], levels(SCENE)[unseen])
    SCENE.save(shown)
    decode(path, None, out, 0, False, "cpu", shown if method == CROP else None, False)
    assert load_image(out).rgb.tobytes() == edited.pictures[0].tobytes()
    if method == CROP:
        again = editor.run(tokens, WORDS, settings=SETTINGS)
        assert again.tokens.fitting == tokens.fitting
        assert (levels(again.pictures[0])[unseen] == 255).all(), "tokens do not know what was beside them"


def test_the_crop_takes_what_other_fits_take(editor, caplog):
    """Variations, masks, auto masks and maps of a picture of which a part is edited, and one sentence of it."""
    mask, size = Image.new("L", TALL), TALL
    mask.paste(255, (0, 0, 100, 60))
    picture = Image.fromarray(noise(*size, 4))
    more = dict(size=SIZE, method=CROP, settings=SETTINGS)
    with caplog.at_level(logging.WARNING):
        masked = editor.run(picture, WORDS, mask=mask, explain=True, **more)
        found = editor.run(picture, WORDS, controls=Controls(auto_mask=0.5), **more)
    assert sum("only the 100x100 in the middle of the 100x150" in line for line in caplog.messages) <= 1
    unseen, black = beside(fitting_for(size, "0.06M", CROP)), levels(mask) == 0
    for result, kept in ((masked, unseen | black), (found, unseen)):
        (one,) = result.pictures
        assert one.size == size and np.array_equal(levels(one)[..., 3], levels(picture)[..., 3])
        assert np.array_equal(levels(one)[kept][:, :3], levels(load_image(picture).rgb)[kept])
    for one in (*masked.changes, *masked.certainty, *found.masks):
        assert one.size == size and not levels(one)[unseen].any()
    assert (levels(masked.pictures[0]) != levels(picture))[~(unseen | black)].any()


def test_a_mask_beside_the_square_is_one_sentence(editor):
    mask = Image.new("L", TALL)
    mask.paste(255, (0, 0, 100, 20))
    picture, more = Image.new("RGB", TALL), dict(size=SIZE, method=CROP)
    for given, what in (
        (dict(mask=mask), "the mask marks nothing in the middle"),
        (dict(regions=[Region(WORDS), Region(WORDS, mask)]), "the mask of region 2 marks nothing in the middle"),
    ):
        with pytest.raises(ValueError, match=what) as error:
            editor.run(picture, () if "regions" in given else WORDS, **given, **more)
        assert one_sentence(error)


def test_tokens_of_another_part_are_not_gone_on_from(editor, cropped):
    drawn = cropped.tokens
    with pytest.raises(ValueError, match="the tokens were made with another fit"):
        editor.run(SCENE, WORDS, size=SIZE, settings=SETTINGS, given=drawn.first(3))
    uncut = replace(drawn, fitting=fitting_for(SCENE.size, "0.06M", FIT))
    with pytest.raises(ValueError, match="tokens have the size and fit they were made with"):
        editor.run(uncut, WORDS, method=CROP, size=SIZE)
    whole = editor.run(SCENE, WORDS, size=SIZE, method=CROP, settings=SETTINGS, given=drawn.first(3)).tokens
    assert torch.equal(whole.total(), drawn.total())


def test_the_table_is_what_options_and_nodes_say():
    assert FIT in FITS and list(FITS)[:3] == ["square", "aspect", "published"], "saved graphs and settings name them"
    for name, one in FITS.items():
        assert f"{name} {one.help}" in FITS_HELP and not one.help.endswith(".")
