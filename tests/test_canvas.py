"""Crops lie in their pictures, edits stay inside their masks, and extended pictures keep what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import noise, one_sentence
from test_nodes import comfy, models, nodes, pack  # noqa: F401  fixtures

from varedit_core.defaults import CROP_MARGIN, FILLS, LEAST_MARGIN, OVERLAP
from varedit_core.fitting import FITS, MAX_CANVAS_PIXELS
from varedit_core.pictures import canvas
from varedit_core.pictures.canvas import Crop, crop, crop_around, extend, sides_from, stitch
from varedit_core.pictures.images import SourceImage, fit, load_image
from varedit_core.tokenizer.schedule import TABLES

SIDES = st.integers(1, 300)
MARGINS = st.sampled_from([0.0, CROP_MARGIN, 2.0])
BOUNDED = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def marked(draw) -> tuple[tuple[int, int], canvas.Box]:
    """A picture's size, and a box in it."""
    width, height = draw(SIDES), draw(SIDES)
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


@st.composite
def masks(draw) -> np.ndarray:
    """A mask [H, W] with anything in it, but for being empty: specks, soft and hard."""
    width, height = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    mask = random.integers(0, 256, (height, width)) * (random.random((height, width)) < draw(st.floats(0, 1)))
    mask[random.integers(height), random.integers(width)] = 255
    if draw(st.booleans()):
        mask = np.where(mask > 0, 255, 0)
    return mask.astype(np.uint8)


def mask_of(size, box) -> torch.Tensor:
    mask = torch.zeros(1, size[1], size[0])
    mask[:, box[1] : box[3], box[0] : box[2]] = 1
    return mask


def picture(size, channels: int = 3, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(*size, channels, seed))


def pictures(count: int, size, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.stack([noise(*size, channels, seed + i) for i in range(count)])).float() / 255


def levels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


# Regions


@BOUNDED
@given(marked(), MARGINS, st.sampled_from(list(FITS)))
@example(((300, 300), (0, 0, 300, 300)), 0.0, "square")
@example(((300, 1), (7, 0, 9, 1)), 2.0, "aspect")
@example(((1, 1), (0, 0, 1, 1)), 0.0, "aspect")
def test_a_crop_lies_in_the_picture_around_what_is_marked(case, margin, shape):
    size, box = case
    region = crop_around(size, mask_of(size, box), margin, shape)
    ((left, top, right, bottom),) = region.boxes
    assert 0 <= left <= box[0] and box[2] <= right <= size[0]
    assert 0 <= top <= box[1] and box[3] <= bottom <= size[1]
    assert region.size == size and region.crop_size == (right - left, bottom - top)


@BOUNDED
@given(marked(), st.sampled_from(list(FITS)))
def test_a_crop_has_its_shape_where_the_picture_is_large_enough(case, shape):
    (width, height), box = case
    size, box = (width + 6000, height + 6000), tuple(edge + 3000 for edge in box)
    wide, high = canvas._crop_size((box[2] - box[0], box[3] - box[1]), size, CROP_MARGIN, shape)
    if shape != "aspect":
        assert wide == high
    else:
        assert min(abs(high - ratio * wide) / max(ratio, 1) for ratio in TABLES) <= 1
    around = 2 * max(LEAST_MARGIN, CROP_MARGIN * max(box[2] - box[0], box[3] - box[1]))
    assert wide >= box[2] - box[0] + around and high >= box[3] - box[1] + around
    assert min(wide - (box[2] - box[0]), high - (box[3] - box[1])) <= around + 2 or shape == "aspect", "no larger"


@pytest.mark.parametrize("box", [(100, 100, 400, 180), (100, 100, 160, 420), (100, 100, 200, 190)])
def test_the_model_pads_nothing_where_the_shape_is_its_own(box):
    size = (1000, 1000)
    for shape in sorted(FITS, key="aspect".__eq__):
        region = crop_around(size, mask_of(size, box), shape=shape)
        fitted = fit(SourceImage(Image.new("RGB", region.crop_size)), "0.06M", shape)
        padded, own = fitted.fitting.padded_size, region.crop_size
        assert max(padded[0] - own[0], padded[1] - own[1]) <= 1
    assert (region.crop_size[0] > region.crop_size[1]) == (box[2] - box[0] > box[3] - box[1] + 20)


