"""The KV cache in 8 bits: half the memory of bf16, an approximation.

Shape suffixes as in `kv_caches`; r rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.config import TransformerConfig
from ..tokenizer.schedule import Schedule
from .kernels import pack_heads, unpack_heads
from .kernels.plain import PackedHeads
from .kv_caches import ElsewhereCache, RowPass, kept_tokens

EXACT_FROM = 24.0
"""Heads whose learned query scale is larger keep their keys exact.

An attention weight is off by the error of its logit, and that is the query scale times the error of a key of unit
length along the query: 0.0006 in 8 bits at head size 128 (0.00015 in bf16). At 24 it is 1.4 %, twice what the codes of
values cost; scales go up to 100. The demo model has 5 of 21 heads beyond 24: with their keys exact, logits are wrong
by 0.05 to 0.5 % of their spread, scale by scale, without by 0.16 to 0.7 %, and with all keys exact by 0.02 to 0.5 %.
"""


def exact_heads(query_scales: Sequence[Sequence[float]]) -> list[list[int]]:
    """The heads of every block whose keys are not coded, by the query scales [depth][H]; none of the first block's."""
    large = [[head for head, scale in enumerate(scales) if scale > EXACT_FROM] for scales in query_scales]
    return [[], *large[1:]]


def query_scales(transformer: nn.Module, device) -> list[list[float]]:
    """The learned query scales [depth][H] of all blocks, as numbers; waits for the device."""
    return torch.stack([block.sa.query_scale(torch.device(device)) for block in transformer.blocks]).tolist()


class EightBitCache(ElsewhereCache):
    """All blocks but the first in 8 bits with one scale a token and head: half the memory of bf16, an approximation.

    The tokens of the pass at work are exact, only the history is rounded. query_scales: [depth][H], numbers of the
    host; keys of heads with large ones are not rounded at all (see EXACT_FROM), without them those of every head are.
    at_once: most rows of a pass, where they are not all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        schedule: Schedule,
        rows: int,
        dtype: torch.dtype,
        device,
        copies: int = 1,
        query_scales: Sequence[Sequence[float]] | None = None,
        at_once: int | None = None,
    ) -> None:
        super().__init__(config, schedule, rows, dtype, device, copies)
        kw, heads, head_size = dict(dtype=dtype, device=device), config.heads, config.head_size
        whole = self.length + schedule.tokens[-1]
        self.staged = [torch.empty(2, min(at_once or rows, rows), heads, whole, head_size, **kw)]
        self.packed = [
            _packed((rows, heads, self.length, head_size), exact, **kw)
            for exact in exact_heads(query_scales or [[0.0] * heads] * config.depth)[1:]
        ]

    @classmethod
    def of(
        cls, transformer: nn.Module, rows_at_once: int | None, *sizes, copies: int = 1, memory=None
    ) -> EightBitCache:
        scales = query_scales(transformer, sizes[-1])
        return cls(transformer.config, *sizes, copies, query_scales=scales, at_once=rows_at_once)

    @classmethod
    def nbytes(
        cls, config: TransformerConfig, schedule: Schedule, rows: int, dtype: torch.dtype, *,
        at_once: int | None = None, exact_keys: int | None = None,
    ) -> int:  # fmt: skip
        """Also at_once: most rows of a pass. exact_keys: of how many heads, all blocks together, keys are not coded;
        None: as if of all."""
        length, heads, size = kept_tokens(config, schedule), config.heads, config.head_size
        blocks = config.depth - cls.plain_blocks(config.depth)
        exact = blocks * heads if exact_keys is None else exact_keys
        head = (2 * blocks * heads - exact) * (size + 4) + exact * size * dtype.itemsize
        staged = 2 * min(at_once or rows, rows) * config.width * (length + schedule.tokens[-1]) * dtype.itemsize
        return super().nbytes(config, schedule, rows, dtype) + rows * length * head + staged + 4 * blocks * heads

    def room_elsewhere(self, block: int, step: RowPass) -> tuple[Tensor, Tensor]:
        return self._staged(step, *self.span(False, step)[0])

    def seen_elsewhere(self, block: int, step: RowPass) -> tuple[Tensor, Tensor]:
        unpack_heads(self.packed[block - 1], step.rows, step.begin, self._kept_part)
        return self._staged(step, *self.span(False, step)[1])

    def put_away(self, block: int, step: RowPass) -> None:
        pack_heads(self._kept_part, self.packed[block - 1], step.rows, step.begin, step.end)

    def release(self) -> None:
        super().release()
        self.staged, self.packed = [], []

    @property
    def _kept_part(self) -> Tensor:
        """Staging memory without the room for the last scale in front."""
        return self.staged[0][:, :, :, self.front :]

    def _staged(self, step: RowPass, begin: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = self.staged[0][:, : step.rows.stop - step.rows.start]
        return self._from(keys, begin, end), self._from(values, begin, end)


def _packed(size: tuple[int, int, int, int], exact: Sequence[int], dtype: torch.dtype, device) -> PackedHeads:
    rows, heads, length, head_size = size
    coded = [head for head in range(heads) if head not in exact]
    places = len(coded) + heads
    return PackedHeads(
        torch.empty(rows, places, length, head_size, dtype=torch.int8, device=device),
        torch.empty(rows, places, length, dtype=torch.float32, device=device),
        torch.empty(rows, len(exact), length, head_size, dtype=dtype, device=device),
        torch.tensor([*coded, *exact], dtype=torch.int32).to(device),
    )
