"""Which precision of published weights a GPU takes, by its free memory: what the planner says beside what the weights
take.

Knows sizes only. Preferred is what is nearest to the original and still runs without weights being streamed: bf16 where
all is on the GPU at once; 8 bits, also with the KV cache in host memory; then 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from .files.checkpoints import TEXT_ENCODER, TOKENIZER, TRANSFORMER
from .files.convert import PRECISIONS, planned
from .files.published import AUTOENCODERS, TRANSFORMERS
from .model.transformer import Transformer
from .runtime.memory import SPARE
from .runtime.plan import Job, Plan, plans
from .runtime.tiling import bytes_to_decode
from .runtime.unfilled import Unfilled
from .text.t5 import FLAN_T5_XL, T5Encoder
from .tokenizer.schedule import schedule_for
from .tokenizer.vae import Autoencoder

FOUR_BITS = "nvfp4"
TEXT_BITS = "int8"
_SYSTEM = 0.6e9  # bytes of a GPU that the system and CUDA itself take
_TEXT_TOKENS = 64  # of an instruction that is long; the text's keys and values are small beside all else


@dataclass(frozen=True)
class Choice:
    """How an edit of one picture with guidance runs. weights: bytes of all weights on the GPU. plan: see
    `runtime.plan`. text_on_host: whether the text encoder runs on the processor."""

    precision: str
    text_precision: str
    weights: int
    plan: Plan
    text_on_host: bool

    @property
    def needed(self) -> int:
        """Bytes of the GPU."""
        return self.weights + self.plan.needed + SPARE


def choose(model: str, area: str, free: float, host: float = math.inf, eight: str = "fp8") -> Choice | None:
    """The precision of a published model for so many free bytes of a GPU and of host memory; None where none of them
    runs without weights being streamed.

    model: a key of `TRANSFORMERS`. area: see `schedule_for`. eight: "fp8" or "int8", whichever the GPU multiplies.
    """
    stores = [("bf16", "exact"), *((eight, store) for store in ("exact", "host", "8-bit"))]
    for precision, store in [*stores, *((FOUR_BITS, store) for store in ("exact", "host", "8-bit"))]:
        for on_host, text in product((False, True), dict.fromkeys((beside(precision), TEXT_BITS))):
            found = _fitting(_Wanted(model, area, precision, text, store, on_host), free, host)
            if found is not None:
                return found
    return None


def beside(precision: str) -> str:
    """The text encoder's precision beside a transformer's, where none is named: in int8 its features move least."""
    return precision if precision in ("fp32", "bf16") else TEXT_BITS


@dataclass(frozen=True)
class Card:
    """A GPU. free: bytes that edits may take, with nothing else on it. eight: the 8-bit precision it multiplies."""

    name: str
    free: float
    eight: str

    @classmethod
    def here(cls) -> Card | None:
        """The first CUDA device; None without one."""
        if not torch.cuda.is_available():
            return None
        facts = torch.cuda.get_device_properties(0)
        fast = (facts.major, facts.minor) >= (8, 9)
        return cls(facts.name, facts.total_memory - _SYSTEM, "fp8" if fast else "int8")

    def advice(self, asked: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """The precision to take for models and areas, and why, in one sentence."""
        found = [choose(model, area, self.free, eight=self.eight) for model, area in asked]
        memory = f"{self.name} has {(self.free + _SYSTEM) / 1e9:.3g} GB"
        if None in found:
            return FOUR_BITS, f"{memory}: even in {FOUR_BITS} ComfyUI has to stream the weights"
        least = max((choice.precision for choice in found), key=PRECISIONS.index)
        return least, f"{memory}: {least} is the nearest to the original that runs whole there"


@dataclass(frozen=True)
class _Wanted:
    """A model, its precisions, where its KV cache is kept, and whether the text encoder runs on the processor."""

    model: str
    area: str
    precision: str
    text: str
    store: str
    text_on_host: bool


def _fitting(wanted: _Wanted, free: float, host: float) -> Choice | None:
    model, own = wanted.model, transformer_bytes(wanted.model, wanted.precision)
    movable = autoencoder_bytes(model) + (0 if wanted.text_on_host else text_bytes(wanted.text))
    weights = own + movable
    if weights + SPARE + picture_bytes(model, wanted.area) > free:  # before and after the loop, the VAE at work
        return None
    job = Job(TRANSFORMERS[model], schedule_for(wanted.area), 1, True, torch.bfloat16, text_tokens=_TEXT_TOKENS)
    ways = (way for way in plans(job, movable) if way.store == wanted.store)
    way = next((way for way in ways if way.fits(free - weights - SPARE, host)), None)
    return None if way is None else Choice(wanted.precision, wanted.text, weights, way, wanted.text_on_host)


@cache
def transformer_bytes(model: str, precision: str) -> int:
    """Bytes of a published transformer as `convert` writes it."""
    with Unfilled():
        state = Transformer(TRANSFORMERS[model], device="meta").state_dict()
    return sum(entry.nbytes for entry in planned(state, TRANSFORMER, precision).values())


@cache
def text_bytes(precision: str) -> int:
    """Bytes of flan-t5-xl's encoder as `convert` writes it."""
    with Unfilled():
        state = T5Encoder(FLAN_T5_XL, device="meta").state_dict()
    return sum(entry.nbytes for entry in planned(state, TEXT_ENCODER, precision).values())


@cache
def autoencoder_bytes(model: str) -> int:
    """Bytes of a published VAE, in fp32."""
    with Unfilled():
        return sum(x.nbytes for x in Autoencoder(AUTOENCODERS[model], device="meta").state_dict().values())


def picture_bytes(model: str, area: str) -> int:
    """Bytes that a published VAE takes to encode a picture, in fp32, beside its weights; about, and rather more."""
    height, width = schedule_for(area).pixels
    with Unfilled():
        network = Autoencoder(AUTOENCODERS[model], device="meta")
    return height * width // network.config.stride**2 * bytes_to_decode(network)


def share(part: str, precision: str) -> float:
    """What a part takes in a precision, as a share of fp32."""
    if part == TOKENIZER:
        return 1.0
    found = {
        kind: text_bytes(kind) if part == TEXT_ENCODER else transformer_bytes("8B", kind)
        for kind in (precision, "fp32")
    }
    return found[precision] / found["fp32"]
