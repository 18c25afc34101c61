"""The hub: what a repository holds, and downloads that go on where they ended. All that needs `huggingface_hub`.

That library has the addresses, mirrors (HF_ENDPOINT), tokens (HF_TOKEN), offline mode (HF_HUB_OFFLINE) and retries. The
file that a download grows is ours: the library's own is thrown away when its process ends, and a transformer has tens
of gigabytes. Nothing is taken for whole before its checksum was that of the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from ..files.reading import printable
from ..files.safe_write import make_folder, on_disk
from .catalogue import Part
from .manifest import Sum, Watch, sum_of

_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. sha256: of a large file; blob: the SHA-1 that git knows a small one by."""

    name: str
    bytes: int
    sha256: str | None
    blob: str | None

    def is_in(self, path: Path, found: Sum) -> bool:
        """Whether a file, of which the checksum is given, is this one."""
        if found.bytes != self.bytes:
            return False
        if self.sha256:
            return found.sha256 == self.sha256
        return sha1(b"blob %d\0" % found.bytes + path.read_bytes()).hexdigest() == self.blob  # noqa: S324


@dataclass(frozen=True)
class Remote:
    """What is fetched of a repository: its commit, what its card says of its licence, and the files."""

    repo: str
    revision: str
    licence: dict[str, str]
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def look_up(part: Part, revision: str | None = None) -> Remote:
    """Ask the hub for the files of a part. ValueError, one sentence, where there are none, or it cannot be asked."""
    hub = _library()
    with _told(hub, part.repo, revision):
        info = hub.HfApi(endpoint=_endpoint(hub)).model_info(part.repo, revision=revision, files_metadata=True)
    known = {file.rfilename: file for file in info.siblings or ()}
    wanted, lacking = part.wanted(sorted(known))
    if lacking:
        raise ValueError(
            f"{part.repo} has no {', '.join(lacking)} at the revision {info.sha}; name another with --revision"
        )
    files = tuple(map(_file, (known[name] for name in wanted)))
    if not re.fullmatch(r"[0-9a-f]{12,64}", info.sha or ""):
        raise ValueError(f"{part.repo} has no commit that is one; choose another HF_ENDPOINT")
    for file in files:
        if ".." in file.name.split("/") or "\\" in file.name or file.bytes is None or not (file.sha256 or file.blob):
            raise ValueError(
                f"{part.repo} lists {printable(file.name)} without a name, size or checksum that is one; choose "
                "another HF_ENDPOINT"
            )
    return Remote(part.repo, info.sha, _licence(info), files)


def download(remote: Remote, file: RemoteFile, target: Path, watch: Watch) -> Sum:
    """Fetch a file, from where an earlier download of it ended; it takes its name when its checksum is the hub's, which
    is returned.

    ValueError, one sentence, for all that can go wrong; what was fetched stays for the next time, but where the
    checksum is another.
    """
    part = unfinished(target, file)
    make_folder(part.parent)
    _grow(remote, file, part, watch)
    found = sum_of(part, watch)
    if not file.is_in(part, found):
        part.unlink(missing_ok=True)
        raise ValueError(
            f"{file.name} of {remote.repo} did not come as the hub has it (its checksum is another); run the command "
            "again"
        )
    os.replace(part, target)
    return found


def unfinished(target: Path, file: RemoteFile) -> Path:
    """The file that a download grows: of one content, so that another revision never goes on with it."""
    return target.with_name(f"{target.name}.{(file.sha256 or file.blob)[:12]}.part")


