"""Scale tables and positions of every aspect ratio and size."""

import pytest
import torch

from varedit_core.fitting import nearest_ratio
from varedit_core.model.positions import positions, rotary
from varedit_core.parity import schedule_from
from varedit_core.tokenizer.schedule import AREAS, TABLES, Schedule, schedule_for

EVERY = [(area, ratio) for area in AREAS for ratio in TABLES]


def test_fifteen_ratios():
    assert sorted(TABLES) == [0.333, 0.4, 0.5, 0.571, 0.666, 0.75, 0.8, 1.0, 1.25, 1.333, 1.5, 1.75, 2.0, 2.5, 3.0]
    assert TABLES[0.571] == tuple((w, h) for h, w in TABLES[1.75])


@pytest.mark.parametrize(("area", "pixels"), [("0.06M", 256), ("0.25M", 512), ("0.60M", 768), ("1M", 1024)])
def test_square_sizes(area, pixels):
    assert schedule_for(area).pixels == (pixels, pixels)


@pytest.mark.parametrize(("area", "ratio"), EVERY)
def test_every_schedule(area, ratio):
    schedule = schedule_for(area, ratio)
    height, width = schedule.pixels
    assert len(schedule) == AREAS[area] and schedule.grids[0] == (1, 1)
    assert abs(height / width - ratio) < 0.01
    tables = rotary(schedule, 64, True)
    assert [t.shape for t in tables] == [(2, n, 32) for n in (schedule.tokens[-1], *schedule.tokens)]


@pytest.mark.parametrize("ratio", TABLES)
def test_positions_are_those_of_the_full_table(ratio):
    rows, columns = TABLES[ratio][-1]
    found = positions(schedule_for("1M", ratio), True)
    source, first, last = found[: rows * columns], found[rows * columns], found[-1]
    assert source.amin(0).tolist() == [rows, columns] and source.amax(0).tolist() == [2 * rows - 1, 2 * columns - 1]
    assert first.tolist() == [0, 0] and last.tolist() == [rows - 1, columns - 1]
    assert torch.equal(positions(schedule_for("0.06M", ratio), True), found), "shorter schedules index the same list"
    assert torch.equal(positions(schedule_for("0.06M", ratio), False), found[rows * columns :]), "without a source"


def test_halves_round_to_even():
    # 2.000: 90 rows over 4 at the third scale: 0, 22.5, 45, 67.5.
    table = TABLES[2.0]
    begin = 90 * 45 + 1 + 4
    assert table[2] == (4, 2)
    assert positions(schedule_for("1M", 2.0), True)[begin : begin + 8, 0].tolist() == [0, 0, 22, 22, 45, 45, 68, 68]


def test_shorter_schedules_take_the_first_entries():
    """At 512 px every token falls inside the source's part of the list; released weights depend on it."""
    short, full = schedule_for("0.25M"), schedule_for("1M")
    long = torch.cat(rotary(full, 32, True), dim=1)
    assert torch.equal(torch.cat(rotary(short, 32, True), dim=1), long[:, : 1024 + 2521])
    assert 1024 + 2521 < 4096


def test_rotary_angles():
    cosine, sine = rotary(schedule_for("0.06M"), 8, True)[1]  # one token: the entry after the 256 source tokens
    row, column = 64 + 256 // 64, 64 + 256 % 64
    angles = torch.tensor([row * 1.0, row * 0.01, column * 1.0, column * 0.01])
    torch.testing.assert_close(cosine[0], angles.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sine[0], angles.sin(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.0, 1.0), (300 / 451, 0.666), (10.0, 3.0), (0.01, 0.333), (16 / 9, 1.75), (9 / 16, 0.571)]
)
def test_nearest_ratio(ratio, expected):
    assert nearest_ratio(ratio) == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedule_for("2M"),
        lambda: schedule_for("1M", 1.1),
        lambda: nearest_ratio(0),
        lambda: Schedule(1.0, ((2, 2),)),
        lambda: schedule_from([], 1.0),
    ],
)
def test_wrong_choices(call):
    with pytest.raises(ValueError):
        call()
