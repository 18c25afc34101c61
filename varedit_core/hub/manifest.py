"""What was converted of what: a JSON file beside the weights, with the checksums of both.

It is written last, so that weights with a manifest are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from ..files.reading import read_json
from ..files.safe_write import write_json

SUFFIX = ".manifest.json"
FORMAT = 1
_CHUNK = 8 << 20
Watch = Callable[[str, int, int], None]
"""watch(what is done, bytes done, bytes in all)."""


@dataclass(frozen=True)
class Sum:
    """A file's size and SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where weights come from: a repository at the hub, its commit, what its card says of its licence (`license`,
    `license_name`, `license_link`), and the files that were read."""

    repo: str
    revision: str
    licence: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Sum] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.repo.partition("/")[0]


@dataclass(frozen=True)
class Manifest:
    """part: its name. files: ours, by their name beside the manifest; the first one holds the weights. made_by: the
    command. kept: whether the download is to stay."""

    part: str
    precision: str
    source: Source
    files: Mapping[str, Sum]
    made_by: str
    kept: bool = False

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.files.values())

    def write(self, weights: Path) -> None:
        """Write it beside the weights. Raises as `files.safe_write`."""
        write_json(path_of(weights), {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, weights: Path) -> Manifest | None:
        """That of a weight file, None where it has none. ValueError for one that cannot be read."""
        path = path_of(weights)
        if not path.is_file():
            return None
        facts = read_json(path, "manifest", cure=f"delete it and {weights.name}, and fetch them again")
        try:
            if facts.pop("format") != FORMAT:
                raise ValueError
            source = facts.pop("source")
            return cls(
                source=Source(**source | {"files": _sums(source["files"])}), files=_sums(facts.pop("files")), **facts
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path} is not a readable manifest; delete it and {weights.name}, and fetch them again"
            ) from None

    def lacking(self, folder: Path) -> list[str]:
        """Sentences for files that are gone or of another size; no file is read."""
        return list(filter(None, (_lack(folder / name, one) for name, one in self.files.items())))

    def faults(self, folder: Path, watch: Watch = lambda *_: None) -> Iterator[str]:
        """Sentences for files that are gone, of another size, or of another content."""
        for name, one in self.files.items():
            fault = _lack(folder / name, one)
            if not fault and sum_of(folder / name, watch) != one:
                fault = f"{folder / name} is damaged: its SHA-256 is not that of its manifest"
            if fault:
                yield fault


def path_of(weights: Path) -> Path:
    """The manifest of a weight file."""
    return weights.with_name(weights.stem + SUFFIX)


def sum_of(path: Path, watch: Watch = lambda *_: None) -> Sum:
    """The size and SHA-256 of a file. OSError where it cannot be read."""
    digest, total, done = sha256(), path.stat().st_size, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            watch(f"checking {path.name}", done, total)
    return Sum(done, digest.hexdigest())


def _lack(path: Path, one: Sum) -> str:
    if not path.is_file():
        return f"{path} is gone"
    size = path.stat().st_size
    return "" if size == one.bytes else f"{path} is damaged: it has {size} bytes in place of {one.bytes}"


def _sums(facts: Mapping[str, Mapping]) -> dict[str, Sum]:
    return {name: Sum(int(one["bytes"]), str(one["sha256"])) for name, one in facts.items()}
