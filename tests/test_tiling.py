"""Decoding in less memory and in fewer bits: what fits is whole, tiles cover everything, bf16 stays close."""

import logging
import math
import re

import pytest
import torch
import torch.nn.functional as F
from support import GOLDEN, ROOT
from torch import nn

from varedit_core import Editor, load_autoencoder
from varedit_core.demo import demo_files
from varedit_core.files.checkpoints import expected
from varedit_core.files.published import AUTOENCODERS
from varedit_core.model.layers import Operations
from varedit_core.pictures.images import fit, load_image
from varedit_core.runtime import tiling
from varedit_core.runtime.tiling import LEAST_TILE, bytes_to_decode, decode_fitted, decode_tiled
from varedit_core.tokenizer.quantizer import encode, latent_grids
from varedit_core.tokenizer.vae import Autoencoder, ResidualBlock

STRIDE = 4
FULL = "takes more memory than is free"


def enlarge(latents):
    """A decoder without neighbourhoods, of which tiles change nothing."""
    return F.interpolate(latents[:, :3], scale_factor=STRIDE, mode="nearest")


class Device:
    """A decoder that runs out of memory above some number of positions, and what it was asked for."""

    def __init__(self, room: float) -> None:
        self.room, self.asked = room, []

    def __call__(self, latents):
        self.asked.append(tuple(latents.shape))
        if latents[:, 0].numel() > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return enlarge(latents)


