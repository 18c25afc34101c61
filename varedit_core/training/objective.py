"""What training minimises: the parallel forward over all scales, its labels, and the tokenizer's loss.

Knows networks and tensors; knows nothing of data, optimisers or files.

Shape suffixes: B pairs, d bits a latent position, (H, W) last latent grid, (h, w) one scale's, n tokens of a
pass, D bits of a token, N tokens of source and all scales, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autoencoder import Autoencoder
from ..kv import SOURCE, Pass, pooled
from ..operations import Attention, sdpa
from ..quantizer import area_resize, codes, encode, latent_grids, linear_resize, to_tokens
from ..schedule import Schedule
from ..transformer import PaddedTexts, Transformer
from .settings import Reconstruction


class TeacherForced:
    """Stands where the sampler's `KeyValueStore` stands, for one pass over source and all scales at once.

    Every scale attends to source, earlier scales and itself, the source to itself; in block 0 a scale sees the
    source pooled to its own grid instead (VAREdit, arXiv 2508.15772, section 3.3). One attention call a pass and
    block, without masks: so each may run on the fastest kernel, and no forbidden product is ever computed.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.spans = [schedule.tokens[-1], *schedule.tokens]

    def step(self, head_size: int, device) -> Pass:
        """The one pass over all N tokens."""
        return Pass(SOURCE, torch.cat(self.schedule.rotary(head_size, device), dim=1), 0)

    @torch.compiler.disable
    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, step: Pass, attention: Attention) -> Tensor:
        source = self.spans[0]
        references: list = [None] * len(self.schedule)
        if block == 0:
            part = k[:, :, :source], v[:, :, :source]
            references = [pooled(*part, self.schedule, grid) for grid in self.schedule.grids]
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


def parallel_logits(
    transformer: Transformer,
    source_BnD: Tensor,
    inputs: Sequence[Tensor],
    texts: PaddedTexts | Sequence[Tensor],
    schedule: Schedule,
    attention: Attention = sdpa,
) -> list[Tensor]:
    """Logits [B, n, D, 2] of every scale in one pass.

    source_BnD: tokens of the source's features. inputs: tokens [B, n, D] of the running sum at every scale from the
    second on. texts: of every row.
    """
    condition = transformer.condition(texts, attention)
    store = TeacherForced(schedule)
    x = torch.cat(
        [
            transformer.embed(source_BnD, len(schedule) - 1),
            transformer.start(condition),
            *(transformer.embed(tokens, k) for k, tokens in enumerate(inputs, start=1)),
        ],
        dim=1,
    )
    x = transformer(x, condition, store.step(transformer.config.head_size, x.device), store, attention)
    return list(transformer.logits(x[:, store.spans[0] :], condition).split(schedule.tokens, dim=1))


@dataclass(frozen=True)
class Teaching:
    """inputs: tokens [B, n, D] of every scale from the second on. labels: boolean bits [B, n, D] of every scale."""

    inputs: list[Tensor]
    labels: list[Tensor]


@torch.no_grad()
def teach(
    features_BdHW: Tensor, schedule: Schedule, patch: int, flips: Tensor | None = None, generator=None
) -> Teaching:
    """Inputs and labels from the target's features, with bitwise self-correction (Infinity, section 3.4).

    flips: probability [B] that a bit of a row is flipped in what later scales see. The labels of later scales are
    the signs of the residual that the flipped bits left, so the network learns to mend its own errors.
    """
    features, grids = features_BdHW.float(), latent_grids(schedule, patch)
    total, teaching = torch.zeros_like(features), Teaching([], [])
    for k, grid in enumerate(grids):
        if k:
            teaching.inputs.append(to_tokens(linear_resize(total, grid), patch))
        bits = area_resize(features - total, grid) > 0
        teaching.labels.append(to_tokens(bits.float(), patch) > 0.5)
        if flips is not None:
            draw = torch.rand(bits.shape, generator=generator, device=bits.device)
            bits = bits ^ (draw < flips[:, None, None, None])
        total = total + linear_resize(codes(bits), grids[-1])
    return teaching


def token_weights(schedule: Schedule, region_BHW: Tensor | None, inside: float, power: float) -> list[Tensor]:
    """Weight [B or 1, n] of every token; a pair's weights sum to 1 over all scales.

    A token of a scale with n tokens weighs n^power, so coarse scales are not drowned by fine ones; `inside` times
    that where the edited region (boolean or 0 to 1, any size) touches it.
    """
    weights = []
    for (rows, columns), count in zip(schedule.grids, schedule.tokens):
        weight = torch.full((1, count), float(count) ** power)
        if region_BHW is not None:
            touched = F.adaptive_max_pool2d(region_BHW.float()[:, None], (rows, columns)).flatten(1)
            weight = weight.to(touched.device) * (1 + (inside - 1) * touched)
        weights.append(weight)
    whole = torch.stack([weight.sum(1, keepdim=True) for weight in weights]).sum(0)
    return [weight / whole for weight in weights]


def bit_loss(logits: Sequence[Tensor], labels: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy a bit, and its plain mean at every scale [scales] (detached)."""
    losses, plain = [], []
    for logit, label, weight in zip(logits, labels, weights):
        odds = (logit[..., 1] - logit[..., 0]).float()
        loss = F.binary_cross_entropy_with_logits(odds, label.float(), reduction="none").mean(-1)
        losses.append((loss * weight.to(loss.device)).sum(1).mean())
        plain.append(loss.detach().mean())
    return torch.stack(losses).sum(), torch.stack(plain)


def tokenizer_loss(
    autoencoder: Autoencoder, pixels: Tensor, schedule: Schedule, patch: int, weights: Reconstruction
) -> tuple[Tensor, Tensor]:
    """Loss of one batch of pixels [B, 3, y, x] in [-1, 1], and its mean squared error (detached).

    Straight-through over the whole multi-scale residual; the commitment term holds the features near their codes,
    without which they run away, as a code step has a fixed length.
    """
    features = autoencoder.encoder(pixels).float()
    with torch.no_grad():
        _, total = encode(features, latent_grids(schedule, patch))
    restored = autoencoder.decoder(features + (total - features).detach()).float()
    error = restored - pixels
    loss = weights.absolute * error.abs().mean() + weights.squared * error.square().mean()
    loss = loss + weights.gradient * _gradient_error(error) + weights.commitment * F.mse_loss(features, total)
    return loss, error.detach().square().mean()


def _gradient_error(error: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbours' errors, over halved pictures."""
    total = error.new_zeros(())
    for _ in range(scales):
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total / scales
