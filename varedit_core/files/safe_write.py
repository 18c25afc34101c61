"""Writing files: each appears whole or not at all, whatever fails and whoever writes the same name at the same time.

`safe_write` is the one way to write a file; the functions below it are for the usual contents.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
    The file has the mode of any new one here. Links are followed; a pipe or device is written to, never replaced.
    Raises as `check_free`, and OSError where the folder cannot be written to or has no room (see `on_disk`).
    """
    path = Path(path)
    check_free(path, overwrite)
    if path.exists() and not path.is_file():
        yield path
        return
    target = Path(os.path.realpath(path))
    _clean(target)
    temporary = _temporary(target)
    try:
        _made(temporary, path)
        with _locked(temporary):
            with on_disk(path):
                yield temporary
            _publish(temporary, target, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


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
        raise OSError(f"cannot write {path} ({error.strerror}); make room, or choose another place") from error


def _made(temporary: Path, path: Path) -> None:
    """Make the temporary file."""
    try:
        with open(temporary, "xb"):
            pass
    except OSError as error:  # under the name that the user knows
        raise type(error)(error.errno, error.strerror, str(path)) from error


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
    ends well. Where it does not, or one cannot be written, none of them is there."""
    with ExitStack() as files:

        def write(path: str | os.PathLike[str], data: bytes, overwrite: bool = True) -> None:
            temporary = files.enter_context(safe_write(path, overwrite))
            with open(temporary, "wb") as file:
                file.write(data)

        yield write


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
        raise ValueError(f"cannot write {path} ({error.strerror}); choose another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a file may not be replaced, ValueError where a folder has the name."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(_taken(path))


def _taken(path: Path) -> str:
    return f"{path} exists; choose another name or allow overwriting (--overwrite, in Python overwrite=True)"


def make_folder(path: Path) -> None:
    """Make a folder with those above it. ValueError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path} ({error.strerror}); choose another") from error
