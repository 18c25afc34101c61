"""What lies between the convolutions of channels-last pictures, as Triton kernels.

`__init__` has their meaning and chooses.

Shape suffixes: B images, C channels, P positions of a picture, G groups of channels, N chunks of positions.

A picture is read twice and written once: every channel's mean and squared deviation in every chunk, then, from those
few numbers, mean and deviation of every group, then the result. All arithmetic is fp32. Squares are only summed of
numbers from which a mean nearby was taken, so a large mean costs no digits. How a picture is cut depends on its shape
alone and nothing is added by atomics, so results are the same run by run and picture by picture.
"""

# Annotations stay objects: the interpreter of Triton 3.0 knows no constexpr whose annotation is a text.
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel

# Numbers a program holds at once, channels it takes at most, and programs a picture's moments are spread over, about.
_TILE, _CHANNELS, _PROGRAMS = 4096, 128, 1024


@triton.jit
def _tile(x_ptr, position, channel, positions, channels):
    """Pointers to a tile of a picture, and which of its numbers there are."""
    there = (position < positions)[:, None] & (channel < channels)[None, :]
    return x_ptr + position.to(tl.int64)[:, None] * channels + channel[None, :], there


def _tiles(channels: int) -> tuple[int, int, int]:
    """Positions and channels of a tile, and how many tiles lie side by side."""
    tile_c = min(_CHANNELS, triton.next_power_of_2(channels))
    return _TILE // tile_c, tile_c, triton.cdiv(channels, tile_c)


