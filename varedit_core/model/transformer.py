"""The VAREdit transformer: source tokens and text in, the logits of one scale's bits out.

Knows blocks, text conditioning and the head; the loop over scales is in `sampling`, the keys and values of
earlier passes are in the `KeyValueStore` that the caller passes in. The backbone is Infinity's (arXiv
2412.04431); source prefix and scale-aligned reference are VAREdit's (arXiv 2508.15772, section 3).

Shape suffixes: R rows (images, then their unconditional twins), n tokens of a pass, L text tokens, C width,
H heads, D head size, T text channels. The residual stream, norms, modulation, embeddings and head are fp32;
the blocks' linear layers and attention run in `dtype`. What is neither goes through `kernels`: fused on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from ..runtime.kernels import add_norm, can_attend_to_text, matmul_fp32, text_attention, text_weights
from .config import TransformerConfig
from .kv_cache import KeyValueStore, Pass
from .layers import Attention, Operations, affine, feed_forward, matrix, reads_rounded, rows, sdpa

EPS = 1e-6


@dataclass(frozen=True)
class Text:
    """Cross-attention keys and values [R, H, L, D] of every row's text, of which the first `lengths[r]` are real.

    lengths: of every row. counts: the same on the device, int32 [R]. mask: [R, 1, 1, L], true for real tokens, where
    training pads texts to one length.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    counts: Tensor
    mask: Tensor | None = None

    def rows(self, which: slice) -> Text:
        mask = None if self.mask is None else self.mask[which]
        return Text(self.keys[which], self.values[which], self.lengths[which], self.counts[which], mask)


