"""What an edit takes before it runs: device memory by kind of store, and every pass's share of the time.

Knows sizes only, neither devices nor weights; whoever has a budget asks `plan` for the way to run within it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .config import TransformerConfig
from .defaults import SIZES
from .kv import KeyValueStore
from .schedule import Schedule, schedule_for
from .stores import EightBitStore, HostStore

STORES = {"exact": KeyValueStore, "8-bit": EightBitStore, "host": HostStore}
"""Ways to keep keys and values, in the order in which they are tried."""
_WORDS = {
    "exact": "keys and values on the device",
    "8-bit": "keys and values in 8 bits (close to exact)",
    "host": "keys and values in host memory (exact, slower)",
}
# Bytes a channel and token of the largest pass: the fp32 parts of a block, and its parts in the compute dtype.
_WIDE, _NARROW = 24, 10
# A pass of few tokens takes as long as reading the weights: counted like one of about this many tokens.
_LEAST_TOKENS = 160


@dataclass(frozen=True)
class Job:
    """One run of the loop: images at once, two rows each under guidance, in the transformer's compute dtype.

    text_tokens: of the longest text; None: as many as the model takes.
    """

    config: TransformerConfig
    schedule: Schedule
    images: int
    guided: bool
    dtype: torch.dtype
    text_tokens: int | None = None

    @property
    def rows(self) -> int:
        return self.images * (2 if self.guided else 1)

    @property
    def _sizes(self) -> tuple:
        return self.schedule, self.config.depth, self.rows, self.config.width, self.dtype

    def stored(self, store: str) -> int:
        """Bytes of keys and values on the device with a store of STORES."""
        return STORES[store].nbytes(*self._sizes)

    @property
    def activations(self) -> int:
        """Bytes of everything else beside the weights: what a pass makes, and the text's keys and values."""
        last, width, size = self.schedule.tokens[-1], self.config.width, self.dtype.itemsize
        block = last * width * (_WIDE + _NARROW * size)
        joined = 2 * width * (last + sum(self.schedule.tokens)) * size
        text = 2 * self.config.depth * width * (self.text_tokens or self.config.text_length) * size
        return self.rows * (block + joined + text)

    def needed(self, store: str) -> int:
        """Bytes the loop needs on the device beside the weights."""
        return self.stored(store) + self.activations

    def needed_on_host(self, store: str) -> int:
        """Bytes of keys and values in host memory."""
        return STORES[store].host_nbytes(*self._sizes)

    def shares(self) -> list[float]:
        """Each pass's share of the time, the source's first: products and attention by their multiplications."""
        history, costs = 0, []
        for tokens in (self.schedule.tokens[-1], *self.schedule.tokens):
            history += tokens
            products = 14 * self.config.width * max(tokens, _LEAST_TOKENS)
            costs.append(products + 2 * tokens * history)
        return [cost / sum(costs) for cost in costs]


@dataclass(frozen=True)
class Plan:
    """How a job runs within a budget: `job.images` at a time, keys and values in `store`; why, in sentences."""

    job: Job
    store: str
    reasons: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        return self.job.needed(self.store)

    @property
    def needed_on_host(self) -> int:
        return self.job.needed_on_host(self.store)

    def fits(self, budget: float, host_budget: float) -> bool:
        """Whether it runs within so many bytes of the device and of host memory."""
        return self.needed <= budget and self.needed_on_host <= host_budget


def gigabytes(count: float) -> str:
    """Bytes as text, in units of 10^9."""
    return f"{count / 1e9:.2f} GB"


def plans(job: Job) -> list[Plan]:
    """All ways to run a job, the best first: fewer images at a time, then the other stores."""
    fewer = [replace(job, images=count) for count in range(job.images, 0, -1)]
    return [Plan(part, "exact") for part in fewer] + [Plan(fewer[-1], name) for name in list(STORES)[1:]]


def plan(job: Job, budget: float, host_budget: float = math.inf) -> Plan:
    """The best way to run a job within `budget` bytes of the device, and `host_budget` of host memory.

    Raises ValueError, naming the largest size that fits, where there is none.
    """
    reasons: list[str] = []
    for way in plans(job):
        if way.fits(budget, host_budget):
            return replace(way, reasons=tuple(reasons))
        if way.job.images in (1, job.images):  # not every number of pictures between
            reasons.append(reason(way, budget))
    raise ValueError(too_large(job, budget, host_budget))


def reason(way: Plan, budget: float) -> str:
    """Why a way was left, in one sentence."""
    if way.needed_on_host and way.needed <= budget:
        return f"{described(way)} would take {gigabytes(way.needed_on_host)} of host memory, which are not free"
    return f"{described(way)} would take {gigabytes(way.needed)} beside the weights and {gigabytes(budget)} are free"


def described(way: Plan) -> str:
    """A way in a few words."""
    images = "one picture at a time" if way.job.images == 1 else f"{way.job.images} pictures at once"
    return f"{images} with {_WORDS[way.store]}"


def too_large(job: Job, budget: float, host_budget: float = math.inf) -> str:
    """What to say where a job does not fit in any way."""
    least = plans(job)[-1].needed
    height, width = job.schedule.pixels
    text = f"an edit at {width}x{height} takes at least {gigabytes(least)} beside the weights and {gigabytes(budget)} are free; "
    for side, area in reversed(SIZES.items()):
        smaller = replace(job, images=1, schedule=schedule_for(area, job.schedule.ratio))
        fits = any(way.fits(budget, host_budget) for way in plans(smaller))
        if len(smaller.schedule) < len(job.schedule) and fits:
            return text + f"encode the source at the size {side}, which fits"
    return text + "no smaller size fits either, so free memory or use a smaller model"