def test_the_marked_part_is_in_the_middle_and_moved_at_the_pictures_edge():
    size = (1000, 800)
    assert crop_around(size, mask_of(size, (400, 300, 600, 400))).boxes == ((350, 200, 650, 500),)
    assert crop_around(size, mask_of(size, (0, 0, 200, 100))).boxes == ((0, 0, 300, 300),)
    assert crop_around(size, mask_of(size, (990, 790, 1000, 800))).boxes == ((926, 726, 1000, 800),)
    assert crop_around(size, mask_of(size, (400, 300, 410, 310)), margin=0).boxes == ((368, 268, 442, 342),)


def test_a_crop_that_is_too_large_keeps_its_shape_at_the_cost_of_the_margin_and_else_is_cut_short():
    size = (450, 300)
    assert crop_around(size, mask_of(size, (100, 50, 300, 250))).crop_size == (300, 300), "margin of 50 does not fit"
    assert crop_around(size, mask_of(size, (20, 100, 400, 150))).crop_size == (450, 300), "no square holds the part"
    assert crop_around(size, mask_of(size, (20, 100, 400, 150)), shape="aspect").crop_size == (450, 225)


def test_crops_of_a_batch_are_of_one_size_each_at_its_place():
    size = (400, 300)
    mask = torch.cat([mask_of(size, box) for box in ((10, 10, 90, 40), (300, 200, 310, 290))])
    region = crop_around(size, mask)
    assert (
        len(region.boxes) == 2 and len({(right - left, bottom - top) for left, top, right, bottom in region.boxes}) == 1
    )
    assert region.boxes[0][:2] == (0, 0) and region.boxes[1][2] > 310 and region.boxes[1][3] == 300
    images = pictures(2, size)
    parts, inside = canvas.crop_pixels(images, region)
    for image, part, whole, hard, (left, top, right, bottom) in zip(images, parts, mask, inside, region.boxes):
        assert torch.equal(part, image[top:bottom, left:right])
        assert torch.equal(hard, whole[top:bottom, left:right]) and hard.sum() == whole.sum()


def test_masks_of_all_forms_are_one():
    size, box = (90, 60), (30, 20, 60, 40)
    mask = mask_of(size, box)
    expected = crop_around(size, mask)
    small = torch.nn.functional.interpolate(mask[None], scale_factor=0.1, mode="area")
    forms = [mask[0], mask[None], mask.double(), small, mask * 7, Image.fromarray(np.uint8(mask[0] * 255)),
             Image.fromarray(np.uint8(mask[0] * 255)).convert("RGB")]  # fmt: skip
    for form in forms:
        region = crop_around(size, form)
        assert region.mask.shape == mask.shape and region.mask.max() == 1
        assert abs(torch.tensor(region.boxes) - torch.tensor(expected.boxes)).max() <= (5 if form is small else 0)
    full = crop_around((77, 53), torch.ones(1, 13, 7))
    assert (full.mask == 1).all(), "ones stay ones, however they are stretched"


def test_what_is_hardly_marked_does_not_count():
    size = (300, 300)
    mask = mask_of(size, (100, 100, 120, 120)) + 1e-4
    assert crop_around(size, mask).boxes == crop_around(size, mask_of(size, (100, 100, 120, 120))).boxes


# Stitching


