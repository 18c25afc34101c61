"""The tokens of runs, and of several runs as one.

Shape suffixes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..fitting import Fitting
from ..tokenizer.schedule import Schedule
from .scale import Scale
from .tokens import Tokens


def tokens_of(
    bits: Sequence[Tensor],
    last: Scale,
    schedule: Schedule,
    fitting: Fitting | None = None,
    source: Tokens | None = None,
    pick: Callable[[Tensor], Tensor] = lambda x_B: x_B,
) -> Tokens:
    """The tokens of a run, by the bits of its scales and the last `Scale`.

    source: the source's tokens, where it is known by them, of every row that is picked. pick: rows that count.
    """
    grid = last.source.grids[-1]
    made = Tokens(schedule, tuple(map(pick, bits)), grid, fitting)
    if last.edited is None or bool(last.edited.all()):
        return made
    free = last.edited if len(last.edited) == 1 else pick(last.edited)
    return replace(made, free=free, under=source or Tokens(schedule, tuple(map(pick, last.source.own[0])), grid))


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of several runs of one kind, their images behind each other; a fitting or an auto mask that is not that of
    all is left out."""
    first, *_ = parts
    if len(parts) == 1:
        return first
    bits = tuple(map(torch.cat, zip(*(part.bits for part in parts))))
    if any(part.fitting != first.fitting for part in parts):
        first = replace(first, fitting=None)
    if any(part.auto_mask != first.auto_mask for part in parts):
        first = replace(first, auto_mask=0.0)
    if all(part.free is None for part in parts):
        return replace(first, bits=bits)
    most = [part.free if part.free is not None else torch.ones(1, 1, *part.grid, dtype=torch.bool) for part in parts]
    channels = bits[0].shape[1]
    free = torch.cat([f.expand(part.images, channels, -1, -1).to(bits[0].device) for f, part in zip(most, parts)])
    under = joined([part.under or replace(part, fitting=None) for part in parts])
    return replace(first, bits=bits, free=free, under=under)
