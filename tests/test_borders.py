"""Nothing of what surrounds a picture shows in it: white padding, hidden colours, room that is too small."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import noise, one_sentence
from test_nodes import comfy, models, nodes, pack  # noqa: F401  fixtures

from varedit_core import Editor
from varedit_core.defaults import FILLS, OVERLAP
from varedit_core.demo import demo_files
from varedit_core.fitting import BAND, FITS, PUBLISHED, canvas_size
from varedit_core.pictures import canvas
from varedit_core.pictures.images import SourceImage, fit, fit_mask, load_image, restore, unfit_mask
from varedit_core.tokenizer.schedule import TOKEN_PIXELS

COLOURS = [(v,) * 3 for v in (0, 4, 12, 60, 200, 250, 255)] + [(220, 20, 20), (10, 20, 200), (0, 255, 0)]
OWN = [method for method in FITS if method != PUBLISHED]
WHOLE = [method for method, fit in FITS.items() if fit.whole]
SIZES = [(400, 240), (97, 333), (64, 63), (1, 200), (200, 1), (3, 2), (1, 1)]
TINY = [*itertools.product((1, 2, 7, 16, 32, 33, 40), repeat=2), (1, 300), (300, 1), (16, 256)]


def levels(picture: Image.Image) -> np.ndarray:
    return np.array(picture).astype(int)


def there_and_back(source: SourceImage, area: str, method: str) -> Image.Image:
    fitted = fit(source, area, method)
    return restore(fitted.pixels, fitted, "nearest")


# Padding


@pytest.mark.parametrize(
    ("size", "method"), [*itertools.product(SIZES, OWN[:2]), *itertools.product(SIZES[:2], OWN[2:])]
)
def test_resizing_mixes_no_padding_into_a_picture(size, method):
    for colour, area in (*((colour, "0.06M") for colour in COLOURS), ((12,) * 3, "0.25M")):
        result = levels(there_and_back(load_image(Image.new("RGB", size, colour)), area, method))
        assert abs(result - colour).max() <= 1, colour


def test_the_last_row_of_a_dark_photograph():
    picture = Image.fromarray(noise(3000, 1996) // 8)
    rows = {method: levels(there_and_back(load_image(picture), "1M", method)).mean((1, 2)) for method in FITS}
    for method in OWN:
        assert abs(rows[method][-8:] - rows[method][8:-8].mean()).max() <= 3
    assert rows[PUBLISHED][-1] - rows[PUBLISHED][8:-8].mean() > 50, "as the published code does"


@pytest.mark.parametrize("area", ["0.06M", "0.25M"])
@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1)])
def test_published_padding_is_the_published_one(size, area):
    picture = Image.fromarray(noise(*size))
    fitted = fit(load_image(picture), area, PUBLISHED)
    square = Image.new("RGB", (max(size),) * 2, "white")
    square.paste(picture)
    seen = levels(square.resize(fitted.schedule.pixels, Image.Resampling.LANCZOS))
    assert np.array_equal(((fitted.pixels[0] + 1) * 127.5).round().int().permute(1, 2, 0), seen)
    shown = Image.fromarray(seen.astype(np.uint8)).resize(square.size, Image.Resampling.LANCZOS).crop((0, 0, *size))
    assert np.array_equal(levels(restore(fitted.pixels, fitted, "nearest")), levels(shown))


@pytest.mark.parametrize("size", [(400, 100), (100, 400)])
def test_a_picture_goes_on_mirrored_and_then_white_begins(size):
    picture = Image.fromarray(noise(*size) // 2)
    fitted = fit(load_image(picture), "0.06M", "square")
    pixels = fitted.pixels[0].transpose(1, 2) if size[0] < size[1] else fitted.pixels[0]
    own, band = 64, BAND * TOKEN_PIXELS
    assert pixels[:, : own + band - 4].max() < 0.5 and (pixels[:, own + band + 4 :] == 1).all()
    assert (pixels[:, own - 16 : own] - pixels[:, own : own + 16].flip(1)).abs().max() < 2 / 127.5


@pytest.mark.parametrize("method", FITS)
@pytest.mark.parametrize("size", SIZES)
def test_a_mask_that_reaches_the_border_goes_on_beyond_it(size, method):
    fitting = fit(load_image(Image.new("RGB", size)), "0.06M", method).fitting
    whole = fit_mask(Image.new("L", (1, 1), 255), fitting)[0]
    seen = fitting.seen
    height, width = (min(side, round(own * side / all) + 1) for own, all, side in zip(
        seen.size[::-1], seen.padded_size[::-1], whole.shape))  # fmt: skip
    assert (whole[:height, :width] == 1).all()
    assert levels(unfit_mask(whole, seen)).min() >= 254
    assert not fit_mask(Image.new("L", (1, 1)), fitting).any()


# Alpha


def disc(size: tuple[int, int], colour, hidden, soft: float) -> Image.Image:
    """A disc whose alpha falls over so many pixels, over hidden colours where it is 0."""
    (width, height), radius = size, min(size) * 0.35
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - height / 2, columns - width / 2)
    alpha = np.clip((radius - distance) / max(soft, 1e-6) + 0.5, 0, 1)
    alpha = (alpha * 255).round().astype(np.uint8)
    rgb = np.where(alpha[..., None] > 0, np.array(colour), np.array(hidden)).astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, alpha]))


@pytest.mark.parametrize(
    ("method", "size", "soft"),
    [
        *itertools.product(OWN[:2], [(400, 240), (97, 133), (32, 32)], [0, 3, 20]),
        *((method, (97, 133), 3) for method in OWN[2:]),
    ],
)
def test_no_hidden_colour_shows_at_an_edge(size, method, soft):
    for colour, hidden in itertools.product(COLOURS[1::3], [(0,) * 3, (0, 255, 0)]):
        picture = disc(size, colour, hidden, soft)
        result = levels(there_and_back(load_image(picture), "0.06M", method))
        alpha = levels(picture)[..., 3]
        assert np.array_equal(result[..., 3], alpha)
        off = abs(result[..., :3] - colour).max(2)
        assert off[alpha >= 8].max() <= 6, (colour, hidden)
        assert (off * alpha / 255).max() <= 8


@pytest.mark.parametrize("alpha", [0, 4, 128, 255])
def test_the_same_alpha_everywhere_leaves_colours_as_they_are(alpha):
    colours = noise(256, 256)
    source = load_image(Image.fromarray(np.dstack([colours, np.full((256, 256), alpha, np.uint8)])))
    assert torch.equal(fit(source, "0.06M", "square").pixels, fit(SourceImage(source.rgb), "0.06M", "square").pixels)


def test_colours_far_from_an_edge_stay_exact_and_far_outside_is_white():
    picture = disc((256, 256), (0, 0, 0), (0, 0, 0), 0)
    texture = noise(256, 256)
    picture = Image.fromarray(np.dstack([texture, np.array(picture)[..., 3]]))
    seen = ((fit(load_image(picture), "0.06M", "square").pixels[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    opaque = levels(picture)[..., 3] == 255
    assert np.array_equal(seen[opaque], texture[opaque])
    assert (seen[:8, :8] == 255).all() and (seen[128 + 89 + 40 :] == 255).all()


# With the demo model


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load(*demo_files(), device="cpu")


def flat(colour: int) -> SourceImage:
    return SourceImage(Image.new("RGB", (400, 240), (colour,) * 3))


def changed(editor: Editor, source: SourceImage, **more) -> np.ndarray:
    return levels(editor.edit([source], ["make the image black and white"], size="0.06M", **more)[0])


def off(line: np.ndarray) -> float:
    """By how much the last pixels of a line differ from those before."""
    return abs(line[-4:] - line[-32:-8].mean()).max()


@pytest.mark.parametrize("colour", [4, 12, 200])
def test_no_bright_line_after_an_edit(editor, colour):
    assert off(changed(editor, flat(colour)).mean((1, 2))) <= 4
    everywhere = Image.new("L", (1, 1), 255)
    assert off(changed(editor, flat(colour), mask=everywhere).mean((1, 2))) <= 4
    assert off(changed(editor, flat(colour), method=PUBLISHED).mean((1, 2))) > 10


def test_no_bright_line_in_a_new_part_and_in_a_crop(editor):
    source = SourceImage(Image.new("RGB", (240, 240), (12,) * 3))
    larger, mask = canvas.extend(source, (0, 0, 160, 0))
    new = changed(editor, larger, mask=mask)[:, 256:]
    assert off(new.mean((1, 2))) <= 4
    marked = Image.new("L", (400, 240))
    marked.paste(255, (0, 150, 400, 240))
    around = canvas.crop_around((400, 240), marked)
    part, inner = canvas.crop(flat(12), around)
    edited = changed(editor, part, mask=inner).astype(np.uint8)
    whole = levels(canvas.stitch(flat(12), Image.fromarray(edited), around))
    assert off(whole.mean((1, 2))) <= 4


@pytest.mark.parametrize("colour", [(12, 12, 12), (200, 30, 30)])
def test_no_rim_after_an_edit(editor, colour):
    result = changed(editor, load_image(disc((256, 256), colour, (0, 255, 0), 0)))
    rows, columns = np.mgrid[-128:128, -128:128]
    distance, sector = np.hypot(rows, columns), np.digitize(np.arctan2(rows, columns), np.linspace(-np.pi, np.pi, 17))
    depth = distance[result[..., 3] > 0].max() - distance
    for one in range(1, 17):
        rim = (sector == one) & (depth >= 0) & (depth < 2)
        near = (sector == one) & (depth > 6) & (depth < 20)
        assert abs(result[rim][:, :3].mean(0) - result[near][:, :3].mean(0)).max() <= 10


# Small pictures


@pytest.mark.parametrize("size", TINY)
def test_every_small_picture_is_extended_cropped_and_put_back(size):
    source = load_image(Image.fromarray(noise(*size, 4)))
    for sides in ((16,) * 4, (0, 0, 7, 0), (0.25,) * 4, (0, 300, 0, 0)):
        try:
            canvas.sides_in_pixels(sides, size)
        except ValueError as error:
            assert "nothing is added" in str(error)  # a quarter of one pixel
            continue
        larger, mask = canvas.extend(source, sides)
        assert larger.size == mask.size and levels(mask).min() == 0, "some of the picture stays as it is"
        for shape in WHOLE[:3]:
            around = canvas.crop_around(larger.size, mask, shape=shape)
            part, inner = canvas.crop(larger, around)
            fitted = fit(part, "0.06M", shape)
            assert fit_mask(inner, fitted.fitting).any()
            whole = levels(canvas.stitch(larger, restore(fitted.pixels, fitted), around))
            assert np.array_equal(whole[levels(mask) == 0][:, :3], levels(larger.rgb)[levels(mask) == 0])


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", TINY[::5])
def test_nodes_extend_small_pictures_as_the_library_does(nodes, size, fill):  # noqa: F811
    picture = Image.fromarray(noise(*size))
    image = torch.from_numpy(np.array(picture))[None] / 255
    larger, mask = nodes["VAREditExtendCanvas"].execute(image, 16, 16, 16, 16, "pixels", fill, OVERLAP).result
    expected, drawn = canvas.extend(load_image(picture), (16,) * 4, fill=fill)
    assert np.abs((larger[0] * 255).round().numpy() - levels(expected.rgb)).max() <= 1
    assert np.array_equal((mask[0] * 255).ceil().numpy(), levels(drawn))
    part, _, region = nodes["VAREditCropRegion"].execute(larger, mask, 0.25, "square").result
    (back,) = nodes["VAREditStitch"].execute(larger, part, region).result
    assert torch.allclose(back, larger, atol=1e-6)


def test_an_overlap_is_at_most_what_leaves_a_pixel():
    for length, sides, most in (
        (32, (1, 0, 1, 0), 15),
        (33, (1, 0, 1, 0), 16),
        (1, (0, 0, 5, 0), 0),
        (9, (3, 0, 0, 0), 8),
    ):
        mask = canvas.extension_mask((length, 50), sides, 16)
        assert torch.equal(mask, canvas.extension_mask((length, 50), sides, most)) and mask.min() == 0
    with pytest.raises(ValueError, match="the overlap must be at least 0 pixels, got -1") as error:
        canvas.extension_mask((9, 9), (1, 1, 1, 1), -1)
    assert one_sentence(error)


def test_a_canvas_holds_its_picture():
    for size, method in itertools.product(TINY, FITS):
        fitting = fit(load_image(Image.new("RGB", size)), "0.06M", method).fitting
        assert fitting.padded_size == canvas_size(fitting.seen.size, fitting.schedule.pixels)
