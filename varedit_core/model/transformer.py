"""The VAREdit transformer: source tokens and text in, the logits of one scale's bits out.

Knows blocks, text conditioning and the head; the loop over scales is in `sampling`, and the caller passes in the
`KVCache` with the earlier passes. The backbone is Infinity's (arXiv 2412.04431); the prefill of the source and its
scale-aligned reference, which is in `KVCache.attend`, are VAREdit's (arXiv 2508.15772, section 3).

Shape suffixes: R rows (images, then their unconditional twins), n tokens of a pass, L text tokens, C width,
H heads, D head size, T text channels. The residual stream, norms, modulation, embeddings and head are fp32;
the blocks' linear layers and attention run in `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..replaceable import replaceable
from .config import TransformerConfig
from .functional import add_norm
from .kv_cache import KVCache, Pass
from .layers import Attention, Operations, affine, rows, sdpa

EPS = 1e-6


@dataclass(frozen=True)
class Text:
    """Cross-attention keys and values [R, H, L, D] of every row's text, of which the first `lengths[r]` are real.

    mask: [R, 1, 1, L], true for real tokens, where training pads texts to one length.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    mask: Tensor | None = None

    def rows(self, which: slice) -> Text:
        mask = None if self.mask is None else self.mask[which]
        return Text(self.keys[which], self.values[which], self.lengths[which], mask)

    def attend(self, layer: CrossAttention, x_RnC: Tensor, attention: Attention) -> Tensor:
        """A layer's attention to this text. The runtime's forms of a text do it in their own way."""
        q = layer.mat_q(x_RnC).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        scale = q.shape[-1] ** -0.5
        # Texts of different lengths attend apart: no mask, and every row equals its single run up to rounding.
        parts = [
            attention(q[r], self.keys[r, :, :n], self.values[r, :, :n], scale=scale, mask=self.mask)
            for r, n in runs(self.lengths)
        ]
        return layer.proj(parts[0] if len(parts) == 1 else torch.cat(parts))


@dataclass(frozen=True)
class BlockConstants:
    """What one block's small parameters say, read through their layers.

    gains: [6, C], added to the shared modulation; 1 is in those of scales. norm: scale and shift [2, C] of the norm
    before cross-attention. query_scale: [H].
    """

    gains: Tensor
    norm: Tensor
    query_scale: Tensor


@dataclass(frozen=True)
class BlockCondition:
    """What one block needs of one edit: modulation [R, 6, C] (gains, scales, shifts), its constants, the text."""

    modulation: Tensor
    constants: BlockConstants
    text: Text


@dataclass(frozen=True)
class Condition:
    """One edit's text, computed once: pooled [R, C], every block's part, the head's scale and shift [R, 2, C]."""

    pooled_RC: Tensor
    blocks: tuple[BlockCondition, ...]
    head: Tensor

    def rows(self, which: slice) -> Condition:
        """The same for some of the rows, as views."""
        blocks = tuple(replace(b, modulation=b.modulation[which], text=b.text.rows(which)) for b in self.blocks)
        return Condition(self.pooled_RC[which], blocks, self.head[which])


