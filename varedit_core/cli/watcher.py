"""Follows an edit scale by scale: progress bar, seconds, and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from ..editor import Editor
from ..pictures.contact_sheet import Row
from ..pictures.images import FittedImage, SourceImage
from ..sampling.scale import Scale
from ..tokenizer.schedule import Schedule


def previews(folder: Path, stem: str, schedule: Schedule) -> list[Path]:
    """The files of the pictures of all scales."""
    return [folder / f"{stem}-scale-{n + 1:02d}-{h}x{w}.png" for n, (h, w) in enumerate(schedule.grids)]


class Watcher:
    """Follows the edit of one picture (the first of its variations) scale by scale: progress bar, seconds, and on
    request its pictures.

    Pictures are decoded from the scale's running sum, but for the last one: that is the result, which whoever edits
    gives to `take`. keep: hold them in `pictures`. previews: where they go, a file a scale (`previews`). write: how.
    """

    def __init__(
        self, editor: Editor, bar: Progress, keep: bool = False, previews: Sequence[Path] = (),
        write: Callable[[Image.Image, Path], None] | None = None,
    ) -> None:  # fmt: skip
        self.editor, self.bar, self.keep, self.previews, self.write = editor, bar, keep, previews, write
        self.task = bar.add_task("reading the source", total=None)
        self.begin, self.scales, self.pictures = time.perf_counter(), [], []
        self.done = False

    def __call__(self, scale: Scale, fitted: list[FittedImage]) -> None:
        if self.done:  # further results, of an edit that did not fit into memory at once
            return
        if scale.index == 0 and self.scales:  # memory ran out on the way, and it begins anew
            self.scales, self.pictures = [], []
        self.done = scale.index + 1 == scale.count
        height, width = scale.grid
        tokens = fitted[0].schedule.tokens
        bits = scale.bits  # drawn here, so that a scale's seconds hold its own draw
        self.scales.append(
            {
                "scale": scale.index + 1,
                "grid": [height, width],
                "seconds": round(time.perf_counter() - self.begin, 4),
                "ones": round(bits.float().mean().item(), 4),
            }
        )
        self.bar.update(
            self.task,
            description=f"scale {scale.index + 1}/{scale.count} ({height}x{width})",
            total=sum(tokens),
            completed=sum(tokens[: scale.index + 1]),
        )
        if (self.keep or self.previews) and scale.index + 1 < scale.count:
            self.take(*self.editor.decode(scale.running_sum[:1], fitted[:1]))
        self.begin = time.perf_counter()

    def take(self, picture: Image.Image) -> None:
        """Keep or write the picture of the scale that passed last."""
        if self.keep:
            self.pictures.append(picture)
        if self.previews:
            self.write(picture, self.previews[self.scales[-1]["scale"] - 1])

    @property
    def columns(self) -> list[str]:
        """A contact sheet's columns: those of `row`."""
        return ["source", *("{}x{}".format(*scale["grid"]) for scale in self.scales), "result"]

    def row(self, label: str, source: SourceImage) -> Row:
        """A contact sheet's row: source, every scale, result."""
        return Row(label, [source.rgb, *self.pictures, self.pictures[-1]])
