"""What stays between edits: the KV cache, the source in it, and passes recorded as graphs.

A workspace holds the memory of one edit. The next edit of the same shape finds its passes recorded. The next edit of
the same picture and text also finds the prefill done, which is a quarter of an edit. What an edit cannot use is freed.
Shape suffixes: R rows of a scale's pass, n tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor

from ..model.layers import Attention
from ..model.transformer import BlockConstants, Condition, Transformer
from ..tokenizer.schedule import Schedule
from .folded_text import counted, fill, foldable, room
from .graphs import Answer, Recordings, State, can_record, on
from .kernels import can_attend_to_text, widens
from .kv_caches import DeviceCache, RowPass

RECORDED_TOKENS = 2304
"""Passes of up to so many tokens, all rows together, wait for their launches and are recorded; longer ones keep the
device busy anyway, and their graphs would only take memory."""
TEXT_STEP = 64
"""Texts get room in steps of so many tokens, so that a prompt of another length finds its passes recorded."""
FOLDED = (32, 64)
"""Room for texts that are short enough to have cross-attention's projections folded in."""


@dataclass(frozen=True)
class Shape:
    """What memory and recorded passes are made for: rows of a scale's pass, of which `copies` share each source."""

    schedule: Schedule
    rows: int
    copies: int
    text: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, schedule: Schedule, texts: Sequence[Tensor], copies: int, dtype: torch.dtype, device) -> Shape:
        longest = max(map(len, texts))
        room = next((length for length in FOLDED if longest <= length), -(-longest // TEXT_STEP) * TEXT_STEP)
        return cls(schedule, len(texts) * copies, copies, room, dtype, device)


class Workspace:
    """The memory of edits with one transformer.

    store: kind of KV cache (see `kv_caches`). kept: whether anything stays when an edit is over; only then passes are
    recorded, each when it is run for the second time. rows_at_once: rows that go through a pass together, all by
    default; fewer make fewer activations. fold: whether short texts may take memory that saves work (see
    `folded_text`). state: what must not change for recorded passes and the prefill to be used again; by default
    where the weights lie and whether they were written. record: whether passes may be recorded at all.
    """

    def __init__(
        self,
        store: type[DeviceCache] = DeviceCache,
        kept: bool = True,
        rows_at_once: int | None = None,
        fold: bool = True,
        state: Callable[[Transformer], Hashable] | None = None,
        record: bool = True,
    ) -> None:
        self.kind, self.kept, self.rows_at_once, self.fold = store, kept, rows_at_once, fold
        self.state, self.record = state or State(), record
        self.store: DeviceCache | None = None
        self.memory = None
        self._claimed, self._leaving = Lock(), False
        self.moved: dict[str, int] = {}
        """Bytes copied between host and device by the last store that was freed."""
        self.recordings = Recordings()
        self.forget()

    @property
    def busy(self) -> bool:
        """Whether an edit is at work in it."""
        return self._claimed.locked()

    def claim(self) -> bool:
        """Take it for an edit, until `end`; False where another edit is at work in it."""
        return self._claimed.acquire(blocking=False)

    def another(self) -> Workspace:
        """One of the same kind that keeps nothing, already claimed."""
        made = Workspace(self.kind, False, self.rows_at_once, self.fold, record=False)
        made.claim()
        return made

    def forget(self, host: bool = True) -> None:
        """Give all memory back; host: that of the host, too, else the next store may have it. While an edit is at work
        in it, it keeps all, and gives it back at the end."""
        self._leaving = True
        while self._leaving and self.claim():
            self._give_back(host)

    def _give_back(self, host: bool) -> None:
        """Release the memory, if it is to be, and the claim."""
        try:
            leaving, self._leaving = self._leaving, False
            if leaving or not self.kept:
                self._release(host)
        finally:
            self._claimed.release()

    def _release(self, host: bool) -> None:
        if self.store is not None:
            self.memory, self.moved = getattr(self.store, "memory", None), dict(getattr(self.store, "moved", {}))
            self.store.release()
        if host:
            self.memory = None
        self.shape: Shape | None = None
        self.weights: Hashable = None
        self.store = None
        self.passes: list[RowPass] = []
        self.changed: list[RowPass] = []
        self._depends: tuple = ()
        self.constants: tuple[BlockConstants, ...] = ()
        self.static: Condition | None = None
        self.condition: Condition | None = None
        self.source: tuple[Tensor, ...] = ()
        self._unchanged: Answer | None = None
        self.lengths: tuple[int, ...] = ()
        self.recordings.forget()

    @property
    def nbytes(self) -> int:
        """Bytes that stay on the device, about: the KV cache, texts, and what recorded passes hold."""
        if self.store is None:
            return 0
        texts = [x for block in self.static.blocks for x in vars(block.text).values()] if self.static else []
        return self.store.nbytes_kept + sum(x.nbytes for x in texts if isinstance(x, Tensor)) + self.recordings.nbytes

    def begin(
        self,
        transformer: Transformer,
        texts: Sequence[Tensor],
        shape: Shape,
        attention: Attention,
        beside: torch.cuda.Stream | None = None,
    ) -> None:
        """Make room for an edit and read its text. texts: features [L_i, T] of every row of the prefill.

        beside: the stream on which they are made, of which the present one knows nothing yet; it does afterwards.
        """
        # Another attention of the same kind is taken for the same.
        weights = self.state(transformer), transformer.config, getattr(attention, "recordable", False)
        if (shape, weights) != (self.shape, self.weights):
            self._release(host=False)
        if self.store is None:
            sizes = (shape.schedule, shape.rows, shape.dtype, shape.device)
            more = {"copies": shape.copies, "memory": self.memory}
            self.store, self.memory = self.kind.of(transformer, self.rows_at_once, *sizes, **more), None
            self.passes = self.store.passes(shape.device)
            self.constants = transformer.constants(shape.device)
            short = shape.text in FOLDED and foldable(transformer, shape.dtype)
            self.foldable = short and widens(shape.device, shape.dtype)  # asked once, as the answer may change
            self.shape, self.weights = shape, weights
        self.transformer, self.attention = transformer, attention
        self.condition = self._condition(texts, beside)

    def expect(self, identity: Sequence[Tensor], fresh: bool = False) -> None:
        """Say what the next prefill depends on beside weights: features and texts.

        The device compares them with those of the last one. fresh: they are known to be others.
        """
        self._expected, alike = tuple(identity), [a.shape == b.shape for a, b in zip(self.source, identity)]
        self._unchanged = None
        if not fresh and len(self.source) == len(self._expected) and all(alike):
            self._unchanged = Answer(torch.stack([(a == b).all() for a, b in zip(self.source, identity)]).all())

    def read_source(self, tokens: Callable[[Tensor], Tensor], features: Tensor) -> None:
        """The prefill, unless the last one here was the same. tokens: makes its input [R / copies, n, C] of
        features."""
        if self.source and self._unchanged is not None and self._unchanged():
            return
        self.source = ()
        copies, step = self.shape.copies, self.passes[0]

        def read(x: Tensor, condition: Condition, step: RowPass) -> None:
            self.transformer.read_source(x, condition, step, self.store, self.attention)

        def run(given: Tensor) -> None:
            x = tokens(given)
            if copies > 1:
                read(x, self.condition.rows(slice(None, None, copies)), step)
            else:
                self._in_turn(x, step, read)

        self._run(("source", self.lengths), step.rotary.shape[1] * (self.shape.rows // copies), run, features)
        if self.kept:
            self.source = tuple(x.clone() for x in self._expected)

    def scale_passes(self, made: Callable[[], list[RowPass]], *depends: object) -> list[RowPass]:
        """Passes that differ from `passes`. They and their recordings are kept while what they depend on stays.

        depends: comparable things, and tensors or None.
        """
        if len(depends) != len(self._depends) or not all(map(_same, depends, self._depends)):
            self.changed = made()
            self._depends = tuple(x.clone() if isinstance(x, Tensor) else x for x in depends)
            present = {"text", "source", *self.passes, *self.changed}
            self.recordings.keep(lambda name: name[0] in present)
        return self.changed

    def run(
        self, tokens: Callable[..., Tensor], step: RowPass, rows: int, asked: int, *inputs: Tensor, shared: int = 1
    ) -> Tensor:
        """Logits [asked, n, D, 2] of the first rows of a scale's pass, of `rows` in all.

        tokens: makes its input [rows, n, C] of `inputs`. shared: how many consecutive rows of the edit share each row
        of the pass: 1, or all copies of a source.
        """

        def run(*given: Tensor) -> Tensor:
            x = tokens(*given)
            whole = self.condition.rows(slice(None, None, shared)) if shared > 1 else self.condition

            def forward(x: Tensor, condition: Condition, step: RowPass) -> Tensor:
                return self.transformer(x, condition, step, self.store, self.attention)

            if shared > 1:
                own = replace(step, rows=slice(0, rows * shared, shared))
                x = forward(x, whole.rows(slice(0, rows)), own)
            else:
                x = self._in_turn(x, step, forward)
            return self.transformer.logits(x[:asked], whole)

        return self._run((step, rows, asked, shared, self.lengths), rows * step.rotary.shape[1], run, *inputs)

    def end(self) -> None:
        """An edit is over. Unless kept, all memory is freed."""
        self.transformer = self.attention = None
        self._give_back(host=self._leaving)
        if self._leaving:  # another thread has asked since
            self.forget()

    @property
    def _recording(self) -> bool:
        """Whether passes of this edit may be recorded."""
        plain = self.store.recordable and getattr(self.attention, "recordable", False)
        return self.kept and self.record and plain and self.shape.device.type == "cuda" and can_record()

    @property
    def _folding(self) -> bool:
        """Whether cross-attention's projections are folded into the text: it takes memory, and saves a tenth."""
        return self.fold and self._recording and self.foldable

    def _in_turn(
        self, x_RnC: Tensor, step: RowPass, function: Callable[[Tensor, Condition, RowPass], Tensor | None]
    ) -> Tensor | None:
        """A pass over all rows, or over some after the other."""
        rows, copies = len(x_RnC), self.shape.copies
        count = -(-(self.rows_at_once or rows) // copies) * copies  # copies of a source stay together
        parts = []
        for begin in range(0, rows, count):
            own = slice(begin, min(begin + count, rows))
            parts.append(function(x_RnC[own], self.condition.rows(own), replace(step, rows=own)))
        return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)

    def _run(self, name: tuple, tokens: int, function: Callable[..., Tensor | None], *inputs: Tensor) -> Tensor | None:
        """The result of a function; recorded where that is allowed and it was run before. tokens: of its pass, all
        rows."""
        if not self._recording or tokens > RECORDED_TOKENS:
            return function(*inputs)
        return self.recordings(name, function, inputs, self.shape.device)

    def _condition(self, texts: Sequence[Tensor], beside: torch.cuda.Stream | None) -> Condition:
        """What depends on the text alone, its rows repeated for every copy; where recorded passes find it."""
        shape, here = self.shape, beside and torch.cuda.current_stream(self.shape.device)
        if not self._recording and shape.copies == 1:
            if beside:
                here.wait_stream(beside)
            return counted(self.transformer.condition(texts, self.attention, self.constants))
        if self.static is None:
            sizes = (shape.rows, shape.copies, shape.text, self._folding, shape.dtype)
            self.static = room(self.transformer.config, self.constants, *sizes)
            if beside:
                beside.wait_stream(here)
        lengths = [len(text) for text in texts]
        with on(beside):
            features = texts[0].new_zeros(len(texts), shape.text, texts[0].shape[1])
            for row, text in zip(features, texts):
                row[: len(text)] = text
            counts = torch.tensor(lengths, pin_memory=features.is_cuda).to(features.device, non_blocking=True)
            self._run(("text",), 0, self._take_text, features, counts)
        if beside:
            here.wait_stream(beside)
        if self._folding:
            return self.static
        keys = self.static.blocks[0].text.keys
        # Where attention to the text is torch's, a recorded call is one of these lengths.
        self.lengths = () if can_attend_to_text(keys, keys) else tuple(lengths)
        repeated = tuple(length for length in lengths for _ in range(shape.copies))
        blocks = tuple(replace(b, text=replace(b.text, lengths=repeated)) for b in self.static.blocks)
        return replace(self.static, blocks=blocks)

    def _take_text(self, features: Tensor, counts: Tensor) -> None:
        real = torch.arange(features.shape[1], device=features.device) < counts[:, None]
        fill(self.static, self.transformer, features, real, self.attention)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    return a == b if not (isinstance(a, Tensor) or isinstance(b, Tensor)) else False
