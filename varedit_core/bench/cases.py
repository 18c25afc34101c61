"""What is measured: cases, and the arithmetic that each of them asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..controls.registry import NO_SHORTCUTS, Shortcuts
from ..defaults import SIZES
from ..editor import Editor
from ..files.published import TRANSFORMERS
from ..model.config import TransformerConfig
from ..model.transformer import Transformer
from ..runtime.eight_bit_cache import EightBitCache
from ..runtime.fp8 import LINEARS
from ..runtime.host_cache import HostCache
from ..runtime.workspace import Workspace
from ..sampling.batch import EditBatch
from ..sampling.settings import DEFAULT_SETTINGS, SamplingSettings
from ..tokenizer.schedule import Schedule, schedule_for
from .models import MODELS, random_transformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One kind of edit with one model at one size.

    kind: key of KINDS. model: key of MODELS. size: side of the square in pixels, as text. settings: of the draw; every
    run has a seed of its own. variations, shortcuts: arguments of `Editor.sample`. masked: share of the picture that a
    square mask covers; 0: no mask. linears: of the transformer, see `fp8.LINEARS`. editor: attributes that the
    editor has while the case runs, each made of the editor as it was. reroll: picture and instruction stay, only the
    seed is new. new_masks: every edit has another mask.
    """

    kind: str
    model: str
    size: str
    settings: SamplingSettings = DEFAULT_SETTINGS
    variations: int = 1
    shortcuts: Shortcuts = NO_SHORTCUTS
    masked: float = 0.0
    linears: str = LINEARS[0]
    editor: Mapping[str, Callable[[Editor], object]] = field(default_factory=dict)
    reroll: bool = False
    new_masks: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.size}" + ("" if self.kind == PLAIN else f" {self.kind}")

    @property
    def area(self) -> str:
        return SIZES[self.size]

    @property
    def schedule(self) -> Schedule:
        return schedule_for(self.area)

    @property
    def options(self) -> dict:
        """Further arguments of `Editor.sample`."""
        side = round(MASK_SIDE * self.masked**0.5)
        mask = torch.zeros(1, MASK_SIDE, MASK_SIDE) if side else None
        if side:
            begin = (MASK_SIDE - side) // 2
            mask[:, begin : begin + side, begin : begin + side] = 1
        return {"variations": self.variations, "shortcuts": self.shortcuts, "mask": mask}

    @property
    def possible(self) -> bool:
        """Whether its size has the scales that its shortcuts name."""
        return max(self.shortcuts.stop, self.shortcuts.drafted) < len(self.schedule)

    @property
    def whole(self) -> bool:
        """Whether every pass that runs has all of its tokens and sees everything, as the arithmetic here supposes."""
        return not (self.shortcuts.inside or self.shortcuts.window or self.shortcuts.drafted)


MASK_SIDE = 64


def _refiner(editor: Editor) -> Transformer:
    """A transformer of the 2B size for the VAE and text encoder of another."""
    theirs = editor.transformer.config
    sizes = replace(TRANSFORMERS["2B"], token_bits=theirs.token_bits, text_width=theirs.text_width)
    return random_transformer(sizes, editor.device)


