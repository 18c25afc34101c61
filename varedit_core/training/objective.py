"""What training minimises: labels of the parallel forward, the loss of their bits, and the VAE's loss.

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

from ..tokenizer.quantizer import area_resize, codes, encode, latent_grids, linear_resize, to_tokens
from ..tokenizer.schedule import Schedule
from ..tokenizer.vae import Autoencoder
from .settings import Reconstruction


@dataclass(frozen=True)
class Teaching:
    """inputs: tokens [B, n, D] of every scale from the second on. labels: boolean bits [B, n, D] of every scale."""

    inputs: list[Tensor]
    labels: list[Tensor]


@torch.no_grad()
def draw_flips(
    shape: torch.Size, schedule: Schedule, patch: int, rates_B: Tensor, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Which bits of every scale are flipped in what later scales see: boolean [B, d, h, w], at each row's own rate."""
    return [
        torch.rand(*shape[:2], *grid, generator=generator, device=rates_B.device) < rates_B[:, None, None, None]
        for grid in latent_grids(schedule, patch)
    ]


@torch.no_grad()
def teach(features_BdHW: Tensor, schedule: Schedule, patch: int, flips: Sequence[Tensor] | None = None) -> Teaching:
    """Inputs and labels from the target's features, with bitwise self-correction (Infinity, section 3.4).

    flips: of `draw_flips`. The labels of later scales are the signs of the residual that the flipped bits left, so
    the network learns to mend its own errors.
    """
    features, grids = features_BdHW.float(), latent_grids(schedule, patch)
    total, teaching = torch.zeros_like(features), Teaching([], [])
    for k, grid in enumerate(grids):
        if k:
            teaching.inputs.append(to_tokens(linear_resize(total, grid), patch))
        bits = area_resize(features - total, grid) > 0
        teaching.labels.append(to_tokens(bits.float(), patch) > 0.5)
        if flips is not None:
            bits = bits ^ flips[k]
        total = total + linear_resize(codes(bits), grids[-1])
    return teaching


def token_weights(schedule: Schedule, region_BHW: Tensor | None, inside: float, power: float) -> list[Tensor]:
    """Weight [B or 1, n] of every token; a pair's weights sum to 1 over all scales.

    A token of a scale with n tokens weighs n^power, so coarse scales are not drowned by fine ones; `inside` times
    that where the edited region (boolean or 0 to 1, any size) touches it.
    """
    weights = []
    for (rows, columns), count in zip(schedule.grids, schedule.tokens):
        if region_BHW is None:
            weight = torch.full((1, count), float(count) ** power)
        else:
            touched = F.adaptive_max_pool2d(region_BHW.float()[:, None], (rows, columns)).flatten(1)
            weight = float(count) ** power * (1 + (inside - 1) * touched)
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


@torch.no_grad()
def bit_accuracy(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Percent of bits whose likelier value is the label: of all scales' together, and of every scale [scales].

    The published training prints the same; its authors name 80 to 85 % for a trained network.
    """
    right = [((logit[..., 1] > logit[..., 0]) == label).float().mean() for logit, label in zip(logits, labels)]
    scales = 100 * torch.stack(right)
    counts = torch.tensor([label.numel() for label in labels], device=scales.device)
    return (scales * counts).sum() / counts.sum(), scales


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
