"""A user's pairs as training data: read and fitted in worker processes, encoded where the networks train.

Knows pixels and batches; what files there are and in which order they come is `data`'s. Step s of a training with a
batches a step reads samples s * a * batch * processes and on, so a training resumed at any step reads what an
unbroken one would.

Shape suffixes: B pairs, (Y, X) pixels, d channels of a feature, (H, W) latent grid, L text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from ..defaults import FIT
from ..pictures.images import SourceImage, fit
from ..shapeedit.metrics import changed
from .data import Pair, PairStream, open_pairs
from .ending import follow_parent
from .settings import SHAPEEDIT, Stage

if TYPE_CHECKING:
    from .data import PairSource
    from .tasks import TransformerTask

ENCODED = 4  # pictures encoded at once; at 1024 pixels the published encoder needs gigabytes for each
Sample = tuple[Tensor, Tensor, Tensor, str]


def check_source(stage: Stage) -> None:
    """Open a stage's pairs or pictures. PairError where that fails, before any network is loaded."""
    if stage.data.source != SHAPEEDIT:
        _open(stage)


def pair_batches(task: TransformerTask, start: int) -> Iterator[dict[str, Tensor]]:
    """Batches from step `start` on, without end, on the task's device.

    source, target: features [B, d, H, W]; region: boolean [B, H, W], where the mask is white or, without one, where
    the pictures differ; ids, real: text tokens [B, L]; features of the text, where its encoder is not trained.
    Raises PairError for a bad pair (on_error "stop"), ValueError for a text that the model cannot take.
    """
    with closing(_samples(task.stage, start, task.accelerator)) as samples:
        while True:
            sources, targets, regions, instructions = zip(*islice(samples, task.stage.batch))
            source, target = _encoded(task, sources), _encoded(task, targets)
            region = torch.stack(regions).float()[:, None]
            ids, real = task.padded(instructions)
            batch = {
                "source": source,
                "target": target,
                "region": F.adaptive_max_pool2d(region, source.shape[-2:])[:, 0] > 0,
                "ids": ids,
                "real": real,
            }
            device = task.accelerator.device
            yield task.with_features({name: tensor.to(device) for name, tensor in batch.items()})


def picture_batches(stage: Stage, start: int, accelerator) -> Iterator[Tensor]:
    """Pixels [batch, 3, Y, X] in [-1, 1] from step `start` on, without end, on the accelerator's device.

    A folder of pictures gives each of them; pairs give the source or the target, as a coin falls.
    """
    number = _first(stage, start, accelerator) + accelerator.process_index
    with closing(_samples(stage, start, accelerator)) as samples:
        while True:
            pictures = []
            for sides in islice(samples, stage.batch):
                pictures.append(sides[Random(f"side {stage.seed} {number}").getrandbits(1)])
                number += accelerator.num_processes
            yield torch.stack(pictures).to(accelerator.device)


def first_pairs(stage: Stage, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first `count` pairs of a training, to look at: pixels [B, 3, Y, X] of both sides, and instructions."""
    pairs = (fitted(pair, stage.data.size, stage.data.fit) for pair in islice(_open(stage).stream(), count))
    sources, targets, _, instructions = zip(*pairs)
    return torch.stack(sources), torch.stack(targets), list(instructions)


def fitted(pair: Pair, size: str, method: str = FIT) -> Sample:
    """A pair as the model sees it: pixels [3, Y, X] of both sides, boolean region [Y, X], the instruction.

    Pictures are fitted as for editing (see `images.fit`): by default padded at the right and bottom to a square, then
    resized.
    """
    source, target = (fit(SourceImage(picture), size, method).pixels[0] for picture in (pair.source, pair.target))
    if pair.mask is None:
        return source, target, changed(source[None], target[None])[0], pair.instruction
    # Inverted, because white is padded.
    kept = fit(SourceImage(ImageOps.invert(pair.mask).convert("RGB")), size, method).pixels[0, 0]
    return source, target, kept < 0, pair.instruction


def _open(stage: Stage) -> PairSource:
    data = stage.data
    pictures = stage.task == "tokenizer"
    return open_pairs(data.source, data.columns, data.on_error, stage.seed, pictures, data.resize_targets)


def _first(stage: Stage, start: int, accelerator) -> int:
    """Number of the first sample, of all processes', that step `start` reads."""
    return start * stage.optimisation.accumulate * stage.batch * accelerator.num_processes


def _samples(stage: Stage, start: int, accelerator) -> Iterator[Sample]:
    """This process's samples from step `start` on."""
    first, share = _first(stage, start, accelerator), (accelerator.process_index, accelerator.num_processes)
    stream = PairStream(_open(stage), first, *share, partial(fitted, size=stage.data.size, method=stage.data.fit))
    try:
        yield from DataLoader(stream, batch_size=None, num_workers=stage.data.workers, worker_init_fn=follow_parent)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise ValueError(
            f"stage {stage.name}: a process that reads pictures was ended from outside, for want of memory perhaps; "
            "set data.workers lower, and go on with --resume"
        ) from error


def _encoded(task: TransformerTask, pictures: Sequence[Tensor]) -> Tensor:
    """Features [B, d, H, W] of pictures [3, Y, X], a few at a time."""
    chunks = torch.stack(list(pictures)).split(ENCODED)
    return torch.cat([task.encode(chunk.to(task.accelerator.device)) for chunk in chunks])