@dataclass(frozen=True)
class FoldedText:
    """The text with both projections of cross-attention folded in: exact, and less work while H * L < C.

    Scores are h @ keys + bias instead of (h @ Wq + bq) @ k, results weights @ values instead of (weights @ v) @ Wo + bo.
    keys, values: [r, H * L, C]; bias: fp32 [r, H * L]; counts: real tokens, int32 [r]. Each row serves `copies` rows of
    a pass.
    """

    keys: Tensor
    bias: Tensor
    values: Tensor
    counts: Tensor
    copies: int = 1

    def rows(self, which: slice) -> FoldedText:
        if which.step is not None:  # one row of every source
            return replace(self, copies=1)
        own = slice(which.start // self.copies, which.stop // self.copies)
        return replace(self, keys=self.keys[own], bias=self.bias[own], values=self.values[own], counts=self.counts[own])


@dataclass(frozen=True)
class PaddedTexts:
    """Text features [R, L, T] of all rows, padded to one length, and which tokens are real (boolean [R, L])."""

    features: Tensor
    real: Tensor


@dataclass(frozen=True)
class BlockConstants:
    """What one block's small parameters say, read through their layers.

    gains: [6, C], added to the shared modulation; 1 is in those of scales. norm: scale and shift [2, C] of the norm before cross-attention.
    query_scale: [H].
    """

    gains: Tensor
    norm: Tensor
    query_scale: Tensor


@dataclass(frozen=True)
class BlockCondition:
    """What one block needs of one edit: modulation [R, 6, C] (gains, scales, shifts), its constants, the text."""

    modulation: Tensor
    constants: BlockConstants
    text: Text | FoldedText


@dataclass(frozen=True)
class Condition:
    """One edit's text, computed once: pooled vector [R, C], every block's part, the head's scale and shift [R, 2, C]."""

    pooled_RC: Tensor
    blocks: tuple[BlockCondition, ...]
    head: Tensor

    def rows(self, which: slice) -> Condition:
        """The same for some of the rows, as views."""
        blocks = tuple(replace(b, modulation=b.modulation[which], text=b.text.rows(which)) for b in self.blocks)
        return Condition(self.pooled_RC[which], blocks, self.head[which])

    @classmethod
    def room(
        cls,
        config: TransformerConfig,
        constants: Sequence[BlockConstants],
        rows: int,
        copies: int,
        length: int,
        fold: bool,
        dtype: torch.dtype,
    ) -> Condition:
        """Memory for `rows` rows, `copies` consecutive ones of each text, of `length` tokens; fold: see `FoldedText`."""
        width, sources = config.width, rows // copies
        wide = dict(dtype=torch.float32, device=constants[0].gains.device)
        narrow = wide | {"dtype": dtype}
        counts = torch.empty(sources if fold else rows, **wide | {"dtype": torch.int32})

        def text() -> Text | FoldedText:
            if fold:
                keys, values = (torch.empty(sources, config.heads * length, width, **narrow) for _ in range(2))
                return FoldedText(keys, torch.empty(keys.shape[:2], **wide), values, counts, copies)
            size = (rows, config.heads, length, config.head_size)
            return Text(torch.zeros(size, **narrow), torch.zeros(size, **narrow), (length,) * rows, counts)

        blocks = tuple(BlockCondition(torch.empty(rows, 6, width, **wide), fixed, text()) for fixed in constants)
        return cls(torch.empty(rows, width, **wide), blocks, torch.empty(rows, 2, width, **wide))


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
        return rows(self.scale_mul, 1, device)[0].clamp_max(math.log(100)).exp()

    def forward(
        self, x_RnC: Tensor, query_scale: Tensor, step: Pass, store: KeyValueStore, attention: Attention
    ) -> Tensor:
        qkv = self.mat_qkv(x_RnC)
        return self.proj(store.attend(self.index, self.first, qkv, query_scale, step, attention))

    def remember(self, x_RnC: Tensor, query_scale: Tensor, step: Pass, store: KeyValueStore) -> None:
        """Leave keys and values in the store and go no further."""
        store.keep(self.index, self.first, self.mat_qkv(x_RnC), query_scale, step)


class CrossAttention(nn.Module):
    """Attention to the text; keys and values are made once an edit by `text`."""

    def __init__(self, config: TransformerConfig, ops, dtype, device) -> None:
        super().__init__()
        self.heads = config.heads
        self.mat_q = ops.Linear(config.width, config.width, dtype=dtype, device=device)
        self.mat_kv = ops.Linear(config.width, 2 * config.width, dtype=dtype, device=device)
        self.proj = ops.Linear(config.width, config.width, dtype=dtype, device=device)

    def memory(self, text_RLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, L, D] of the projected text."""
        return self.mat_kv(text_RLC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def foldable(self, dtype: torch.dtype) -> bool:
        """Whether the layers show their matrices."""
        return all(matrix(layer, dtype) is not None for layer in (self.mat_q, self.proj))

    def fill(self, room: Text | FoldedText, text_RLC: Tensor) -> None:
        """Write keys and values of the projected text, once for every copy, or folded, to where they stay."""
        keys, values = self.memory(text_RLC)
        if isinstance(room, Text):
            for kept, x in ((room.keys, keys), (room.values, values)):
                kept.unflatten(0, (len(x), -1)).copy_(x[:, None].expand(-1, len(kept) // len(x), -1, -1, -1))
            return
        _, heads, length, size = keys.shape
        query, result = (matrix(layer, keys.dtype) for layer in (self.mat_q, self.proj))
        scale = size**-0.5
        query_HDC, result_HDC = query.unflatten(0, (heads, size)), result.unflatten(1, (heads, size)).permute(1, 2, 0)
        for row in range(len(keys)):
            torch.bmm(keys[row] * scale, query_HDC, out=room.keys[row].unflatten(0, (heads, length)))
            torch.bmm(values[row], result_HDC, out=room.values[row].unflatten(0, (heads, length)))
        bias = keys.float() @ self.mat_q.bias.float().unflatten(0, (heads, size))[:, :, None]
        room.bias.copy_(bias.mul_(scale).flatten(1))
        # The weights of each head sum to 1: a share of the bias in every head's values adds it once.
        room.values.add_(self.proj.bias / heads)

    def forward(self, x_RnC: Tensor, text: Text | FoldedText, attention: Attention) -> Tensor:
        if isinstance(text, FoldedText):
            x = x_RnC.unflatten(0, (len(text.keys), -1)).flatten(1, 2)
            scores = matmul_fp32(x, text.keys.transpose(1, 2))
            weights = text_weights(scores, text.bias, text.counts, self.heads, x.dtype)
            return torch.bmm(weights, text.values).view(x_RnC.shape)
        q = self.mat_q(x_RnC)
        scale = (q.shape[-1] // self.heads) ** -0.5
        if getattr(attention, "recordable", False) and text.mask is None and can_attend_to_text(q, text.keys):
            return self.proj(text_attention(q, text.keys, text.values, text.counts, scale))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # Texts of different lengths attend apart: no mask, and every row equals its single run up to rounding.
        parts = [
            attention(q[r], text.keys[r, :, :n], text.values[r, :, :n], scale=scale, mask=text.mask)
            for r, n in _runs(text.lengths)
        ]
        return self.proj(parts[0] if len(parts) == 1 else torch.cat(parts))


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig, ops, dtype, device) -> None:
        super().__init__()
        self.fc1 = ops.Linear(config.width, config.hidden, dtype=dtype, device=device)
        self.fc2 = ops.Linear(config.hidden, config.width, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(self.fc1, self.fc2, x)


class Block(nn.Module):
    """One block. Its last residual is left to the next block, which adds it in the same pass as its first norm:
    `pending` is (y, gate), not yet part of x, or None before the first block.
    """

    def __init__(self, config: TransformerConfig, index: int, ops, dtype, device) -> None:
        super().__init__()
        self.dtype = dtype
        self.sa = SelfAttention(config, index, ops, dtype, device)
        self.ca = CrossAttention(config, ops, dtype, device)
        self.ca_norm = ops.LayerNorm(config.width, eps=EPS, dtype=torch.float32, device=device)
        self.ffn = FeedForward(config, ops, dtype, device)
        self.ada_gss = ops.Embedding(6, config.width, dtype=torch.float32, device=device)

    def constants(self, device: torch.device) -> BlockConstants:
        gains = rows(self.ada_gss, 6, device)
        gains = gains + (torch.arange(6, device=device)[:, None] // 2 == 1)  # scales count from 1
        norm = affine(self.ca_norm, gains.shape[1], EPS, device)
        return BlockConstants(gains, norm, self.sa.query_scale(device))

    def forward(
        self,
        x_RnC: Tensor,
        pending: tuple[Tensor, Tensor] | None,
        condition: BlockCondition,
        step: Pass,
        store: KeyValueStore,
        attention: Attention,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        gain1, gain2, _, scale2, _, shift2 = condition.modulation.unbind(1)
        scale, shift = condition.constants.norm[:, None]
        x, h = self._first_norm(x_RnC, pending, condition)
        y = self.sa(h, condition.constants.query_scale, step, store, attention)
        x, h = add_norm(x, y, gain1, scale, shift, EPS, self.dtype)
        y = self.ca(h, condition.text, attention)
        x, h = add_norm(x, y, None, scale2, shift2, EPS, self.dtype, reads_rounded(self.ffn.fc1))
        return x, (self.ffn(h), gain2)

    def remember(self, x_RnC: Tensor, pending, condition: BlockCondition, step: Pass, store: KeyValueStore) -> None:
        """Leave keys and values in the store: all that is ever asked of the source's last block."""
        _, h = self._first_norm(x_RnC, pending, condition)
        self.sa.remember(h, condition.constants.query_scale, step, store)

    def _first_norm(self, x: Tensor, pending, condition: BlockCondition) -> tuple[Tensor, Tensor]:
        y, gate = pending or (None, None)
        scale, shift = condition.modulation[:, 2], condition.modulation[:, 4]
        return add_norm(x, y, gate, scale, shift, EPS, self.dtype, reads_rounded(self.sa.mat_qkv))


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
    """What makes the head's scale and shift from the pooled text."""

    def __init__(self, config: TransformerConfig, ops, **kw) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), ops.Linear(config.width, 2 * config.width, **kw))


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

    def constants(self, device: torch.device) -> tuple[BlockConstants, ...]:
        """Every block's small parameters; they are the same for every edit."""
        return tuple(block.constants(device) for block in self.blocks)

    def condition(
        self,
        texts: Sequence[Tensor] | PaddedTexts,
        attention: Attention = sdpa,
        constants: Sequence[BlockConstants] | None = None,
        room: Condition | None = None,
    ) -> Condition:
        """Text features [L_i, T] of every row -> all that depends on the text alone.

        room: where to write it (see `Condition.room`); texts are then padded to its length, and every row is repeated
        for its copies.
        """
        padded = texts if isinstance(texts, PaddedTexts) else None
        lengths = (padded.features.shape[1],) * len(padded.features) if padded else tuple(map(len, texts))
        features = padded.features if padded else nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        mask = padded.real[:, None, None] if padded else None
        text_RLT = self.text_norm(features.float())
        pooled_RC = torch.cat([self.text_proj_for_sos(text_RLT[r, :n], attention, mask) for r, n in _runs(lengths)])
        memory_RLC = self.text_proj_for_ca(text_RLT).to(self.dtype)
        shared_R6C = self.shared_ada_lin(pooled_RC).unflatten(-1, (6, -1))
        head_R2C = self.head_nm.ada_lin(pooled_RC).unflatten(-1, (2, -1))
        head_R2C = torch.stack((head_R2C[:, 0] + 1, head_R2C[:, 1]), dim=1)
        constants = constants or self.constants(features.device)
        if room is not None:
            for block, part in zip(self.blocks, room.blocks):
                modulation = _copies(part.modulation, shared_R6C)
                torch.add(shared_R6C[:, None].expand_as(modulation), part.constants.gains, out=modulation)
                block.ca.fill(part.text, memory_RLC)
            for kept, x in ((room.pooled_RC, pooled_RC), (room.head, head_R2C)):
                _copies(kept, x).copy_(x[:, None].expand_as(_copies(kept, x)))
            counts = padded.real.sum(1, dtype=torch.int32)
            _copies(room.blocks[0].text.counts, counts).copy_(counts[:, None])
            return room
        # Filled on the device: a copy from the host would wait for it.
        counts = torch.cat([features.new_full((r.stop - r.start,), n, dtype=torch.int32) for r, n in _runs(lengths)])
        texts = (Text(*block.ca.memory(memory_RLC), lengths, counts, mask) for block in self.blocks)
        blocks = tuple(BlockCondition(shared_R6C + c.gains, c, text) for c, text in zip(constants, texts))
        return Condition(pooled_RC, blocks, head_R2C)

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
        pending = None
        for block, part in zip(self.blocks, condition.blocks):
            x_RnC, pending = block(x_RnC, pending, part, step, store, attention)
        y, gate = pending
        return x_RnC + gate[:, None] * y

    def read_source(
        self, x_RnC: Tensor, condition: Condition, step: Pass, store: KeyValueStore, attention: Attention = sdpa
    ) -> None:
        """The source's pass: all that stays of it are keys and values, so the last block stops there."""
        pending = None
        *blocks, last = zip(self.blocks, condition.blocks)
        for block, part in blocks:
            x_RnC, pending = block(x_RnC, pending, part, step, store, attention)
        last[0].remember(x_RnC, pending, last[1], step, store)

    def logits(self, x_RnC: Tensor, condition: Condition) -> Tensor:
        """Logits [R, n, token_bits, 2] of every bit being 0 and 1, for the first R rows of the condition."""
        scale, shift = condition.head[: len(x_RnC)].unbind(1)
        _, h = add_norm(x_RnC, None, None, scale, shift, EPS, torch.float32)
        return self.head(h).unflatten(-1, (-1, 2))

    def _level(self, index: int, device) -> Tensor:
        return self.lvl_embed(torch.full((1,), index, device=device))  # torch.tensor would wait for the device


def _copies(kept: Tensor, x: Tensor) -> Tensor:
    """Rows [r * copies, ...] as [r, copies, ...]."""
    return kept.unflatten(0, (len(x), -1))


def _runs(lengths: Sequence[int]):
    """Consecutive rows of one text length: (slice, length)."""
    begin = 0
    for length, group in groupby(lengths):
        end = begin + len(list(group))
        yield slice(begin, end), length
        begin = end