@BOUNDED
@given(masks(), st.integers(0, 9), st.sampled_from(list(FITS)))
def test_outside_the_mask_nothing_changes_and_inside_a_hard_one_all_does(mask, feather, shape):
    size = mask.shape[::-1]
    source = load_image(picture(size))
    region = crop_around(size, Image.fromarray(mask), 0.0, shape)
    edited = picture(region.crop_size, seed=5)
    result = levels(stitch(source, edited, region, feather))
    assert (result[mask == 0] == levels(source.rgb)[mask == 0]).all()
    left, top, right, bottom = region.boxes[0]
    pasted = levels(source.rgb)
    pasted[top:bottom, left:right] = levels(edited)
    if not feather:
        assert (result[mask == 255] == pasted[mask == 255]).all()
        weight = mask[..., None] / 255
        assert np.abs(result - (pasted * weight + levels(source.rgb) * (1 - weight))).max() <= 0.5 + 1e-3
    low, high = np.minimum(pasted, levels(source.rgb)), np.maximum(pasted, levels(source.rgb))
    assert ((low <= result) & (result <= high)).all()


@BOUNDED
@given(masks(), st.integers(0, 9), st.booleans())
def test_a_crop_put_back_is_the_picture(mask, feather, transparent):
    size = mask.shape[::-1]
    source = load_image(picture(size, 4 if transparent else 3))
    region = crop_around(size, Image.fromarray(mask))
    part, inside = crop(source, region)
    assert part.size == inside.size == region.crop_size and set(np.unique(inside)) <= {0, 255}
    result = stitch(source, part.rgb, region, feather)
    assert result.mode == ("RGBA" if transparent else "RGB")
    assert (levels(result.convert("RGB")) == levels(source.rgb)).all()
    if transparent:
        assert result.getchannel("A").tobytes() == source.alpha.tobytes()
        assert part.alpha.tobytes() == source.alpha.crop(region.boxes[0]).tobytes()


@BOUNDED
@given(masks(), st.integers(1, 12))
def test_a_feather_never_raises_a_mask(mask, pixels):
    before = torch.from_numpy(mask)[None].float() / 255
    after = canvas.feathered(before, pixels)
    assert after.shape == before.shape and (after <= before + 1e-6).all() and (after >= 0).all()
    assert (after[before == 0] == 0).all()


@pytest.mark.parametrize("pixels", [1, 2, 3, 8])
def test_a_feather_rises_from_the_edge_inwards(pixels):
    mask = mask_of((80, 60), (30, 0, 80, 60))
    (row,) = {tuple(row.tolist()) for row in canvas.feathered(mask, pixels)[0]}
    assert row[:30] == (0,) * 30
    assert row[30:] == pytest.approx([min(d, pixels + 1) / (pixels + 1) for d in range(1, 51)])
    assert row[-1] == 1, "the picture's border is no edge"
    assert torch.equal(canvas.feathered(torch.ones(1, 5, 4), pixels), torch.ones(1, 5, 4))
    box = canvas.feathered(mask_of((80, 60), (20, 20, 60, 40)), pixels)
    assert torch.allclose(box, box.flip(2)) and torch.allclose(box, box.flip(1)), "from all sides alike"


@BOUNDED
@given(marked(), st.integers(0, 40))
def test_a_feather_does_not_depend_on_where_the_crop_ends(case, feather):
    size, box = case
    region = crop_around(size, mask_of(size, box))
    tight = Crop((box,), region.mask)
    for one in (region, tight):
        edit = torch.ones(1, *one.crop_size[::-1], 3)
        result = canvas.stitch_pixels(torch.zeros(1, *size[::-1], 3), edit, one, feather)
        assert torch.equal(result[..., 0], canvas.feathered(region.mask, feather))


def test_batches_of_several_edits_each():
    size, images = (120, 100), pictures(2, (120, 100), 4)
    mask = torch.cat([mask_of(size, (5, 5, 30, 30)), mask_of(size, (80, 60, 110, 90))])
    region, kept = crop_around(size, mask), images.clone()
    edited = pictures(6, region.crop_size, seed=50)
    result = canvas.stitch_pixels(images, edited, region)
    assert result.shape == (6, 100, 120, 4) and torch.equal(images, kept)
    for i, (one, edit) in enumerate(zip(result, edited)):
        k = i // 3
        left, top, right, bottom = region.boxes[k]
        pasted = images[k].clone()
        pasted[top:bottom, left:right, :3] = edit
        assert torch.equal(one, torch.where(mask[k, ..., None] > 0, pasted, images[k]))


