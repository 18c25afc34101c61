"""Pictures keep their size, their alpha and their place; every mode and every broken file is answered."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from varedit_core.fitting import FITS, canvas_size
from varedit_core.pictures import images, reading
from varedit_core.pictures.images import SourceImage, fit, load_image, restore, save_image, to_uint8
from varedit_core.tokenizer.schedule import schedule_for

EXAMPLE = Path(__file__).parents[1] / "samples" / "cat.jpg"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WHOLE = [method for method, fit in FITS.items() if fit.whole]
SIDES = st.integers(1, 300)
BOUNDED = settings(max_examples=25, deadline=None, derandomize=True)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def reopened(image: Image.Image, path: Path, **options) -> SourceImage:
    image.save(path, **options)
    return load_image(path)


def first_pixel(source: SourceImage) -> tuple[int, ...]:
    alpha = () if source.alpha is None else (source.alpha.getpixel((0, 0)),)
    return source.rgb.getpixel((0, 0)) + alpha


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    text = str(error.value)
    return "\n" not in text and len(text) < 300 and not text.endswith(".") and ";" in text


# Size and alpha


@BOUNDED
@given(SIDES, SIDES, st.sampled_from(list(FITS)), st.booleans())
@example(1, 200, "square", True)
@example(1, 200, "aspect", True)
@example(200, 1, "aspect", False)
@example(200, 1, "square", False)
@example(1, 1, "aspect", True)
@example(299, 300, "square", True)
def test_size_and_alpha_come_back_exactly(width, height, method, transparent):
    picture = Image.fromarray(noise(width, height, 4))
    fitted = fit(load_image(picture if transparent else picture.convert("RGB")), "0.06M", method)
    assert fitted.pixels.shape == (1, 3, *fitted.schedule.pixels) and fitted.pixels.dtype == torch.float32
    assert fitted.pixels.abs().max() <= 1
    edited = restore(-fitted.pixels, fitted)
    assert edited.size == (width, height)
    assert edited.mode == ("RGBA" if transparent else "RGB")
    if transparent:
        assert edited.getchannel("A").tobytes() == picture.getchannel("A").tobytes()


@BOUNDED
@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from(["0.06M", "0.25M", "1M"]),
    st.sampled_from([1.0, 1.333, 0.4, 3.0]),
)
def test_canvas_is_the_smallest_of_the_grids_shape(width, height, area, ratio):
    grid_height, grid_width = schedule_for(area, ratio).pixels
    wide, high = canvas_size((width, height), (grid_height, grid_width))
    assert (wide == width and high >= height) or (high == height and wide >= width)
    # The side that was free to choose is the rounded one, or the source's own where that is within a pixel of it.
    assert abs(wide - high * grid_width / grid_height) <= 0.5 or abs(high - wide * grid_height / grid_width) <= 0.5


def test_square_pads_to_the_longer_side_and_aspect_to_the_nearest_table():
    source = load_image(Image.new("RGB", (300, 140)))
    assert fit(source, "0.25M", "square").fitting.padded_size == (300, 300)
    assert fit(source, "0.25M", "square").schedule == schedule_for("0.25M")
    aspect = fit(source, "0.06M", "aspect")
    assert aspect.schedule == schedule_for("0.06M", 0.5)
    assert aspect.fitting.padded_size == (300, 150)


@pytest.mark.parametrize(
    ("size", "white"), [((100, 50), (slice(140, None), slice(None))), ((50, 100), (slice(None), slice(140, None)))]
)
def test_padding_is_white_and_at_the_right_or_bottom(size, white):
    rows, columns = white
    pixels = fit(load_image(Image.new("RGB", size)), "0.06M", "published").pixels[0]
    assert (pixels[:, rows, columns] == 1).all()
    assert (pixels[:, :116, :116] == -1).all()


# Place


def blob(width: int, height: int, x: float, y: float) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    level = 90 + 160 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 3.0**2))
    return Image.fromarray(level.round().astype(np.uint8)).convert("RGB")


def centroid(levels: np.ndarray, x: float, y: float, radius: float) -> tuple[float, float]:
    """Of the light above 110 within `radius` of (x, y), so that white padding has no say."""
    rows, columns = np.mgrid[: levels.shape[0], : levels.shape[1]]
    near = (abs(rows - y) < radius) & (abs(columns - x) < radius)
    light = np.where(near, np.clip(levels.astype(float) - 110, 0, None), 0)
    return (columns * light).sum() / light.sum(), (rows * light).sum() / light.sum()


@BOUNDED
@given(st.integers(80, 300), st.integers(80, 300), st.floats(0, 1), st.floats(0, 1), st.sampled_from(WHOLE))
def test_nothing_moves(width, height, along, down, method):
    x, y = 20 + along * (width - 41), 20 + down * (height - 41)
    picture = blob(width, height, x, y)
    fitted = fit(load_image(picture), "0.06M", method)
    restored = np.array(restore(fitted.pixels, fitted))[..., 0]
    before, after = centroid(np.array(picture)[..., 0], x, y, 15), centroid(restored, x, y, 15)
    assert np.allclose(before, after, atol=0.05)

    # Neither does the picture move on its way in, so that two wrong shifts cannot cancel.
    width, height = fitted.fitting.padded_size
    scale_x, scale_y = (fitted.pixels.shape[3] / width, fitted.pixels.shape[2] / height)
    inside = ((before[0] + 0.5) * scale_x - 0.5, (before[1] + 0.5) * scale_y - 0.5)
    seen = centroid(to_uint8(fitted.pixels, "nearest")[0, 0].numpy(), *inside, 15 * min(scale_x, scale_y))
    assert np.allclose(seen, inside, atol=0.05)


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("size", [(1, 200), (200, 1), (3, 299), (299, 3)])
def test_nothing_moves_along_a_sliver(size, method):
    x, y = (size[0] - 1) * 0.4, (size[1] - 1) * 0.4
    picture = blob(*size, x, y)
    fitted = fit(load_image(picture), "0.06M", method)
    restored = np.array(restore(fitted.pixels, fitted))[..., 0]
    axis = int(size[0] < size[1])
    assert abs(centroid(np.array(picture)[..., 0], x, y, 15)[axis] - centroid(restored, x, y, 15)[axis]) < 0.1


def test_an_edge_stays_on_its_pixel():
    for column in (60, 61, 150):
        levels = np.zeros((211, 301, 3), np.uint8)
        levels[:, column:] = 255
        fitted = fit(load_image(Image.fromarray(levels)), "0.25M", "square")
        restored = np.array(restore(fitted.pixels, fitted))
        assert ((restored > 127) == (levels > 127)).all()


@pytest.mark.parametrize("shape", [("square", 1.0), ("aspect", 1.0), ("aspect", 0.5), ("aspect", 1.25)])
def test_without_a_resize_every_pixel_is_kept(shape):
    method, ratio = shape
    height, width = schedule_for("0.06M", ratio).pixels
    levels = noise(width, height)
    fitted = fit(load_image(Image.fromarray(levels)), "0.06M", method)
    assert fitted.schedule.ratio == ratio and fitted.fitting.padded_size == (width, height)
    assert torch.equal(fitted.pixels[0], torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1)
    assert np.array_equal(np.array(restore(fitted.pixels, fitted, "nearest")), levels)
    loss = levels.astype(int) - np.array(restore(fitted.pixels, fitted)).astype(int)
    assert set(np.unique(loss)) == {0, 1}  # truncation never brightens


def test_the_example_photograph_survives_the_round_trip():
    assert EXAMPLE.stat().st_size <= 120_000
    source = load_image(EXAMPLE)
    fitted = fit(source, "0.25M", "square")
    before, after = (np.array(i).astype(float) for i in (source.rgb, restore(fitted.pixels, fitted, "nearest")))
    assert before.shape == after.shape == (300, 451, 3)
    errors = {
        (dy, dx): (np.roll(after, (dy, dx), (0, 1)) - before)[4:-4, 4:-4].std()
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert errors.pop((0, 0)) < 1.5 and min(errors.values()) > 5


# Colour modes

GREY = (77, 77, 77)


def filled(mode: str, colour) -> Image.Image:
    return Image.new(mode, (3, 2), colour)


def palette(mode: str = "RGB", **info) -> Image.Image:
    image = filled("P", 1)
    image.putpalette([0, 0, 0, 9][: len(mode)] + [10, 200, 30, 128][: len(mode)], mode)
    image.info.update(info)
    return image


MODES = [
    (filled("1", 1), (255, 255, 255)),
    (filled("L", 77), GREY),
    (filled("LA", (77, 128)), (*GREY, 128)),
    (filled("La", (77, 128)), (153, 153, 153, 128)),
    (palette(), (10, 200, 30)),
    (palette(transparency=1), (255, 255, 255, 0)),
    (palette(transparency=0), (10, 200, 30, 255)),
    (palette(transparency=b"\x00\x80"), (10, 200, 30, 128)),
    (palette("RGBA"), (10, 200, 30, 128)),
    (filled("RGB", (1, 2, 3)), (1, 2, 3)),
    (filled("RGBA", (1, 2, 3, 4)), (1, 2, 3, 4)),
    (filled("RGBA", (1, 2, 3, 0)), (255, 255, 255, 0)),
    (filled("RGBa", (20, 40, 60, 128)), (39, 79, 119, 128)),
    (filled("RGBX", (1, 2, 3, 4)), (1, 2, 3)),
    (filled("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    (filled("YCbCr", (76, 85, 255)), (254, 0, 0)),
    (filled("HSV", (0, 255, 255)), (255, 0, 0)),
    (filled("LAB", (137, 128, 128)), (128, 128, 128)),
    (filled("I", 77 * 257), GREY),
    *((filled(mode, 77 * 257), GREY) for mode in ("I;16", "I;16L", "I;16B", "I;16N")),
]


@pytest.mark.parametrize(("image", "colour"), MODES, ids=[f"{image.mode}-{colour}" for image, colour in MODES])
def test_mode(image, colour):
    source = load_image(image)
    assert source.size == (3, 2) and source.rgb.mode == "RGB"
    assert (source.alpha is None) == (len(colour) == 3)
    assert source.alpha is None or (source.alpha.mode == "L" and source.alpha.size == (3, 2))
    assert np.allclose(first_pixel(source), colour, atol=2 if image.mode == "LAB" else 0)


def test_palette_and_alpha_palette():
    image = Image.new("PA", (2, 1), (1, 128))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), (1, 0))
    source = load_image(image)
    assert image.mode == "PA" and first_pixel(source) == (10, 20, 30, 128)
    assert source.rgb.getpixel((1, 0)) == (255, 255, 255) and source.alpha.getpixel((1, 0)) == 0


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_values_are_rounded_to_8(tmp_path, mode):
    values = np.arange(65536).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    suffix = ".pgm" if mode == "I" else ".tif"
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]
    source = reopened(Image.fromarray(values.astype(kind)), tmp_path / f"grey{suffix}")
    with Image.open(tmp_path / f"grey{suffix}") as stored:
        assert stored.mode == mode
    assert np.array_equal(np.array(source.rgb), np.stack([expected] * 3, -1)) and source.alpha is None


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_values_are_refused(value):
    with pytest.raises(ValueError, match=r"scale them to 0\.\.65535") as error:
        load_image(filled("I", value))
    assert one_sentence(error)


@pytest.mark.parametrize(
    ("mode", "key", "other"), [("L", 7, 8), ("RGB", (1, 2, 3), (1, 2, 4)), ("1", 0, 1), ("I;16", 300, 301)]
)
def test_transparent_colour_of_a_png(tmp_path, mode, key, other):
    image = filled(mode, other)
    image.putpixel((1, 0), key)
    try:
        source = reopened(image, tmp_path / "key.png", transparency=key)
    except OSError as error:  # Pillow 10 reads such files, too, but writes none of 16 bits
        pytest.skip(str(error))
    assert np.array_equal(np.array(source.alpha), [[255, 0, 255], [255, 255, 255]])
    assert source.rgb.getpixel((1, 0)) == (255, 255, 255)
    assert source.rgb.getpixel((0, 0)) == load_image(filled(mode, other)).rgb.getpixel((0, 0))


def test_only_fully_transparent_colours_become_white():
    levels = noise(64, 64, 4)
    levels[:, :32, 3] = noise(32, 64, 1)[..., 0] % 2
    source = load_image(Image.fromarray(levels))
    expected = np.where(levels[..., 3:] == 0, 255, levels[..., :3])
    assert np.array_equal(np.array(source.rgb), expected)
    assert np.array_equal(np.array(source.alpha), levels[..., 3])
    assert (levels[..., 3] == 0).sum() > 100 and (levels[..., 3] == 1).sum() > 100


# Files

TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    levels = noise(5, 3, 3 if suffix == ".jpg" else 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    path = tmp_path / f"turned{suffix}"
    source = reopened(Image.fromarray(levels), path, exif=exif, **options)
    with open(path, "rb") as file, Image.open(file) as opened:
        upright = np.array(ImageOps.exif_transpose(opened))
    with open(path, "rb") as file, Image.open(file) as opened:
        assert np.array_equal(np.array(load_image(opened).rgb), upright[..., :3])
    assert np.array_equal(np.array(source.rgb), upright[..., :3])
    if suffix != ".jpg":
        assert np.array_equal(upright, TURNS[orientation](levels))
        assert np.array_equal(np.array(source.alpha), TURNS[orientation](levels)[..., 3])
    again = load_image(source.rgb)
    assert again.size == source.size  # turned once only


def test_first_frame_of_a_file_and_current_frame_of_an_image(tmp_path):
    frames = [filled("RGB", colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert first_pixel(load_image(tmp_path / "film.gif"))[:3] == (255, 0, 0)
    with Image.open(tmp_path / "film.gif") as film:
        film.seek(2)
        assert first_pixel(load_image(film))[:3] == (0, 0, 255)
        assert film.tell() == 2


def test_path_as_text_and_the_callers_image_is_left_alone(tmp_path):
    image = Image.fromarray(noise(4, 4, 4) * np.array([1, 1, 1, 0], np.uint8))
    before = image.tobytes()
    source = load_image(image)
    source.rgb.putpixel((0, 0), (1, 1, 1))
    assert image.tobytes() == before
    image.save(tmp_path / "a.png")
    assert load_image(str(tmp_path / "a.png")).size == (4, 4)


def test_profile_is_kept_only_with_the_numbers_it_describes(tmp_path):
    def stored(mode: str, suffix: str, profile: bytes = SRGB) -> bytes | None:
        return reopened(filled(mode, 0), tmp_path / f"{mode}{suffix}", icc_profile=profile).icc_profile

    assert stored("RGB", ".png") == stored("RGBA", ".png") == stored("P", ".png") == stored("RGB", ".jpg") == SRGB
    assert stored("CMYK", ".jpg") is None and stored("L", ".png") is None and stored("LAB", ".tif") is None
    assert stored("RGB", ".tif", SRGB[:16] + b"GRAY" + SRGB[20:]) is None
    assert load_image(filled("RGB", 0)).icc_profile is None


def broken(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    picture = Image.fromarray(noise(64, 64))
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is not a picture")
    elif kind == "folder":
        path.mkdir()
    elif kind == "header":
        picture.save(path)
        path.write_bytes(path.read_bytes()[:20])
    else:
        picture.save(path, kind)
        path.write_bytes(path.read_bytes()[:3000])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "folder", "header", "PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_broken_files_are_refused_by_name(tmp_path, kind):
    path = broken(kind, tmp_path)
    with pytest.raises(ValueError) as error:
        load_image(path)
    assert str(path) in str(error.value) and one_sentence(error)


def test_missing_file_floats_and_empty_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png") as missing:
        load_image(tmp_path / "nowhere.png")
    filled("F", 0.5).save(tmp_path / "floats.tif")
    with pytest.raises(ValueError, match="mode F") as floats:
        load_image(tmp_path / "floats.tif")
    with pytest.raises(ValueError, match="0x5") as empty:
        load_image(Image.new("RGB", (0, 5)))
    assert one_sentence(missing) and one_sentence(floats) and one_sentence(empty)


@pytest.mark.filterwarnings("error")
def test_pillows_bound_of_pixels_is_not_ours(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    for bound in (9000, 4000):  # Pillow warns above it, and refuses above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        assert load_image(tmp_path / "large.png").size == (100, 100)
    monkeypatch.setattr(reading, "MAX_CANVAS_PIXELS", 9999)
    with pytest.raises(ValueError, match="has 100x100 pixels where at most 9999 are read; make it smaller"):
        load_image(tmp_path / "large.png")


def test_fit_refuses_what_it_does_not_know(monkeypatch):
    source = load_image(filled("RGB", 0))
    with pytest.raises(ValueError, match="square, aspect") as method:
        fit(source, "0.06M", "cover")
    with pytest.raises(ValueError, match="0.25M"):
        fit(source, "2M", "square")
    monkeypatch.setattr(Image, "new", lambda *_: pytest.fail("the canvas was made"))
    with pytest.raises(ValueError, match="20000x20000") as canvas:
        fit(SourceImage(filled_sliver := source.rgb.resize((20000, 1))), "0.06M", "square")
    assert filled_sliver.size == (20000, 1) and one_sentence(method) and one_sentence(canvas)


# Pixels to levels


def test_rounding():
    pixels = torch.tensor([-7.0, -1.0, -0.9945, -0.9925, 0.0, 0.9999, 1.0, 7.0])
    assert to_uint8(pixels).tolist() == [0, 0, 0, 0, 127, 254, 255, 255]
    assert to_uint8(pixels, "nearest").tolist() == [0, 0, 1, 1, 128, 255, 255, 255]
    assert torch.equal(to_uint8(pixels), to_uint8(pixels, images.PUBLISHED_ROUNDING))
    assert to_uint8(torch.tensor([[1.0]], dtype=torch.bfloat16)).tolist() == [[255]]


def test_bf16_is_widened_before_it_is_scaled():
    pixels = (torch.arange(256) / 127.5 - 1).bfloat16()
    assert torch.equal(to_uint8(pixels), to_uint8(pixels.float()))


@pytest.mark.parametrize(("pixels", "rounding"), [([0.0], "ceil"), ([float("nan")], "truncate"), ([1], "truncate")])
def test_rounding_refuses(pixels, rounding):
    with pytest.raises(ValueError) as error:
        to_uint8(torch.tensor(pixels), rounding)
    assert one_sentence(error)


def test_restore_takes_one_image_of_the_models_size():
    fitted = fit(load_image(Image.fromarray(noise(30, 20))), "0.06M", "square")
    assert restore(fitted.pixels, fitted).tobytes() == restore(fitted.pixels[0], fitted).tobytes()
    black = restore(torch.full_like(fitted.pixels, -1), fitted)
    assert black.getextrema() == ((0, 0),) * 3
    for shape in [(2, 3, 256, 256), (1, 3, 128, 256), (1, 256, 256), (256, 256)]:
        with pytest.raises(ValueError, match=r"\[3, 256, 256\]") as error:
            restore(torch.zeros(shape), fitted)
        assert one_sentence(error)


# Saving


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
@pytest.mark.parametrize("channels", [3, 4])
def test_saving_loses_nothing(tmp_path, suffix, channels):
    levels = noise(33, 17, channels)
    levels[:5, :, 3:] = 0
    path = tmp_path / "new" / "folder" / f"a{suffix}"
    save_image(Image.fromarray(levels), path, icc_profile=SRGB)
    with Image.open(path) as stored:
        assert np.array_equal(np.array(stored), levels) and stored.info["icc_profile"] == SRGB
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpeg_is_saved_well(tmp_path, suffix):
    with Image.open(EXAMPLE) as picture:
        save_image(picture.convert("RGB"), tmp_path / f"a{suffix}", icc_profile=SRGB)
        with Image.open(tmp_path / f"a{suffix}") as stored:
            assert stored.format == "JPEG" and stored.info["icc_profile"] == SRGB
            assert (np.array(stored).astype(float) - np.array(picture)).std() < 1.5


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_no_profile_unless_given(tmp_path, suffix):
    image = filled("RGB", 0)
    image.info["icc_profile"] = SRGB
    save_image(image, tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as stored:
        assert "icc_profile" not in stored.info


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"a\.png") as error:
        save_image(filled("RGB", "red"), path)
    assert one_sentence(error) and path.read_bytes() == b"precious"
    save_image(filled("RGB", "red"), path, overwrite=True)
    assert first_pixel(load_image(path)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "name", "says"),
    [
        ("RGBA", "a.jpg", "PNG or WebP"),
        ("RGB", "a.xyz", r"\.png"),
        ("RGB", "a", r"\.png"),
        ("CMYK", "a.png", "CMYK"),
        ("I;16", "a.webp", "I;16"),
    ],
)
def test_nothing_is_flattened_or_guessed(tmp_path, mode, name, says):
    with pytest.raises(ValueError, match=says) as error:
        save_image(Image.new(mode, (2, 2)), tmp_path / "deep" / name)
    assert os.listdir(tmp_path) == []
    assert name.startswith("a") and "\n" not in str(error.value)


def test_a_transparent_colour_is_not_dropped_in_a_jpeg(tmp_path):
    image = filled("RGB", "red")
    image.info["transparency"] = (255, 0, 0)
    with pytest.raises(ValueError, match="PNG or WebP"):
        save_image(image, tmp_path / "a.jpg")


@pytest.mark.parametrize("step", ["encode", "replace"])
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")

    def half_written(self, target, *_, **__):
        target.write(b"half")
        raise OSError("disk full")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half_written) if step == "encode" else monkeypatch.setattr(
        os, "replace", fail
    )
    with pytest.raises(OSError, match="disk full"):
        save_image(filled("RGB", "red"), path, overwrite=True)
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["a.png"]


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    save_image(filled("RGB", "red"), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_opaque_alpha_does_not_hinder_jpeg(tmp_path):
    picture = Image.new("RGBA", (8, 8), (200, 30, 10, 255))
    save_image(picture, tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").mode == "RGB" and load_image(picture).opaque
    picture.putpixel((0, 0), (200, 30, 10, 254))
    assert not load_image(picture).opaque
    with pytest.raises(ValueError, match="JPEG cannot hold the transparency of b.jpg"):
        save_image(picture, tmp_path / "b.jpg")


def test_a_mask_is_the_alpha_where_something_shines_through():
    from varedit_core.pictures.images import load_mask

    grey = Image.linear_gradient("L")
    assert load_mask(grey).tobytes() == grey.tobytes()
    opaque = Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 255)])
    assert load_mask(opaque).tobytes() == grey.tobytes()
    white = Image.new("L", grey.size, 255)
    assert load_mask(Image.merge("RGBA", [white, white, white, grey])).tobytes() == grey.tobytes()
