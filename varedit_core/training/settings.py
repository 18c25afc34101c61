"""What a training is, as frozen dataclasses read from a TOML file of stages.

One table of training defaults, and of what numbers may be: what a file does not say stands here. Unknown names are
refused, so that a misspelt setting is never silently ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..defaults import FIT
from ..files.reading import check_file
from ..pictures.images import FITS, fitting_for
from ..runtime.fp8 import LINEARS
from ..shapeedit.edits import FAMILIES
from ..shapeedit.scenes import STYLES
from ..tokenizer.schedule import AREAS, schedule_for

TASKS = ("tokenizer", "transformer", "lora")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("fp32", "bf16")
ON_ERROR = ("stop", "skip")
SHAPEEDIT = "shapeedit"
HUB = "hf:"
EARLIER = "@"
PATHS = ("transformer", "autoencoder", "text_encoder")
MAX_TOML, MANY, FAR = 1 << 20, 10**9, 1e6
MAX_SEED = 2**32 - 1


class Range(NamedTuple):
    """What a number may be, both ends included; below: the upper one is not."""

    low: float
    high: float
    below: bool = False

    def holds(self, number: float) -> bool:
        return self.low <= number < self.high if self.below else self.low <= number <= self.high

    def __str__(self) -> str:
        if self.below:
            return f"at least {self.low:.10g} and below {self.high:.10g}"
        return f"from {self.low:.10g} to {self.high:.10g}"


def number(default: Any, *bounds: float, below: bool = False) -> Any:
    """A field that holds a number, or several in a tuple or a table, within a range."""
    kind = {"default_factory": default} if default is dict else {"default": default}
    return field(**kind, metadata={"range": Range(*bounds, below)})


@dataclass(frozen=True)
class Optimisation:
    """optimizer: adamw, or muon (Muon on the blocks' matrices, AdamW on the rest). rate: highest learning rate.
    warmup: share of the steps over which it rises; after them it falls as a cosine to `final` of it. decay: weight
    decay on matrices. clip: largest gradient norm. average: decay of the weights' moving average, 0 for none.
    accumulate: batches a step."""

    optimizer: str = "adamw"
    rate: float = number(1e-3, 0, 10)
    muon_rate: float = number(2e-3, 0, 10)
    beta1: float = number(0.9, 0, 1, below=True)
    beta2: float = number(0.95, 0, 1, below=True)
    decay: float = number(0.05, 0, 10)
    clip: float = number(1.0, 1e-9, 1e9)
    warmup: float = number(0.03, 0, 1)
    final: float = number(0.0, 0, 1)
    average: float = number(0.999, 0, 1)
    accumulate: int = number(1, 1, 65536)


@dataclass(frozen=True)
class Data:
    """source: "shapeedit", a folder or .jsonl of pairs, "hf:owner/name", or WebDataset shards (see `data`).

    size: as when editing. For pairs: how they are fitted to a square, as when editing; on_error "stop" or "skip";
    columns that have other names than source, target, instruction and mask; whether targets of another size than their
    source's are brought to it (resize_targets); processes (workers) that read. A VAE may also be trained on any folder
    of pictures.
    For ShapeEdit: pairs are drawn, rendered and encoded `block` at a time and every block is used `reuse` times;
    pictures: share of cluttered pictures; families, styles: relative frequency of each, 1 where not named
    (0 for the style `duotone`).
    """

    source: str = SHAPEEDIT
    size: str = "0.06M"
    fit: str = FIT
    on_error: str = "stop"
    columns: dict[str, str] = field(default_factory=dict)
    resize_targets: bool = False
    workers: int = number(2, 0, 256)
    block: int = number(8192, 1, 1 << 20)
    reuse: int = number(4, 1, MANY)
    pictures: float = number(0.5, 0, 1)
    families: dict[str, float] = number(dict, 0, FAR)
    styles: dict[str, float] = number(dict, 0, FAR)


@dataclass(frozen=True)
class NewTransformer:
    """Sizes of a transformer that starts from random weights."""

    depth: int = number(8, 1, 1000)
    width: int = number(192, 4, 65536)
    heads: int = number(3, 1, 1024)
    hidden: int = number(768, 1, 1 << 18)
    levels: int = number(7, 1, 1000)


@dataclass(frozen=True)
class NewTokenizer:
    """Sizes of a VAE that starts from random weights; widths are finest first and at least 64: normalising 32 groups of
    fewer channels removes every channel's mean, and with it the colours."""

    bits: int = number(14, 1, 64)
    encoder_widths: tuple[int, ...] = number((64, 64, 64, 64), 64, 65536)
    decoder_widths: tuple[int, ...] = number((64, 64, 64, 64), 64, 65536)
    encoder_blocks: int = number(2, 1, 1000)
    decoder_blocks: int = number(3, 1, 1000)
    stride: int = number(8, 1, 16)


@dataclass(frozen=True)
class NewText:
    """Sizes of a T5 encoder that starts from random weights, with a vocabulary made for ShapeEdit."""

    width: int = number(128, 1, 65536)
    layers: int = number(2, 1, 1000)
    heads: int = number(4, 1, 1024)
    hidden: int = number(256, 1, 1 << 18)
    vocabulary: int = number(512, 1, FAR)
    length: int = number(64, 1, 65536)


@dataclass(frozen=True)
class Lora:
    """rank and targets of the adapters (see `lora`); alpha: defaults to the rank. base: what the frozen linear layers
    are held in, one of `fp8.LINEARS`: "exact" is the training's precision, "8-bit" half the memory of bf16."""

    rank: int = number(16, 1, 65536)
    alpha: float | None = number(None, 1e-9, FAR)
    targets: str = "all"
    base: str = LINEARS[0]


@dataclass(frozen=True)
class Objective:
    """flips: a row's share of flipped bits is drawn from 0 to this. text_dropout: share of rows that see the learned
    unconditional text. inside: weight of tokens in the edited region. power: a token of a scale of n tokens weighs
    n^power. sums: share of rows whose source is read as the sum of its tokens, as edits of edits read it."""

    flips: float = number(0.25, 0, 1)
    text_dropout: float = number(0.1, 0, 1)
    inside: float = number(4.0, 0, FAR)
    power: float = number(-0.5, -10, 10)
    sums: float = number(0.0, 0, 1)


@dataclass(frozen=True)
class Reconstruction:
    """Weights of the parts of the VAE's loss: absolute and squared error of pixels in [-1, 1], absolute error of
    neighbours' differences, and the commitment of the features to their codes."""

    absolute: float = number(0.5, 0, FAR)
    squared: float = number(8.0, 0, FAR)
    gradient: float = number(0.1, 0, FAR)
    commitment: float = number(0.25, 0, FAR)


@dataclass(frozen=True)
class Stage:
    """One training. name: of its folder. batch: samples a process and step (see `accumulate`). log_every, save_every,
    sample_every: steps between figures, checkpoints and pictures (0: none). transformer, autoencoder, text_encoder:
    files or folders; a path that begins with `@` is an earlier stage's result, such as `@tokenizer`. new_*:
    sizes, for random weights."""

    name: str
    task: str
    steps: int = number(MISSING, 1, MANY)
    batch: int = number(MISSING, 1, 65536)
    seed: int = number(0, 0, MAX_SEED)
    precision: str = "bf16"
    compile: bool = False
    checkpointing: bool = False
    log_every: int = number(50, 1, MANY)
    save_every: int = number(1000, 1, MANY)
    sample_every: int = number(1000, 0, MANY)
    transformer: str = ""
    autoencoder: str = ""
    text_encoder: str = ""
    train_text: bool = False
    data: Data = Data()
    optimisation: Optimisation = Optimisation()
    objective: Objective = Objective()
    reconstruction: Reconstruction = Reconstruction()
    lora: Lora = Lora()
    new_transformer: NewTransformer | None = None
    new_tokenizer: NewTokenizer | None = None
    new_text: NewText | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]{1,100}", self.name):
            raise ValueError(
                f"the name {shown(self.name)} of a stage must be letters, digits, _ and -, at most 100; rename it"
            )
        where = f"stage {self.name}"
        for name, values, known in (
            ("task", [self.task], TASKS),
            ("precision", [self.precision], PRECISIONS),
            ("optimizer", [self.optimisation.optimizer], OPTIMIZERS),
            ("lora.base", [self.lora.base], LINEARS),
            ("data.size", [self.data.size], tuple(AREAS)),
            ("data.fit", [self.data.fit], square_fits()),
            ("data.on_error", [self.data.on_error], ON_ERROR),
            ("data.families", self.data.families, tuple(FAMILIES)),
            ("data.styles", self.data.styles, STYLES[1:]),
        ):
            for value in values:
                if value not in known:
                    near = _near(value, known)
                    raise ValueError(f"{where}: {name} must be one of {', '.join(known)}, got {shown(value)}{near}")
        check_ranges(self, where)
        self._check_shares(where)
        if self.task != "tokenizer" and not self.autoencoder:
            raise ValueError(f"stage {self.name}: name the VAE's file with autoencoder")
        if self.task != "tokenizer" and not (self.text_encoder or self.new_text):
            raise ValueError(f"stage {self.name}: name the text encoder with text_encoder, or give [stage.new_text]")
        if self.task == "lora" and (self.train_text or self.new_text):
            raise ValueError(f"{where}: the file of a LoRA holds no text encoder; leave out train_text and new_text")
        if self.task == "lora" and self.compile and self.lora.base != LINEARS[0]:
            raise ValueError(f'{where}: an 8-bit base is not compiled; set compile = false or lora.base = "exact"')
        if self.task == "lora" and not self.transformer:
            raise ValueError(f"stage {self.name}: name the transformer that the LoRA is for with transformer")

    def _check_shares(self, where: str) -> None:
        """ValueError where ShapeEdit's pairs cannot be drawn as `data` says."""
        data = self.data
        for name, table, every in (("families", data.families, FAMILIES), ("styles", data.styles, STYLES[1:])):
            if not any(table.get(one, float(one != "duotone")) for one in every):
                raise ValueError(f"{where}: data.{name} leaves nothing to draw; give one of them more than 0")
        if data.source == SHAPEEDIT and self.task != "tokenizer" and data.block % self.batch:
            raise ValueError(
                f"{where}: a block of {data.block} pairs is no multiple of the batch {self.batch}; change data.block"
            )


