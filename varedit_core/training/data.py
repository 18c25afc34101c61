"""Edit pairs for training: a JSON Lines folder, a Hugging Face dataset or WebDataset shards, in a fixed order.

Knows files, rows and the order they are read in; knows nothing of crops, tokens or losses. Sample number n
(0, 1, 2, ...) of the endless stream depends on the seed and n alone, so a training resumed at n reads what
an unbroken one would. A bad sample is replaced by the next good one in that order and takes no number away:
every rank gets its share, and resuming stays exact. Sizes are (width, height), as in `images`.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .containers import (
    FIELDS,
    ORDER,
    WORDING,
    Lines,
    Pair,
    PairError,
    Pictures,
    Shards,
    Table,
    decode,
    open_data,
    seeded,
)
from .settings import ON_ERROR

__all__ = [
    "FIELDS",
    "ON_ERROR",
    "Pair",
    "PairError",
    "PairSource",
    "PairStream",
    "Report",
    "check_pairs",
    "open_pairs",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What `check_pairs` found: the number of good samples, and one sentence for every bad one."""

    good: int
    bad: tuple[str, ...]

    @property
    def count(self) -> int:
        """Samples looked at; a shard that breaks off counts as one more bad sample, and its last good one is lost."""
        return self.good + len(self.bad)


