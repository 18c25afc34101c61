"""Bits and features, both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varedit_core.tokenizer.quantizer import (
    area_resize,
    codes,
    decode,
    encode,
    from_tokens,
    latent_grids,
    linear_resize,
    to_tokens,
)
from varedit_core.tokenizer.schedule import AREAS, TABLES, schedule_for


@given(
    ratio=st.sampled_from(sorted(TABLES)),
    area=st.sampled_from(["0.06M", "0.25M"]),
    patch=st.sampled_from([1, 2]),
    bits=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_encode_then_decode(ratio, area, patch, bits, seed):
    grids = latent_grids(schedule_for(area, ratio), patch)
    features = torch.randn(2, bits, *grids[-1], generator=torch.Generator().manual_seed(seed))
    drawn, total = encode(features, grids)
    assert [tuple(b.shape) for b in drawn] == [(2, bits, *grid) for grid in grids]
    torch.testing.assert_close(decode(drawn, grids[-1]), total, atol=1e-5, rtol=0)


def test_the_last_scale_lowers_the_residual():
    grids = latent_grids(schedule_for("0.06M"), 2)
    features = torch.randn(1, 14, *grids[-1], generator=torch.Generator().manual_seed(0)) * 0.5
    errors = [(features - decode(encode(features, grids)[0][:k], grids[-1])).norm() for k in range(1, len(grids) + 1)]
    assert errors[-1] < 0.6 * errors[0]


def test_codes_have_unit_length():
    drawn = torch.rand(2, 9, 4, 4) > 0.5
    torch.testing.assert_close(codes(drawn).norm(dim=1), torch.ones(2, 4, 4))
    assert torch.equal(codes(drawn) > 0, drawn)


def test_a_zero_residual_is_bit_zero():
    drawn, _ = encode(torch.zeros(1, 3, 2, 2), [(2, 2)])
    assert not drawn[0].any()


def test_area_resize_averages():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert area_resize(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert area_resize(x, (4, 4)) is x


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_rows_of_patches(patch):
    x = torch.randn(2, 3, 4 * patch, 5 * patch)
    tokens = to_tokens(x, patch)
    assert tokens.shape == (2, 20, 3 * patch * patch)
    assert torch.equal(from_tokens(tokens, (4, 5), patch), x)
    if patch == 2:  # channel index c * 4 + dy * 2 + dx
        assert tokens[1, 7, 2 * 4 + 1 * 2 + 0] == x[1, 2, 2 * 1 + 1, 2 * 2 + 0]


def test_every_schedule_fits_both_layouts():
    for area in AREAS:
        for ratio in TABLES:
            schedule = schedule_for(area, ratio)
            height, width = schedule.pixels
            assert latent_grids(schedule, 2)[-1] == (height // 8, width // 8)
            assert latent_grids(schedule, 1)[-1] == (height // 16, width // 16)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def apart(x):
    return torch.stack((x, x), -1)[..., 0]


LAYOUTS = [channels_last, transposed, apart]


@pytest.mark.parametrize("lay", LAYOUTS, ids=lambda lay: lay.__name__)
def test_how_numbers_lie_is_nothing_to_a_resize(lay):
    torch.manual_seed(0)
    x = torch.randn(2, 32, 16, 16)
    for resize in (area_resize, linear_resize):
        for grid in [(1, 1), (3, 5), (6, 6), (24, 24)]:
            found = resize(lay(x), grid)
            assert torch.equal(found, resize(x, grid)) and found.is_contiguous()
