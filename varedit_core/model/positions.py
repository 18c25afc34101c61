"""Where tokens lie in the picture, and the rotary tables that tell attention so (RoPE on two axes)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokenizer.schedule import TABLES, Schedule


def positions(schedule: Schedule, source: bool) -> Tensor:
    """Positions [N, 2] (row, column) of the source's tokens, if there are any, then of every scale of the full table.

    Always built from the table's 13 scales, whatever runs: shorter schedules index the same list with the offsets of
    their own (`rotary`). Released weights depend on this layout.
    """
    table = TABLES[schedule.ratio]
    rows, columns = table[-1]
    parts = [_cells(torch.arange(rows) + rows, torch.arange(columns) + columns)] if source else []
    for height, width in table:
        # int64 times a Python float is float32 in torch; rounding follows it, half to even.
        down, right = torch.arange(height) * (rows / height), torch.arange(width) * (columns / width)
        parts.append(_cells(down.round(), right.round()))
    return torch.cat(parts).long()


def rotary(schedule: Schedule, head_size: int, source: bool, device: torch.device | str = "cpu") -> list[Tensor]:
    """Rotary tables [2, n, head_size / 2] (cosine, sine), fp32: the source's first (of no tokens where there is none),
    then one a scale.

    head_size / 4 frequencies 10000^(-2i / (head_size / 2)) an axis, height before width.
    """
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_size // 2, 2).float() / (head_size // 2))
    lengths = [schedule.tokens[-1] * source, *schedule.tokens]
    angles = (positions(schedule, source)[: sum(lengths), :, None].float() * frequencies).flatten(1)
    return list(torch.stack([angles.cos(), angles.sin()]).to(device).split(lengths, dim=1))


def _cells(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)
