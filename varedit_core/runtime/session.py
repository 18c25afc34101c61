"""The fast engine: recorded passes, memory that stays, short texts folded in, the source read once for a re-roll.

It gives the numbers of `model.engine.PlainEngine`. What stays between batches is in its `Workspace`. Shape suffixes: B
rows, d bits a latent position, (H, W) latent grid of the last scale, n tokens of a scale, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.engine import BUSY, Engine, every_row, row_texts
from ..model.layers import Attention, sdpa
from ..model.transformer import Condition, Transformer
from ..sampling import loop
from ..sampling.batch import EditBatch
from ..sampling.beginnings import begun
from ..sampling.checks import can_draft
from ..sampling.scale import Scale
from ..sampling.settings import DEFAULT_SETTINGS, SamplingSettings
from ..tokenizer.quantizer import area_resize, linear_resize, to_tokens
from ..tokenizer.schedule import Grid, Schedule
from .graphs import on
from .workspace import Shape, Workspace


class Session:
    """An engine for one batch after the other. It takes a workspace of its own while the given one is busy.

    workspace: by default memory of this batch alone, let go of however it ends.
    """

    def __init__(
        self, transformer: Transformer, workspace: Workspace | None = None, attention: Attention = sdpa
    ) -> None:
        self.transformer, self.attention, self.configs = transformer, attention, (transformer.config,)
        self.workspace = workspace or Workspace(kept=False)
        self.work: Workspace | None = None

    def prefill(self, batch: EditBatch) -> None:
        if self.work is not None:
            raise ValueError(BUSY)
        self.work = self.workspace if self.workspace.claim() else self.workspace.another()
        try:
            self._begin(batch)
        except BaseException:
            self.close()
            raise

    @torch.no_grad()
    def _begin(self, batch: EditBatch) -> None:
        network, config = self.transformer, self.transformer.config
        work, self.batch, device = self.work, batch, batch.features.device
        # Stores that keep a row of its own for every result read every source as often.
        apart = batch.copies > 1 and not work.kind.shares_source
        roomy = batch.copies == 1 and batch.room > 1 and work.kind.shares_source
        self.copies = batch.room if roomy else 1 if apart else batch.copies
        self.shared = len(batch.plan) if roomy else 0 if apart else _shared(batch)
        self.results = 1 if apart else batch.copies
        features = batch.each_row(batch.features) if apart else batch.each_source(batch.features)
        with on(batch.stream):
            texts = row_texts(batch, network, copies=apart)
        shape = Shape.of(batch.schedule, texts, self.copies, network.dtype, device)
        work.begin(network, texts, shape, self.attention, batch.stream)
        if config.source:
            work.expect((features, *texts), batch.fresh)
            work.read_source(lambda x: self._source(x, len(texts)), features)
        depends = [x for control in batch.active for x in (type(control).__name__, *control.depends) if control.depends]
        self.steps = work.scale_passes(lambda: batch.steps(work.passes), len(batch.schedule), *depends)[1:]

    def _source(self, features: Tensor, count: int) -> Tensor:
        tokens = to_tokens(area_resize(features.float(), self.batch.grids[-1]), self.batch.patch)
        return every_row(self.transformer.embed(tokens, len(self.batch.schedule) - 1), count)

    @torch.no_grad()
    def logits(self, k: int, total: Tensor, guided: bool) -> Tensor:
        batch, work, step = self.batch, self.work, self.steps[k]
        shared = self.copies if k < self.shared else 1
        repeats = self.results if shared > 1 else 1
        own = len(total) // repeats
        # Of the store that later scales attend to, also where this one asks for no unconditional rows.
        rows = len(total) // self.results * self.copies // shared * (2 if k < batch.guided_scales else 1)
        tokens = _Tokens(self.transformer, work.condition, batch.grids[k], batch.patch, k, step.tokens, rows, shared)
        logits = work.run(tokens, step, rows, rows if guided else own, *[total[::repeats]] * (k > 0), shared=shared)
        return logits.repeat_interleave(repeats, 0) if repeats > 1 else logits

    def computed(self, k: int) -> Tensor | None:
        return self.steps[k].tokens

    def close(self) -> None:
        if self.work is not None:
            self.work.end()
            self.work = None


def _shared(batch: EditBatch) -> int:
    """First scales that the results of a picture have in common, so that each pass is done once for them."""
    return len(batch.prefix) if batch.prefix and len(batch.prefix[0]) == batch.pictures and batch.copies > 1 else 0


@dataclass(frozen=True)
class _Tokens:
    """Makes a scale's input of the running sum; the first scale has none. It holds no tensor of an edit but those that
    stay in place. shared: so many consecutive rows of the condition have one pass."""

    transformer: Transformer
    condition: Condition
    grid: Grid
    patch: int
    index: int
    which: Tensor | None
    rows: int
    shared: int = 1

    def __call__(self, *total_BdHW: Tensor) -> Tensor:
        if not total_BdHW:
            return self.transformer.start(self.condition)[:: self.shared][: self.rows]
        (total,) = total_BdHW
        tokens = to_tokens(linear_resize(total, self.grid), self.patch)
        tokens = tokens if self.which is None else tokens[:, self.which]
        return every_row(self.transformer.embed(tokens, self.index), self.rows)


def sample(
    transformer: Transformer,
    features: Tensor,
    texts: Sequence[Tensor],
    schedule: Schedule,
    settings: SamplingSettings = DEFAULT_SETTINGS,
    negatives: Sequence[Tensor | None] | None = None,
    attention: Attention = sdpa,
    workspace: Workspace | None = None,
    steer: Sequence[Callable[[Scale], None]] = (),
    **more,
) -> Iterator[Scale]:
    """The loop over a transformer: edits of features [P, d, H, W] by texts [L_i, T], one each; yields every `Scale`
    before its bits are drawn (see `sampling.loop`).

    workspace: where the KV cache is kept; by default memory of this edit alone. steer: called with every scale. more:
    `variations` and further fields of `EditBatch`. ValueError where the parts do not belong together, and at the end
    where the logits were undefined numbers.
    """
    batch = EditBatch.of(features, texts, schedule, settings, negatives, **more)
    can_draft(batch, False)
    yield from checked(drawn(Session(transformer, workspace, attention), batch, steer))


def drawn(engine: Engine, batch: EditBatch, steer: Sequence[Callable[[Scale], None]] = ()) -> Generator[Scale]:
    """`loop.sample` of a batch, from the best of several beginnings where it asks for them."""
    yield from loop.sample(engine, begun(engine, batch, steer), steer)


def checked(scales: Generator[Scale]) -> Iterator[Scale]:
    """The scales of a loop, and at its end a ValueError where logits were undefined numbers."""
    scale = None
    with closing(scales):  # at once, also where an error's traceback still holds it
        for scale in scales:
            yield scale
    if scale is not None:
        scale.check()
