"""The parallel forward over the source and all scales at once, as training runs it.

Caches that stand where the sampler's `KVCache` stands. Shape suffixes: B pairs, n tokens of a scale, D bits of
a token, N tokens of source and all scales, P of the pooled references, H heads, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.functional import split_heads
from ..model.kv_cache import SOURCE, Pass, pooled
from ..model.layers import Attention, sdpa
from ..model.positions import rotary
from ..model.transformer import Transformer
from ..tokenizer.schedule import Schedule


class TeacherForced:
    """One pass over source and all scales: every scale attends to source, earlier scales and itself, the source to
    itself; in block 0 a scale sees the source pooled to its own grid instead (VAREdit, arXiv 2508.15772, section 3.3).

    One attention call a scale and block, without masks: runs anywhere, and no forbidden product is ever computed.
    Keeps nothing of a pass, so one store serves a whole training. step: the pass over all N tokens.
    """

    def __init__(self, schedule: Schedule, head_size: int, device) -> None:
        self.schedule = schedule
        self.spans = [schedule.tokens[-1], *schedule.tokens]
        self.step = Pass(SOURCE, torch.cat(rotary(schedule, head_size, True, device), dim=1), 0)

    def references(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The source's k and v [B, H, N, D] pooled to every scale's grid."""
        part = k[:, :, : self.spans[0]], v[:, :, : self.spans[0]]
        return [pooled(*part, self.schedule.grids[-1], grid) for grid in self.schedule.grids]

    @torch.compiler.disable
    def attend(
        self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: Pass, attention: Attention
    ) -> Tensor:
        q, k, v = split_heads(qkv, query_scale, step.rotary)
        q = q.to(v.dtype)
        source = self.spans[0]
        references: list = self.references(k, v) if first else [None] * len(self.schedule)
        k, outputs, begin = k.to(v.dtype), [], 0
        for count, reference in zip(self.spans, [None, *references]):
            end = begin + count
            keys, values = k[:, :, :end], v[:, :, :end]
            if reference is not None:
                keys = torch.cat([reference[0].to(v.dtype), keys[:, :, source:]], dim=2)
                values = torch.cat([reference[1].to(v.dtype), values[:, :, source:]], dim=2)
            outputs.append(attention(q[:, :, begin:end], keys, values, scale=1.0))
            begin = end
        return torch.cat(outputs, dim=1)


class BlockCausal(TeacherForced):
    """The same in one call a block, block-causal masks and references included: for compiled blocks on CUDA.

    Through FlexAttention (Dong et al., arXiv 2412.05496), which skips the tiles that a mask leaves empty. The
    injected attention is not asked.
    """

    def __init__(self, schedule: Schedule, head_size: int, device) -> None:
        super().__init__(schedule, head_size, device)
        self.masks = [_block_mask(schedule, first, device) for first in (False, True)]

    def attend(
        self, block: int, first: bool, qkv: Tensor, query_scale: Tensor, step: Pass, attention: Attention
    ) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = split_heads(qkv, query_scale, step.rotary)
        q, keys, values = q.to(v.dtype), k.to(v.dtype), v
        if first:
            pairs = self.references(k, v)
            keys = torch.cat([keys, *(reference.to(v.dtype) for reference, _ in pairs)], dim=2)
            values = torch.cat([values, *(reference.to(v.dtype) for _, reference in pairs)], dim=2)
        mask = self.masks[first]
        return flex_attention(q, keys, values, block_mask=mask, scale=1.0).transpose(1, 2).flatten(2)


def visible(schedule: Schedule, first: bool, device) -> Callable:
    """Whether query token q may see key j, as a function of (row, head, q, j) for FlexAttention.

    Queries: the N tokens. Keys: the same; in the first block, the P pooled references of all scales behind them.
    """
    tokens = torch.tensor(schedule.tokens)
    scales = torch.arange(1, len(schedule) + 1).repeat_interleave(tokens)
    level = torch.cat([torch.zeros(schedule.tokens[-1], dtype=torch.long), scales]).to(device)
    if not first:
        return lambda row, head, q, j: level[j] <= level[q]
    count = len(level)
    reference = torch.cat([torch.zeros(count, dtype=torch.long), scales]).to(device)
    level = torch.cat([level, torch.zeros_like(scales, device=device)])

    def sees(row, head, q, j):
        own_reference = (j >= count) & (reference[j] == level[q])
        source = (level[q] == 0) & (level[j] == 0) & (j < count)
        return own_reference | source | ((level[j] > 0) & (level[j] <= level[q]))

    return sees


def _block_mask(schedule: Schedule, first: bool, device):
    from torch.nn.attention.flex_attention import create_block_mask

    queries = schedule.tokens[-1] + sum(schedule.tokens)
    keys = queries + first * sum(schedule.tokens)
    return create_block_mask(visible(schedule, first, device), None, None, queries, keys, device=device)


def parallel_logits(
    transformer: Transformer,
    source_BnD: Tensor,
    inputs: Sequence[Tensor],
    texts: Tensor | Sequence[Tensor],
    store: TeacherForced,
    attention: Attention = sdpa,
    real: Tensor | None = None,
) -> list[Tensor]:
    """Logits [B, n, D, 2] of every scale in one pass.

    source_BnD: tokens of the source's features. inputs: tokens [B, n, D] of the running sum at every scale from the
    second on. texts: features of every row, [L_i, T]; padded to one length, [B, L, T], where `real` (boolean [B, L])
    says which tokens are real. store: how the tokens attend to each other.
    """
    schedule = store.schedule
    condition = transformer.condition(texts, attention, real=real)
    x = torch.cat(
        [
            transformer.embed(source_BnD, len(schedule) - 1),
            transformer.start(condition),
            *(transformer.embed(tokens, k) for k, tokens in enumerate(inputs, start=1)),
        ],
        dim=1,
    )
    x = transformer(x, condition, store.step, store, attention)
    return list(transformer.logits(x[:, store.spans[0] :], condition).split(schedule.tokens, dim=1))
