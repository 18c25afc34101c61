"""The VAREdit transformer: source tokens and text in, the logits of one scale's bits out.

Knows blocks, text conditioning and the head; the loop over scales is in `sampling`, the keys and values of
earlier passes are in the `KeyValueStore` that the caller passes in. The backbone is Infinity's (arXiv
2412.04431); source prefix and scale-aligned reference are VAREdit's (arXiv 2508.15772, section 3).

Shape suffixes: R rows (images, then their unconditional twins), n tokens of a pass, L text tokens, C width,
H heads, D head size, T text channels. The residual stream, norms, modulation, embeddings and head are fp32;
the blocks' linear layers and attention run in `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TransformerConfig
from .kv import KeyValueStore, Pass
from .operations import Attention, Operations, rows, sdpa

EPS = 1e-6


@dataclass(frozen=True)
class TextRows:
    """Cross-attention keys and values [r, H, L, D] of consecutive rows whose texts have the same length.

    mask: [r, 1, 1, L], true for real tokens, where training pads texts to one length; None: all are real.
    """

    rows: slice
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class PaddedTexts:
    """Text features [R, L, T] of all rows, padded to one length, and which tokens are real (boolean [R, L])."""

    features: Tensor
    real: Tensor


@dataclass(frozen=True)
class BlockCondition:
    """What one block needs of one edit's text: six modulation vectors [R, 1, C], query scale [1, H, 1, 1], text."""

    modulation: tuple[Tensor, ...]
    query_scale: Tensor
    text: tuple[TextRows, ...]


@dataclass(frozen=True)
class Condition:
    """One edit's text, computed once: pooled vector [R, C], every block's part, the head's scale and shift."""

    pooled_RC: Tensor
    blocks: tuple[BlockCondition, ...]
    head: tuple[Tensor, Tensor]

    def rows(self, count: int) -> Condition:
        """The same for the first `count` rows only."""
        blocks = tuple(
            replace(b, modulation=tuple(m[:count] for m in b.modulation), text=tuple(_first_rows(b.text, count)))
            for b in self.blocks
        )
        return Condition(self.pooled_RC[:count], blocks, (self.head[0][:count], self.head[1][:count]))