@pytest.fixture
def free(monkeypatch):
    """Sets for how many positions memory seems to be free."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return lambda positions: monkeypatch.setattr(tiling, "free_memory", lambda device: positions * tiling._SPARE + 1)


def psnr(a, b) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.fixture(scope="module")
def cat():
    """The demo tokenizer, the cat at 256 pixels as it is read back from its bits, and the picture of that."""
    network = load_autoencoder(demo_files()[1])
    fitted = fit(load_image(ROOT / "samples" / "cat.jpg"), "0.06M", "published")
    with torch.no_grad():
        _, latents = encode(network.encode(fitted.pixels), latent_grids(fitted.schedule, 2))
        return network, latents, network.decode(latents)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (5, 33), (23, 8)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (8, 0), (13, 12), (64, 16)])
def test_tiles_cover_the_picture(height, width, tile, overlap):
    latents, shapes = torch.randn(2, 4, height, width), set()

    def decode(part):
        shapes.add(tuple(part.shape[-2:]))
        return enlarge(part)

    picture = decode_tiled(decode, latents, tile, overlap, STRIDE)
    assert torch.allclose(picture, enlarge(latents), atol=1e-5)
    assert shapes == {(min(tile, height), min(tile, width))}, "tiles are as large as they can be"


def test_one_tile_passes_linearly_into_the_other():
    bright = iter([0.0, 1.0])
    row = decode_tiled(
        lambda x: torch.full((1, 3, 4 * STRIDE, 8 * STRIDE), next(bright)), torch.zeros(1, 4, 4, 12), 8, 4, STRIDE
    )
    profile = row[0, 0, 5]
    assert profile[: 4 * STRIDE].eq(0).all() and profile[-4 * STRIDE :].eq(1).all()
    between = profile[4 * STRIDE : 8 * STRIDE]
    assert torch.allclose(between.diff(), torch.full((4 * STRIDE - 1,), 1 / (4 * STRIDE)), atol=1e-6)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, -1), (0, 0)])
def test_an_overlap_must_be_less_than_the_tile(tile, overlap):
    with pytest.raises(ValueError, match="the overlap must be less than the tile"):
        decode_tiled(enlarge, torch.zeros(1, 4, 16, 16), tile, overlap, STRIDE)


def test_what_fits_is_decoded_whole(free, caplog):
    free(2 * 40 * 48)
    device, latents = Device(math.inf), torch.randn(2, 4, 40, 48)
    assert torch.equal(decode_fitted(device, latents, STRIDE, 1), enlarge(latents))
    assert device.asked == [(2, 4, 40, 48)] and not caplog.records


@pytest.mark.parametrize(("seems", "room"), [(40 * 48, math.inf), (math.inf, 40 * 48)], ids=["estimate", "ran out"])
def test_a_batch_that_does_not_fit_is_decoded_picture_by_picture(free, caplog, seems, room):
    free(seems)
    device, latents = Device(room), torch.randn(2, 4, 40, 48)
    assert torch.equal(decode_fitted(device, latents, STRIDE, 1), enlarge(latents))
    assert device.asked[-2:] == [(1, 4, 40, 48)] * 2 and not caplog.records


@pytest.mark.parametrize(("seems", "room"), [(64 * 64, math.inf), (math.inf, 64 * 64)], ids=["estimate", "ran out"])
def test_a_picture_that_does_not_fit_is_decoded_in_tiles(free, caplog, seems, room):
    free(seems)
    device, latents = Device(room), torch.randn(1, 4, 72, 128)
    with caplog.at_level(logging.WARNING):
        picture = decode_fitted(device, latents, STRIDE, 1)
    assert torch.allclose(picture, enlarge(latents), atol=1e-5)
    (record,) = caplog.records
    assert re.match(rf"decoding 512 x 288 pixels {FULL}, so it is done in tiles of \d+, .*[^.]$", record.getMessage())
    assert device.asked[-1][-1] > LEAST_TILE, "no smaller than they must be"


def test_where_nothing_fits_it_says_so(free):
    free(100)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        decode_fitted(Device(10), torch.randn(1, 4, 64, 64), STRIDE, 1)


def test_only_cuda_tells_what_is_free():
    assert tiling.free_memory(torch.device("cpu")) == math.inf


def test_the_estimate_goes_with_widths_and_bits():
    wide, narrow = (
        Autoencoder(c, device="meta") for c in (AUTOENCODERS["8B"], load_autoencoder(demo_files()[1]).config)
    )
    half = Autoencoder(AUTOENCODERS["8B"], device="meta", decode_dtype=torch.bfloat16)
    assert bytes_to_decode(wide) == 2 * bytes_to_decode(half) == 3 * 256 * 64 * 4
    assert bytes_to_decode(narrow) < bytes_to_decode(wide) / 2


@torch.no_grad()
def test_tiles_of_the_demo_tokenizer(cat):
    network, latents, whole = cat
    tiled = decode_tiled(network.decode, latents, 24, 6, network.config.stride)
    assert tiled.shape == whole.shape and 33 < psnr(tiled, whole) < 40


@torch.no_grad()
def test_decoding_in_bf16(cat):
    network, latents, whole = cat
    narrow = load_autoencoder(demo_files()[1], decode_dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in narrow.decoder.parameters()} == {torch.bfloat16}
    assert {key: t.dtype for key, t in expected(narrow).items()} == {k: t.dtype for k, t in narrow.state_dict().items()}
    picture = narrow.decode(latents)
    assert picture.dtype == torch.float32 and psnr(picture, whole) > 60
    pixels = torch.rand(1, 3, 48, 64) * 2 - 1
    assert torch.equal(narrow.encode(pixels), network.encode(pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_editor_on_the_cpu_decodes_in_fp32(dtype):
    path = GOLDEN / "patchify_256.safetensors"
    editor = Editor.load(path, path, device="cpu", dtype=dtype)
    assert {p.dtype for p in editor.autoencoder.parameters()} == {torch.float32}
    assert all(p.is_contiguous() for p in editor.autoencoder.parameters())


@torch.no_grad()
def test_numbers_on_the_cpu_are_those_of_plain_layers(cat):
    network, latents, whole = cat

    class Plain(Operations):
        GroupNorm = nn.GroupNorm

    plain = load_autoencoder(demo_files()[1], Plain)
    assert torch.equal(plain.decode(latents), whole)
    x = torch.randn(1, 64, 12, 20)
    for block in (m for m in network.modules() if isinstance(m, ResidualBlock) and m.norm1.num_channels == 64):
        h = block.conv1(F.silu(block.norm1(x)))
        h = block.nin_shortcut(x) + block.conv2(F.silu(block.norm2(h)))
        before = x.clone()
        assert torch.equal(block(x), h) and torch.equal(x, before)
