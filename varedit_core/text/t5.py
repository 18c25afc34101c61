"""T5's encoder: token ids in, one feature vector a token out. It knows no tokenizer and no files (see `text`).

Raffel et al., arXiv 1910.10683; both feed-forward networks, the first release's (ReLU) and that of v1.1 and Flan-T5
(gated GELU). Modules are named so that keys are those of the published files. What is T5's own: norms without
mean or bias, scores without a scale, and positions only as a learned bias on the scores, by the distance of the
two tokens and the same in every layer. Training makes no dropout.

Shape suffixes: B rows, L tokens, C width, H heads. `dtype` is that of weights and of the features. In fp16 the
feed-forward output and with it the residual stream overflow, so both are fp32 there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.layers import Operations

# Ours: what config.json of a Hugging Face folder calls it.
_NAMES = {
    "vocabulary": "vocab_size", "width": "d_model", "head_size": "d_kv", "hidden": "d_ff", "layers": "num_layers",
    "heads": "num_heads", "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance", "eps": "layer_norm_epsilon",
}  # fmt: skip
_KINDS = {"relu": False, "gated-gelu": True}
_ATTENTION, _FEED = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder (flan-t5-xl: width 2048, 24 layers of 32 heads).

    gated: gated GELU instead of ReLU. buckets: rows of the position bias. max_distance: tokens further apart share
    the last one.
    """

    vocabulary: int
    width: int
    head_size: int
    hidden: int
    layers: int
    heads: int
    gated: bool
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(f"{self.buckets} position buckets do not reach a distance of {self.max_distance}")
        if not 0 < self.eps < 1:
            raise ValueError(f"an epsilon of {self.eps} is not between 0 and 1")

    @classmethod
    def from_json(cls, values: Mapping) -> T5Config:
        """Read the content of config.json. KeyError for a size that is not there, ValueError for one that is none."""
        kind = values.get("feed_forward_proj", "relu")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"feed_forward_proj is {kind!r:.40} where {' or '.join(_KINDS)} was expected")
        defaults = {_NAMES[name]: getattr(cls, name) for name in ("buckets", "max_distance", "eps")}
        known = {name: (defaults | dict(values))[theirs] for name, theirs in _NAMES.items()}
        for name, value in known.items():
            wanted, kinds = ("number", (int, float)) if name == "eps" else ("whole number", int)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{_NAMES[name]} is {value!r:.40} where a {wanted} was expected")
        return cls(gated=_KINDS[kind], **known)

    def to_json(self) -> dict:
        """The content of config.json, by which transformers builds the same encoder."""
        kind = next(kind for kind, gated in _KINDS.items() if gated == self.gated)
        return {
            "model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": False, "use_cache": False,
            **{theirs: getattr(self, name) for name, theirs in _NAMES.items()},
            "feed_forward_proj": kind, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
        """Read the sizes off the weights' shapes. KeyError for a weight that is not there."""
        buckets, heads = _matrix(shapes, f"{_ATTENTION}.relative_attention_bias.weight")
        inner, _ = _matrix(shapes, f"{_ATTENTION}.q.weight")  # in 4 bits it holds two numbers a byte
        vocabulary, width = _matrix(shapes, "shared.weight")
        gated = f"{_FEED}.wi_0.weight" in shapes
        return cls(
            vocabulary=vocabulary,
            width=width,
            head_size=inner // heads,
            hidden=_matrix(shapes, f"{_FEED}.{'wi_0' if gated else 'wi'}.weight")[0],
            layers=layers_of(shapes),
            heads=heads,
            gated=gated,
            buckets=buckets,
        )


FLAN_T5_XL = T5Config(32128, 2048, 64, 5120, 24, 32, gated=True)
"""The encoder that all published transformers read."""


def _matrix(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, int]:
    if len(shapes[key]) != 2 or not all(shapes[key]):
        raise ValueError(f"{key} has the shape {list(shapes[key])} where that of a matrix was expected")
    return shapes[key]


def layers_of(keys: Iterable[str]) -> int:
    """How many layers an encoder's weights are of, by the highest number among their keys; 0 for none."""
    found = map(re.compile(r"encoder\.block\.([0-9]{1,9})\.").match, keys)
    return max((1 + int(match[1]) for match in found if match), default=0)


def position_buckets(offsets: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The row of the bias table for every offset (position of the key less that of the query).

    Each direction has one half of the rows (the arXiv paper, section 2.1): its first half for one distance each,
    the rest for ranges that widen logarithmically up to max_distance.
    """
    half = buckets // 2
    exact = half // 2
    distance = offsets.abs()
    growth = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(distance < exact, distance, far) + half * (offsets > 0)


class SelfAttention(nn.Module):
    def __init__(self, config: T5Config, biased: bool, ops, **kw) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_size
        self.q = ops.Linear(config.width, inner, bias=False, **kw)
        self.k = ops.Linear(config.width, inner, bias=False, **kw)
        self.v = ops.Linear(config.width, inner, bias=False, **kw)
        self.o = ops.Linear(inner, config.width, bias=False, **kw)
        if biased:
            self.relative_attention_bias = ops.Embedding(config.buckets, config.heads, **kw)

    def bias(self, length: int, device: torch.device) -> Tensor:
        """What is added to the scores of `length` tokens: [H, L, L], fp32."""
        offsets = torch.arange(1 - length, length, device=device)
        table = self.relative_attention_bias(position_buckets(offsets, self.config.buckets, self.config.max_distance))
        positions = torch.arange(length, device=device)
        return table.float()[positions[None] - positions[:, None] + length - 1].permute(2, 0, 1)

    def forward(self, x_BLC: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x_BLC).unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        # Unscaled scores are large: in half precision they would lose the bias beside them.
        scores = q.float() @ k.float().transpose(-1, -2) + bias
        return self.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: T5Config, ops, wide: torch.dtype, **kw) -> None:
        super().__init__()
        self.gated, self.wide = config.gated, wide
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            self.add_module(name, ops.Linear(config.width, config.hidden, bias=False, **kw))
        self.wo = ops.Linear(config.hidden, config.width, bias=False, **kw | {"dtype": wide})

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.wo(F.gelu(self.wi_0(x), approximate="tanh").to(self.wide) * self.wi_1(x))
        return self.wo(F.relu(self.wi(x)).to(self.wide))


class Block(nn.Module):
    def __init__(self, config: T5Config, index: int, ops, wide: torch.dtype, **kw) -> None:
        super().__init__()
        self.dtype = kw["dtype"]
        self.layer = nn.ModuleList([nn.Module(), nn.Module()])
        self.layer[0].SelfAttention = SelfAttention(config, index == 0, ops, **kw)
        self.layer[1].DenseReluDense = FeedForward(config, ops, wide, **kw)
        for layer in self.layer:
            layer.layer_norm = ops.RMSNorm(config.width, eps=config.eps, **kw)

    def forward(self, x_BLC: Tensor, bias: Tensor) -> Tensor:
        attention, feed = self.layer
        x = x_BLC
        # Norms run in fp32: squares overflow in fp16 and are too coarse in bf16.
        x = x + attention.SelfAttention(attention.layer_norm(x.float()).to(self.dtype), bias)
        return x + feed.DenseReluDense(feed.layer_norm(x.float()).to(self.dtype))


class T5Encoder(nn.Module):
    """The whole encoder. operations: namespace of layers (see `operations`)."""

    def __init__(
        self, config: T5Config, operations=Operations, dtype: torch.dtype = torch.float32, device=None
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.wide = torch.float32 if dtype == torch.float16 else dtype
        kw = dict(dtype=dtype, device=device)
        self.shared = operations.Embedding(config.vocabulary, config.width, **kw)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block(config, i, operations, self.wide, **kw) for i in range(config.layers))
        self.encoder.final_layer_norm = operations.RMSNorm(config.width, eps=config.eps, **kw)

    def forward(self, ids_BL: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """Features [B, L, C] of token ids. real_BL: nonzero for tokens that may be seen; None: all."""
        bias = self.encoder.block[0].layer[0].SelfAttention.bias(ids_BL.shape[1], ids_BL.device)[None]
        if real_BL is not None:
            bias = bias.masked_fill(~real_BL.bool()[:, None, None], torch.finfo(bias.dtype).min)
        x = self.shared(ids_BL).to(self.wide)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x.float()).to(self.dtype)
