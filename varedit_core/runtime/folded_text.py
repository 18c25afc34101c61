"""The text of an edit in two forms for recorded passes: read by a kernel that knows its length, or folded into
cross-attention's projections. Both lie in memory that stays in place.

Shape suffixes: R rows (images, then their unconditional twins), r sources, n tokens of a pass, L text tokens, C
width, H heads, D head size, T text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..model.config import TransformerConfig
from ..model.layers import Attention
from ..model.transformer import BlockCondition, BlockConstants, Condition, CrossAttention, Text, Transformer, runs
from .kernels import can_attend_to_text, matmul_fp32, text_attention, text_weights


@dataclass(frozen=True)
class CountedText(Text):
    """A text whose length is known on the device: a kernel reads its real tokens only, in a recorded pass too.

    counts: int32 [R].
    """

    counts: Tensor | None = None

    def rows(self, which: slice) -> CountedText:
        return CountedText(self.keys[which], self.values[which], self.lengths[which], None, self.counts[which])

    def attend(self, layer: CrossAttention, x_RnC: Tensor, attention: Attention) -> Tensor:
        if not (getattr(attention, "recordable", False) and can_attend_to_text(x_RnC, self.keys)):
            return super().attend(layer, x_RnC, attention)
        q, scale = layer.mat_q(x_RnC), self.keys.shape[3] ** -0.5
        return layer.proj(text_attention(q, self.keys, self.values, self.counts, scale))


@dataclass(frozen=True)
class FoldedText:
    """The text with both projections of cross-attention folded in: exact, and less work while H * L < C.

    Scores are h @ keys + bias instead of (h @ Wq + bq) @ k, results weights @ values instead of (weights @ v) @ Wo +
    bo. keys, values: [r, H * L, C]; bias: fp32 [r, H * L]; counts: real tokens, int32 [r]. Each row serves `copies`
    rows of a pass.
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

    def attend(self, layer: CrossAttention, x_RnC: Tensor, attention: Attention) -> Tensor:
        x = x_RnC.unflatten(0, (len(self.keys), -1)).flatten(1, 2)
        scores = matmul_fp32(x, self.keys.transpose(1, 2))
        weights = text_weights(scores, self.bias, self.counts, layer.heads, x.dtype)
        return torch.bmm(weights, self.values).view(x_RnC.shape)

    def fill(self, layer: CrossAttention, text_RLC: Tensor) -> None:
        """Fold a layer's projections into the projected text [r, L, C]."""
        keys, values = layer.memory(text_RLC)
        _, heads, length, size = keys.shape
        query, result = (matrix(linear, keys.dtype) for linear in (layer.mat_q, layer.proj))
        scale = size**-0.5
        query_HDC, result_HDC = query.unflatten(0, (heads, size)), result.unflatten(1, (heads, size)).permute(1, 2, 0)
        for row in range(len(keys)):
            torch.bmm(keys[row] * scale, query_HDC, out=self.keys[row].unflatten(0, (heads, length)))
            torch.bmm(values[row], result_HDC, out=self.values[row].unflatten(0, (heads, length)))
        bias = keys.float() @ offset(layer.mat_q).float().unflatten(0, (heads, size))[:, :, None]
        self.bias.copy_(bias.mul_(scale).flatten(1))
        # The weights of each head sum to 1: a share of the bias in every head's values adds it once.
        self.values.add_(offset(layer.proj) / heads)


def counted(condition: Condition) -> Condition:
    """A condition whose texts are `CountedText`."""
    text = condition.blocks[0].text
    # Filled on the device: a copy from the host would wait for it.
    parts = [text.keys.new_full((r.stop - r.start,), n, dtype=torch.int32) for r, n in runs(text.lengths)]
    counts = torch.cat(parts)
    texts = [CountedText(b.text.keys, b.text.values, b.text.lengths, None, counts) for b in condition.blocks]
    return replace(condition, blocks=tuple(replace(b, text=text) for b, text in zip(condition.blocks, texts)))


def room(
    config: TransformerConfig,
    constants: Sequence[BlockConstants],
    rows: int,
    copies: int,
    length: int,
    fold: bool,
    dtype: torch.dtype,
) -> Condition:
    """Memory for a condition of `rows` rows, to be written by `fill`. copies: consecutive rows of each text. length:
    its tokens. fold: see `FoldedText`."""
    width, sources = config.width, rows // copies
    wide = dict(dtype=torch.float32, device=constants[0].gains.device)
    narrow = wide | {"dtype": dtype}
    counts = torch.empty(sources if fold else rows, **wide | {"dtype": torch.int32})

    def text() -> CountedText | FoldedText:
        if fold:
            keys, values = (torch.empty(sources, config.heads * length, width, **narrow) for _ in range(2))
            return FoldedText(keys, torch.empty(keys.shape[:2], **wide), values, counts, copies)
        size = (rows, config.heads, length, config.head_size)
        return CountedText(torch.zeros(size, **narrow), torch.zeros(size, **narrow), (length,) * rows, counts=counts)

    blocks = tuple(BlockCondition(torch.empty(rows, 6, width, **wide), fixed, text()) for fixed in constants)
    return Condition(torch.empty(rows, width, **wide), blocks, torch.empty(rows, 2, width, **wide))


def fill(
    place: Condition, transformer: Transformer, features_RLT: Tensor, real_RL: Tensor, attention: Attention
) -> None:
    """Write all that depends on the text into its memory (see `room`), every row repeated for its copies.

    features: padded to the length of the room. real: which tokens are real, boolean.
    """
    pooled_RC, modulation_R6C, head_R2C, memory_RLC = transformer.read_text(features_RLT, attention, real_RL)
    for block, part in zip(transformer.blocks, place.blocks):
        modulation = _copies(part.modulation, modulation_R6C)
        torch.add(modulation_R6C[:, None].expand_as(modulation), part.constants.gains, out=modulation)
        if isinstance(part.text, FoldedText):
            part.text.fill(block.ca, memory_RLC)
        else:
            for kept, x in zip((part.text.keys, part.text.values), block.ca.memory(memory_RLC)):
                _repeat(x, kept)
    _repeat(pooled_RC, place.pooled_RC)
    _repeat(head_R2C, place.head)
    _repeat(real_RL.sum(1, dtype=torch.int32), place.blocks[0].text.counts)


def foldable(transformer: Transformer, dtype: torch.dtype) -> bool:
    """Whether the layers show their matrices."""
    layers = (layer for block in transformer.blocks for layer in (block.ca.mat_q, block.ca.proj))
    return all(matrix(layer, dtype) is not None for layer in layers)


def matrix(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """A linear layer's weight [out, in] in a type, where the layer is one that shows it; None where it is not."""
    shown = getattr(layer, "matrix", None)
    return shown(dtype) if shown and layer.bias is not None else None


def offset(layer: nn.Module) -> Tensor:
    """The bias that belongs to `matrix`."""
    shown = getattr(layer, "offset", None)
    return shown() if shown else layer.bias


def _repeat(x: Tensor, kept: Tensor) -> None:
    """Write every row of x to all its copies."""
    place = _copies(kept, x)
    place.copy_(x[:, None].expand_as(place))


def _copies(kept: Tensor, x: Tensor) -> Tensor:
    """Rows [r * copies, ...] as [r, copies, ...]."""
    return kept.unflatten(0, (len(x), -1))
