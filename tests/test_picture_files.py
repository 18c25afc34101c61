"""Pictures and masks as users have them: every kind, format and fault from a list, and what they carry."""

import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

from varedit_core.pictures import reading
from varedit_core.pictures.canvas import crop, crop_around, extend, stitch
from varedit_core.pictures.images import (
    _FORMATS,
    check_mask_shape,
    fit,
    fit_mask,
    load_image,
    load_mask,
    restore,
    save_image,
    unfit_mask,
)
from varedit_core.pictures.reading import FORMATS, Details, is_picture, opened

SCENE = Image.new("RGB", (40, 30), (200, 30, 60))
ImageDraw.Draw(SCENE).rectangle((5, 5, 20, 20), (20, 160, 240))
ARRAY = np.array(SCENE)


def encoded(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def file_of(folder, data, name="picture.png"):
    (folder / name).write_bytes(data)
    return folder / name


# Ways to give a picture

WAYS = {
    "a path": lambda folder, data: file_of(folder, data),
    "the name of a path": lambda folder, data: str(file_of(folder, data)),
    "bytes": lambda folder, data: data,
    "a bytearray": lambda folder, data: bytearray(data),
    "a memoryview": lambda folder, data: memoryview(data),
    "BytesIO": lambda folder, data: io.BytesIO(data),
    "an open file": lambda folder, data: open(file_of(folder, data), "rb"),
    "a Pillow image": lambda folder, data: Image.open(io.BytesIO(data)),
    "an array": lambda folder, data: ARRAY,
    "an array of numbers": lambda folder, data: ARRAY / 255.0,
    "an array, channels first": lambda folder, data: ARRAY.transpose(2, 0, 1),
    "a tensor": lambda folder, data: torch.from_numpy(ARRAY.copy()),
    "a tensor, channels first": lambda folder, data: torch.from_numpy(ARRAY.copy()).permute(2, 0, 1) / 255,
    "a tensor in half precision": lambda folder, data: torch.from_numpy(ARRAY.copy()).permute(2, 0, 1).half() / 255,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_give_a_picture(tmp_path, way):
    given = WAYS[way](tmp_path, encoded(SCENE, "PNG"))
    assert is_picture(given)
    assert np.abs(np.array(load_image(given).rgb).astype(int) - ARRAY).max() == 0


NONE = {
    "a number": (3, "got int"), "None": (None, "got NoneType"), "a list": ([SCENE], "got list"),
    "a file of text": (io.StringIO("x"), "open it with mode 'rb'"), "no bytes": (b"", "it is none of PNG"),
    "a batch": (np.zeros((2, 8, 8, 3)), "of one picture is"), "two channels": (np.zeros((8, 8, 2)), "of one picture"),
    "too bright": (np.full((8, 8), 1.5), "from 0 to 1, got 1.5"),
    "undefined": (np.full((8, 8), np.nan), "holds undefined"),
    "16 bits": (np.zeros((8, 8), np.uint16), "must be of uint8"), "no pixels": (np.zeros((0, 8, 3)), "is empty"),
    "complex": (np.zeros((8, 8), complex), "must be of uint8"), "words": ("a cat", "there is no image at a cat"),
    "one dimension": (torch.zeros(8), "of one picture is"), "sparse": (torch.zeros(3, 8, 8).to_sparse(), "a plain one"),
    "no data": (torch.zeros(3, 8, 8, device="meta"), "a plain one"),
    "conjugated": (torch.zeros(3, 8, 8, dtype=torch.complex64).conj(), "a plain one"),
    "masked": (np.ma.masked_array(ARRAY, ARRAY > 9), "fill it"),
    "every other byte": (memoryview(b"no picture" * 9)[::2], "it is none of PNG"),
    "a photograph of a phone": (b"\0\0\0\x18ftypheic" + bytes(99), "it is HEIF, which this Pillow cannot decode"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_picture_is_one_sentence(kind):
    given, said = NONE[kind]
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_image(given)
    assert said in str(raised.value) and len(str(raised.value)) < 300 and "\n" not in str(raised.value)


# Formats

SAVED = {"PNG": {}, "JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {}, "PPM": {}, "TIFF": {}}
HERE = [kind for kind in SAVED if kind in FORMATS]


@pytest.mark.parametrize("kind", HERE)
def test_every_format_is_read(kind):
    found = np.array(load_image(encoded(SCENE, kind, **SAVED[kind])).rgb).astype(int)
    assert np.abs(found - ARRAY).mean() < (8 if kind in ("JPEG", "GIF") else 1)


@pytest.mark.parametrize("kind", HERE)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_a_cut_file_is_one_sentence(tmp_path, kind, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind, **SAVED[kind])
    path = file_of(tmp_path, data[: max(4, int(len(data) * part))])
    with pytest.raises(ValueError) as raised:
        load_image(path)
    assert str(path) in str(raised.value) and ("again" in str(raised.value) or "damaged" in str(raised.value))


def test_a_jpeg_that_is_cut_short_is_called_so(tmp_path):
    path = file_of(tmp_path, encoded(SCENE, "JPEG")[:-20], "photo.jpg")
    with pytest.raises(ValueError, match="it is cut short, so copy or download it again"):
        load_image(path)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
OTHERS = {"EPS": EPS, "PDF": b"%PDF-1.4\n", "a script": b"#!/bin/sh\necho x\n", "HTML": b"<html>not found</html>"}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_start_nothing(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("another program was started"))
    with pytest.raises(ValueError, match="it is none of PNG, JPEG"):
        load_image(file_of(tmp_path, OTHERS[kind] + b" " * 64))


def png_of(width, height):
    """The head of a PNG of a size, without its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


CLAIMS = {
    "PNG": (png_of(65535, 65535), "at most"), "a PNG within our bound": (png_of(16000, 16000), "it is damaged"),
    "GIF": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;", "at most"),
    "PPM": (b"P6 65535 65535 255\n" + b"\0" * 99, "at most"), "a small PPM": (b"P6 9000 9000 255\n\0", "it is damaged"),
    "BMP": (encoded(SCENE, "BMP")[:18] + struct.pack("<ii", 65535, 65535) + b"\1\0\x18\0" + b"\0" * 24, "at most"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLAIMS)
def test_a_picture_that_claims_too_much_is_refused_unread(tmp_path, kind, monkeypatch):
    data, said = CLAIMS[kind]
    monkeypatch.setattr(reading, "_upright", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=said):
        load_image(file_of(tmp_path, data))


def test_a_link_to_a_device_and_a_pipe_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        for read in (load_image, load_mask):
            with pytest.raises(ValueError, match="is a (pipe|device), not a"):
                read(tmp_path / name)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
@pytest.mark.parametrize("read", [load_image, load_mask])
def test_of_several_frames_the_first_is_read_and_told(tmp_path, kind, read, caplog):
    others = [Image.new("RGB", SCENE.size, color) for color in ("green", "blue")]
    path = file_of(tmp_path, encoded(SCENE, kind, save_all=True, append_images=others))
    read(path)
    assert [record.message for record in caplog.records] == [f"{path} has 3 frames; the first is read"]


def test_a_phones_second_picture_is_no_frame(tmp_path, caplog):
    load_image(file_of(tmp_path, encoded(SCENE, "MPO", save_all=True, append_images=[SCENE.resize((8, 6))]), "p.jpg"))
    assert not caplog.records


# Colours

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def grey_profile():
    """A linear grey one, as littleCMS cannot make one through Pillow: header, white point and a curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    point = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + b"\0" * 79
    tags, data, at = [], b"", 128 + 4 + 3 * 12
    for name, part in ((b"desc", text), (b"wtpt", point), (b"kTRC", curve)):
        part += b"\0" * (-len(part) % 4)
        tags.append(name + struct.pack(">II", at + len(data), len(part)))
        data += part
    body = struct.pack(">I", 3) + b"".join(tags) + data
    head = struct.pack(">I", 128 + len(body)) + b"\0" * 4 + b"\x02\x10\0\0" + b"mntrGRAYXYZ " + b"\0" * 12 + b"acsp"
    head += b"\0" * 28 + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + body


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_goes_through_its_profile(mode):
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4, 1)))
    image = ramp if mode == "L" else Image.merge("LA", (ramp, Image.new("L", ramp.size, 90)))
    source = load_image(encoded(image, "PNG", icc_profile=grey_profile()))
    found = np.array(source.rgb)[0, :, 0].astype(int)
    light = np.arange(256) / 255
    wanted = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    error = np.abs(found - wanted)
    assert error.max() < 12 and error.mean() < 1.5 and np.abs(np.arange(256) - wanted).max() > 60
    assert source.icc_profile is None, "the result is in sRGB"
    assert (source.alpha is None) == (mode == "L") and (mode == "L" or source.alpha.getextrema() == (90, 90))


def test_a_broken_profile_is_told(caplog):
    load_image(encoded(SCENE.convert("L"), "PNG", icc_profile=b"\0" * 16 + b"GRAY" + b"\0" * 200))
    assert "the colour profile of the picture cannot be used" in caplog.text


def test_lab_is_read():
    lab = ImageCms.profileToProfile(SCENE, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    found = np.array(load_image(encoded(lab, "TIFF")).rgb).astype(int)
    assert np.abs(found - ARRAY).max() < 12


# What is not kept of one


def png(*chunks, mode="RGB"):
    made = PngImagePlugin.PngInfo()
    for name, data in chunks:
        made.add(name, data)
    return encoded(SCENE if mode == "RGB" else Image.new(mode, (40, 30), 700), "PNG", pnginfo=made)


TOLD = {
    "png, 16 bits": (png(mode="I;16"), "16 bits a channel"),
    "tiff, 16 bits": (encoded(Image.new("I;16", (40, 30), 700), "TIFF"), "16 bits a channel"),
    "pgm, 16 bits": (encoded(Image.new("I;16", (40, 30), 700), "PPM"), "16 bits a channel"),
    "png, gamma": (png((b"gAMA", struct.pack(">I", 100000))), "says that its gamma is 1, which is not used"),
    "png, wide colours": (png((b"cICP", bytes((9, 16, 0, 1)))), "cICP chunk that its colours are others"),
    "png": (png(), ""),
    "png, sRGB's gamma": (png((b"gAMA", struct.pack(">I", 45455))), ""),
    "png, sRGB by number": (png((b"cICP", bytes((1, 13, 0, 1)))), ""),
    "png, gamma beside sRGB": (png((b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100000))), ""),
    "tiff": (encoded(SCENE, "TIFF"), ""),
}


@pytest.mark.parametrize("kind", TOLD)
def test_depth_and_colours_that_are_not_kept_are_told(kind, caplog):
    data, said = TOLD[kind]
    assert load_image(data).size == (40, 30)
    assert said in caplog.text and bool(said) == bool(caplog.records)


@pytest.mark.parametrize("length", [0, 2**31 - 1, 2**32 - 1])
def test_a_chunk_of_any_length_is_no_hang(length):
    whole = png()
    broken = whole[:33] + struct.pack(">I", length) + b"abcd" + whole[33:]
    try:
        load_image(broken)
    except ValueError as error:
        assert "cannot read" in str(error)


def test_no_resolution_is_none():
    assert load_image(encoded(SCENE, "TIFF")).details.dpi is None


def test_an_open_file_without_end_is_refused_unread():
    with open("/dev/zero", "rb") as file, pytest.raises(ValueError, match="cannot read /dev/zero .it is none of"):
        load_image(file)


class Endless(io.RawIOBase):
    """A PNG that goes on for ever."""

    def read(self, size=-1):
        return png()[:size] if size == 16 else bytes(size)


def test_an_open_file_is_read_up_to_what_a_picture_can_have(monkeypatch):
    monkeypatch.setattr(reading, "MOST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="holds more than 1 MB"):
        load_image(Endless())


# What a picture carries


def carrying(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x013B], exif[0x8769] = 6, "A. Painter", {0x9003: "2026:01:02 03:04:05"}
    more = {"exif": exif, "dpi": (300, 300)}
    if kind == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("prompt", '{"1": {}}')
        texts.add_itxt("Title", "黄昏")
        more["pnginfo"] = texts
    if kind == "JPEG":
        more["comment"] = b"by hand"
    return encoded(SCENE, kind, **more)


@pytest.mark.parametrize("target", ["out.png", "out.jpg", "out.webp"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_a_picture_carries_is_kept(tmp_path, kind, target, caplog):
    source = load_image(carrying(kind))
    assert source.size == (30, 40), "upright"
    save_image(source.rgb, tmp_path / target, details=source.details)
    with Image.open(tmp_path / target) as saved:
        exif = saved.getexif()
        assert saved.size == (30, 40) and exif[0x0112] == 1 and exif[0x013B] == "A. Painter"
        assert exif.get_ifd(0x8769)[0x9003] == "2026:01:02 03:04:05"
        if target == "out.png":
            saved.load()
            assert kind == "WEBP" or round(saved.info["dpi"][0]) == 300
            texts = {key: str(value) for key, value in saved.text.items()}
            wanted = {"PNG": {"prompt": '{"1": {}}', "Title": "黄昏"}, "JPEG": {"Comment": "by hand"}}.get(kind, {})
            assert wanted.items() <= texts.items()
        if target == "out.jpg" and kind == "JPEG":
            assert saved.info["comment"] == b"by hand"
    lost = kind == "PNG" and target != "out.png"
    assert ("without its" in caplog.text and "texts (prompt, Title)" in caplog.text) == lost


def test_a_thumbnail_is_dropped(tmp_path):
    exif = Image.Exif()
    exif[0x013B] = "A. Painter"
    plain = len(exif.tobytes())
    assert len(load_image(encoded(SCENE, "JPEG", exif=exif)).details.exif) <= plain + 12


def test_broken_exif_is_told_and_the_picture_read(caplog):
    data = encoded(SCENE, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x99" * 40)
    assert load_image(data).size == SCENE.size


def artist(name: str) -> bytes:
    exif = Image.Exif()
    exif[0x013B] = name
    return exif.tobytes()


LONG = 70_000  # more than a JPEG's segment holds
CARRIED = {
    "EXIF data": (Details(exif=artist("A. Painter")), "exif"),
    "EXIF data, long": (Details(exif=artist("A" * LONG)), "exif"),
    "dots per inch": (Details(dpi=(300.0, 150.0)), "dpi"),
    "dots per inch, many": (Details(dpi=(70_000.0, 70_000.0)), "dpi"),
    "dots per inch, most": (Details(dpi=(4e9, 4e9)), "dpi"),
    "dots per inch, few": (Details(dpi=(1e-9, 1e-9)), "dpi"),
    "XMP data": (Details(xmp=b"<x:xmpmeta/>"), "xmp"),
    "XMP data, long": (Details(xmp=b"<" * LONG), "xmp"),
    "comment": (Details(comment=b"by hand"), "comment"),
    "comment, long": (Details(comment=b"c" * LONG), "comment"),
    "texts": (Details(texts=(("prompt", "{}"),)), "texts"),
}


@pytest.mark.parametrize("target", sorted(_FORMATS))
@pytest.mark.parametrize("what", CARRIED)
def test_what_a_format_cannot_hold_is_told(tmp_path, caplog, what, target):
    details, name = CARRIED[what]
    save_image(SCENE, tmp_path / f"a{target}", details=details)
    told = f"without its {what.partition(',')[0]}" in caplog.text
    with Image.open(tmp_path / f"a{target}") as saved:
        saved.load()
        kept = load_image(tmp_path / f"a{target}").details
        found = {
            "exif": "exif" in saved.info, "xmp": kept.xmp == details.xmp, "texts": kept.texts == details.texts,
            "dpi": kept.dpi == pytest.approx(details.dpi, rel=1e-3) if kept.dpi and details.dpi else False,
            "comment": details.comment in (kept.comment, dict(kept.texts).get("Comment", "").encode()),
        }[name]  # fmt: skip
    assert found != told and caplog.text.count("\n") == told


def test_a_tiffs_own_tags_are_kept(tmp_path):
    said = {270: "a cat", 315: "A. Painter", 33432: "all rights", 306: "2026:01:02 03:04:05"}
    SCENE.save(tmp_path / "a.tif", tiffinfo=said)
    details = load_image(tmp_path / "a.tif").details
    save_image(SCENE, tmp_path / "b.jpg", details=details)
    with Image.open(tmp_path / "b.jpg") as saved:
        assert dict(saved.getexif()) == said, "and nothing of how it was stored"


def test_iptc_that_is_left_out_is_told(tmp_path, caplog):
    block = b"\x1c\x02\x78\x00\x05a cat"
    resource = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + len(block).to_bytes(4, "big") + block
    segment = b"\xff\xed" + (len(resource) + 2).to_bytes(2, "big") + resource
    data = encoded(SCENE, "JPEG")
    load_image(data[:2] + segment + data[2:])
    assert "the IPTC data of the picture" in caplog.text


def test_every_part_that_a_picture_carries_is_on_the_list():
    assert {name for _, name in CARRIED.values()} == set(Details.__dataclass_fields__)


@pytest.mark.parametrize("dpi", [(0, 0), (float("nan"), 72), (72, float("inf")), (-1, 72), "300", (300,), 5, (None, 1)])
def test_dots_per_inch_that_are_none_are_told(caplog, dpi):
    image = SCENE.copy()
    image.info["dpi"] = dpi
    assert load_image(image).details.dpi is None and "dots per inch of the picture are" in caplog.text


def test_an_edit_is_not_lost_for_what_its_picture_carried(tmp_path, caplog):
    save_image(SCENE, tmp_path / "a.png", icc_profile="no profile", details=Details(dpi=(72.0, 72.0)))
    assert "cannot be written to" in caplog.text
    assert Image.open(tmp_path / "a.png").tobytes() == SCENE.tobytes()


@pytest.mark.parametrize("profile", [b"junk", b"\0" * 200])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_profile_that_is_none_is_told(caplog, mode, profile):
    image = SCENE.convert(mode)
    image.info["icc_profile"] = profile
    assert load_image(image).icc_profile is None and "the colour profile of the picture" in caplog.text


# Masks


def mask_of(levels, alpha=None, color=None):
    """A 4x4 mask: levels left and right, alpha of the same."""

    def halves(pair):
        image = Image.new("L", (4, 4), pair[0])
        image.paste(pair[1], (2, 0, 4, 4))
        return image

    bands = [halves(levels)] * 3
    if color:
        bands = [band.point(lambda level, part=part: level * part // 255) for band, part in zip(bands, color)]
    return Image.merge("RGB" if alpha is None else "RGBA", bands + ([] if alpha is None else [halves(alpha)]))


MASKS = {
    "bright": ((0, 255), None, None, (0, 255), False),
    "bright, alpha nearly full": ((0, 255), (254, 254), None, (0, 254), False),
    "bright, alpha full": ((0, 255), (255, 255), None, (0, 255), False),
    "bright times alpha": ((255, 128), (100, 255), None, (100, 128), False),
    "white strokes on nothing": ((255, 255), (0, 255), None, (0, 255), True),
    "black strokes on nothing": ((0, 0), (0, 255), None, (0, 255), True),
    "red strokes on nothing": ((255, 255), (0, 255), (255, 0, 0), (0, 255), True),
    "soft alpha alone": ((90, 90), (40, 200), None, (40, 200), True),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_brightness_times_alpha(kind, caplog):
    levels, alpha, color, wanted, told = MASKS[kind]
    found = load_mask(mask_of(levels, alpha, color))
    assert (found.getpixel((0, 0)), found.getpixel((3, 3))) == wanted
    assert ("the mask's transparency counts" in caplog.text) == told and len(caplog.records) == told


def test_a_photograph_with_an_erased_part_is_asked_about(caplog):
    photo = SCENE.copy()
    alpha = Image.new("L", SCENE.size, 255)
    alpha.paste(0, (10, 10, 30, 20))
    photo.putalpha(alpha)
    with pytest.raises(ValueError, match="give it with --protect"):
        load_mask(photo)
    with caplog.at_level(logging.WARNING):
        assert load_mask(photo, erased=True).tobytes() == alpha.tobytes()
    assert "transparency counts" in caplog.text


SHAPES = {
    "the same": ((600, 400), True), "another size": ((150, 100), True), "rounded": ((151, 99), True),
    "turned": ((400, 600), False), "wider": ((700, 400), False), "square": ((64, 64), False),
    "a line": ((600, 1), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_a_mask_of_another_shape_is_refused(kind):
    size, fits = SHAPES[kind]
    mask = Image.new("L", size)
    check_mask_shape(mask, (600, 400))
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    if fits:
        check_mask_shape(mask, (600, 400))
        return
    with pytest.raises(ValueError, match=f"the mask is {size[0]}x{size[1]} but the picture is 600x400 .upright."):
        check_mask_shape(mask, (600, 400))


def test_a_photograph_that_is_turned_does_not_fit_its_stored_mask(tmp_path):
    """Stored lying, shown upright: a mask drawn over what is stored marks another place."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = load_image(encoded(Image.new("RGB", (60, 40), "gray"), "JPEG", exif=exif))
    mask = load_mask(mask_of((0, 255)).resize((60, 40)))
    with pytest.raises(ValueError, match="the mask is 60x40 but the picture is 40x60"):
        check_mask_shape(mask, photo.size)


@pytest.mark.parametrize("name", sorted({"left\\right.png", "tür.png", "名前.png", "a b.png", "x" * 200 + ".png"}))
def test_names_of_all_kinds(tmp_path, name):
    path = file_of(tmp_path, encoded(SCENE, "PNG"), name)
    assert opened(path)[0].size == SCENE.size


@pytest.mark.filterwarnings("error")
def test_no_step_of_an_edit_has_pillows_bound(monkeypatch):
    """Its `open`, `crop` and more refuse pictures of so many pixels that are none too many for an edit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    source = load_image(encoded(Image.effect_noise((90, 60), 50).convert("RGBA"), "PNG"))
    fitted = fit(source, "0.06M", "square")
    assert restore(fitted.pixels[0], fitted).size == (90, 60)
    mask = Image.new("L", (90, 60))
    mask.paste(255, (20, 10, 60, 50))
    assert unfit_mask(fit_mask(mask, fitted.fitting)[0], fitted.fitting).size == (90, 60)
    place = crop_around(source.size, mask, 0.25)
    part, _ = crop(source, place)
    assert stitch(source, part.rgb, place).size == (90, 60)
    assert extend(source, (8, 0, 0, 0))[0].size == (98, 60)
