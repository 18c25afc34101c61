"""The engine: what the loop needs of a network, and its plain form.

`runtime.session.Session` gives the same numbers faster; a test holds the two equal. Shape suffixes: B rows, S sources,
d bits a latent position, (H, W) latent grid of the last scale, n tokens of a scale, D token bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..tokenizer.quantizer import area_resize, linear_resize, to_tokens
from .config import TransformerConfig
from .kv_cache import KVCache
from .layers import Attention, sdpa
from .transformer import Transformer

if TYPE_CHECKING:
    from ..sampling.batch import EditBatch


class Engine(Protocol):
    """A network at work on one batch at a time. configs: of the network; of both, where two work together."""

    configs: tuple[TransformerConfig, ...]

    def prefill(self, batch: EditBatch) -> None:
        """Read the texts, then the sources into the KV cache. Where it fails the engine is as it was: there is nothing
        to close. `sampling.checks.fits` has said that the batch fits."""

    def logits(self, k: int, total: Tensor, guided: bool) -> Tensor:
        """Logits [B or 2B, n, D, 2], fp32, of scale k (from 0). total: the running sum [B, d, H, W], fp32, of the
        scales before it. guided: whether the unconditional rows follow the others."""

    def computed(self, k: int) -> Tensor | None:
        """Which tokens of scale k are computed; None: all."""

    def close(self) -> None:
        """The batch is over, whether it was finished or not."""


BUSY = "this engine is in the middle of another batch; close that first, or make another engine"


class PlainEngine:
    """The network in plain PyTorch: one row for each result, a KV cache, nothing kept or skipped.

    attention: as in `layers`. Cache and logits are of the transformer's dtype and fp32. ValueError for a second batch
    before the first is closed, and for shortcuts that compute or see less of a scale.
    """

    def __init__(self, transformer: Transformer, attention: Attention = sdpa) -> None:
        self.transformer, self.attention, self.configs = transformer, attention, (transformer.config,)
        self.cache: KVCache | None = None

    @torch.no_grad()
    def prefill(self, batch: EditBatch) -> None:
        network, config = self.transformer, self.transformer.config
        if self.cache is not None:
            raise ValueError(BUSY)
        if batch.shortcuts.inside or batch.shortcuts.window:
            raise ValueError("the plain engine computes and sees every scale whole; leave out inside and window")
        texts, device = row_texts(batch, network), batch.features.device
        cache = KVCache(config, batch.schedule, len(texts), network.dtype, device)
        (source, *scales), condition = batch.steps(cache.passes(device)), network.condition(texts, self.attention)
        if config.source:
            tokens = to_tokens(area_resize(batch.each_row(batch.features).float(), batch.grids[-1]), batch.patch)
            x = every_row(network.embed(tokens, len(batch.schedule) - 1), len(texts))
            network.read_source(x, condition, source, cache, self.attention)
        self.batch, self.cache, self.condition, self.steps = batch, cache, condition, scales

    @torch.no_grad()
    def logits(self, k: int, total: Tensor, guided: bool) -> Tensor:
        network, step = self.transformer, self.steps[k]
        rows = len(total) * (
            2 if k < self.batch.guided_scales else 1
        )  # also unasked ones, which later scales attend to
        condition = self.condition.rows(slice(0, rows))
        x = network.start(condition) if k == 0 else self._embedded(k, total, rows)
        x = network(x, condition, step, self.cache, self.attention)
        return network.logits(x if guided else x[: len(total)], condition)

    def _embedded(self, k: int, total: Tensor, rows: int) -> Tensor:
        tokens = to_tokens(linear_resize(total, self.batch.grids[k]), self.batch.patch)
        return every_row(self.transformer.embed(tokens, k), rows)

    def computed(self, k: int) -> Tensor | None:
        return None

    def close(self) -> None:
        self.cache = self.condition = None


def every_row(x_BnC: Tensor, count: int) -> Tensor:
    """The conditional rows, and the same again for the unconditional ones."""
    return x_BnC.repeat(count // len(x_BnC), 1, 1)


def row_texts(batch: EditBatch, transformer: Transformer, copies: bool = True) -> list[Tensor]:
    """Text features of the conditional rows, then of the unconditional ones where there is guidance. copies: a row a
    result, else one for all results of a source."""
    device, rows = batch.features.device, [text for texts in batch.texts for text in texts]
    if batch.guided_scales:
        negatives = [text for text in batch.negatives for _ in range(batch.regions)]
        rows += [transformer.unconditional(len(t), device) if n is None else n for t, n in zip(rows, negatives)]
    return [text.to(device) for text in rows for _ in range(batch.copies if copies else 1)]
