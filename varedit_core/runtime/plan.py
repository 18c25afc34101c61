"""What an edit will take: device memory for each way to run it, and each pass's share of the time.

Knows sizes only, neither devices nor weights. `plan` picks the best way to run within a budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..defaults import SIZES
from ..model.config import TransformerConfig
from ..tokenizer.schedule import Schedule, schedule_for
from .eight_bit_cache import EightBitCache
from .host_cache import HostCache
from .kv_caches import DeviceCache, source_tokens

STORES = {"exact": DeviceCache, "host": HostCache, "8-bit": EightBitCache}
"""Ways to keep the KV cache, in the order in which they are tried."""
_WORDS = {
    "exact": "the KV cache on the device",
    "host": "the KV cache in host memory (exact, slower)",
    "8-bit": "the KV cache in 8 bits (close to exact)",
}
# Bytes a channel and token of the largest pass: the fp32 parts of a block, and its parts in the compute dtype.
_WIDE, _NARROW = 24, 10
# A pass of few tokens takes as long as reading the weights: counted like one of about this many tokens.
_LEAST_TOKENS = 160


@dataclass(frozen=True)
class Job:
    """One run of the loop: images at once, two rows each under guidance, in the transformer's compute dtype.

    text_tokens: of the longest text; None: as many as the model takes. exact_keys: of how many heads of all blocks but
    the first the 8-bit cache does not round the keys (`eight_bit_cache.exact_heads`); None: as if of all.
    """

    config: TransformerConfig
    schedule: Schedule
    images: int
    guided: bool
    dtype: torch.dtype
    text_tokens: int | None = None
    exact_keys: int | None = None

    @property
    def rows(self) -> int:
        return self.images * (2 if self.guided else 1)

    @property
    def _sizes(self) -> tuple:
        return self.config, self.schedule, self.rows, self.dtype

    def stored(self, store: str, at_once: int | None = None) -> int:
        """Bytes of the KV cache on the device, kept in one of STORES; at_once: rows of a pass, if not all."""
        return STORES[store].nbytes(*self._sizes, at_once=at_once, exact_keys=self.exact_keys)

    def activations(self, at_once: int | None = None) -> int:
        """Bytes of everything else beside the weights: what a pass makes, and the text's keys and values."""
        last, width, size = self.schedule.tokens[-1], self.config.width, self.dtype.itemsize
        block = self.pass_bytes(self.config, self.dtype, last)
        text = 2 * self.config.depth * width * (self.text_tokens or self.config.text_length) * size
        return (at_once or self.rows) * block + self.rows * text

    @staticmethod
    def pass_bytes(config: TransformerConfig, dtype: torch.dtype, tokens: int) -> int:
        """Bytes of what a pass of so many tokens makes."""
        return tokens * config.width * (_WIDE + _NARROW * dtype.itemsize)

    def needed(self, store: str, at_once: int | None = None) -> int:
        """Bytes the loop needs on the device beside the weights."""
        return self.stored(store, at_once) + self.activations(at_once)

    def needed_on_host(self, store: str) -> int:
        """Bytes of the KV cache in host memory."""
        return STORES[store].host_nbytes(*self._sizes)

    def shares(self) -> list[float]:
        """Each pass's share of the time, the prefill's first (0 without a source): products and attention by their
        multiplications."""
        history, costs = 0, []
        for tokens in (source_tokens(self.config, self.schedule), *self.schedule.tokens):
            history += tokens
            products = 14 * self.config.width * max(tokens, _LEAST_TOKENS) * bool(tokens)
            costs.append(products + 2 * tokens * history)
        return [cost / sum(costs) for cost in costs]