def _grow(remote: Remote, file: RemoteFile, part: Path, watch: Watch) -> None:
    """Append what is missing to an unfinished file. A transfer that ended early is begun again while each brings
    something: of the library's versions not all do that."""
    hub = _library()
    address = hub.hf_hub_url(remote.repo, file.name, revision=remote.revision, endpoint=_endpoint(hub))
    with open(part, "ab", buffering=0) as opened:
        sink = _Sink(opened, part, lambda done: watch(f"downloading {file.name}", done, file.bytes))
        with _told(hub, remote.repo, remote.revision), _without_bars(hub):
            while (begun := opened.tell()) < file.bytes:
                headers = hub.utils.build_hf_headers()
                try:
                    hub.file_download.http_get(
                        address, sink, resume_size=begun, headers=headers, expected_size=file.bytes
                    )
                except _failures(hub):
                    if opened.tell() <= begun:
                        raise


class _Sink:
    """A file that says how far it is, and whose full disk is not taken for a failing network."""

    def __init__(self, file: BinaryIO, path: Path, told: Callable[[int], None]) -> None:
        self.file, self.path, self.told = file, path, told

    def write(self, data: bytes) -> int:
        try:
            with on_disk(self.path):
                view = memoryview(data)
                while view:  # a file without a buffer may take a part
                    view = view[self.file.write(view) :]
        except OSError as error:
            raise ValueError(str(error)) from error
        self.told(self.file.tell())
        return len(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _library() -> ModuleType:
    """`huggingface_hub`. ValueError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise ValueError(
            f'downloads need huggingface_hub ({error}); install it with: pip install "huggingface_hub>=0.30"'
        ) from None
    return huggingface_hub


def _endpoint(hub: ModuleType) -> str:
    """The hub's address: HF_ENDPOINT as it is now, which the library reads once."""
    return os.environ.get("HF_ENDPOINT", hub.constants.ENDPOINT).rstrip("/")


@contextmanager
def _without_bars(hub: ModuleType) -> Iterator[None]:
    """Without the library's own bars of progress."""
    group = "huggingface_hub.http_get"
    if hub.utils.are_progress_bars_disabled(group):
        yield
        return
    hub.utils.disable_progress_bars(group)
    try:
        yield
    finally:
        hub.utils.enable_progress_bars(group)


@contextmanager
def _told(hub: ModuleType, repo: str, revision: str | None) -> Iterator[None]:
    """Around requests: what fails is one sentence that says what to do."""
    try:
        yield
    except _failures(hub) as error:
        raise ValueError(_sentence(hub, error, repo, revision)) from error


def _failures(hub: ModuleType) -> tuple[type[Exception], ...]:
    """What requests raise, of whichever library the hub's asks the network with."""
    return OSError, *hub.errors.HfHubHTTPError.__bases__


def _sentence(hub: ModuleType, error: Exception, repo: str, revision: str | None) -> str:
    errors, at = hub.errors, _endpoint(hub)
    code = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids downloads, and files of {repo} are missing here; unset it"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is only for those who accept its terms; do so at {at}/{repo}, then set HF_TOKEN to your token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}; name a commit, branch or tag of it, or leave --revision out"
    if isinstance(error, errors.RepositoryNotFoundError) or code in (401, 403):
        return f"{at} does not give {repo} to you (it is not there, or closed); check HF_ENDPOINT and HF_TOKEN"
    if code == 404:
        return f"{at} has no more what it listed of {repo}; run the command again"
    reason = printable((str(error).splitlines() or [""])[0]) or type(error).__name__
    return (
        f"{at} cannot be reached, or ended the transfer ({reason}); check the network and run the command again: it "
        "goes on from here"
    )


def _file(sibling) -> RemoteFile:
    lfs = sibling.lfs
    return RemoteFile(sibling.rfilename, lfs.size if lfs else sibling.size, lfs and lfs.sha256, sibling.blob_id)


def _licence(info) -> dict[str, str]:
    """What a repository's card says of its licence, else what its tags say."""
    card = info.card_data or {}
    found = {name: card.get(name) for name in _LICENCE}
    if not found["license"]:
        found["license"] = _tag(info.tags or ())
    return {name: printable(str(value)) for name, value in found.items() if value}


def _tag(tags: Sequence[str]) -> str | None:
    return next((tag.partition(":")[2] for tag in tags if tag.startswith("license:")), None)
