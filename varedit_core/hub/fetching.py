"""From a name to weights on the disk: what is missing is looked up, downloaded, converted, and said in a manifest.

Every step leaves what it finished, so that a run that was interrupted anywhere goes on where it ended: downloads grow a
file (`remote`), conversions appear whole or not at all (`files.convert`), the manifest comes last, and only then the
download is deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..cards import beside
from ..files.convert import convert
from ..files.reading import printable
from ..files.safe_write import check_target, make_folder, write_bytes, write_text
from ..files.weights import open_weights
from .card import card_of, card_path
from .catalogue import FOLDERS, PRECISION, Part, check_precision, parts_of
from .manifest import Manifest, Source, Sum, Watch, path_of, sum_of
from .places import Place, home, of_comfyui, originals, own, remember
from .remote import Remote, RemoteFile, download, look_up, unfinished


@dataclass(frozen=True)
class Step:
    """One part of what is asked for. made: its manifest, where it is here; remote: what is fetched, where not."""

    part: Part
    precision: str
    weights: Path
    made: Manifest | None = None
    remote: Remote | None = None

    @property
    def folder(self) -> Path:
        """Where its download lies."""
        return _folder(self.remote.repo, self.remote.revision)

    @property
    def missing(self) -> int:
        """Bytes that are still to be downloaded."""
        return sum(file.bytes - _size(self.folder / file.name, file) for file in self.remote.files)

    @property
    def result(self) -> int:
        """Bytes of the converted weights: what is here, or about what will be."""
        return self.made.bytes if self.made else self.part.estimate(self.remote.bytes, self.precision)

    def fetch(self, watch: Watch, command: str, keep_original: bool) -> Manifest:
        """Download, convert and say it in a manifest. ValueError or OSError, one sentence, where that fails."""
        if not self.weights.exists():
            path_of(self.weights).unlink(missing_ok=True)  # of ones that are gone
        sums = {file.name: self._original(file, watch) for file in self.remote.files}
        self._convert(watch)
        names = [self.weights.name, *self.part.beside]
        for name in self.part.beside:
            write_bytes(self.weights.parent / name, (self.folder / name).read_bytes())
        source = Source(self.remote.repo, self.remote.revision, self.remote.licence, sums)
        ours = {name: sum_of(self.weights.parent / name, watch) for name in names}
        made = Manifest(self.part.name, self.precision, source, ours, command, keep_original)
        write_text(card_path(self.weights), card_of(self.weights, made))
        made.write(self.weights)
        if not keep_original:
            _discard(source)
        return made

    def _original(self, file: RemoteFile, watch: Watch) -> Sum:
        """Have a file of the download here. ValueError for one that was kept, and is not what it was."""
        target = self.folder / file.name
        if not target.is_file():
            return download(self.remote, file, target, watch)
        found = sum_of(target, watch)
        if not file.is_in(target, found):
            raise ValueError(f"{target} is damaged: its checksum is not the hub's; delete it and run the command again")
        return found

    def _convert(self, watch: Watch) -> None:
        """Write the converted weights, unless an earlier run did, and was interrupted later."""
        if self.weights.exists():
            return
        source = self.folder / self.part.source
        doing = f"converting {self.part.name} to {self.precision}"
        convert(
            source, self.weights, self.precision, False, lambda done, total: watch(doing, done, total), self.part.kind
        )


@dataclass(frozen=True)
class Plan:
    """What a `varedit get` will do. place: where the weights go."""

    names: tuple[str, ...]
    place: Place
    steps: tuple[Step, ...]
    keep_original: bool

    @property
    def open(self) -> list[Step]:
        """The steps that are still to be done."""
        return [step for step in self.steps if step.made is None]

    @property
    def missing(self) -> int:
        """Bytes to download."""
        return sum(step.missing for step in self.open)

    @property
    def result(self) -> int:
        """About how many bytes more are taken at the end."""
        return sum(step.result for step in self.open) + (self.missing if self.keep_original else 0)

    @property
    def most(self) -> int:
        """About how many bytes more are taken at most in between: a download goes when it is converted."""
        taken = most = 0
        for step in self.open:
            most = max(most, taken + step.missing + step.result)
            taken += step.result + (step.missing if self.keep_original else 0)
        return most

    def check_space(self) -> None:
        """ValueError where a disk has not the room."""
        downloads = [step.missing for step in self.open]
        needs = {originals(): sum(downloads) if self.keep_original else max(downloads, default=0),
                 self.place.folder: sum(step.result for step in self.open)}  # fmt: skip
        if _disk(originals()) == _disk(self.place.folder):
            needs = {self.place.folder: self.most}
        for folder, needed in needs.items():
            free = shutil.disk_usage(_there(folder)).free
            if free < needed:
                raise ValueError(
                    f"{folder} has {free / 1e9:.3g} GB free, and this takes about {needed / 1e9:.3g} GB at most; make "
                    "room, or set VAREDIT_HOME to a folder of another disk"
                )

    def run(self, watch: Watch = lambda *_: None) -> None:
        """Do what is still to be done. ValueError or OSError, one sentence; called again it goes on where it ended."""
        if self.place != own():
            remember(self.place)
        done = [step.made.source for step in self.steps if step.made and not step.made.kept]
        stale = [source for source in done if any(map(Path.exists, _downloads(source)))]
        if not (self.open or stale):
            return
        with _alone():
            self.check_space()
            for step in self.open:
                check_target(path_of(step.weights))
            for source in stale:  # of a run that ended before it could delete them
                _discard(source)
            for step in self.open:
                step.fetch(watch, self._command(), self.keep_original)

    def _command(self) -> str:
        precisions = {FOLDERS[step.part.what]: step.precision for step in self.steps}
        return " ".join(
            ["varedit get", *self.names, "--precision", precisions["diffusion_models"], "--text-precision",
             precisions["text_encoders"]]
        )  # fmt: skip


def plan(
    names: Sequence[str],
    precision: str = PRECISION,
    text: str | None = None,
    comfyui: str | Path | None = None,
    revisions: Sequence[str] = (),
    keep_original: bool = False,
) -> Plan:
    """What is to be done for sets of weights to be here; the hub is asked for what is missing, nothing is written.

    precision: of the transformer; text: of its encoder, by default see `cards.beside`. comfyui: a ComfyUI
    folder to put the files into, else `places.own`. revisions: OWNER/NAME@REVISION. ValueError, one sentence, for
    unknown names, a folder that is none, what the hub does not give, and files that are in the way.
    """
    check_precision(precision)
    check_precision(text)
    if not names:
        raise ValueError("name the weights to fetch; varedit get --list says which there are")
    parts = list(dict.fromkeys(part for name in names for part in parts_of(name)))
    place, asked = of_comfyui(Path(comfyui)) if comfyui else own(), _revisions(revisions, parts)
    words = text or beside(precision)
    steps = [_step(part, words if part.beside else precision, place, asked.get(part.repo)) for part in parts]
    if keep_original and all(step.made for step in steps):
        raise ValueError("all is here, so that there is no download to keep; leave --keep-original out")
    return Plan(tuple(dict.fromkeys(names)), place, tuple(steps), keep_original)


def get(*names: str, watch: Watch = lambda *_: None, **options) -> None:
    """Have sets of weights here, such as "8B-512"; what is missing is downloaded and converted. options: of `plan`.

    watch(what is done, bytes done, bytes in all) is called meanwhile. ValueError or OSError, one sentence; called again
    it goes on where it ended. `finding.find` says where they are.
    """
    plan(names, **options).run(watch)


def _step(part: Part, asked: str, place: Place, revision: str | None) -> Step:
    """What is to be done for a part. ValueError where something else has its name."""
    precision = part.precision(asked)
    weights = place.weights(part, precision)
    made = Manifest.read(weights)
    lacking = made.lacking(weights.parent) if made else []
    if made and not lacking:
        if revision and not made.source.revision.startswith(revision):
            raise ValueError(
                f"{weights} is of the revision {made.source.revision}; delete it to fetch {revision} in its place"
            )
        return Step(part, precision, weights, made)
    if lacking and weights.exists():
        raise ValueError(f"{lacking[0]}; delete {weights} and run the command again")
    step = Step(part, precision, weights, remote=look_up(part, revision))
    if weights.exists() and not made and not _ours(step):
        raise ValueError(
            f"{weights} was not made by varedit get, as {path_of(weights).name} is missing beside it; move it, or name "
            "it with --model in place of --weights"
        )
    return step


def _ours(step: Step) -> bool:
    """Whether a converted file without a manifest is of a run that was interrupted: its whole download is here."""
    if any(_size(step.folder / file.name, file) != file.bytes for file in step.remote.files):
        return False
    told = open_weights(step.weights).metadata
    name = (step.folder / step.part.source).name
    return (told.get("varedit.converted_from"), told.get("varedit.precision")) == (printable(name), step.precision)


def _revisions(texts: Sequence[str], parts: Sequence[Part]) -> dict[str, str]:
    """Repository -> revision of OWNER/NAME@REVISION."""
    asked, known = {}, list(dict.fromkeys(part.repo for part in parts))
    for text in texts:
        repo, _, revision = text.partition("@")
        if repo not in known or not revision:
            raise ValueError(f"--revision takes OWNER/NAME@REVISION of {', '.join(known)}, not {text!r}")
        asked[repo] = revision
    return asked


def _size(path: Path, file: RemoteFile) -> int:
    """Bytes of a file that are here, of an unfinished one too."""
    unready = unfinished(path, file)
    if path.is_file():
        return file.bytes
    return min(unready.stat().st_size, file.bytes) if unready.is_file() else 0


def _folder(repo: str, revision: str) -> Path:
    """Where a repository's downloads lie: the last folder's name is the published one, which conversions note."""
    owner, name = repo.split("/")
    return originals() / owner / revision[:12] / name


def _downloads(source: Source) -> list[Path]:
    return [_folder(source.repo, source.revision) / name for name in source.files]


def _discard(source: Source) -> None:
    """Delete a part's download, and the folders that are empty then."""
    files = _downloads(source)
    for file in files:
        file.unlink(missing_ok=True)
    with suppress(OSError):  # what has files of other parts
        for folder in sorted({file.parent for file in files}, reverse=True):
            while folder != home():
                folder.rmdir()
                folder = folder.parent


def leftovers() -> dict[Path, int]:
    """The folders of downloads that are not converted, or kept, and their bytes."""
    found: dict[Path, int] = {}
    for file in originals().rglob("*") if originals().is_dir() else ():
        if file.is_file():
            folder = originals().joinpath(*file.relative_to(originals()).parts[:2])
            found[folder] = found.get(folder, 0) + file.stat().st_size
    return found


@contextmanager
def _alone() -> Iterator[None]:
    """ValueError where another process is at work in the folder of our own."""
    from filelock import FileLock, Timeout

    make_folder(home())
    lock = FileLock(home() / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another varedit get is at work in {home()}; wait for it to end") from None
    except OSError as error:
        raise ValueError(
            f"cannot write to {home()} ({error.strerror or error}); set VAREDIT_HOME to another"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _there(folder: Path) -> Path:
    """A folder, or the first above it that exists."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _disk(folder: Path) -> int:
    return os.stat(_there(folder)).st_dev
