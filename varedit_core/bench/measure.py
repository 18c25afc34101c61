"""The measurement: whole edits with models of random weights, from a fitted picture to decoded pixels on the device.

A whole edit is text encoder, VAE's encoder, all scales and decoder; reading and writing pictures is not in it.
Whole edits, phases and scales are timed in runs of their own, as the last two wait for the device or mark its work.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..editor import Editor
from ..pictures.images import FittedImage, SourceImage, fit
from ..sampling.batch import EditBatch
from .cases import MASK_SIDE, Case, Work, work
from .ceilings import Ceilings
from .clock import Marks, Timed, synchronize, timed
from .models import nbytes

REPEATS, WARMUPS = 5, 2
PICTURES = 4
PROMPT = "make it a rainy night"
PHASES = ("text", "encode", "loop", "decode")


@dataclass(frozen=True)
class Result:
    """A measured case. phases: seconds of each of PHASES that ran. passes: seconds from each scale's logits to the
    next one's, the prefill in the first, the last draw in the last; work: the passes in these."""

    case: Case
    whole: Timed
    phases: dict[str, float]
    passes: list[float]
    work: list[tuple[Work, ...]]
    weights_gib: float
    itemsize: int

    @property
    def flop(self) -> list[float]:
        return [sum(w.flop for w in passes) for passes in self.work]

    def share(self, ceilings: Ceilings) -> float:
        """The loop's arithmetic over its time, as a part of the machine's matrix product."""
        return sum(self.flop) / self.phases["loop"] / (ceilings.matmul_tflops * 1e12)

    def floors(self, ceilings: Ceilings) -> list[float]:
        """Least seconds of `passes`: the arithmetic of each, or reading the weights where that takes longer."""
        rate, read = ceilings.matmul_tflops * 1e12, ceilings.copy_gbs * 1e9
        return [sum(max(w.flop / rate, w.weights * self.itemsize / read) for w in passes) for passes in self.work]

    def to_json(self, ceilings: Ceilings) -> dict:
        case, floors = self.case, self.floors(ceilings)
        scales = zip(case.schedule.grids, self.passes, self.flop, floors)
        single = [w for passes in self.work for w in passes]
        return {
            "name": case.name, "kind": case.kind, "model": case.model, "size": case.size, "images": case.variations,
            "seconds": asdict(self.whole.seconds),
            "warmup_extra_seconds": self.whole.extra,
            "phases": {name: round(value, 5) for name, value in self.phases.items()},
            "scales": [
                {"grid": list(grid), "seconds": round(s, 6), "tflop": _tera(flop), "floor_seconds": round(floor, 6)}
                for grid, s, flop, floor in scales
            ],
            "tflop": {name: _tera(sum(getattr(w, name) for w in single)) for name in ("products", "attention")},
            "share": round(self.share(ceilings), 4) if case.whole else None,
            "floor_seconds": round(sum(floors), 5),
            "weights_gib": self.weights_gib,
            "peak_gib": self.whole.peak_gib,
            "reserved_gib": self.whole.reserved_gib,
        }  # fmt: skip


def _tera(count: float) -> float:
    return float(f"{count / 1e12:.5g}")


class Runs:
    """Edits of one case, each of another picture than the last, with its own seed; a re-roll only has the latter."""

    def __init__(self, editor: Editor, case: Case) -> None:
        self.editor, self.case, self.count = editor, case, 0
        self.options, first = case.options, picture(case)
        self.pictures = [replace(first, pixels=first.pixels.roll(turn, -1)) for turn in range(PICTURES)]
        self.kept = self._encoded(first, _nothing) if case.reroll else None

    @torch.no_grad()
    def edit(
        self, phase: Callable[[str], None] | None = None, moment: Callable[[], None] | None = None
    ) -> list[Tensor]:
        """One whole edit -> pixels [1, 3, y, x] of every picture.

        phase: called with the name of a phase after it. moment: called when the loop begins, at every scale it yields,
        and at its end.
        """
        phase, moment = phase or _nothing, moment or _nothing
        self.count += 1
        source = self.pictures[self.count % PICTURES]
        hints = {}
        if self.kept:
            features, texts = self.kept
        elif phase is _nothing:
            features, texts, hints = self.editor.begin([source], [PROMPT])
        else:
            features, texts = self._encoded(source, phase)
        moment()
        settings, options = replace(self.case.settings, seed=self.count), dict(self.options)
        if self.case.new_masks:
            options["mask"] = options["mask"].roll(self.count % MASK_SIDE, -1)
        batch = EditBatch.of(features, texts, self.case.schedule, settings, **options, **hints)
        for scale in self.editor.scales(batch):
            moment()
            last = scale
        latents = last.running_sum
        moment()
        phase("loop")
        pixels = [self.editor.decode_pixels(latent[None]) for latent in latents]
        phase("decode")
        last.check()
        return pixels

    def _encoded(self, source: FittedImage, phase: Callable[[str], None]) -> tuple[Tensor, list[Tensor]]:
        texts = self.editor.encode_text([PROMPT])
        phase("text")
        features = self.editor.encode_source([source])
        phase("encode")
        return features, texts


def measure(editor: Editor, case: Case, repeats: int = REPEATS, warmups: int = WARMUPS) -> Result:
    """Measure a case: whole edits, then phases, then scales, each `repeats` times (medians of the last two)."""
    with _adjusted(editor, case):
        try:
            runs = Runs(editor, case)
            whole = timed(runs.edit, editor.device, repeats, warmups)
            phases = [_phases(runs) for _ in range(repeats)]
            passes = [_passes(runs) for _ in range(repeats)]
        finally:
            editor.forget()
    config, weights = editor.transformer.config, round(nbytes(editor) / 2**30, 2)
    medians = {name: statistics.median(run[name] for run in phases) for name in phases[0]}
    columns = [statistics.median(column) for column in zip(*passes)]
    return Result(case, whole, medians, columns, work(config, case), weights, editor.transformer.dtype.itemsize)


def _phases(runs: Runs) -> dict[str, float]:
    """Seconds of each phase of one edit, waiting for the device after each."""
    marks, names = Marks(torch.device("cpu")), []

    def after(name: str) -> None:
        synchronize(runs.editor.device)
        marks()
        names.append(name)

    synchronize(runs.editor.device)
    marks()
    runs.edit(phase=after)
    return dict(zip(names, marks.gaps()))


def _passes(runs: Runs) -> list[float]:
    """Seconds from each scale's logits to the next one's; what comes after the last logits counts as the last's."""
    marks = Marks(runs.editor.device)
    runs.edit(moment=marks)
    *passes, last, draw = marks.gaps()
    return [*passes, last + draw]


def picture(case: Case) -> FittedImage:
    """A picture of the case's size: smooth noise, as a flat one would be no work for a VAE."""
    height, width = case.schedule.pixels
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return fit(SourceImage(smooth), case.area, "square")


@contextmanager
def _adjusted(editor: Editor, case: Case) -> Iterator[None]:
    """The case's attributes of the editor, put back afterwards."""
    before = {name: getattr(editor, name) for name in case.editor}
    try:
        for name, make in case.editor.items():
            setattr(editor, name, make(editor))
        yield
    finally:
        for name, value in before.items():
            setattr(editor, name, value)


def _nothing(*_: object) -> None:
    pass
