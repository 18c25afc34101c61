"""A sweep: one edit at several values of one or two of its settings, and a labelled grid of what comes of it.

Knows the settings and an editor; knows nothing of files and options. `Axis` and `planned` are the node's too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from PIL import Image
from torch import Tensor

from .coder import Picture
from .controls import registry
from .controls.base import Known
from .controls.curves import PRESET
from .controls.registry import NEUTRAL, NO_SHORTCUTS, SWEPT, Controls, problems
from .defaults import FIT
from .editor import Editor
from .pictures.contact_sheet import LETTERS, Row, contact_sheet
from .pictures.images import load_image
from .sampling.settings import DEFAULT_SETTINGS, SamplingSettings
from .tokenizer.schedule import Schedule

CELL = 256
"""Largest side of a picture on the grid, in pixels."""
MOST = 100
"""Edits of a sweep, at most."""
_NEUTRAL = {field.name: field.default for kind in (SamplingSettings, Controls) for field in fields(kind)} | {
    "preset": PRESET
}
_PREFERRED_LETTERS = 16  # pixels of a cell to one of its label


@dataclass(frozen=True)
class Axis:
    """A setting and its values, in the order of the grid. ValueError for an unknown setting, for no value, and for one
    that is there twice.

    repeated: values that were given more than once, and count once. holes: places between commas without a value.
    """

    name: str
    values: tuple[float | int | str, ...]
    repeated: tuple[float | int | str, ...] = ()
    holes: int = 0

    def __post_init__(self) -> None:
        if self.name not in SWEPT:
            raise ValueError(f"there is no setting {self.name!r} to sweep; choose one of {', '.join(SWEPT)}")
        if not self.values:
            raise ValueError(f"{self.name} has no values to sweep; give some with commas between them")
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"{self.name} has a value more than once; give each once")

    @classmethod
    def read(cls, name: str, texts: str) -> Axis:
        """Values with commas between them, each once. ValueError as of an axis, and for what is none of its values."""
        kind = type(_NEUTRAL.get(name, ""))
        if not isinstance(texts, str):
            raise ValueError(f"the values of {name} are text with commas between them, got {type(texts).__name__}")
        parts = [part.strip() for part in texts.strip().removesuffix(",").split(",")]
        values = [part for part in parts if part]
        try:
            counted = Counter(kind(value) for value in values)
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"{name} takes {what} with commas between them, got {texts!r}") from None
        repeated = tuple(value for value, count in counted.items() if count > 1)
        return cls(name, tuple(counted), repeated, len(parts) - len(values))

    @classmethod
    def parse(cls, text: str) -> Axis:
        """`read` of NAME=VALUE,VALUE,..."""
        name, equals, values = text.partition("=")
        if not equals:
            raise ValueError(f"a sweep takes NAME=VALUE,VALUE,..., got {text!r}; such as guidance=1,2,3")
        return cls.read(name.strip(), values)

    @property
    def labels(self) -> list[str]:
        return [self._label(value) for value in self.values]

    @property
    def doubt(self) -> str | None:
        """A sentence where values were given more than once, or left out between commas."""
        said = []
        if self.repeated:
            said.append(f"given more than once, and edited once: {', '.join(map(self._label, self.repeated))}")
        if self.holes:
            said.append(f"the values of {self.name} have an empty place between commas, which counts as none")
        return "; ".join(said) or None

    def _label(self, value: float | int | str) -> str:
        short = f"{value:g}" if isinstance(value, float) else str(value)
        if isinstance(value, float) and float(short) != value:  # two values have two labels
            short = repr(value)
        return f"{self.name} {short}"


@dataclass(frozen=True)
class Cell:
    """One edit of a sweep: what it is called on each axis, and its settings."""

    column: str
    row: str
    settings: SamplingSettings
    controls: Controls


def planned(
    x: Axis, y: Axis | None = None, settings: SamplingSettings = DEFAULT_SETTINGS, controls: Controls = NEUTRAL
) -> list[list[Cell]]:
    """The edits of a sweep, row by row, with all other settings as given. ValueError, before anything runs, where two
    axes are one setting, where a value is out of its setting's range, and for too many edits."""
    if y is not None and x.name == y.name:
        raise ValueError(f"both axes are {x.name}; choose another setting for one of them")
    count = len(x.values) * (len(y.values) if y else 1)
    if count > MOST:
        raise ValueError(f"the sweep has {count} edits; give fewer values, for at most {MOST}")
    down = list(zip(y.labels, y.values)) if y else [("", None)]
    return [
        [
            Cell(column, row, *_with({x.name: value} | ({y.name: other} if y else {}), settings, controls))
            for column, value in zip(x.labels, x.values)
        ]
        for row, other in down
    ]


def check(cells: Sequence[Sequence[Cell]], schedule: Schedule, mask: bool = False, negative: bool = False) -> None:
    """Raise ValueError, before anything runs, for what `refuse` refuses and `doubts` doubts."""
    refuse(cells, schedule, mask)
    if found := doubts(cells, schedule, mask, negative):
        raise ValueError("; ".join(found))


