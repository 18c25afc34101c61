"""Several candidates for the first scales of an edit, of which the best one stays (`controls.best_of`).

Shape suffixes: P pictures, C candidates, d bits a latent position, (h, w) latent grid of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from ..controls.best_of import Candidates, best
from ..model.engine import Engine
from .batch import EditBatch
from .loop import sample
from .parts import part_of, slices
from .scale import Scale


def begun(
    engine: Engine, batch: EditBatch, controls: Sequence[Callable[[Scale], None]] = (), at_once: int | None = None
) -> EditBatch:
    """A batch that goes on from the first scales of every picture's best candidate; itself where it asks for none.

    controls: as for `loop.sample`. at_once: how many candidates run together; None: all. ValueError where logits are
    undefined numbers.
    """
    if batch.controls.best_of == 1:
        return batch
    scales = min(batch.controls.best_at, len(batch.plan))
    shortcuts = replace(batch.shortcuts, stop=scales if scales < len(batch.schedule) else 0)
    one = replace(batch.controls, best_of=1)
    trial = replace(batch, seeds=batch.trial_seeds, shortcuts=shortcuts, controls=one)
    scores, bits = [], []
    for copies in slices(trial.copies, at_once or trial.copies):
        part = part_of(trial, copies=copies)
        found = Candidates(batch.controls.score)
        with closing(sample(engine, part, controls)) as drawn:
            for scale in drawn:
                found(scale)
        scale.check()
        scores.append(found.scores.unflatten(0, (part.pictures, part.regions, part.copies)))
        bits.append([part.results(x).unflatten(0, (part.pictures, part.copies)) for x in found.bits])
    which = best(torch.cat(scores, dim=2))
    rows = torch.arange(batch.pictures, device=which.device)
    prefix = [torch.cat(of_scale, dim=1)[rows, which] for of_scale in zip(*bits)]
    return replace(batch, prefix=prefix, controls=one, fresh=False, stream=None)
