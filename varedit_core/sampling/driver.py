"""The driver: runs a batch of edits within the free memory. Library, command line and nodes use this one.

It splits a batch by memory, tries the next way where memory runs out, picks the best of several candidates, and joins
sums, tokens and confidence. What a row draws with does not depend on how the batch was split; its logits are equal
up to the rounding of matrix products of more or fewer rows.

Shape suffixes: N results, P pictures, R regions, C candidates, d bits a latent position, (H, W) latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..controls import registry
from ..controls.confidence import Confidence
from ..controls.prefix import one_edit_each
from ..model.engine import Engine
from ..runtime.memory import Memory, as_it_fits
from ..runtime.plan import Job, Plan
from .batch import EditBatch
from .beginnings import begun
from .checks import can_draft, facts
from .loop import sample
from .parts import part_of, slices
from .results import joined, tokens_of
from .scale import Scale
from .tokens import Tokens

Watch = Callable[[Scale, Sequence[int], Sequence[int]], None]
"""Called with every scale before its bits are drawn, the numbers of its results, and those of their pictures."""


@dataclass(frozen=True, eq=False)
class Result:
    """The results of a batch: tokens and sums [N, d, H, W]; those of one picture follow each other.

    scales: sums [K, N, d, H, W] after every scale. before: the sources' sums [N, d, H, W]. confidence: how sure the
    model was, [N, H, W]. None where not asked for.
    """

    tokens: Tokens
    total: Tensor
    last: tuple[Scale, ...]
    scales: Tensor | None = None
    before: Tensor | None = None
    confidence: Tensor | None = None

    def check(self) -> None:
        """Raise ValueError where logits were undefined numbers; waits for the device."""
        for scale in self.last:
            scale.check()


@dataclass(frozen=True)
class Wanted:
    """What a caller wants beside tokens and sums; see `Result`."""

    scales: bool = False
    before: bool = False
    confidence: bool = False


def run(
    batch: EditBatch,
    memory: Memory,
    watch: Watch | None = None,
    controls: Sequence[Callable[[Scale], None]] = (),
    known: Tokens | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008
) -> Result:
    """Edit a batch. ValueError where its parts do not fit each other, or where no way to run it fits into memory.

    watch: see `Watch`; raise in it to cancel. Where memory runs out in it, as it may decode, that counts as the edit's
    and the edit begins anew in less. controls: further ones, behind the batch's own. known: the sources'
    tokens, where they are edits themselves.
    """
    check(batch, len(memory.networks) > 1)
    drafts = batch.shortcuts.drafted > 0
    rows = batch.pictures * batch.regions * max(batch.copies, batch.controls.best_of)
    jobs = [
        Job(network.config, batch.schedule, rows, batch.guided_scales > 0, network.dtype, _longest(batch))
        for network in memory.networks[: 1 + drafts]
    ]
    job = max(jobs, key=lambda job: job.needed("exact"))  # a drafter is done when the other begins
    task = _Task(batch, watch, tuple(controls), known, wanted)

    def attempt(plan: Plan) -> Result:
        return memory.within(plan, drafts, lambda engine: task.run(engine, plan.job.images // batch.regions))

    return as_it_fits(job, memory, attempt, batch.regions)


def check(batch: EditBatch, drafter: bool) -> None:
    """Raise ValueError for shortcuts that lack what they need, and for knobs that exclude each other."""
    can_draft(batch, drafter)
    registry.check(facts(batch))
    if batch.prefix and len(batch.prefix[0]) != batch.pictures:
        raise ValueError(one_edit_each(len(batch.prefix[0]), batch.pictures))


def _longest(batch: EditBatch) -> int:
    """Tokens of the longest text."""
    return max(len(text) for row in (*batch.texts, batch.negatives) for text in row if text is not None)


@dataclass(frozen=True, eq=False)
class _Task:
    """A batch at work, in one of the ways to run it."""

    batch: EditBatch
    watch: Watch | None
    controls: Sequence[Callable[[Scale], None]]
    known: Tokens | None
    wanted: Wanted

    def run(self, engine: Engine, at_once: int) -> Result:
        """The batch's results; at_once: how many, or candidates for them, run together."""
        batch, parts = self.batch, []
        most = max(batch.copies, batch.controls.best_of)
        for pictures in slices(batch.pictures, max(1, at_once // most)):
            own = begun(engine, part_of(batch, pictures), self.controls, at_once)
            for copies in slices(batch.copies, at_once):
                part = part_of(own, copies=copies)
                numbers = range(batch.pictures)[pictures]
                results = [p * batch.copies + c for p in numbers for c in range(batch.copies)[copies]]
                parts.append(self._part(engine, part, at_once >= most, results, numbers))
        return _joined(parts)

    def _part(
        self, engine: Engine, part: EditBatch, roomy: bool, results: list[int], pictures: Sequence[int]
    ) -> Result:
        """Run rows together. roomy: whether there is room for as many rows as there were candidates."""
        of_results = [picture for picture in pictures for _ in range(part.copies)]
        confidence = Confidence() if self.wanted.confidence else None
        part = replace(part, room=self.batch.controls.best_of) if roomy and part.copies == 1 else part
        bits, sums = [], []
        with closing(sample(engine, part, self.controls)) as scales:
            for scale in scales:
                if confidence:
                    confidence(scale)
                if self.watch:
                    self.watch(scale, results, of_results)
                bits.append(scale.bits)
                if self.wanted.scales:
                    sums.append(part.results(scale.running_sum))
        known = self.known and self.known.of(of_results).to(scale.total.device)
        return Result(
            tokens_of(bits, scale, part.schedule, None, known, part.results),
            part.results(scale.running_sum),
            (scale,),
            torch.stack(sums) if sums else None,
            part.results(scale.source.total) if self.wanted.before else None,
            part.results(confidence.map) if confidence else None,
        )


def _joined(parts: Sequence[Result]) -> Result:
    """The results of parts as those of one run."""
    if len(parts) == 1:
        return parts[0]

    def cat(name: str, dim: int = 0) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found, dim=dim)

    tokens = joined([part.tokens for part in parts])
    last = tuple(scale for part in parts for scale in part.last)
    return Result(tokens, cat("total"), last, cat("scales", 1), cat("before"), cat("confidence"))