def square_fits() -> tuple[str, ...]:
    """The fits that bring every picture to a square, which is what training knows."""
    area = next(iter(AREAS))
    return tuple(name for name in FITS if fitting_for((1, 2), area, name).schedule == schedule_for(area))


def load_stages(path: str | Path, changes: Sequence[str] = ()) -> list[Stage]:
    """The stages of a TOML file: tables named [[stage]]; relative paths in it start from the file's folder.

    changes: settings in place of the file's, "STAGE.NAME=VALUE" each, such as "tokenizer.data.source=pairs"; VALUE is
    TOML, or else a text as it stands. ValueError for unknown names and wrong values.
    """
    path = check_file(path, "file of settings")
    if path.stat().st_size > MAX_TOML:
        raise ValueError(f"{path} is too large for a file of settings; check the path")
    toml = _toml()
    try:
        table = toml.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, too
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    stages = table.pop("stage", [])
    if table or not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path} must hold tables named [[stage]] and nothing else")
    for change in changes:
        _change(stages, change)
    read = [build(Stage, stage, f"{path}, stage {number}") for number, stage in enumerate(stages, start=1)]
    if len({stage.name for stage in read}) < len(read):
        raise ValueError(f"{path} names two stages alike; give every stage its own name")
    return [_placed(stage, path.parent.resolve()) for stage in read]