def open_pairs(
    where: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    on_error: str = "stop",
    seed: int = 0,
    pictures: bool = False,
    resize_targets: bool = False,
) -> PairSource:
    """Open edit pairs; pictures are read when the stream comes to them.

    where: a .jsonl file, a folder with metadata.jsonl or other .jsonl files (paths in them are relative to the folder);
    `hf:owner/name[:split]` (split: train) or a folder written by `save_to_disk`; tar shards by name, with
    {000..012} or * (members KEY.source.png or KEY.src.png, KEY.target.png or KEY.tgt.png, KEY.txt or KEY.json, and
    KEY.mask.png or none), or by a list of the published training (see `upstream`).
    An instruction may be a list of wordings, of which seed and n pick one. Lines and rows are read where they
    lie; every rank and worker reads all shards through, and resuming skips undecoded samples.
    columns: names other than those of FIELDS, e.g. {"source": "input_image"}: JSON keys, dataset columns, or
    what stands for `source` in KEY.source.png.
    on_error: "stop" raises at the first bad sample, "skip" logs it as a warning and goes on. seed: 0 to 2**32-1.
    pictures: take any other folder for one of pictures, each its own source and target with an empty instruction.
    resize_targets: bring targets of another size than their source's to it; else they are bad.
    Raises PairError for what cannot be opened, holds nothing, or (with "stop") has a bad line; ValueError for
    another setting.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"unknown on_error {on_error!r}; choose one of {', '.join(ON_ERROR)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed is {seed}; choose one from 0 to {2**32 - 1}")
    data = open_data(os.fspath(where), columns or {}, pictures)
    return (_Streamed if isinstance(data, Shards) else _Indexed)(data, seed, on_error, resize_targets)


def check_pairs(
    where: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    pictures: bool = False,
    resize_targets: bool = False,
) -> Report:
    """Read every sample once, pictures too, and list the bad ones.

    Arguments as of `open_pairs`. Raises PairError for what cannot be opened at all.
    """
    data = open_data(os.fspath(where), columns or {}, pictures)
    good, bad = 0, [*data.problems]
    for item in data.items():
        try:
            decode(data.record(item), 0, resize_targets)
            good += 1
        except PairError as error:
            bad.append(str(error))
    return Report(good, tuple(bad))


class PairSource(ABC):
    """Pairs in the order that a seed gives them; made by `open_pairs`. Can be pickled for worker processes."""

    def __init__(
        self, data: Lines | Table | Shards | Pictures, seed: int, on_error: str, resize_targets: bool = False
    ) -> None:
        self.seed, self.on_error, self._data, self._resize = seed, on_error, data, resize_targets
        self._bad: dict[str, None] = {}
        for problem in data.problems:
            self._reject(PairError(problem))

    @property
    def skipped(self) -> int:
        """Different bad samples left out so far in this process (DataLoader workers count their own)."""
        return len(self._bad)

    @abstractmethod
    def stream(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Pair]:
        """Samples number start + rank, start + rank + world, start + rank + 2 world, ... without end.

        Raises PairError for a bad sample (on_error "stop") or where every sample of an epoch is bad ("skip"),
        ValueError for a negative start or a rank outside 0..world-1.
        """

    def _attempt(self, item: Any, n: int) -> Pair | None:
        """The pair of an item as sample n, or None where it is bad and bad ones are skipped."""
        try:
            record = self._data.record(item)
            wording = int(seeded(self.seed, WORDING, n).randint(len(record.instructions)))
            return decode(record, wording, self._resize)
        except PairError as error:
            self._reject(error)
            return None

    def _reject(self, error: PairError) -> None:
        if self.on_error == "stop":
            raise error
        if str(error) not in self._bad:
            self._bad[str(error)] = None
            logger.warning("skipped %s", error)

    def _exhausted(self) -> PairError:
        return PairError(f"no sample of {self._data.where} can be used, mend them first: {next(iter(self._bad))}")


class _Indexed(PairSource):
    """Rows in reach by number: a permutation for every epoch."""

    def __init__(self, data: Lines | Table | Pictures, *how) -> None:
        super().__init__(data, *how)
        if not len(data):
            raise self._exhausted()
        self._order = (-1, np.arange(0))

    def stream(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Pair]:
        _check_share(start, rank, world)
        return (self._at(n) for n in count(start + rank, world))

    def _at(self, n: int) -> Pair:
        rows = len(self._data)
        epoch, place = divmod(n, rows)
        order = self._order
        if order[0] != epoch:
            order = self._order = (epoch, seeded(self.seed, ORDER, epoch).permutation(rows))
        for step in range(rows):
            pair = self._attempt(int(order[1][(place + step) % rows]), n)
            if pair is not None:
                return pair
        raise self._exhausted()


class _Streamed(PairSource):
    """Tar shards: shuffled, then samples within a buffer of SHUFFLE_BUFFER.

    Every rank and every worker reads all shards and decodes its own samples only. Resuming at n reads past
    the samples before it without decoding them: at most one epoch to learn its length, and a part of another.
    """

    def stream(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Pair]:
        _check_share(start, rank, world)
        return self._share(start + rank, world)

    def _share(self, first: int, world: int) -> Iterator[Pair]:
        items, ahead = self._items(first), deque()
        for n in count(first, world):
            yield self._first_good(n, ahead, items)
            for _ in range(world):
                if ahead:
                    ahead.popleft()
                else:
                    next(items)

    def _first_good(self, n: int, ahead: deque, items: Iterator) -> Pair:
        """The first good sample from `ahead` on; what is read for it stays there, bad ones as None."""
        for step in count():
            if step == len(ahead):
                ahead.append(next(items))
            epoch, item = ahead[step]
            pair = None if item is None else self._attempt(item, n)
            if pair is not None:
                return pair
            ahead[step] = (epoch, None)
            if epoch > ahead[0][0] + 1:
                raise self._exhausted()

    def _items(self, skip: int) -> Iterator[tuple[int, Any]]:
        """(epoch, item) without end after the first `skip`; epochs are equally long, so whole ones are not read."""
        epoch = 0
        while True:
            length = 0
            for item in self._data.items(self.seed, epoch):
                length += 1
                if skip:
                    skip -= 1
                else:
                    yield epoch, item
            if not length:
                raise PairError(f"{self._data.where} holds no samples; name shards with KEY.source.png and the like")
            jump, skip = divmod(skip, length)
            epoch += 1 + jump


class PairStream(IterableDataset):
    """`source.stream(start, rank, world)` for torch's DataLoader, in the same order with any number of workers.

    Use it with `batch_size=None`: the loader then takes one sample of each worker in turn (of a worker's own
    batches it would mix the order). transform: what each Pair becomes, run in the worker; None leaves it.
    """

    def __init__(
        self,
        source: PairSource,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        transform: Callable[[Pair], Any] | None = None,
    ) -> None:
        _check_share(start, rank, world)
        self.source, self.start, self.rank, self.world, self.transform = source, start, rank, world, transform

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        pairs = self.source.stream(self.start + worker * self.world, self.rank, self.world * workers)
        return pairs if self.transform is None else map(self.transform, pairs)


def _check_share(start: int, rank: int, world: int) -> None:
    if start < 0 or not 0 <= rank < world:
        raise ValueError(
            f"start {start}, rank {rank} of {world} is impossible; start from 0, ranks from 0 to world - 1"
        )