class SelfAttention(nn.Module):
    """Cosine attention with a learned scale a head, over the source, earlier scales and the pass itself."""

    def __init__(self, config: TransformerConfig, index: int, ops, **kw) -> None:
        super().__init__()
        self.index = index
        # Not told from the index: a compiled block would be compiled anew for every index that it compares.
        self.first = index == 0
        self.mat_qkv = ops.Linear(config.width, 3 * config.width, **kw)
        self.scale_mul = ops.Embedding(1, config.heads, **kw | {"dtype": torch.float32})
        self.proj = ops.Linear(config.width, config.width, **kw)

    def query_scale(self, device: torch.device) -> Tensor:
        return rows(self.scale_mul, 1, device)[0].clamp_max(math.log(100)).exp()

    def forward(self, x_RnC: Tensor, query_scale: Tensor, step: Pass, cache: KVCache, attention: Attention) -> Tensor:
        return self.proj(cache.attend(self.index, self.first, self.mat_qkv(x_RnC), query_scale, step, attention))


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are made once an edit."""

    def __init__(self, config: TransformerConfig, ops, **kw) -> None:
        super().__init__()
        self.heads = config.heads
        self.mat_q = ops.Linear(config.width, config.width, **kw)
        self.mat_kv = ops.Linear(config.width, 2 * config.width, **kw)
        self.proj = ops.Linear(config.width, config.width, **kw)

    def memory(self, text_RLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, L, D] of the projected text."""
        return self.mat_kv(text_RLC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x_RnC: Tensor, text: Text, attention: Attention) -> Tensor:
        return text.attend(self, x_RnC, attention)


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig, ops, **kw) -> None:
        super().__init__()
        self.fc1 = ops.Linear(config.width, config.hidden, **kw)
        self.fc2 = ops.Linear(config.hidden, config.width, **kw)

    @replaceable
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """One block. Its last residual is left to the next block, which adds it in the same step as its first norm:
    `pending` is (y, gate), not yet part of x, or (None, None) before the first block.
    """

    def __init__(self, config: TransformerConfig, index: int, ops, dtype: torch.dtype, device) -> None:
        super().__init__()
        self.dtype, kw = dtype, dict(dtype=dtype, device=device)
        self.sa = SelfAttention(config, index, ops, **kw)
        self.ca = CrossAttention(config, ops, **kw)
        self.ca_norm = ops.LayerNorm(config.width, eps=EPS, dtype=torch.float32, device=device)
        self.ffn = FeedForward(config, ops, **kw)
        self.ada_gss = ops.Embedding(6, config.width, dtype=torch.float32, device=device)

    def constants(self, device: torch.device) -> BlockConstants:
        gains = rows(self.ada_gss, 6, device)
        gains = gains + (torch.arange(6, device=device)[:, None] // 2 == 1)  # scales count from 1
        norm = affine(self.ca_norm, gains.shape[1], EPS, device)
        return BlockConstants(gains, norm, self.sa.query_scale(device))

    def forward(
        self, x_RnC: Tensor, pending, condition: BlockCondition, step: Pass, cache: KVCache, attention: Attention
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        gain1, gain2, _, scale2, _, shift2 = condition.modulation.unbind(1)
        scale, shift = condition.constants.norm[:, None]
        x, h = self._first_norm(x_RnC, pending, condition)
        y = self.sa(h, condition.constants.query_scale, step, cache, attention)
        x, h = add_norm(x, y, gain1, scale, shift, EPS, self.dtype)
        y = self.ca(h, condition.text, attention)
        x, h = add_norm(x, y, None, scale2, shift2, EPS, self.dtype, self.ffn.fc1)
        return x, (self.ffn(h), gain2)

    def remember(self, x_RnC: Tensor, pending, condition: BlockCondition, step: Pass, cache: KVCache) -> None:
        """Fill the cache only: nothing else of the prefill's last block is used."""
        _, h = self._first_norm(x_RnC, pending, condition)
        cache.keep(self.sa.index, self.sa.first, self.sa.mat_qkv(h), condition.constants.query_scale, step)

    def _first_norm(self, x: Tensor, pending, condition: BlockCondition) -> tuple[Tensor, Tensor]:
        scale, shift = condition.modulation[:, 2], condition.modulation[:, 4]
        return add_norm(x, *pending, scale, shift, EPS, self.dtype, self.sa.mat_qkv)


class TextPool(nn.Module):
    """Attention pooling of the text with one learned query: [r, L, T] -> [r, C]."""

    def __init__(self, config: TransformerConfig, ops, **kw) -> None:
        super().__init__()
        self.heads = config.pool_heads
        self.ca = nn.Module()
        self.ca.mat_q = ops.Embedding(1, config.width, **kw)
        self.ca.mat_kv = ops.Linear(config.text_width, 2 * config.width, **kw)
        self.ca.proj = ops.Linear(config.width, config.width, **kw)

    def forward(self, text_rLT: Tensor, attention: Attention, mask: Tensor | None = None) -> Tensor:
        keys, values = self.ca.mat_kv(text_rLT).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = rows(self.ca.mat_q, 1, text_rLT.device).unflatten(-1, (self.heads, -1))[:, :, None]
        q = q.expand(len(keys), -1, -1, -1)
        return self.ca.proj(attention(q, keys, values, scale=q.shape[-1] ** -0.5, mask=mask)).squeeze(1)


class Transformer(nn.Module):
    """The whole network but for the loop over scales.

    operations: namespace of layers (see `layers`). dtype: of the blocks' linear layers, attention and the KV cache;
    everything else is fp32.
    """

    def __init__(
        self, config: TransformerConfig, operations=Operations, dtype: torch.dtype = torch.float32, device=None
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        ops, width, kw = operations, config.width, dict(dtype=torch.float32, device=device)
        self.cfg_uncond = ops.Embedding(config.text_length, config.text_width, **kw)
        self.text_norm = ops.RMSNorm(config.text_width, eps=EPS, **kw)
        self.text_proj_for_sos = TextPool(config, ops, **kw)
        self.text_proj_for_ca = nn.Sequential(
            ops.Linear(config.text_width, width, **kw), nn.GELU("tanh"), ops.Linear(width, width, **kw)
        )
        self.pos_start = ops.Embedding(1, width, **kw)
        self.lvl_embed = ops.Embedding(config.levels, width, **kw)
        self.word_embed = ops.Linear(config.token_bits, width, **kw)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), ops.Linear(width, 6 * width, **kw))
        self.blocks = nn.ModuleList(Block(config, i, ops, dtype, device) for i in range(config.depth))
        self.head_nm = nn.Module()
        self.head_nm.ada_lin = nn.Sequential(nn.SiLU(), ops.Linear(width, 2 * width, **kw))
        self.head = ops.Linear(width, 2 * config.token_bits, **kw)

    def unconditional(self, length: int, device) -> Tensor:
        """Learned text features [length, T] of the unconditional branch. ValueError beyond `text_length`."""
        if length > self.config.text_length:
            raise ValueError(
                f"the instruction has {length} text tokens but the model takes {self.config.text_length}; shorten it"
            )
        return rows(self.cfg_uncond, length, device)

    def constants(self, device: torch.device) -> tuple[BlockConstants, ...]:
        """Every block's small parameters; they are the same for every edit."""
        return tuple(block.constants(device) for block in self.blocks)

    def condition(
        self, texts: Sequence[Tensor] | Tensor, attention: Attention = sdpa,
        constants: Sequence[BlockConstants] | None = None, real: Tensor | None = None,
    ) -> Condition:  # fmt: skip
        """Text features [L_i, T] of every row -> all that depends on the text alone.

        constants: of `constants`, where they are known. real: boolean [R, L], which tokens are real, where texts are
        padded to one length [R, L, T].
        """
        pooled_RC, modulation_R6C, head_R2C, memory_RLC = self.read_text(texts, attention, real)
        lengths, mask = tuple(map(len, texts)), None if real is None else real[:, None, None]
        blocks = tuple(
            BlockCondition(modulation_R6C + own.gains, own, Text(*block.ca.memory(memory_RLC), lengths, mask))
            for block, own in zip(self.blocks, constants or self.constants(memory_RLC.device))
        )
        return Condition(pooled_RC, blocks, head_R2C)

    def read_text(
        self, texts: Sequence[Tensor] | Tensor, attention: Attention = sdpa, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text features (see `condition`) -> pooled [R, C], the modulation that all blocks share [R, 6, C], the head's
        scale and shift [R, 2, C], and the projected text [R, L, C], which cross-attention reads."""
        features = texts if isinstance(texts, Tensor) else nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        mask = None if real is None else real[:, None, None]
        text_RLT, spans = self.text_norm(features.float()), runs(map(len, texts))
        pooled_RC = torch.cat([self.text_proj_for_sos(text_RLT[r, :n], attention, mask) for r, n in spans])
        memory_RLC = self.text_proj_for_ca(text_RLT).to(self.dtype)
        modulation_R6C = self.shared_ada_lin(pooled_RC).unflatten(-1, (6, -1))
        scale, shift = self.head_nm.ada_lin(pooled_RC).unflatten(-1, (2, -1)).unbind(1)
        return pooled_RC, modulation_R6C, torch.stack((scale + 1, shift), dim=1), memory_RLC

    def start(self, condition: Condition) -> Tensor:
        """The single input token [R, 1, C] of the first scale."""
        start = rows(self.pos_start, 1, condition.pooled_RC.device)
        return condition.pooled_RC[:, None] + start + self._level(0, start.device)

    def embed(self, tokens_BnD: Tensor, level: int) -> Tensor:
        """Tokens [B, n, d] of the source or of the running sum -> [B, n, C], marked with their scale's index."""
        return self.word_embed(tokens_BnD) + self._level(level, tokens_BnD.device)

    def forward(
        self, x_RnC: Tensor, condition: Condition, step: Pass, cache: KVCache, attention: Attention = sdpa
    ) -> Tensor:
        """All blocks for the tokens of one pass; their keys and values go into `cache`."""
        pending = None, None
        for block, part in zip(self.blocks, condition.blocks):
            x_RnC, pending = block(x_RnC, pending, part, step, cache, attention)
        y, gate = pending
        return x_RnC + gate[:, None] * y

    def read_source(
        self, x_RnC: Tensor, condition: Condition, step: Pass, cache: KVCache, attention: Attention = sdpa
    ) -> None:
        """The prefill: the source goes into the KV cache. Nothing else of it is used, so the last block stops there."""
        pending = None, None
        *blocks, (last, own) = zip(self.blocks, condition.blocks)
        for block, part in blocks:
            x_RnC, pending = block(x_RnC, pending, part, step, cache, attention)
        last.remember(x_RnC, pending, own, step, cache)

    def logits(self, x_RnC: Tensor, condition: Condition) -> Tensor:
        """Logits [R, n, token_bits, 2] of every bit being 0 and 1, for the first R rows of the condition."""
        scale, shift = condition.head[: len(x_RnC)].unbind(1)
        _, h = add_norm(x_RnC, None, None, scale, shift, EPS, torch.float32)
        return self.head(h).unflatten(-1, (-1, 2))

    def _level(self, index: int, device) -> Tensor:
        return self.lvl_embed(torch.full((1,), index, device=device))  # torch.tensor would wait for the device


def runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Consecutive rows of one text length: (slice, length)."""
    begin = 0
    for length, group in groupby(lengths):
        end = begin + len(list(group))
        yield slice(begin, end), length
        begin = end
