"""What holds edit pairs: JSON Lines, Hugging Face datasets, WebDataset shards; each gives records of a sample.

Knows files and rows, and turns one record into pictures; knows nothing of the order in which they are trained on.
Sizes are (width, height), as in `images`.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..files.reading import check_file
from ..pictures.images import SourceImage, load_image
from .settings import HUB
from .upstream import LIST, MAX_SHARDS, MEMBERS, PICTURE, listed_shards

FIELDS = ("source", "target", "instruction", "mask")
SHUFFLE_BUFFER = 128  # samples of tar shards held undecoded, a few hundred MB at a megapixel in each worker
ORDER, WORDING = range(2)  # what random numbers are drawn for
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_LINE, MAX_TEXT = 1 << 20, 20_000  # bytes of a line, letters of an instruction or name
MAX_MEMBER = 64 << 20
TOO_LARGE = object()
_TARS = (".tar", ".tar.gz", ".tgz")
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a folder


class PairError(ValueError):
    """A pair or a source of pairs that cannot be used: one sentence that names it and says what to change."""

    def __init__(self, text: str) -> None:
        # A DataLoader makes a worker's error anew from its whole traceback, which ends with the sentence.
        super().__init__(" ".join(text.rsplit("PairError: ", 1)[-1].split()))


@dataclass(frozen=True)
class Pair:
    """A picture before and after an edit: upright RGB images of one size, the instruction, a mask (L) or None.

    name: where it came from, for messages.
    """

    name: str
    source: Image.Image
    target: Image.Image
    instruction: str
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Record:
    """A sample whose pictures (a path, or a file's bytes) have not been decoded."""

    name: str
    source: Path | bytes
    target: Path | bytes
    instructions: tuple[str, ...]
    mask: Path | bytes | None


class Lines:
    """Samples of JSON Lines files; only the places of the good lines are kept. problems: one for a bad line.

    pictures: a line may name one picture alone, as Infinity's do, which is then source and target.
    """

    def __init__(self, where: str, paths: Sequence[Path], columns: Mapping[str, str], pictures: bool = False) -> None:
        self.where, self._paths, self._columns, self.problems = where, paths, columns, []
        self._pictures = pictures
        places = [place for number, path in enumerate(paths) for place in self._good(path, number)]
        self._places = np.array(places, np.int64).reshape(-1, 3)
        if not places and not self.problems:
            raise PairError(f"{where} holds no samples; write one JSON object a line")

    def _good(self, path: Path, file_number: int) -> Iterator[tuple[int, int, int]]:
        """Number of the file, place and number of every good line."""
        place = 0
        with open(check_file(path, "file of pairs", PairError), "rb") as file:
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    try:
                        self._parse(path, line, number)
                        yield file_number, place, number
                    except PairError as error:
                        self.problems.append(str(error))
                place = file.tell()

    def __len__(self) -> int:
        return len(self._places)

    def items(self) -> Iterator[int]:
        return iter(range(len(self)))

    def record(self, item: int) -> Record:
        file_number, place, number = self._places[item].tolist()
        with open(self._paths[file_number], "rb") as file:
            file.seek(place)
            return self._parse(self._paths[file_number], file.readline(MAX_LINE + 1), number)

    def _parse(self, path: Path, line: bytes, number: int) -> Record:
        name = f"{path} line {number}"
        if len(line) > MAX_LINE:
            raise PairError(f"{name} is longer than {MAX_LINE} bytes; name pictures in it, and write one object a line")
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise PairError(f"{name} is not JSON in UTF-8 ({_short(error)}); write one object a line") from None
        if not isinstance(row, dict):
            raise PairError(f"{name} is not a JSON object; write {{...}} with {', '.join(FIELDS[:3])}")
        if PICTURE in row and self._columns["source"] not in row:
            if not self._pictures:
                raise PairError(
                    f"{name} has one picture with captions, as Infinity trains on, but an edit takes two; name them "
                    "source and target, and write an instruction"
                )
            picture = path.parent / _text(name, PICTURE, row[PICTURE])
            return Record(name, picture, picture, ("",), None)
        values = {field: row.get(self._columns[field]) for field in FIELDS}
        for field in ("source", "target", "mask"):
            if values[field] is not None:
                values[field] = path.parent / _text(name, self._columns[field], values[field])
        return _record(name, values, self._columns)


class Table:
    """Rows of a `datasets.Dataset`; its Image columns are read as they were stored."""

    problems = ()

    def __init__(self, where: str, dataset: Any, columns: Mapping[str, str], chosen: Mapping[str, str]) -> None:
        self.where, self._columns = where, dict(columns)
        for field in FIELDS:
            if columns[field] not in dataset.column_names and (field != "mask" or field in chosen):
                raise PairError(
                    f"{where} has no column {columns[field]!r} for the {field}; choose one of "
                    f"{', '.join(dataset.column_names)}"
                )
        if not len(dataset):
            raise PairError(f"{where} holds no samples; choose another dataset or split")
        used = [column for column in dict.fromkeys(columns.values()) if column in dataset.column_names]
        dataset = dataset.with_format(None).select_columns(used)
        image = _library("datasets").Image
        for column in used:
            if isinstance(dataset.features[column], image):
                dataset = dataset.cast_column(column, image(decode=False))
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def items(self) -> Iterator[int]:
        return iter(range(len(self)))

    def record(self, item: int) -> Record:
        name, row = f"{self.where} row {item}", self._dataset[item]
        values = {field: row.get(self._columns[field]) for field in FIELDS}
        for field in ("source", "target", "mask"):
            value = values[field]
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            if value is not None and not isinstance(value, bytes):
                value = Path(_text(name, self._columns[field], value))
            values[field] = value
        return _record(name, values, self._columns)


class Shards:
    """Samples of tar shards in the order of the files, or in that of a seed and an epoch."""

    problems = ()

    def __init__(
        self, where: str, paths: Sequence[Path], columns: Mapping[str, str], chosen: Mapping[str, str]
    ) -> None:
        self.where, self._paths, self._columns = where, [str(path) for path in paths], columns
        also = {field: name for field, name in MEMBERS.items() if field not in chosen}
        self._names = {
            field: tuple(f"{n}.".lower() for n in (columns[field], also.get(field)) if n) for field in FIELDS
        }
        _library("webdataset")

    @classmethod
    def named(cls, where: str, columns: Mapping[str, str], chosen: Mapping[str, str]) -> Shards:
        """Of a pattern: {000..012} and * stand for several."""
        paths: dict[Path, None] = {}
        # With forward slashes: the expansion of braces takes a backslash for an escape.
        spans = [int(end) - int(first) + 1 for first, end in re.findall(r"\{(\d{1,9})\.\.(\d{1,9})\}", where)]
        if math.prod(spans) > MAX_SHARDS or re.search(r"\.\.\d{10}", where):
            raise PairError(f"{where} names more than {MAX_SHARDS} shards; check the range in braces")
        for pattern in _library("webdataset").shardlists.expand_urls(Path(where).as_posix()):
            found = [pattern] if Path(pattern).exists() else sorted(glob(pattern))
            if not found:
                raise PairError(f"there is no shard {pattern}; check the path and the range in braces")
            for path in found:
                check_file(path, "shard", PairError)
            paths.update(dict.fromkeys(map(Path, found)))
        return cls(where, list(paths), columns, chosen)

    def items(self, seed: int | None = None, epoch: int = 0) -> Iterator[dict | PairError]:
        """Members of each sample by suffix, and a PairError where a shard breaks off. seed None: unshuffled."""
        paths = self._paths
        if seed is None:
            return (item for path in paths for item in self._read(path))
        order = seeded(seed, ORDER, epoch).permutation(len(paths))
        samples = (item for index in order for item in self._read(paths[index]))
        shuffle = _library("webdataset").shuffle(
            SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(f"{seed}/{epoch}")
        )
        return shuffle(samples)

    def _read(self, path: str) -> Iterator[dict | PairError]:
        tars = _library("webdataset").tariterators
        try:
            with open(path, "rb") as stream:
                yield from tars.group_by_keys(_members(path, stream))
        except Exception as error:  # broken tar files raise ReadError, EOFError, zlib.error and more
            reason = _short(error.args[0] if error.args else error).split(" @ ")[0]
            yield PairError(f"{path} cannot be read to its end ({reason}); write or download the shard again")

    def record(self, item: dict | PairError) -> Record:
        if isinstance(item, PairError):
            raise item
        name = f"{item['__url__']} sample {item['__key__']}"
        for suffix, value in item.items():
            if value is TOO_LARGE:
                raise PairError(f"{name} has a {suffix} of more than {MAX_MEMBER >> 20} MB; make it smaller")
        values: dict[str, Any] = {field: self._picture(item, name, field) for field in ("source", "target", "mask")}
        values["instruction"] = self._instruction(item, name)
        return _record(name, values, self._columns)

    def _picture(self, item: dict, name: str, field: str) -> bytes | None:
        found = [suffix for suffix in item if suffix.startswith(self._names[field])]
        if len(found) > 1:
            raise PairError(f"{name} has {' and '.join(found)}; keep one of them")
        return item[found[0]] if found else None

    def _instruction(self, item: dict, name: str) -> Any:
        try:
            if "txt" in item or "json" not in item:
                return item["txt"].decode("utf-8-sig") if "txt" in item else None
            row = json.loads(item["json"].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise PairError(
                f"{name} has a text that is not UTF-8 or not JSON ({_short(error)}); write it again"
            ) from None
        return row.get(self._columns["instruction"]) if isinstance(row, dict) else None


class Pictures:
    """The pictures of a folder and the folders in it, in the order of their names: each is source and target."""

    problems = ()

    def __init__(self, where: str, paths: Sequence[Path]) -> None:
        self.where, self._paths = where, paths

    def __len__(self) -> int:
        return len(self._paths)

    def items(self) -> Iterator[int]:
        return iter(range(len(self)))

    def record(self, item: int) -> Record:
        path = self._paths[item]
        return Record(str(path), path, path, ("",), None)


def open_data(where: str, columns: Mapping[str, str], pictures: bool = False) -> Lines | Table | Shards | Pictures:
    """What holds the samples of `where` (see `data.open_pairs`). PairError where nothing can be opened."""
    unknown = [field for field in columns if field not in FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} in columns; choose from {', '.join(FIELDS)}")
    names = {field: columns.get(field, field) for field in FIELDS}
    path = Path(where)
    if where.startswith(HUB):
        return Table(where, _dataset(where), names, columns)
    if where.endswith(_TARS):
        return Shards.named(where, names, columns)
    if path.suffix == LIST and path.is_file():
        return Shards(where, listed_shards(path, PairError), names, columns)
    if (path / "metadata.jsonl").is_file():
        return Lines(str(path / "metadata.jsonl"), [path / "metadata.jsonl"], names, pictures)
    if any((path / name).is_file() for name in _SAVED):
        return Table(where, _dataset(where), names, columns)
    lines = [path] if path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))
    if lines and all(file.is_file() for file in lines):
        return Lines(where, lines, names, pictures)
    if pictures and path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and not file.is_dir())
        if not found:
            raise PairError(f"{where} holds no pictures; choose a folder with {', '.join(PICTURES)}")
        return Pictures(where, found)
    if path.exists():
        raise PairError(f"{where} is no set of pairs; pass a .jsonl, a folder with .jsonl files, or shards as *.tar")
    raise PairError(f"there is no {where}; check the path, or write hf:owner/name for a Hugging Face dataset")