@dataclass(frozen=True)
class Plan:
    """How a job runs within a budget; why, in sentences.

    `job.images` at a time, the KV cache in `store`. rows_at_once: of a pass, None for all. movable: bytes of other
    networks that go to host memory while the loop runs, 0 where they stay.
    """

    job: Job
    store: str = "exact"
    rows_at_once: int | None = None
    movable: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes on the device beside the weights, less what other networks free."""
        return self.job.needed(self.store, self.rows_at_once) - self.movable

    @property
    def needed_on_host(self) -> int:
        return self.job.needed_on_host(self.store) + self.movable

    @property
    def exact(self) -> bool:
        """Whether the result is that of the best way."""
        return self.store != "8-bit"

    def fits(self, budget: float, host_budget: float) -> bool:
        """Whether it runs within so many bytes of the device and of host memory."""
        return self.needed <= budget and self.needed_on_host <= host_budget


def gigabytes(count: float) -> str:
    """Bytes as text, in units of 10^9."""
    return f"{count / 1e9:.2f} GB"


def plans(job: Job, movable: int = 0, exact: bool = False) -> list[Plan]:
    """All ways to run a job, the best first: exact ones on the device, in host memory, then (unless exact) in 8 bits.

    On the device: fewer images at a time, then rows one after the other, then both again with other networks' `movable`
    bytes in host memory. Which way takes how much is not in this order: 8 bits take more of the device than host
    memory.
    """
    fewer = [Plan(replace(job, images=count)) for count in range(job.images, 0, -1)]
    one = fewer[-1]
    apart = [replace(one, rows_at_once=1)] if job.guided else []
    places = [0, movable] if movable else [0]
    ways = [replace(way, movable=bytes) for bytes in places for way in fewer + apart]
    for store in list(STORES)[1 : 2 if exact else None]:
        ways += [replace(way, store=store, movable=bytes) for bytes in places for way in [one, *apart]]
    return ways


def plan(job: Job, budget: float, host_budget: float = math.inf, movable: int = 0, exact: bool = False) -> Plan:
    """The best way to run a job within `budget` bytes of the device, and `host_budget` of host memory (see `plans`).

    Raises ValueError, naming the largest size that fits, where there is none.
    """
    ways = plans(job, movable, exact)
    reasons: dict[str, str] = {}
    for way in ways:
        if way.fits(budget, host_budget):
            return replace(way, reasons=tuple(reasons.values()))
        if way is ways[0] or way.job.images == 1:  # of every store the way that takes least, and the best of all
            reasons["best" if way is ways[0] else way.store] = reason(way, budget)
    raise ValueError(too_large(job, budget, host_budget, movable, exact))


def reason(way: Plan, budget: float) -> str:
    """Why a way was not taken, in one sentence."""
    if way.needed_on_host and way.needed <= budget:
        return f"{described(way)} would take {gigabytes(way.needed_on_host)} of host memory, which are not free"
    return f"{described(way)} would take {gigabytes(way.needed)} beside the weights and {gigabytes(budget)} are free"


def described(way: Plan) -> str:
    """A way in a few words."""
    images = "one picture at a time" if way.job.images == 1 else f"{way.job.images} pictures at once"
    apart = ", with and without the text one after the other," if way.rows_at_once else ""
    others = ", other networks in host memory meanwhile" if way.movable else ""
    return f"{images}{apart} with {_WORDS[way.store]}{others}"


def too_large(job: Job, budget: float, host_budget: float = math.inf, movable: int = 0, exact: bool = False) -> str:
    """The error's sentence where a job does not fit in any way."""

    def ways(job: Job) -> list[Plan]:
        return [way for way in plans(job, movable, exact) if way.needed_on_host <= host_budget]

    least = min(way.needed for way in ways(job))
    height, width = job.schedule.pixels
    what, how = ("an edit at", "encode the source") if job.config.source else ("a picture at", "make it")
    text = (
        f"{what} {width}x{height} takes at least {gigabytes(least)} beside the weights and {gigabytes(budget)} are "
        "free; "
    )
    for side, area in reversed(SIZES.items()):
        smaller = replace(job, images=1, schedule=schedule_for(area, job.schedule.ratio))
        fits = any(way.fits(budget, host_budget) for way in ways(smaller))
        if len(smaller.schedule) < len(job.schedule) and fits:
            return text + f"{how} at the size {side}, which fits"
    return text + "no smaller size fits either, so free memory or use a smaller model"