PLAIN = "edit"
_FAST = {"linears": "8-bit", "shortcuts": Shortcuts(unguided=3)}
KINDS: dict[str, dict] = {
    PLAIN: {},
    "reroll": {"reroll": True},
    "variations": {"variations": 4},
    "unguided": {"settings": SamplingSettings(guidance=1.0)},
    "8-bit-kv": {"editor": {"workspace": lambda editor: Workspace(EightBitCache)}},
    "host-kv": {"editor": {"workspace": lambda editor: Workspace(HostCache, kept=False)}},
    **{f"unguided-{count}": {"shortcuts": Shortcuts(unguided=count)} for count in (1, 2, 3, 4)},
    "window": {"shortcuts": Shortcuts(window=0.125)},
    "inside": {"shortcuts": Shortcuts(inside=3), "masked": 0.25},
    "draft": {"shortcuts": Shortcuts(stop=10)},
    "drafted": {
        "shortcuts": Shortcuts(drafted=9),
        "editor": {"drafter": lambda editor: editor.transformer, "transformer": _refiner},
    },
    "8-bit": {"linears": "8-bit"},
    "8-bit-all": {"linears": "8-bit", "editor": {"workspace": lambda editor: Workspace(EightBitCache, fold=False)}},
    "fast": _FAST,
    "fast-inside": {**_FAST, "shortcuts": Shortcuts(unguided=3, inside=3), "masked": 0.25},
    "fast-inside-6-new": {
        **_FAST,
        "shortcuts": Shortcuts(unguided=3, inside=6),
        "masked": 0.25,
        "new_masks": True,
    },
    "fast-inside-6": {**_FAST, "shortcuts": Shortcuts(unguided=3, inside=6), "masked": 0.25},
}
"""Name -> what differs from the plain edit. A new kind of case is one line here.

reroll: another seed for the same picture and instruction. variations: four seeds at once. unguided: without guidance,
or without it at so many last scales. 8-bit-kv, host-kv: the KV cache in 8 bits, or in host memory. window: the last
three scales see an eighth of the height each way. inside: they compute only a square of a quarter of the picture.
draft: ten scales. drafted: nine scales by this model, the rest by one of the 2B size. 8-bit: linear layers; 8-bit-all:
the KV cache too. fast: 8-bit and unguided-3; fast-inside: with inside as well, for three scales or six, with the
same mask every time or a new one.
"""


def choose(models: Sequence[str], sizes: Sequence[str], kinds: Sequence[str]) -> list[Case]:
    """The cases of these models, sizes and kinds, a model's together. ValueError for an unknown name."""
    for names, table, what in ((models, MODELS, "model"), (sizes, SIZES, "size"), (kinds, KINDS, "case")):
        for name in names:
            if name not in table:
                raise ValueError(f"there is no {what} {name!r} to measure; choose of {', '.join(table)}")
    every = [Case(kind, model, size, **KINDS[kind]) for model in models for size in sizes for kind in kinds]
    chosen = list({case.name: case for case in every}.values())  # a name that is given twice is measured once
    for case in chosen:
        if not case.possible:
            logger.warning("%s is left out: this size has only %d scales", case.name, len(case.schedule))
    return [case for case in chosen if case.possible]


@dataclass(frozen=True)
class Work:
    """One pass through the blocks: its floating-point operations (a multiply-add is two) and the weights it reads.

    products: of the linear layers. attention: of self-attention. weights: how many numbers.
    """

    products: float
    attention: float
    weights: float

    @property
    def flop(self) -> float:
        return self.products + self.attention


def work(config: TransformerConfig, case: Case) -> list[tuple[Work, ...]]:
    """The passes that run up to each scale's logits: the source's, unless it is kept, and the scale's own.

    Counted a token, row and layer: C^2 multiply-adds each for q, k, v, projection and the query and projection of
    cross-attention, 2 C hidden for the feed-forward network (14 C^2 in all at the published sizes), and 2 C a token
    attended to. Left out: text, embeddings, head, and that the first block sees a smaller source.
    """
    schedule, width = case.schedule, config.width
    weights = config.depth * (6 * width**2 + 2 * width * config.hidden)
    empty = torch.empty(1, config.token_bits, *schedule.grids[-1], device="meta")
    batch = EditBatch.of(empty, [empty], schedule, case.settings, shortcuts=replace(case.shortcuts, inside=0))
    guidance, guided = [g for g, _, _ in batch.plan], batch.guided_scales

    def one(tokens: int, seen: int, rows: int) -> Work:
        return Work(2 * weights * tokens * rows, 4 * config.depth * width * tokens * seen * rows, weights)

    seen = schedule.tokens[-1]
    source = one(seen, seen, 2 if guided else 1)
    passes = []
    for k, (tokens, _) in enumerate(zip(schedule.tokens, guidance)):
        seen += tokens
        passes.append((one(tokens, seen, case.variations * (2 if k < guided else 1)),))
    return passes if case.reroll else [(source, *passes[0]), *passes[1:]]
