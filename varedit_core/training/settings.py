"""What a training is, as frozen dataclasses read from a TOML file of stages.

One table of training defaults: what a file does not say stands here. Unknown names are refused, so that a
misspelt setting is never silently ignored.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tokenizer.schedule import AREAS

TASKS = ("tokenizer", "transformer", "lora")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("fp32", "bf16")
ON_ERROR = ("stop", "skip")
SHAPEEDIT = "shapeedit"
HUB = "hf:"
EARLIER = "@"
PATHS = ("transformer", "autoencoder", "text_encoder")


@dataclass(frozen=True)
class Optimisation:
    """optimizer: adamw, or muon (Muon on the blocks' matrices, AdamW on the rest). rate: highest learning rate.
    warmup: share of the steps over which it rises; after them it falls as a cosine to `final` of it. decay: weight
    decay on matrices. clip: largest gradient norm. average: decay of the weights' moving average, 0 for none.
    accumulate: batches a step."""

    optimizer: str = "adamw"
    rate: float = 1e-3
    muon_rate: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    decay: float = 0.05
    clip: float = 1.0
    warmup: float = 0.03
    final: float = 0.0
    average: float = 0.999
    accumulate: int = 1


@dataclass(frozen=True)
class Data:
    """source: "shapeedit", a folder or .jsonl of pairs, "hf:owner/name", or WebDataset shards (see `data`).

    size: as when editing; pictures are fitted to a square. For pairs: on_error "stop" or "skip"; columns that have
    other names than source, target, instruction and mask; processes (workers) that read. A VAE may also be
    trained on any folder of pictures.
    For ShapeEdit: pairs are drawn, rendered and encoded `block` at a time and every block is used `reuse` times;
    pictures: share of cluttered pictures; families, styles: relative frequency of each, 1 where not named
    (0 for the style `duotone`).
    """

    source: str = SHAPEEDIT
    size: str = "0.06M"
    on_error: str = "stop"
    columns: dict[str, str] = field(default_factory=dict)
    workers: int = 2
    block: int = 8192
    reuse: int = 4
    pictures: float = 0.5
    families: dict[str, float] = field(default_factory=dict)
    styles: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NewTransformer:
    """Sizes of a transformer that starts from random weights."""

    depth: int = 8
    width: int = 192
    heads: int = 3
    hidden: int = 768
    levels: int = 7


@dataclass(frozen=True)
class NewTokenizer:
    """Sizes of a VAE that starts from random weights; widths are finest first and at least 64."""

    bits: int = 14
    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    decoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    stride: int = 8

    def __post_init__(self) -> None:
        if min(self.encoder_widths + self.decoder_widths) < 64:
            raise ValueError(
                "a VAE of fewer than 64 channels cannot learn colours: normalising 32 groups removes every "
                "channel's mean; raise its widths to 64 or more"
            )


@dataclass(frozen=True)
class NewText:
    """Sizes of a T5 encoder that starts from random weights, with a vocabulary made for ShapeEdit."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    vocabulary: int = 512
    length: int = 64


@dataclass(frozen=True)
class Lora:
    """rank and targets of the adapters (see `lora`); alpha: defaults to the rank."""

    rank: int = 16
    alpha: float | None = None
    targets: str = "all"


@dataclass(frozen=True)
class Objective:
    """flips: a row's share of flipped bits is drawn from 0 to this. text_dropout: share of rows that see the learned
    unconditional text. inside: weight of tokens in the edited region. power: a token of a scale of n tokens weighs
    n^power. sums: share of rows whose source is read as the sum of its tokens, as edits of edits read it."""

    flips: float = 0.25
    text_dropout: float = 0.1
    inside: float = 4.0
    power: float = -0.5
    sums: float = 0.0


@dataclass(frozen=True)
class Reconstruction:
    """Weights of the parts of the VAE's loss: absolute and squared error of pixels in [-1, 1], absolute error of
    neighbours' differences, and the commitment of the features to their codes."""

    absolute: float = 0.5
    squared: float = 8.0
    gradient: float = 0.1
    commitment: float = 0.25


@dataclass(frozen=True)
class Stage:
    """One training. name: of its folder. batch: samples a process and step (see `accumulate`). log_every, save_every,
    sample_every: steps between figures, checkpoints and pictures (0: none). transformer, autoencoder, text_encoder:
    files or folders; a path that begins with `@` is an earlier stage's result, such as `@tokenizer`. new_*:
    sizes, for random weights."""

    name: str
    task: str
    steps: int
    batch: int
    seed: int = 0
    precision: str = "bf16"
    compile: bool = False
    checkpointing: bool = False
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000
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
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"the name {self.name!r} of a stage must be letters, digits, _ and -; rename it")
        for name, value, known in (
            ("task", self.task, TASKS),
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimisation.optimizer, OPTIMIZERS),
            ("data.size", self.data.size, tuple(AREAS)),
            ("data.on_error", self.data.on_error, ON_ERROR),
        ):
            if value not in known:
                raise ValueError(f"stage {self.name}: {name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("steps", "batch", "log_every", "save_every", "optimisation.accumulate"):
            owner = self.optimisation if "." in name else self
            if getattr(owner, name.split(".")[-1]) < 1:
                raise ValueError(f"stage {self.name}: {name} must be at least 1")
        if self.task != "tokenizer" and not self.autoencoder:
            raise ValueError(f"stage {self.name}: name the VAE's file with autoencoder")
        if self.task != "tokenizer" and not (self.text_encoder or self.new_text):
            raise ValueError(f"stage {self.name}: name the text encoder with text_encoder, or give [stage.new_text]")
        if self.task == "lora" and not self.transformer:
            raise ValueError(f"stage {self.name}: name the transformer that the LoRA is for with transformer")


def load_stages(path: str | Path, changes: Sequence[str] = ()) -> list[Stage]:
    """The stages of a TOML file: tables named [[stage]]; relative paths in it start from the file's folder.

    changes: settings in place of the file's, "STAGE.NAME=VALUE" each, such as "tokenizer.data.source=pairs"; VALUE is
    TOML, or else a text as it stands. ValueError for unknown names and wrong values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {path}; check the path")
    toml = _toml()
    try:
        table = toml.loads(path.read_text(encoding="utf-8"))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    stages = table.pop("stage", [])
    if table or not isinstance(stages, list) or not stages:
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
    toml = _toml()
    try:
        table[inner[-1]] = toml.loads(f"value = {text.strip()}")["value"]
    except toml.TOMLDecodeError:
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
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(kinds)}")
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
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
