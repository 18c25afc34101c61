"""What is asked of the loop for some pictures, cut and repeated in one place, and the loop for it with its controls.

Shape suffixes: B pictures, R regions (instructions a picture), d bits a latent position, (H, W) latent grid, (y, x)
pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from torch import Tensor

from ..controls.effects import Candidates, Regions, steering
from ..defaults import NEUTRAL, NO_SHORTCUTS, Controls, SamplingSettings, Shortcuts
from ..model.layers import Attention, sdpa
from ..model.transformer import Transformer
from ..runtime.workspace import Workspace
from ..tokenizer.schedule import Schedule
from .drafting import draft_and_refine
from .loop import Control, Promises, Scale, sample


@dataclass(frozen=True, eq=False)
class Request:
    """features: [B, d, H, W] of the sources. texts: of every picture R instructions, one or those of its regions.
    negatives: of every picture its negative prompt or None. mask: [1 or B, y, x]. areas: [B, R, y, x] of the regions.
    given: bits [B, d, h, w] of the first scales. source_total: the sources' sums of codes [B, d, H, W], where known.
    """

    features: Tensor
    texts: Sequence[Sequence[Tensor]]
    negatives: Sequence[Tensor | None] | None = None
    mask: Tensor | None = None
    areas: Tensor | None = None
    given: Sequence[Tensor] = ()
    source_total: Tensor | None = None

    def __post_init__(self) -> None:
        if self.given and len(self.given[0]) != len(self):
            raise ValueError(
                f"there are tokens of {len(self.given[0])} edits for {len(self)} pictures; go on from one edit of each picture"
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def regions(self) -> int:
        """R, the rows of each picture."""
        return len(self.texts[0])

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(text) for row in (*self.texts, self.negatives or ()) for text in row if text is not None)

    def part(self, pictures: slice) -> Request:
        """The request for some of the pictures."""
        return self._picked(list(range(len(self))[pictures]))

    def repeated(self, count: int) -> Request:
        """Every picture `count` times, one behind the other."""
        return self._picked(repeated(range(len(self)), count))

    def _picked(self, rows: list[int]) -> Request:
        def own(x: Tensor | None) -> Tensor | None:
            return x if x is None else x[rows]

        return Request(
            self.features[rows],
            [self.texts[row] for row in rows],
            self.negatives and [self.negatives[row] for row in rows],
            self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows],
            own(self.areas),
            [bits[rows] for bits in self.given],
            own(self.source_total),
        )

    def arguments(self, copies: int, given: Sequence[Tensor]) -> tuple[tuple, dict]:
        """What `sampling.sample` takes of it: features, texts and negatives; and the rest by name. Rows are pictures, their
        regions behind each other. given: bits of the first scales, in place of its own."""
        count = self.regions
        texts = [text for row in self.texts for text in row]
        negatives = self.negatives and [text for text in self.negatives for _ in range(count)]
        mask = self.mask if self.mask is None or len(self.mask) == 1 else _each(self.mask, count)
        more = dict(mask=mask, copies=copies, given=[_each(bits, count) for bits in given])
        more["source_total"] = self.source_total if self.source_total is None else _each(self.source_total, count)
        more["steer"] = [Regions(self.areas, copies)] if self.areas is not None and count > 1 else []
        if count > 1:  # the regions of a result draw alike
            more["draws"] = [n * copies + copy for n in range(len(self)) for _ in range(count) for copy in range(copies)]
        return (_each(self.features, count), texts, negatives), more

    def to(self, device) -> Request:
        """The same with its features, and what is as large, on a device."""
        moved = [x if x is None else x.to(device) for x in (self.features, self.source_total)]
        return replace(self, features=moved[0], source_total=moved[1], given=[bits.to(device) for bits in self.given])

    def own(self, x_B: Tensor, copies: int) -> Tensor:
        """Of something with a row for every region and copy, one row for every copy: the regions' have become the same."""
        return x_B if self.regions == 1 else x_B.unflatten(0, (-1, self.regions, copies))[:, 0].flatten(0, 1)


def repeated(items: Sequence, count: int) -> list:
    """Every item `count` times, one behind the other."""
    return [item for item in items for _ in range(count)]


def _each(x: Tensor, count: int) -> Tensor:
    return x if count == 1 else x.repeat_interleave(count, 0)


def edits(
    request: Request,
    networks: Sequence[Transformer],
    schedule: Schedule,
    settings: SamplingSettings,
    workspaces: Sequence[Workspace | None] = (None, None),
    shortcuts: Shortcuts = NO_SHORTCUTS,
    controls: Controls = NEUTRAL,
    copies: int = 1,
    steer: Sequence[Control] = (),
    attention: Attention = sdpa,
    promises: Promises = Promises(),
) -> Iterator[Scale]:
    """The scales of a request's edits (see `sampling.sample`), with their controls.

    networks, workspaces: of the transformer and, where scales are drafted, of the drafter. copies: variations of each
    picture. steer: further controls, behind those of `controls`. Where a best beginning is chosen, candidates run to
    `best_at` scales first, and the best one's are given to the edit. ValueError where scales are to be drafted and
    nobody is there to do it.
    """
    if shortcuts.drafted and len(networks) < 2:
        raise ValueError("drafted scales need a second transformer; name a drafter, or leave drafted at 0")
    if shortcuts.drafted and controls.best_of > 1:
        raise ValueError("drafted and best_of do not go together; choose one")

    def run(copies: int, given: Sequence[Tensor], shortcuts: Shortcuts, promises: Promises) -> Iterator[Scale]:
        args, more = request.arguments(copies, given)
        more["steer"] += [*steering(controls), *steer]
        more |= dict(feather=controls.feather, source_attention=controls.source_attention)
        more |= dict(attention=attention, promises=promises)
        if shortcuts.drafted and not given:
            refiner, drafter = networks
            pair = (workspaces[1], workspaces[0])
            return draft_and_refine(
                drafter, refiner, *args[:2], schedule, shortcuts, settings, args[2], pair, **more
            )
        own = dict(workspace=workspaces[0], shortcuts=replace(shortcuts, drafted=0))
        return sample(networks[0], *args[:2], schedule, settings, args[2], **own, **more)

    given = request.given
    if controls.best_of > 1:
        found, promises = Candidates(controls.score), promises.settled()
        begun = replace(shortcuts, stop=min(controls.best_at, shortcuts.stop or len(schedule)))
        with closing(run(controls.best_of, given, begun, replace(promises, checks=False))) as scales:
            for scale in scales:
                found(scale)
        given = found.best(controls.best_of, request.regions)
    return run(copies, given, shortcuts, promises)