def _toml():
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise ValueError(
                'Python 3.10 needs tomli; install it: pip install -e ".[train]" in the folder of the project'
            ) from None
    return tomllib


def _change(stages: list[dict[str, Any]], change: str) -> None:
    """Put one "STAGE.NAME=VALUE" into the tables."""
    names, sign, text = change.partition("=")
    stage, *inner = names.strip().split(".")
    table = next((table for table in stages if table.get("name") == stage), None)
    if not (sign and inner):
        raise ValueError(f"{change!r} is no setting; write STAGE.NAME=VALUE, such as {stages[0].get('name')}.steps=10")
    if table is None:
        raise ValueError(f"there is no stage {stage!r}; choose one of {', '.join(str(t.get('name')) for t in stages)}")
    for name in inner[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{change!r} is no setting: {name} holds no others; see docs/TRAINING.md")
    try:
        table[inner[-1]] = _toml().loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        table[inner[-1]] = text.strip()


def _placed(stage: Stage, folder: Path) -> Stage:
    """The stage with whole paths instead of those relative to a folder."""
    paths = {name: getattr(stage, name) for name in PATHS}
    whole = {name: str(folder / path) for name, path in paths.items() if path and not path.startswith(EARLIER)}
    source = stage.data.source
    if source != SHAPEEDIT and not source.startswith(HUB):
        whole["data"] = dataclasses.replace(stage.data, source=str(folder / source))
    return dataclasses.replace(stage, **whole)


def build(cls: type, table: dict[str, Any], where: str):
    """A dataclass from a table, nested tables included. ValueError names the place and the unknown or missing name."""
    kinds = typing.get_type_hints(cls)
    unknown = sorted(set(table) - set(kinds))
    if unknown:
        name = unknown[0]
        raise ValueError(f"{where}: unknown setting {shown(name)}{_near(name, kinds)}; known are {', '.join(kinds)}")
    values = {name: _value(kinds[name], value, f"{where}, {name}") for name, value in table.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).split('__init__() ')[-1]}") from None


def _value(kind, value, where: str):
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return build(option, value, where)
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is tuple and isinstance(value, list):
            return tuple(_value(inner[0], one, where) for one in value)
        if origin is dict and isinstance(value, dict):
            return {name: _value(inner[1], one, f"{where}, {name}") for name, one in value.items()}
        if origin is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
            return float(value)
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {shown(value)}")


def check_ranges(settings: Any, where: str, prefix: str = "") -> None:
    """ValueError where a number of the settings, or of a table in them, is outside the range beside its field."""
    for each in dataclasses.fields(settings):
        value, name = getattr(settings, each.name), prefix + each.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, where, f"{name}.")
        bounds = each.metadata.get("range")
        if bounds is None or value is None:
            continue
        several = value.values() if isinstance(value, dict) else value
        if several == ():
            raise ValueError(f"{where}: {name} must hold a number")
        for one in [value] if isinstance(value, int | float) else several:
            if not bounds.holds(one):
                raise ValueError(f"{where}: {name} must be {bounds}, got {shown(one)}")


def shown(value: object) -> str:
    """A value for a message: the beginning of a long one."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, say
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _near(name: str, known: Iterable[str]) -> str:
    """The known names that look like one, for a message."""
    near = difflib.get_close_matches(str(name), list(known))
    return f" (did you mean {' or '.join(near)}?)" if near else ""