def _dataset(where: str) -> Any:
    """The `datasets.Dataset` of a name on the Hub or a folder."""
    datasets = _library("datasets")
    name, _, split = where.removeprefix(HUB).partition(":")
    try:
        if where.startswith(HUB):
            return datasets.load_dataset(name, split=split or "train")
        dataset = datasets.load_from_disk(where)
    except Exception as error:  # not found, no such split, no connection, and what the dataset's own files raise
        raise PairError(f"cannot open {where} ({_short(error)}); check its name, split and files") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise PairError(f"{where} holds splits; pass one of {', '.join(str(Path(where) / name) for name in dataset)}")
    return dataset


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; of one longer than MAX_LINE, one byte more than that."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def _members(path: str, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Members of a tar shard as webdataset groups them; of one that is too large only that it is. Links, devices and
    folders are none, and names are only compared: nothing is unpacked."""
    with tarfile.open(fileobj=stream, mode="r|*") as shard:
        for member in shard:
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own
                file = shard.extractfile(member)
                if member.size > MAX_MEMBER:  # read past: tarfile skips what was never written for hours
                    while file.read(1 << 20):
                        pass
                data = TOO_LARGE if member.size > MAX_MEMBER else file.read()
                yield {"fname": member.name, "data": data, "__url__": path}
            shard.members = []  # it remembers all of them
    yield {}


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PairError(
            f'the library {name} is missing; install it: pip install -e ".[train]" in the folder of the project'
        ) from error


def _record(name: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    for field in FIELDS[:3]:
        if values[field] is None:
            raise PairError(f"{name} has no {field} (under the name {columns[field]!r}); add it")
    wordings = values["instruction"]
    texts = [
        _text(name, columns["instruction"], text) for text in (wordings if isinstance(wordings, list) else [wordings])
    ]
    if not texts:
        raise PairError(f"{name} has an empty list of instructions; write at least one")
    return Record(name, values["source"], values["target"], tuple(texts), values["mask"])


def _text(name: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise PairError(f"{name} has {field!r} of type {type(value).__name__}; it must be a string")
    if not value.strip():
        raise PairError(f"{name} has an empty {field!r}; write something there or remove the sample")
    if len(value) > MAX_TEXT:
        raise PairError(f"{name} has a {field!r} of {len(value)} letters; write at most {MAX_TEXT}")
    return value.strip()


def decode(record: Record, wording: int, resize: bool = False) -> Pair:
    """The pair with its instruction in that wording. resize: a target of another size is brought to the source's.
    PairError for pictures that cannot be read or differ in size."""
    source = _load(record, "source", record.source).rgb
    target = source if record.target is record.source else _load(record, "target", record.target).rgb
    target = target.resize(source.size, Image.Resampling.BICUBIC) if resize else target
    mask = None if record.mask is None else _load(record, "mask", record.mask)
    for field, picture, cure in (("target", target, ", or set resize_targets = true"), ("mask", mask, "")):
        if picture is not None and picture.size != source.size:
            raise PairError(
                f"{record.name}: the source is {source.width}x{source.height} but the {field} "
                f"{picture.size[0]}x{picture.size[1]}; make them the same size{cure}"
            )
    if mask is not None and mask.alpha is not None:
        raise PairError(f"{record.name}: the mask has transparency; save it as a grey picture without")
    return Pair(record.name, source, target, record.instructions[wording], mask and mask.rgb.convert("L"))


def _load(record: Record, field: str, picture: Path | bytes) -> SourceImage:
    try:
        return load_image(picture)
    except (ValueError, OSError) as error:
        reason = _short(error)
        if ";" not in reason:
            reason = f"cannot be read ({reason}); save it again as PNG or JPEG"
        raise PairError(f"{record.name}, {field}: {reason}") from error


def _short(error: object) -> str:
    """An error's text in one line, without the addresses that change from run to run."""
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", str(error)).split())[:300] or type(error).__name__


def seeded(seed: int, purpose: int, number: int) -> np.random.RandomState:
    """NumPy's frozen generator: the same numbers with every version, so that trainings resume anywhere."""
    return np.random.RandomState([seed, purpose, number & 0xFFFFFFFF, number >> 32])
