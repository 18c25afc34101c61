"""Which precision of published weights a GPU takes, by its free memory: what the planner says beside what the weights
take.

Knows sizes only. Preferred is what is nearest to the original and still runs without weights being streamed: bf16 where
all is on the GPU at once; 8 bits, also with the KV cache in host memory; then 4 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from .files.checkpoints import TEXT_ENCODER, TRANSFORMER
from .files.convert import planned
from .files.published import AUTOENCODERS, TEXT, TRANSFORMERS
from .model.transformer import Transformer
from .runtime.memory import SPARE
from .runtime.plan import Job, Plan, plans
from .runtime.unfilled import Unfilled
from .text.t5 import T5Encoder
from .tokenizer.schedule import schedule_for
from .tokenizer.vae import Autoencoder

FOUR_BITS = "nvfp4"
_TEXT_TOKENS = 64  # of an instruction that is long; the text's keys and values are small beside all else


@dataclass(frozen=True)
class Choice:
    """How an edit of one picture with guidance runs. weights: bytes of all weights. plan: see `runtime.plan`."""

    precision: str
    text_precision: str
    weights: int
    plan: Plan

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
        for text in dict.fromkeys(("bf16" if precision == "bf16" else eight, eight)):
            found = _fitting(model, area, precision, text, store, free, host)
            if found is not None:
                return found
    return None


def _fitting(
    model: str, area: str, precision: str, text: str, store: str, free: float, host: float
) -> Choice | None:
    encoder, vae = text_bytes(text), autoencoder_bytes(model)
    weights = transformer_bytes(model, precision) + encoder + vae
    job = Job(TRANSFORMERS[model], schedule_for(area), 1, True, torch.bfloat16, text_tokens=_TEXT_TOKENS)
    ways = (way for way in plans(job, movable=encoder + vae) if way.store == store)
    # Before and after the loop all networks are on the GPU.
    fits = weights + SPARE <= free
    way = next((way for way in ways if fits and way.fits(free - weights - SPARE, host)), None)
    return None if way is None else Choice(precision, text, weights, way)


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
        state = T5Encoder(TEXT, device="meta").state_dict()
    return sum(entry.nbytes for entry in planned(state, TEXT_ENCODER, precision).values())


@cache
def autoencoder_bytes(model: str) -> int:
    """Bytes of a published VAE, in fp32."""
    with Unfilled():
        return sum(x.nbytes for x in Autoencoder(AUTOENCODERS[model], device="meta").state_dict().values())
