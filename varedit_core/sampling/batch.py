"""A batch of edits: features, texts, seeds, and what holds them to their sources.

Shape suffixes: P pictures, R regions (instructions a picture), d bits a latent position, (H, W) latent grid of the last
scale, (h, w) of one scale, (y, x) pixels of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..controls.base import Control, Plan
from ..controls.registry import NEUTRAL, NO_SHORTCUTS, Controls, Shortcuts, active
from ..defaults import MOST_VARIATIONS
from ..model.kv_cache import Pass
from ..tokenizer.quantizer import latent_grids
from ..tokenizer.schedule import Grid, Schedule
from ..tokenizer.source import Source
from .checks import agree, right_kinds, whole_number
from .settings import DEFAULT_SETTINGS, SamplingSettings


@dataclass(frozen=True, eq=False)
class EditBatch:
    """P pictures, each edited with R instructions and as many times as it has seeds.

    features: [P, d, H, W], unquantised, of the sources; where no source is read they give the shape, and with a mask
    what stays. texts: features [L, T] of the R instructions of each picture. seeds: one a result; those of a picture
    follow each other. negatives: of each picture its negative prompt's features, None for the learned unconditional
    ones. mask: [1 or P, y, x], above 0 where the picture may change. areas: [P, R, y, x] of the regions. prefix: bits
    [P or P * copies, d, h, w] of the first scales. source_total: the sources' sums of codes [P, d, H, W], where they
    are known. trial_seeds: of the candidates of each picture, where the best is chosen. room: for how many results of a
    picture memory is made, where there is one: as many as there were candidates, so that the prefill is not run again.

    fresh: picture or texts are known to differ from the last edit's. stream: where the texts are being made. Both save
    time only. ValueError where the parts do not fit each other.
    """

    features: Tensor
    texts: Sequence[Sequence[Tensor]]
    schedule: Schedule
    seeds: tuple[int, ...]
    settings: SamplingSettings = DEFAULT_SETTINGS
    negatives: Sequence[Tensor | None] = ()
    controls: Controls = NEUTRAL
    shortcuts: Shortcuts = NO_SHORTCUTS
    mask: Tensor | None = None
    areas: Tensor | None = None
    prefix: Sequence[Tensor] = ()
    source_total: Tensor | None = None
    trial_seeds: tuple[int, ...] = ()
    room: int = 1
    fresh: bool = False
    stream: torch.cuda.Stream | None = None

    @classmethod
    def of(
        cls, features: Tensor, texts: Sequence[Tensor | Sequence[Tensor]], schedule: Schedule,
        settings: SamplingSettings = DEFAULT_SETTINGS, negatives: Sequence[Tensor | None] | None = None,
        variations: int = 1, numbers: Sequence[int] | None = None, **more,
    ) -> EditBatch:  # fmt: skip
        """The batch whose results draw with the seeds `settings.seed`, the next one, and so on, modulo 2^64.

        features: [P, d, H, W]. texts: features [L, T] of one instruction a picture, or a list of R of them, which then
        need `areas`. negatives: features [L, T] of each picture's negative prompt, or None. variations: results of each
        picture. numbers: of the pictures, by which they count their seeds; from 0 on by default. more: further fields.
        ValueError as for these.
        """
        rows = [[text] if isinstance(text, Tensor) else list(text) for text in texts]
        right_kinds({"settings": settings, **more})
        copies = whole_number("variations", variations, 1, MOST_VARIATIONS)
        trials = more.get("controls", NEUTRAL).best_of
        seeds, trial_seeds = (
            tuple((settings.seed + k * n + i) % 2**64 for n in numbers or range(len(features)) for i in range(k))
            for k in (copies, trials if trials > 1 else 0)
        )
        return cls(features, rows, schedule, seeds, settings, list(negatives or ()), trial_seeds=trial_seeds, **more)

    def __post_init__(self) -> None:
        object.__setattr__(self, "negatives", list(self.negatives) or [None] * self.pictures)
        agree(self)

    @property
    def pictures(self) -> int:
        return len(self.features)

    @property
    def regions(self) -> int:
        """R, the instructions of each picture."""
        return len(self.texts[0])

    @property
    def copies(self) -> int:
        """Results of each picture."""
        return len(self.seeds) // self.pictures

    @property
    def patch(self) -> int:
        """Latents along a token's edge."""
        return max(1, self.features.shape[-2] // self.schedule.grids[-1][0])

    @property
    def grids(self) -> list[Grid]:
        """The latent grid (h, w) of every scale."""
        return latent_grids(self.schedule, self.patch)

    @cached_property
    def active(self) -> tuple[Control, ...]:
        """The controls that change these edits, in the order in which they act."""
        return active(self)

    @cached_property
    def plan(self) -> Plan:
        """(guidance, temperature, top_p) of the scales that run."""
        plan = self.settings.per_scale(len(self.schedule))
        for control in self.active:
            plan = control.plan(plan)
        return plan

    @property
    def guided_scales(self) -> int:
        """How many scales there are until guidance, and with it the unconditional rows, ends for good."""
        return max((k + 1 for k, (guidance, _, _) in enumerate(self.plan) if guidance != 1), default=0)

    def steps(self, passes: Sequence[Pass]) -> list[Pass]:
        """The passes of a network, the prefill first, as changed by the active controls."""
        made, source = [passes[0]], passes[0].end > 0
        for step in passes[1:]:
            for control in self.active:
                step = control.step(step, source)
            begin = made[-1].end
            made.append(step if step.begin == begin else replace(step, begin=begin))
        return made

    def each_source(self, x_P: Tensor) -> Tensor:
        """A tensor of one row a picture, repeated for its regions: [P * R, ...]."""
        # Sums lie as features do, and products of what lies otherwise are rounded in another way on a GPU.
        return x_P.contiguous() if self.regions == 1 else x_P.repeat_interleave(self.regions, 0)

    def each_row(self, x_P: Tensor) -> Tensor:
        """A tensor of one row a picture, repeated for its regions and results: [P * R * copies, ...]."""
        x = self.each_source(x_P)
        return x if self.copies == 1 else x.repeat_interleave(self.copies, 0)

    def each_result(self, x: Tensor) -> Tensor:
        """A tensor of one row a result, repeated for the regions: [P * R * copies, ...]."""
        if self.regions == 1:
            return x
        return x.unflatten(0, (self.pictures, self.copies)).repeat_interleave(self.regions, 0).flatten(0, 1)

    def results(self, x_B: Tensor) -> Tensor:
        """One row a result, of a tensor with a row for every region and result: the regions' rows are equal."""
        return x_B if self.regions == 1 else x_B.unflatten(0, (-1, self.regions, self.copies))[:, 0].flatten(0, 1)

    def row_seeds(self) -> list[int]:
        """The seed of every row [P * R * copies]: the regions of a result draw alike."""
        count = self.copies
        return [s for p in range(self.pictures) for s in self.seeds[p * count : (p + 1) * count] * self.regions]

    def source(self) -> Source:
        """The sources of all rows, which the edits may be held to."""
        total = None if self.source_total is None else self.each_row(self.source_total)
        return Source(self.each_row(self.features).float(), self.grids, total)