def test_one_mask_serves_a_batch_and_one_picture_several_edits():
    size = (120, 100)
    region = crop_around(size, mask_of(size, (40, 40, 60, 60)))
    parts, inside = canvas.crop_pixels(pictures(3, size), region)
    assert parts.shape[0] == 3 and inside.shape == (1, *region.crop_size[::-1])
    for images in (pictures(3, size), pictures(1, size)):
        result = canvas.stitch_pixels(images, 1 - parts, region)
        outside = region.mask[0] == 0
        assert all(torch.equal(one[outside], images[min(i, len(images) - 1)][outside]) for i, one in enumerate(result))


@pytest.mark.parametrize(("whole", "edit", "wanted"), [(1, 3, 3), (3, 1, 3), (4, 3, 4), (3, 4, 3), (1, 1, 3)])
def test_channels_are_the_whole_pictures(whole, edit, wanted):
    size = (50, 40)
    region = crop_around(size, mask_of(size, (10, 10, 20, 20)))
    images = pictures(1, size, whole)
    result = canvas.stitch_pixels(images, torch.full((1, *region.crop_size[::-1], edit), 0.5), region)
    assert result.shape == (1, 40, 50, wanted)
    assert (result[0, 15, 15, :3] == 0.5).all() and torch.equal(result[0, 0, 0, : min(whole, 3)], images[0, 0, 0, :3])
    if wanted == 4:
        assert torch.equal(result[..., 3], images[..., 3])


def test_an_edit_of_another_size_in_the_same_shape_is_resized():
    size = (200, 200)
    region = crop_around(size, mask_of(size, (50, 50, 101, 80)))
    wide, high = region.crop_size
    for factor in (4, 2.5, 0.5):
        edited = Image.new("RGB", (round(wide * factor), round(high * factor)), (10, 200, 30))
        result = stitch(SourceImage(Image.new("RGB", size)), edited, region)
        assert result.getpixel((70, 60)) == (10, 200, 30) and result.getpixel((49, 60)) == (0, 0, 0)
    sharp = torch.zeros(1, 4 * high, 4 * wide, 3)
    sharp[:, ::40] = 1
    result = canvas.stitch_pixels(torch.zeros(1, 200, 200, 3), sharp, region)
    assert result.min() == 0 and result.max() <= 1, "resizing adds no darker or lighter colours"
    for other in ((wide, high + 3), (2 * wide, high)):
        with pytest.raises(ValueError, match="give the edit of that region") as error:
            stitch(SourceImage(Image.new("RGB", size)), Image.new("RGB", other), region)
        assert one_sentence(error)


# Extending


@BOUNDED
@given(SIDES, SIDES, st.tuples(*[st.integers(0, 90)] * 4).filter(any), st.sampled_from(FILLS), st.booleans())
@example(1, 1, (0, 0, 0, 90), "blur", True)
@example(1, 1, (7, 90, 0, 0), "mirror", True)
@example(3, 300, (0, 0, 1, 0), "blur", False)
def test_an_extended_picture_holds_the_old_one(width, height, sides, fill, transparent):
    left, top, right, bottom = sides
    source = load_image(picture((width, height), 4 if transparent else 3))
    larger, mask = extend(source, sides, 0, fill)
    size = (width + left + right, height + top + bottom)
    box = (left, top, left + width, top + height)
    assert larger.size == mask.size == size
    assert larger.rgb.crop(box).tobytes() == source.rgb.tobytes()
    new = levels(mask) == 255
    assert set(np.unique(mask)) <= {0, 255} and (~new).sum() == width * height
    assert not levels(mask.crop(box)).any()
    assert (larger.alpha is None) != transparent
    if transparent:
        assert larger.alpha.crop(box).tobytes() == source.alpha.tobytes() and (levels(larger.alpha)[new] == 255).all()
    filled, old = levels(larger.rgb)[new], levels(source.rgb).reshape(-1, 3)
    if fill == "white":
        assert (filled == 255).all()
    else:
        assert (filled >= old.min(axis=0)).all() and (filled <= old.max(axis=0)).all(), "out of the picture's colours"