def doubts(
    cells: Sequence[Sequence[Cell]], schedule: Schedule, mask: bool = False, negative: bool = False
) -> list[str]:
    """Sentences on a setting or a value of an axis that counts in none of its edits (`registry.problems`), and on two
    values of an axis that give the same edits."""
    known = _known(cells, schedule, mask)
    said = [[problems(edit) for edit in row] for row in known]
    rows, columns = [row[0].row for row in cells], [cell.column for cell in cells[0]]
    whole = "", [texts for row in said for texts in row]
    found = dict.fromkeys(
        text
        for label, line in (whole, *zip(rows, said), *zip(columns, zip(*said)))
        for text in line[0]
        if text.startswith(label and label.split()[0] + " ") and all(text in other for other in line)
    )
    if negative and not any(edit.guided(range(edit.stop)) for row in known for edit in row):
        found["negative counts only with guidance, which is 1 at every scale; raise guidance, or leave it out"] = None
    for name, lines in (("row", cells), ("column", list(zip(*cells)))):
        seen: dict = {}
        for line in lines:
            same = seen.setdefault(tuple(_acts(cell, schedule) for cell in line), line)
            if same is not line:
                one, other = (getattr(each[0], name) for each in (same, line))
                found[
                    f"{one} and {other} give the same (without temperature no seed and no top_p counts); leave one out"
                ] = None
    return list(found)


def refuse(cells: Sequence[Sequence[Cell]], schedule: Schedule, mask: bool = False) -> None:
    """Raise ValueError, before anything runs, for a sweep of nothing, and for a cell whose settings do not go
    together."""
    if not (len(cells) and all(len(row) for row in cells)):
        raise ValueError("there is no edit to sweep; make cells with planned")
    for row in _known(cells, schedule, mask):
        for edit in row:
            registry.check(edit)


def _known(cells: Sequence[Sequence[Cell]], schedule: Schedule, mask: bool) -> list[list[Known]]:
    return [[Known(schedule, cell.settings, cell.controls, NO_SHORTCUTS, mask) for cell in row] for row in cells]


def _acts(cell: Cell, schedule: Schedule) -> tuple:
    """All of a cell that an edit depends on."""
    plan = [
        (guidance, warmth, top_p if warmth else None)
        for guidance, warmth, top_p in cell.settings.per_scale(len(schedule))
    ]
    return tuple(plan), cell.settings.seed if any(warmth for _, warmth, _ in plan) else None, cell.controls


def _with(values: dict, settings: SamplingSettings, controls: Controls) -> tuple[SamplingSettings, Controls]:
    def own(kind) -> dict:
        return {field.name: values[field.name] for field in fields(kind) if field.name in values}

    settings = replace(settings, **own(SamplingSettings))
    settings = settings.preset(values["preset"]) if "preset" in values else settings  # bends what the others set
    return settings, replace(controls, **own(Controls))


@dataclass(frozen=True, eq=False)
class Swept:
    """What every edit of a sweep has in common; the arguments are those of `Editor.run`.

    How it is drawn is in its cells: `planned` takes `editor.made_for.settings` for the weights' own.
    """

    picture: Picture
    instruction: str | Tensor
    negative: str = ""
    size: str | None = None
    method: str = FIT
    mask: Image.Image | None = None


def sweep(
    editor: Editor,
    swept: Swept,
    cells: Sequence[Sequence[Cell]],
    on_cell: Callable[[Cell, Image.Image], None] | None = None,
) -> list[list[Image.Image]]:
    """The pictures of the edits that `planned` lists; picture and instruction are encoded once.

    on_cell: called with every edit when it is done.
    """
    source = swept.picture if hasattr(swept.picture, "rgb") else load_image(swept.picture)
    fitted = editor.fit(source, swept.size, swept.method)
    check(cells, fitted.schedule, swept.mask is not None, bool(swept.negative))
    features = editor.encode_source([fitted])
    words = swept.instruction
    prompt = editor.encode_text([words])[0] if isinstance(words, str) else words
    unwanted = [editor.encode_text([swept.negative])[0]] if swept.negative else None
    more = dict(size=swept.size, method=swept.method, mask=swept.mask, features=features, idle=True)
    rows = []
    for row in cells:
        rows.append([])
        for cell in row:
            negative = unwanted if cell.settings.guided else None
            (result,) = editor.edit(source, prompt, negative, settings=cell.settings, controls=cell.controls, **more)
            rows[-1].append(result)
            if on_cell:
                on_cell(cell, result)
    return rows


def grid(cells: Sequence[Sequence[Cell]], pictures: Sequence[Sequence[Image.Image]], cell: int = CELL) -> Image.Image:
    """The pictures of a sweep as one, with the values of x on top and those of y above each row."""
    rows = [Row(row[0].row, shown) for row, shown in zip(cells, pictures)]
    return contact_sheet(rows, [one.column for one in cells[0]], cell, max(LETTERS, cell // _PREFERRED_LETTERS))
