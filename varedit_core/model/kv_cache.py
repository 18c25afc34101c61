"""The KV cache of one edit, in its plain form: every block has [source][scale 1]...[scale K].

The runtime's caches (`runtime.kv_caches` and beside it) do the same in less memory and time. Shape suffixes: R rows
(images, then their unconditional twins), H heads, n tokens of the pass, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..tokenizer.quantizer import area_resize
from ..tokenizer.schedule import Grid, Schedule
from .config import TransformerConfig
from .functional import split_heads
from .layers import Attention
from .positions import rotary

SOURCE = -1
"""Index of the prefill (the pass over the source) among the passes of an edit; the scales count from 0."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The tokens of one pass through the blocks: the source (index SOURCE) or one scale. Equal to itself only.

    rotary: [2, n, D / 2]. begin: where its tokens lie in the cache. source_bias: added to the logits of the source.
    """

    index: int
    rotary: Tensor
    begin: int
    source_bias: float = 0.0

    @property
    def end(self) -> int:
        return self.begin + self.rotary.shape[1]


class KVCache:
    """The KV cache of every block, all allocated here.

    config: of the transformer. rows: R; a pass of fewer has the first ones. dtype: of the blocks.
    """

    def __init__(self, config: TransformerConfig, schedule: Schedule, rows: int, dtype: torch.dtype, device) -> None:
        self.schedule, self.head_size = schedule, config.head_size
        self.source = schedule.tokens[-1] if config.source else 0
        """Tokens of the source."""
        size = (config.depth, rows, config.heads, self.source + sum(schedule.tokens), config.head_size)
        self.keys, self.values = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        self.references: list[tuple[Tensor, Tensor]] = []

    def passes(self, device) -> list[Pass]:
        """The prefill (no tokens without a source), then one pass for each scale; rotary tables on `device`."""
        tables = rotary(self.schedule, self.head_size, self.source > 0, device)
        begins = accumulate([0, self.source, *self.schedule.tokens])
        return [Pass(index, table, begin) for index, (table, begin) in enumerate(zip(tables, begins), start=SOURCE)]

    def attend(
        self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: Pass, attention: Attention
    ) -> Tensor:
        """Self-attention of a pass over the source, earlier scales and itself, its own keys and values kept.

        qkv: [R, n, 3 * H * D], thirds q, k, v. query_scale: [H]. first: of the first block. Returns [R, n, H * D].
        """
        q = self.keep(block, first, qkv, query_scale, step)
        keys, values = (kept[block, : len(q), :, : step.end] for kept in (self.keys, self.values))
        seen = self.source
        if first and step.index > SOURCE and self.source:
            # The scale-aligned reference: the first block sees the source pooled to the scale's own grid.
            pair = self.references[step.index]
            keys, values = (
                torch.cat((pooled[: len(q)].to(x.dtype), x[:, :, self.source :]), dim=2)
                for pooled, x in zip(pair, (keys, values))
            )
            seen = self.schedule.tokens[step.index]
        mask = None
        if step.source_bias:
            mask = q.new_zeros(1, 1, 1, keys.shape[2])
            mask[..., :seen] = step.source_bias
        return attention(q, keys, values, scale=1.0, mask=mask)

    def keep(self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: Pass) -> Tensor:
        """Normalise and rotate a pass's q and k, keep its k and v; returns q [R, H, n, D]."""
        q, k, v = split_heads(qkv, query_scale, step.rotary)
        for kept, x in ((self.keys, k), (self.values, v)):
            kept[block, : len(x), :, step.begin : step.end] = x
        if first and step.index == SOURCE:
            self.references = [pooled(k, v, self.schedule.grids[-1], grid) for grid in self.schedule.grids]
        return q.to(qkv.dtype)


def pooled(k: Tensor, v: Tensor, source: Grid, grid: Grid) -> tuple[Tensor, Tensor]:
    """The source's k and v [R, H, n, D], of its grid, area-pooled to a scale's.

    The scale-aligned reference (VAREdit, arXiv 2508.15772, section 3.3). k and v are pooled as they arrive, k in fp32.
    """

    def pool(x: Tensor) -> Tensor:
        maps = x.transpose(2, 3).flatten(1, 2).unflatten(2, source)
        return area_resize(maps, grid).flatten(2).unflatten(1, (x.shape[1], x.shape[3])).transpose(2, 3)

    return pool(k), pool(v)