def test_the_fills():
    ramp = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3))
    source = SourceImage(Image.fromarray(ramp))
    mirrored = levels(extend(source, (0, 0, 250, 0), fill="mirror")[0].rgb)[0, :, 0]
    assert (mirrored == np.concatenate([ramp[0, :, 0], ramp[0, ::-1, 0], ramp[0, :, 0], ramp[0, ::-1, 0][:50]])).all()
    left = levels(extend(source, (250, 0, 0, 0), fill="mirror")[0].rgb)[0, ::-1, 0]
    assert (left[100:200] == ramp[0, :, 0]).all()
    blurred = levels(extend(source, (0, 0, 60, 0), fill="blur")[0].rgb)[:, 100:, 0]
    assert (blurred[:, 0] >= 95).all(), "beside the edge its colours"
    half = np.zeros((100, 100, 3), np.uint8)
    half[50:] = 200
    blurred = levels(extend(SourceImage(Image.fromarray(half)), (0, 0, 100, 0), fill="blur")[0].rgb)[..., 0]
    steps = np.abs(np.diff(blurred, axis=0)).max(axis=0)[[99, 104, 116, 199]]
    assert (np.diff(steps) < 0).all(), f"softer further out, not {steps}"


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_white_is_white_in_levels_and_shares(scale):
    images = pictures(1, (9, 9), 4) * scale
    assert (canvas.extend_pixels(images, (2, 0, 0, 0), "white")[:, :, :2] == scale).all()
    assert (canvas.extend_pixels(images, (2, 0, 0, 0), "blur")[:, :, :2, 3] == scale).all()


