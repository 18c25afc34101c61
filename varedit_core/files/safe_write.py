"""Writing files: each appears whole or not at all, whatever fails and whoever writes the same name at the same time.

`safe_write` is the one way to write a file; the functions below it are for the usual contents.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def safe_write(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the `with` block; at its end the file takes its name at once.

    The temporary name is of this call alone, so that writers of one name never meet: the last one wins, and without
    overwrite the first. After any error, KeyboardInterrupt too, the temporary file is gone and an old file as it was;
    that of a writer that was killed goes when the name is written next.
    A new file has the mode of any new one here, one that replaces another has its mode. Links are followed; a device is
    written to, never replaced.
    Raises as `check_free`, and OSError where the folder cannot be written to or has no room (see `on_disk`).
    """
    with _begun(Path(path), overwrite) as file:
        with on_disk(path):
            yield file.temporary
        file.publish()


@dataclass(frozen=True)
class _File:
    """A file that is written under another name. path: its name as the user knows it; target: without links. old: the
    file that it will replace, None for a new one."""

    path: Path
    target: Path
    temporary: Path
    overwrite: bool
    old: os.stat_result | None

    def publish(self) -> None:
        """Give it its name. FileExistsError where another writer was faster and may not be replaced, OSError where the
        name cannot be given."""
        if self.temporary == self.path:  # a device has all already
            return
        if self.old:
            _chmod(self.temporary, self.old.st_mode)
        try:
            _publish(self.temporary, self.target, self.overwrite)
        except FileExistsError:
            raise FileExistsError(_taken(self.path)) from None
        except OSError as error:
            raise OSError(_unwritable(self.path, error)) from error

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What has the name now has it again where the `with` block, in which this file may be published, fails."""
        old, made = _temporary(self.target), os.stat(self.temporary)
        with ExitStack() as stack:
            if self.target.is_file():
                with on_disk(self.path):
                    _copied(self.target, old)
                stack.enter_context(_locked(old))
            try:
                yield
            except BaseException:
                if self.target.exists() and os.path.samestat(os.stat(self.target), made):
                    os.replace(old, self.target) if old.exists() else self.target.unlink()
                old.unlink(missing_ok=True)
                raise
            old.unlink(missing_ok=True)


@contextmanager
def _begun(path: Path, overwrite: bool) -> Iterator[_File]:
    """A file under a temporary name, which is gone at the end. Raises as `safe_write`."""
    check_free(path, overwrite)
    if path.exists() and not path.is_file():
        yield _File(path, path, path, overwrite, None)
        return
    target = Path(os.path.realpath(path))
    _clean(target)
    temporary, old = _temporary(target), target.stat() if target.exists() else None
    try:
        _made(temporary, path)
        if old:  # before anything is in it: the old one may be for few eyes
            _chmod(temporary, old.st_mode | 0o600)
        with _locked(temporary):
            yield _File(path, target, temporary, overwrite, old)
    finally:
        temporary.unlink(missing_ok=True)


def _chmod(path: Path, mode: int) -> None:
    with suppress(OSError):  # not every file system has modes
        os.chmod(path, stat.S_IMODE(mode))


def _copied(source: Path, copy: Path) -> None:
    """A second name of a file, or where there can be none, a copy."""
    try:
        os.link(source, copy)
    except OSError:
        try:
            shutil.copy2(source, copy)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise


def _temporary(target: Path) -> Path:
    """A name of this call alone beside a file."""
    return target.with_name(f"{_mark(target)}{uuid4().hex}.tmp")


def _mark(target: Path) -> str:
    """What all temporary names of a file begin with: short, however long its own is."""
    return f".{sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


@contextmanager
def _locked(temporary: Path) -> Iterator[None]:
    """Tell other writers that this file is being written: a lock ends with its process, however that ends."""
    if fcntl is None:
        yield
        return
    file = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _clean(target: Path) -> None:
    """Remove what killed writers of this file left."""
    mark = _mark(target)
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(mark) and entry.name.endswith(".tmp") and _abandoned(entry.path):
                os.unlink(entry.path)


def _abandoned(temporary: str) -> bool:
    """Whether nobody writes a temporary file any more. Its writer makes it before locking it: what is new is left."""
    age = time.time() - os.stat(temporary).st_mtime
    if fcntl is None:
        return age > 24 * 3600
    file = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return age > 1


@contextmanager
def on_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around writing to a file: a full disk, which names none, is one sentence with the name that the user knows."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(_unwritable(path, error)) from error


def _unwritable(path: str | os.PathLike[str], error: OSError) -> str:
    advice = "make room, or choose another place" if error.errno in _FULL else "choose another place"
    return f"cannot write {path} ({error.strerror or error}); {advice}"


def _made(temporary: Path, path: Path) -> None:
    """Make the temporary file."""
    try:
        with open(temporary, "xb"):
            pass
    except OSError as error:  # under the name that the user knows
        raise type(error)(_unwritable(path, error)) from error


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # fails where another writer was faster, which a rename would not
    except FileExistsError:
        raise FileExistsError(_taken(target)) from None
    except OSError:  # a file system without links
        check_free(target, overwrite)
        os.replace(temporary, target)


def write_bytes(path: str | os.PathLike[str], data: bytes, overwrite: bool = True) -> None:
    """Write bytes. Raises as `safe_write`."""
    with safe_write(path, overwrite) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str, overwrite: bool = True) -> None:
    """Write a text in UTF-8. Raises as `safe_write`."""
    write_bytes(path, text.encode(), overwrite)


def write_json(path: str | os.PathLike[str], facts: object, indent: int = 1, overwrite: bool = True) -> None:
    """Write JSON and an end of line. Raises as `safe_write`."""
    write_text(path, json.dumps(facts, indent=indent) + "\n", overwrite)


@contextmanager
def together() -> Iterator[Callable[[str | os.PathLike[str], bytes, bool], None]]:
    """Files that appear all or none: a function like `write_bytes`, whose files take their names when the `with` block
    ends well. Where it does not, or one of them cannot be written or named, all is as it was. A name that is written
    twice has what came last."""
    with ExitStack() as stack:
        files: dict[str, _File] = {}

        def write(path: str | os.PathLike[str], data: bytes, overwrite: bool = True) -> None:
            name = os.path.realpath(path)
            if name not in files:
                files[name] = stack.enter_context(_begun(Path(path), overwrite))
            with on_disk(path), open(files[name].temporary, "wb") as file:
                file.write(data)

        yield write
        _publish_all([file for file in files.values() if file.temporary != file.path])


def _publish_all(files: Sequence[_File]) -> None:
    """Give all files their names, or none."""
    with ExitStack() as undo:
        for file in files:
            undo.enter_context(file.kept())
        for file in files:
            file.publish()


def check_target(path: str | os.PathLike[str], overwrite: bool = True) -> None:
    """Raise what `safe_write` would for this path, and make missing folders, before there is anything to write.
    ValueError where nothing can be written there; one sentence."""
    path, temporary = Path(path), None
    try:
        check_free(path, overwrite)
        make_folder(path.parent)
        if not path.exists() or path.is_file():
            temporary = _temporary(Path(os.path.realpath(path)))
            _made(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise ValueError(str(error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a file may not be replaced, ValueError where what has the name cannot be."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # links in a circle, names that are too long, folders that may not be read
        raise ValueError(_unwritable(path, error)) from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder; name a file in it")
    # One without a name, such as the shell's >(COMMAND), has a reader; at another, writing may wait for ever.
    if stat.S_ISFIFO(mode) and os.path.exists(os.path.realpath(path)):
        raise ValueError(f"{path} is a pipe; name a file")
    if not overwrite:
        raise FileExistsError(_taken(path))
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path} may not be written; change its permissions, or choose another name")
    if stat.S_ISREG(mode) and (reason := _fixed(Path(os.path.realpath(path)))):
        raise ValueError(f"{path} cannot be replaced: {reason}; choose another name")


def _fixed(target: Path) -> str:
    """Why a file cannot be replaced by a rename, where that can be told beforehand; else an empty text."""
    if os.path.ismount(target):
        return "something is mounted there"
    folder = target.parent.stat()
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, folder.st_uid, target.stat().st_uid):
        return "it belongs to another user"
    return ""


def _taken(path: Path) -> str:
    return f"{path} exists; choose another name or allow overwriting (--overwrite, in Python overwrite=True)"


def check_empty(path: Path) -> None:
    """FileExistsError for what is not an empty folder or none yet, ValueError for one that cannot be read."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise ValueError(f"cannot read the folder {path} ({error.strerror or error}); choose another") from error
    if taken:
        raise FileExistsError(f"{path} is not an empty folder; choose another")


def make_folder(path: Path) -> None:
    """Make a folder with those above it. ValueError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path} ({error.strerror or error}); choose another") from error