@kernel(do_not_specialize=["positions", "tiles"])
def _moments(
    x_ptr, offset_ptr, mean_ptr, squares_ptr, positions, channels, tiles,
    OFFSET: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """One chunk of `tiles` tiles: mean and sum of squared deviations of its channels, into [B, N, C]."""
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    first = tl.program_id(0) * tiles * TILE_P
    count = tl.minimum(positions - first, tiles * TILE_P)
    position = first + tl.arange(0, TILE_P)
    x_ptr += image * positions * channels
    # Deviations are taken from the mean of the first tile: a part of the chunk, so it is not far from the chunk's.
    at, there = _tile(x_ptr, position, channel, positions, channels)
    x = tl.load(at, there, other=0.0).to(tl.float32)
    near = tl.sum(x, 0) / tl.minimum(count, TILE_P).to(tl.float32)
    total = tl.zeros([TILE_P, TILE_C], tl.float32)
    squares = tl.zeros([TILE_P, TILE_C], tl.float32)
    for step in range(tiles):
        at, there = _tile(x_ptr, position + step * TILE_P, channel, positions, channels)
        x = tl.where(there, tl.load(at, there, other=0.0).to(tl.float32) - near[None, :], 0.0)
        total += x
        squares += x * x
    count = count.to(tl.float32)
    mean = tl.sum(total, 0) / count
    to = (image * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    if OFFSET:
        near += tl.load(offset_ptr + channel, channel < channels, other=0.0).to(tl.float32)
    tl.store(mean_ptr + to, near + mean, channel < channels)
    tl.store(squares_ptr + to, tl.sum(squares, 0) - count * mean * mean, channel < channels)


@kernel(do_not_specialize=["positions", "channels", "width", "chunks", "length"])
def _groups(
    mean_ptr, squares_ptr, group_ptr, positions, channels, width, chunks, length, eps,
    TILE_N: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of one group, from its channels' moments in all chunks, into [B, G, 2]."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, TILE_W)
    at = image * chunks * channels + group * width + lane
    numbers = positions.to(tl.float32) * width
    total = tl.zeros([TILE_N, TILE_W], tl.float32)
    for first in range(0, chunks, TILE_N):
        chunk = first + tl.arange(0, TILE_N)
        there = (chunk < chunks)[:, None] & (lane < width)[None, :]
        mean = tl.load(mean_ptr + at[None, :] + chunk[:, None] * channels, there, other=0.0)
        total += mean * tl.minimum(positions - chunk * length, length).to(tl.float32)[:, None]
    centre = tl.sum(tl.sum(total, 1), 0) / numbers
    total = tl.zeros([TILE_N, TILE_W], tl.float32)
    for first in range(0, chunks, TILE_N):
        chunk = first + tl.arange(0, TILE_N)
        there = (chunk < chunks)[:, None] & (lane < width)[None, :]
        away = tl.load(mean_ptr + at[None, :] + chunk[:, None] * channels, there, other=0.0) - centre
        squares = tl.load(squares_ptr + at[None, :] + chunk[:, None] * channels, there, other=0.0)
        count = tl.minimum(positions - chunk * length, length).to(tl.float32)[:, None]
        total += tl.where(there, squares + count * away * away, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / numbers
    to = (image * tl.num_programs(0) + group) * 2
    tl.store(group_ptr + to, centre)
    tl.store(group_ptr + to + 1, 1.0 / tl.sqrt(variance + eps))


@kernel(do_not_specialize=["positions", "groups", "width"])
def _activated(
    x_ptr, offset_ptr, y_ptr, group_ptr, weight_ptr, bias_ptr, positions, channels, groups, width,
    OFFSET: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < channels
    group = group_ptr + (image * groups + channel // width) * 2
    mean = tl.load(group, inside, other=0.0)
    if OFFSET:
        mean -= tl.load(offset_ptr + channel, inside, other=0.0).to(tl.float32)
    gain = tl.load(group + 1, inside, other=0.0) * tl.load(weight_ptr + channel, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, inside, other=0.0).to(tl.float32)
    position = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    start = image * positions * channels
    at, there = _tile(x_ptr + start, position, channel, positions, channels)
    y = (tl.load(at, there, other=0.0).to(tl.float32) - mean[None, :]) * gain[None, :] + bias[None, :]
    y = y / (1.0 + tl.exp(-y))
    to, there = _tile(y_ptr + start, position, channel, positions, channels)
    tl.store(to, y.to(y_ptr.dtype.element_ty), there)


def group_norm_silu(
    x_BCHW: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, offset: Tensor | None = None
) -> Tensor:
    images, channels, height, side = x_BCHW.shape
    positions, width = height * side, channels // groups
    tile_p, tile_c, columns = _tiles(channels)
    tiles = triton.cdiv(positions * columns, _PROGRAMS * tile_p)
    chunks = triton.cdiv(positions, tiles * tile_p)
    moments = torch.empty(2, images, chunks, channels, dtype=torch.float32, device=x_BCHW.device)
    group = torch.empty(images, groups, 2, dtype=torch.float32, device=x_BCHW.device)
    y = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    tile_w = triton.next_power_of_2(width)
    given = dict(OFFSET=offset is not None, TILE_P=tile_p, TILE_C=tile_c)
    offset = bias if offset is None else offset
    _moments[(chunks, columns, images)](x_BCHW, offset, moments[0], moments[1], positions, channels, tiles, **given)
    _groups[(groups, images)](
        moments[0], moments[1], group, positions, channels, width, chunks, tiles * tile_p, eps,
        TILE_N=max(1, _TILE // 2 // tile_w), TILE_W=tile_w,
    )  # fmt: skip
    _activated[(triton.cdiv(positions, tile_p), columns, images)](
        x_BCHW, offset, y, group, weight, bias, positions, channels, groups, width, **given
    )
    return y


@kernel(do_not_specialize=["positions"])
def _sum(x_ptr, y_ptr, offset_ptr, positions, channels, TILE_P: tl.constexpr, TILE_C: tl.constexpr):
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    offset = tl.load(offset_ptr + channel, channel < channels, other=0.0).to(tl.float32)
    position = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    at, there = _tile(x_ptr, position, channel, positions, channels)
    x = tl.load(at, there, other=0.0).to(tl.float32)
    beside, _ = _tile(y_ptr, position, channel, positions, channels)
    x += tl.load(beside, there, other=0.0).to(tl.float32) + offset[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), there)


def add_pictures(x_BCHW: Tensor, y_BCHW: Tensor, offset: Tensor) -> Tensor:
    positions, channels = x_BCHW.numel() // x_BCHW.shape[1], x_BCHW.shape[1]
    tile_p, tile_c, columns = _tiles(channels)
    _sum[(triton.cdiv(positions, tile_p), columns)](
        x_BCHW, y_BCHW, offset, positions, channels, TILE_P=tile_p, TILE_C=tile_c
    )
    return x_BCHW


@kernel(do_not_specialize=["positions", "side"])
def _doubled(x_ptr, y_ptr, positions, side, channels, TILE_P: tl.constexpr, TILE_C: tl.constexpr):
    """positions, side: of x, all pictures' rows one below the other."""
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    position = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    at, there = _tile(x_ptr, position, channel, positions, channels)
    x = tl.load(at, there)
    corner = (position // side) * 4 * side + (position % side) * 2
    for half in tl.static_range(4):
        to = corner + (half // 2) * 2 * side + half % 2
        tl.store(y_ptr + to.to(tl.int64)[:, None] * channels + channel[None, :], x, there)


def double_picture(x_BCHW: Tensor) -> Tensor:
    images, channels, height, side = x_BCHW.shape
    y = torch.empty(
        images, channels, 2 * height, 2 * side, dtype=x_BCHW.dtype, device=x_BCHW.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    positions = images * height * side
    tile_p, tile_c, columns = _tiles(channels)
    _doubled[(triton.cdiv(positions, tile_p), columns)](
        x_BCHW, y, positions, side, channels, TILE_P=tile_p, TILE_C=tile_c
    )
    return y