@BOUNDED
@given(st.integers(40, 200), st.tuples(*[st.integers(0, 40)] * 4).filter(any), st.integers(0, 19))
def test_the_mask_falls_within_the_overlap(side, sides, overlap):
    mask = canvas.extension_mask((side, side), sides, overlap)[0]
    left, top, right, bottom = sides
    assert mask.shape == (side + top + bottom, side + left + right)
    inner = mask[top : top + side, left : left + side]
    for added, depths in zip(sides, (inner.T, inner, inner.flip(1).T, inner.flip(0))):
        line = depths[:overlap, side // 2]
        if added:
            assert torch.allclose(line, 1 - torch.arange(1, overlap + 1) / (overlap + 1))
        assert ((0 < line) & (line < 1)).all() or not added
    assert (inner > 0).sum() == side**2 - (side - overlap * (bool(left) + bool(right))) * (
        side - overlap * (bool(top) + bool(bottom))
    )
    outside = mask.clone()
    outside[top : top + side, left : left + side] = 1
    assert (outside == 1).all()


def test_the_faintest_overlap_is_still_in_the_mask():
    _, mask = extend(SourceImage(Image.new("RGB", (600, 4))), (5, 0, 0, 0), 500)
    assert (levels(mask)[:, 5:505] > 0).all() and not levels(mask)[:, 505:].any()


def test_batches_are_extended_alike():
    images = pictures(3, (40, 30))
    for fill in FILLS:
        together = canvas.extend_pixels(images, (5, 0.5, 0, 7), fill)
        assert together.shape == (3, 30 + 15 + 7, 45, 3)
        for one, alone in zip(together, images):
            assert torch.allclose(one, canvas.extend_pixels(alone[None], (5, 0.5, 0, 7), fill)[0])


@pytest.mark.parametrize(
    ("text", "sides", "pixels"),
    [
        ("64", (64,) * 4, (64,) * 4),
        ("10,0,20,0", (10, 0, 20, 0), (10, 0, 20, 0)),
        ("0.25, 0,25%,7", (0.25, 0, 0.25, 7), (100, 0, 100, 7)),
        ("1.0,0.5,0,0", (1.0, 0.5, 0, 0), (400, 100, 0, 0)),
    ],
)
def test_extensions_in_words(text, sides, pixels):
    assert sides_from(text) == sides and [type(side) for side in sides_from(text)] == [type(side) for side in sides]
    assert canvas.sides_in_pixels(sides_from(text), (400, 200)) == pixels


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3", "1,2,3,4,5", "a", "1;2;3;4", "%", "1,,2,3", "64px"])
def test_other_words_are_no_extension(text):
    with pytest.raises(ValueError, match="is no extension; give left,top,right,bottom") as error:
        sides_from(text)
    assert one_sentence(error)


# Errors

SIZE, REGION = (60, 40), Crop(((0, 0, 30, 30),), mask_of((60, 40), (5, 5, 20, 20)))
PICTURES, EMPTY = pictures(2, SIZE), torch.zeros(1, 40, 60)
SOURCE = SourceImage(Image.new("RGB", SIZE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crop_around(SIZE, EMPTY), "the mask is empty; paint where"),
        (lambda: crop_around(SIZE, Image.new("L", (9, 9))), "the mask is empty; paint where"),
        (lambda: crop_around(SIZE, torch.cat([EMPTY + 1, EMPTY])), "mask 2 of 2 is empty; paint where"),
        (lambda: crop_around(SIZE, torch.zeros(0, 4, 4)), "the mask has no pixels"),
        (lambda: crop_around(SIZE, EMPTY + 1, -0.1), "the margin must be at least 0, got -0.1"),
        (lambda: crop_around(SIZE, EMPTY + 1, float("nan")), "the margin must be at least 0, got nan"),
        (lambda: crop_around(SIZE, EMPTY + 1, 0, "round"), "unknown shape 'round'; choose one of square, aspect, pub"),
        (
            lambda: canvas.crop_pixels(PICTURES, crop_around(SIZE, torch.ones(3, 4, 4))),
            "there are 3 masks for 2 pictures",
        ),
        (lambda: canvas.crop_pixels(PICTURES[:, 1:], REGION), "the image is 60x39 but the region is of one of 60x40"),
        (lambda: canvas.crop_pixels(PICTURES[..., :2], REGION), "the image has 2 channels; connect one with 1, 3 or 4"),
        (lambda: canvas.crop_pixels(PICTURES[:0], REGION), "there is no picture"),
        (lambda: crop(SourceImage(Image.new("RGB", (61, 40))), REGION), "the image is 61x40 but"),
        (lambda: stitch(SourceImage(Image.new("RGB", (61, 40))), SOURCE.rgb, REGION), "the image is 61x40 but"),
        (lambda: canvas.stitch_pixels(PICTURES, pictures(3, (30, 30)), REGION), "there are 2 images for 3 edits"),
        (lambda: canvas.stitch_pixels(PICTURES, pictures(2, (30, 30))[:0], REGION), "there are 2 images for 0 edits"),
        (lambda: canvas.stitch_pixels(PICTURES, pictures(2, (30, 20)), REGION), "the edited crop is 30x20 but"),
        (lambda: canvas.stitch_pixels(PICTURES, pictures(2, (30, 30)) / 0, REGION), "holds undefined numbers"),
        (lambda: canvas.stitch_pixels(PICTURES, pictures(2, (30, 30), 2), REGION), "the image has 2 channels"),
        (lambda: stitch(SOURCE, Image.new("RGB", (30, 30)), REGION, -1), "the feather must be at least 0 pixels"),
        (lambda: extend(SOURCE, (0, 0, 0, 0)), "nothing is added; give left, top, right or bottom"),
        (lambda: extend(SOURCE, (0.001, 0, 0, 0)), "nothing is added"),
        (lambda: extend(SOURCE, (-1, 0, 5, 0)), "must be at least 0, got (-1, 0, 5, 0)"),
        (lambda: extend(SOURCE, (float("nan"), 0, 5, 0)), "must be at least 0, got (nan"),
        (lambda: extend(SOURCE, (1, 2)), "left, top, right and bottom must be"),
        (lambda: extend(SOURCE, (64.0, 0, 0, 0)), "a share of 64.0 is too much"),
        (lambda: extend(SOURCE, (MAX_CANVAS_PIXELS, 0, 0, 0)), "the extended picture would be of 268435516x40"),
        (lambda: extend(SOURCE, (1, 0, 0, 0), -1), "the overlap must be at least 0 pixels, got -1"),
        (lambda: extend(SOURCE, (1, 0, 0, 0), fill="grey"), "unknown fill 'grey'; choose one of blur, mirror, white"),
        (lambda: canvas.extend_pixels(PICTURES[:0], (1, 0, 0, 0)), "there is no picture to extend"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and one_sentence(error), str(error.value)


# Nodes


def test_the_nodes_cut_out_and_put_back(nodes):  # noqa: F811
    size, images = (200, 150), pictures(2, (200, 150), 4)
    soft = mask_of(size, (60, 60, 100, 100)) * 0.5
    part, inside, region = nodes["VAREditCropRegion"].execute(images, soft, CROP_MARGIN, "square").result
    assert part.shape == (2, 104, 104, 4) and inside.shape == (1, 104, 104)
    assert set(inside.unique().tolist()) == {0, 1} and inside.sum() == 40 * 40
    execute = nodes["VAREditStitch"].execute
    for feather in ({}, {"feather": 7}):
        (same,) = execute(images, part, region, **feather).result
        assert torch.allclose(same, images, atol=1e-6)
        (result,) = execute(images, 1 - part, region, **feather).result
        outside = soft[0] == 0
        assert torch.equal(result[:, outside], images[:, outside])
        assert torch.allclose(result[:, 80, 80, :3], torch.tensor(0.5)), "half of the one, half of the other"
        edge = (result - images).abs()[:, 80, 60, :3].mean() / (1 - 2 * images).abs()[:, 80, 60, :3].mean()
        assert edge == pytest.approx(0.5 / (1 + feather.get("feather", 0)), abs=1e-4)


def test_the_node_extends_by_pixels_and_percent(nodes):  # noqa: F811
    execute = nodes["VAREditExtendCanvas"].execute
    images = pictures(2, (100, 50))
    larger, mask = execute(images, 10, 0, 5, 20, "pixels", "mirror", OVERLAP).result
    assert larger.shape == (2, 70, 115, 3) and mask.shape == (1, 70, 115)
    assert torch.equal(larger[:, :50, 10:110], images)
    assert torch.equal(mask, canvas.extension_mask((100, 50), (10, 0, 5, 20)))
    larger, mask = execute(images, 10, 0, 0, 20, "percent", "blur", 0).result
    assert larger.shape == (2, 60, 110, 3) and mask.sum() == 60 * 110 - 50 * 100


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("CropRegion", (PICTURES, EMPTY, 0.25, "square"), "the mask is empty; paint where the picture may change"),
        ("CropRegion", (PICTURES, torch.ones(3, 8, 8), 0.25, "square"), "there are 3 masks for 2 pictures"),
        ("CropRegion", (PICTURES[..., :2], EMPTY + 1, 0.25, "square"), "the image has 2 channels"),
        ("Stitch", (PICTURES[:, :9], PICTURES, REGION), "the image is 60x9 but the region is of one of 60x40"),
        ("Stitch", (PICTURES, PICTURES, REGION), "the edited crop is 60x40 but the region is 30x30"),
        ("ExtendCanvas", (PICTURES, 0, 0, 0, 0, "pixels", "blur", 16), "nothing is added"),
        ("ExtendCanvas", (PICTURES, 500, 0, 0, 0, "percent", "blur", 16), "a share of 5.0 is too much"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(nodes, name, arguments, message):  # noqa: F811
    with pytest.raises(ValueError) as error:
        nodes[f"VAREdit{name}"].execute(*arguments)
    assert message in str(error.value) and one_sentence(error)
