"""The loop: next-scale prediction of an edit (VAREdit, arXiv 2508.15772, section 3; Infinity, algorithm 1).

Knows scales and draws. The network is behind an `Engine`. Previews, masks and stops act on the `Scale` that the loop
yields.

Shape suffixes: B rows, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of one scale, n tokens of
a scale, D token bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..model.engine import Engine
from ..tokenizer.quantizer import from_tokens
from .batch import EditBatch
from .checks import fits
from .scale import Scale


@torch.no_grad()
def sample(engine: Engine, batch: EditBatch, controls: Sequence[Callable[[Scale], None]] = ()) -> Iterator[Scale]:
    """Edit a batch; yields every `Scale` before its bits are drawn. The last `running_sum` is the result.

    controls: functions called with every scale, after the batch's own controls. Raises ValueError, at the first step,
    where the batch does not fit the network, and for `best_of`, which `beginnings.begun` settles before. `Scale.check`
    says whether logits are numbers, as that waits for the device. Close the generator where you leave it early.
    """
    batch, controls = replace(batch), tuple(controls)  # a copy: what its controls remember is this run's alone
    generators = [torch.Generator().manual_seed(seed) for seed in batch.row_seeds()]
    fits(batch, engine.configs)
    engine.prefill(batch)
    try:
        source, finite = batch.source(), None
        total = torch.zeros_like(source.features)
        for k, (guidance, temperature, _) in enumerate(batch.plan):
            logits = engine.logits(k, total, guided=guidance != 1)
            odds = guide(logits, len(total), guidance) / (temperature or 1.0)  # 0 is greedy: only the sign counts
            log_odds = from_tokens(
                everywhere(odds, engine.computed(k), batch.schedule.tokens[k]), batch.schedule.grids[k], batch.patch
            )
            finite = logits.isfinite().all() if finite is None else finite & logits.isfinite().all()
            # Drawn on the CPU, also where a greedy scale ignores them: one seed, one image, on every device.
            scale = Scale(k, batch, source, total, logits, log_odds, uniform(log_odds, generators), finite)
            for control in (*batch.active, *controls):
                control(scale)
            yield scale
            total = scale.running_sum  # draws the bits, where nothing has set them
    finally:
        engine.close()


def guide(logits: Tensor, rows: int, guidance: float) -> Tensor:
    """Classifier-free guidance: log-odds [B, n, D] of guidance * conditional + (1 - guidance) * unconditional logits
    [B or 2B, n, D, 2]."""
    odds = logits[..., 1] - logits[..., 0]
    return odds if len(odds) == rows else guidance * odds[:rows] + (1 - guidance) * odds[rows:]


def everywhere(odds_BnD: Tensor, tokens: Tensor | None, count: int) -> Tensor:
    """Log-odds of all of a scale's tokens; 0 for those that were not computed, whose bits are locked."""
    if tokens is None:
        return odds_BnD
    return odds_BnD.new_zeros(len(odds_BnD), count, odds_BnD.shape[2]).index_copy_(1, tokens, odds_BnD)


def uniform(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A number from 0 to 1 for every element of [B, d, h, w], row i's from generator i, brought to its device."""
    drawn = torch.empty(like.shape, pin_memory=like.is_cuda)  # from pageable memory the copy would wait for the device
    for row, generator in zip(drawn, generators):
        torch.rand(row.shape, generator=generator, out=row)
    return drawn.to(like.device, non_blocking=True)
