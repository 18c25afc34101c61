"""What a control is: knobs for the user, and their effect on an edit.

A control is one file of this package with a subclass of `Control`. Options of the command line, widgets of the nodes,
names of sweeps, both languages' texts and the tables in docs are made from its knobs (`registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..model.config import TransformerConfig
    from ..model.kv_cache import Pass
    from ..sampling.batch import EditBatch
    from ..sampling.scale import Scale
    from ..sampling.settings import SamplingSettings
    from ..tokenizer.schedule import Schedule

Value = float | int | str
Plan = list[tuple[float, float, float]]
"""(guidance, temperature, top_p) of every scale that runs."""


@dataclass(frozen=True)
class Knob:
    """A number or a choice of the user's.

    name: of the field, the widget and (with dashes) the option. default: leaves the edit as it is; its type is the
    knob's. low, high: the bounds, both allowed; None: none. choices: of a text. step: of the widget. advanced: hidden
    at first. help, help_zh: what it does, in English and Chinese. more, more_zh: what the nodes' help pages say after
    that. option: what the command line says in place of help, where that differs. label_zh: its Chinese name. needs:
    what must be there for it to count: "source", "mask", or another knob of its group. apart: another knob of its group
    with which it does not go together. scales: whether it counts scales, so that no more than the edit has make sense.
    """

    name: str
    default: Value
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    step: float = 0.05
    advanced: bool = False
    help: str = ""
    help_zh: str = ""
    more: str = ""
    more_zh: str = ""
    option: str = ""
    label_zh: str = ""
    needs: str = ""
    apart: str = ""
    scales: bool = False

    def checked(self, value: object) -> Value:
        """The value; numbers of numpy and torch as Python's. ValueError, saying what is allowed, for a wrong one."""
        value = value.item() if hasattr(value, "item") and not getattr(value, "ndim", 0) else value
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"unknown {self.name} {value!r}; choose one of {', '.join(self.choices)}")
            return value
        whole = isinstance(self.default, int)
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if right and (self.low is None or self.low <= value) and (self.high is None or value <= self.high):
            return value
        kind = "a whole number" if whole else "a number"
        bounds = f" of at least {self.low:g}" if self.low is not None else ""
        bounds = f" from {self.low:g} to {self.high:g}" if self.low is not None and self.high is not None else bounds
        raise ValueError(f"{self.name} must be {kind}{bounds}, got {value!r}")


@dataclass(frozen=True, eq=False)
class Known:
    """Facts of an edit before anything is loaded: enough to find knobs that would do nothing.

    controls, shortcuts: the knobs' values. mask: whether there is one. begun: scales that are there already.
    variations: results of each picture. seam: the feather, pixels over which an edit fades in. negative: whether there
    is a negative prompt. spelled: how the user writes a name.
    """

    schedule: Schedule
    settings: SamplingSettings
    controls: Any
    shortcuts: Any
    mask: bool = False
    begun: int = 0
    variations: int = 1
    seam: int = 0
    negative: bool = False
    spelled: Callable[[str], str] = str

    @property
    def stop(self) -> int:
        """How many scales run."""
        return min(self.shortcuts.stop or len(self.schedule), len(self.schedule))

    @cached_property
    def drawn(self) -> Plan:
        """(guidance, temperature, top_p) of the scales that run, where no shortcut ends guidance."""
        return self.settings.per_scale(len(self.schedule))[: self.stop]

    def late(self, count: int) -> range:
        """Those of the edit's last `count` scales that run."""
        return range(max(0, len(self.schedule) - count), self.stop)

    def guided(self, scales: range) -> bool:
        """Whether any of these scales has guidance."""
        end = len(self.schedule) - self.shortcuts.unguided
        return any(self.drawn[k][0] != 1 for k in scales if k < end)

    def greedy(self, scales: range) -> bool:
        """Whether none of these scales is drawn at random, so that no seed counts."""
        return not any(self.drawn[k][1] for k in scales)


class Control:
    """Something that holds, bends or picks an edit. Subclasses override what they change; `of` makes one for a batch.

    group: the user's class that has its knobs: "controls" or "shortcuts" (which save time and are not exact). order:
    the place of its knobs among the others; only ever append. stage: when it acts on a scale; smaller ones act first.
    docs/CONTROLS.md has a table of both.
    """

    group: ClassVar[str] = "controls"
    order: ClassVar[int] = 1000
    stage: ClassVar[int] = 50
    knobs: ClassVar[tuple[Knob, ...]] = ()

    @classmethod
    def of(cls, batch: EditBatch) -> Control | None:
        """The control for a batch of edits, None where its knobs are at their defaults. Knobs are the arguments."""
        values = [getattr(getattr(batch, cls.group), knob.name) for knob in cls.knobs]
        return None if values == [knob.default for knob in cls.knobs] else cls(*values)

    @classmethod
    def idle(cls, edit: Known) -> str:
        """A sentence, saying what to change, where its knobs are set but would do nothing; else an empty text.

        It begins with the knob's name (`edit.spelled`), by which a sweep knows whose it is. `needs` and `scales` of a
        knob are checked by `registry.problems`.
        """
        return ""

    @classmethod
    def refuse(cls, edit: Known) -> str:
        """A sentence where its knobs do not go together with the rest of an edit; else an empty text."""
        return ""

    @classmethod
    def held(cls, values: Any) -> str:
        """Which of its knobs holds an edit to its source at these values, those of its group: a name, or words for one;
        an empty text for none. Knobs that need a source do; override it where only some values do."""
        return next(
            (knob.name for knob in cls.knobs if "source" in knob.needs.split() and knob.name in values.changed), ""
        )

    def check(self, config: TransformerConfig) -> None:
        """Raise ValueError where a transformer cannot do it."""

    def plan(self, plan: Plan) -> Plan:
        """The guidance, temperature and top-p of the scales, changed; or fewer scales."""
        return plan

    @property
    def depends(self) -> tuple[Hashable, ...]:
        """All that `step` depends on: numbers and tensors."""
        return ()

    def step(self, step: Pass, source: bool) -> Pass:
        """A scale's pass through the network, changed. source: whether a source comes before the scales."""
        return step

    def __call__(self, scale: Scale) -> None:
        """Act on a scale: change `log_odds`, set `bits`, or `lock` some of them to the source's.

        Called once for every scale that runs, coarse ones first. Controls of smaller stages have acted on it before, of
        one stage those of smaller order.

        scale.drawn: whether its bits are there already. They are where the scale was begun before (the prefix, stage
        10), or where an earlier control has read or set `bits`: reading draws them. What only bends the draw must leave
        such a scale alone: its bits are to stay, and setting `log_odds` raises ValueError. What holds to the source may
        `lock` it all the same: a lock counts whatever is drawn or assigned, before or after.

        scale.index, count: which of how many scales run, from 0. A draft and candidates run fewer scales than the edit
        has, so what counts from its end, or takes a share of it, goes by len(scale.schedule) and not by `count`.
        scale.last: whether this is the finest scale of the whole edit, whose locks make latents the source's exactly.
        What stops early never has it.
        """