class SelfAttention(nn.Module):
    """Cosine attention with a learned scale a head, over the source, earlier scales and the pass itself."""

    def __init__(self, config: TransformerConfig, index: int, ops, dtype, device) -> None:
        super().__init__()
        self.index, self.heads = index, config.heads
        # Not told from the index: a compiled block would be compiled anew for every index that it compares.
        self.first = index == 0
        self.mat_qkv = ops.Linear(config.width, 3 * config.width, dtype=dtype, device=device)
        self.scale_mul = ops.Embedding(1, config.heads, dtype=torch.float32, device=device)
        self.proj = ops.Linear(config.width, config.width, dtype=dtype, device=device)

    def query_scale(self, device: torch.device) -> Tensor:
        return rows(self.scale_mul, 1, device).clamp_max(math.log(100)).exp()[:, :, None, None]

    def forward(
        self, x_RnC: Tensor, query_scale: Tensor, step: Pass, store: KeyValueStore, attention: Attention
    ) -> Tensor:
        q, k, v = self.mat_qkv(x_RnC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Unit length and rotation in fp32: in bf16 the angles between keys would be lost.
        q = _rotate(F.normalize(q.float(), dim=-1, eps=1e-12) * query_scale, step.rotary)
        k = _rotate(F.normalize(k.float(), dim=-1, eps=1e-12), step.rotary)
        return self.proj(store.attend(self.index, self.first, q.to(v.dtype), k, v, step, attention))


class CrossAttention(nn.Module):
    """Attention to the text; keys and values are made once an edit by `text_rows`."""

    def __init__(self, config: TransformerConfig, ops, dtype, device) -> None:
        super().__init__()
        self.heads = config.heads
        self.mat_q = ops.Linear(config.width, config.width, dtype=dtype, device=device)
        self.mat_kv = ops.Linear(config.width, 2 * config.width, dtype=dtype, device=device)
        self.proj = ops.Linear(config.width, config.width, dtype=dtype, device=device)

    def text_rows(self, selected: slice, memory_rLC: Tensor, mask: Tensor | None = None) -> TextRows:
        keys, values = self.mat_kv(memory_rLC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return TextRows(selected, keys, values, mask)

    def forward(self, x_RnC: Tensor, text: Sequence[TextRows], attention: Attention) -> Tensor:
        q = self.mat_q(x_RnC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # Texts of different lengths attend apart: no mask, and every row equals its single run up to rounding.
        parts = [attention(q[t.rows], t.keys, t.values, scale=q.shape[-1] ** -0.5, mask=t.mask) for t in text]
        return self.proj(torch.cat(parts))


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig, ops, dtype, device) -> None:
        super().__init__()
        self.fc1 = ops.Linear(config.width, config.hidden, dtype=dtype, device=device)
        self.fc2 = ops.Linear(config.hidden, config.width, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, index: int, ops, dtype, device) -> None:
        super().__init__()
        self.dtype = dtype
        self.sa = SelfAttention(config, index, ops, dtype, device)
        self.ca = CrossAttention(config, ops, dtype, device)
        self.ca_norm = ops.LayerNorm(config.width, eps=EPS, dtype=torch.float32, device=device)
        self.ffn = FeedForward(config, ops, dtype, device)
        self.ada_gss = ops.Embedding(6, config.width, dtype=torch.float32, device=device)

    def condition(self, shared_R6C: Tensor, memories: Sequence[tuple[slice, Tensor, Tensor | None]]) -> BlockCondition:
        modulation = shared_R6C + rows(self.ada_gss, 6, shared_R6C.device)
        text = tuple(self.ca.text_rows(selected, memory.to(self.dtype), mask) for selected, memory, mask in memories)
        return BlockCondition(modulation[:, :, None].unbind(1), self.sa.query_scale(shared_R6C.device), text)

    def forward(
        self, x_RnC: Tensor, condition: BlockCondition, step: Pass, store: KeyValueStore, attention: Attention
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = condition.modulation
        x = x_RnC
        h = _modulated(x, scale1, shift1).to(self.dtype)
        x = x + gamma1 * self.sa(h, condition.query_scale, step, store, attention)
        x = x + self.ca(self.ca_norm(x).to(self.dtype), condition.text, attention)
        h = _modulated(x, scale2, shift2).to(self.dtype)
        return x + gamma2 * self.ffn(h)


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
        q = (
            rows(self.ca.mat_q, 1, text_rLT.device)
            .unflatten(-1, (self.heads, -1))[:, :, None]
            .expand(len(keys), -1, -1, -1)
        )
        return self.ca.proj(attention(q, keys, values, scale=q.shape[-1] ** -0.5, mask=mask)).squeeze(1)


class HeadNorm(nn.Module):
    """The head's modulated norm; its scale and shift come from the pooled text."""

    def __init__(self, config: TransformerConfig, ops, **kw) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), ops.Linear(config.width, 2 * config.width, **kw))

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return _modulated(x, scale, shift)


class Transformer(nn.Module):
    """The whole network but for the loop over scales.

    operations: namespace of layers (see `operations`). dtype: of the blocks' linear layers, attention and
    the key/value store; everything else is fp32.
    """

    def __init__(
        self, config: TransformerConfig, operations=Operations, dtype: torch.dtype = torch.float32, device=None
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        ops, kw = operations, dict(dtype=torch.float32, device=device)
        self.cfg_uncond = ops.Embedding(config.text_length, config.text_width, **kw)
        self.text_norm = ops.RMSNorm(config.text_width, eps=EPS, **kw)
        self.text_proj_for_sos = TextPool(config, ops, **kw)
        self.text_proj_for_ca = nn.Sequential(
            ops.Linear(config.text_width, config.width, **kw),
            nn.GELU("tanh"),
            ops.Linear(config.width, config.width, **kw),
        )
        self.pos_start = ops.Embedding(1, config.width, **kw)
        self.lvl_embed = ops.Embedding(config.levels, config.width, **kw)
        self.word_embed = ops.Linear(config.token_bits, config.width, **kw)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), ops.Linear(config.width, 6 * config.width, **kw))
        self.blocks = nn.ModuleList(Block(config, i, ops, dtype, device) for i in range(config.depth))
        self.head_nm = HeadNorm(config, ops, **kw)
        self.head = ops.Linear(config.width, 2 * config.token_bits, **kw)

    def unconditional(self, length: int, device) -> Tensor:
        """Learned text features [length, T] of the unconditional branch. ValueError beyond `text_length`."""
        if length > self.config.text_length:
            raise ValueError(
                f"the instruction has {length} text tokens but the model takes {self.config.text_length}; shorten it"
            )
        return rows(self.cfg_uncond, length, device)

    def condition(self, texts: Sequence[Tensor] | PaddedTexts, attention: Attention = sdpa) -> Condition:
        """Text features [L_i, T] of every row -> all that depends on the text alone."""
        pooled, memories, begin = [], [], 0
        for stacked, mask in _groups(texts):
            stacked = self.text_norm(stacked.float())
            pooled.append(self.text_proj_for_sos(stacked, attention, mask))
            memories.append((slice(begin, begin := begin + len(stacked)), self.text_proj_for_ca(stacked), mask))
        pooled_RC = torch.cat(pooled)
        shared_R6C = self.shared_ada_lin(pooled_RC).unflatten(-1, (6, -1))
        scale, shift = self.head_nm.ada_lin(pooled_RC).unflatten(-1, (2, 1, -1)).unbind(1)
        return Condition(pooled_RC, tuple(b.condition(shared_R6C, memories) for b in self.blocks), (scale, shift))

    def start(self, condition: Condition) -> Tensor:
        """The single input token [R, 1, C] of the first scale."""
        start = rows(self.pos_start, 1, condition.pooled_RC.device)
        return condition.pooled_RC[:, None] + start + self._level(0, start.device)

    def embed(self, tokens_Bnd: Tensor, level: int) -> Tensor:
        """Tokens [B, n, d] of the source or of the running sum -> [B, n, C], marked with their scale's index."""
        return self.word_embed(tokens_Bnd) + self._level(level, tokens_Bnd.device)

    def forward(
        self, x_RnC: Tensor, condition: Condition, step: Pass, store: KeyValueStore, attention: Attention = sdpa
    ) -> Tensor:
        """All blocks for the tokens of one pass; their keys and values go into `store`."""
        for block, part in zip(self.blocks, condition.blocks):
            x_RnC = block(x_RnC, part, step, store, attention)
        return x_RnC

    def logits(self, x_RnC: Tensor, condition: Condition) -> Tensor:
        """Logits [R, n, token_bits, 2] of every bit being 0 and 1, for the first R rows of the condition."""
        scale, shift = (part[: len(x_RnC)] for part in condition.head)
        return self.head(self.head_nm(x_RnC, scale, shift)).unflatten(-1, (-1, 2))

    def _level(self, index: int, device) -> Tensor:
        return self.lvl_embed(torch.full((1,), index, device=device))  # torch.tensor would wait for the device


def _groups(texts: Sequence[Tensor] | PaddedTexts):
    """Stacked features [r, L, T] of consecutive rows of one length, with the mask of padded ones."""
    if isinstance(texts, PaddedTexts):
        yield texts.features, texts.real[:, None, None]
        return
    for _, group in groupby(texts, key=len):
        yield torch.stack(list(group)), None


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def _rotate(x_RHnD: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs (x_2i, x_2i+1) by the pass's angles (RoPE, two axes)."""
    cosine, sine = rotary
    a, b = x_RHnD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cosine - b * sine, a * sine + b * cosine), dim=-1).flatten(-2)


def _first_rows(text: Sequence[TextRows], count: int):
    for part in text:
        kept = min(part.rows.stop, count) - part.rows.start
        if kept > 0:
            mask = None if part.mask is None else part.mask[:kept]
            yield TextRows(slice(part.rows.start, part.rows.start + kept), part.keys[:kept], part.values[:kept], mask)
