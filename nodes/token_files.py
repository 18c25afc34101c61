"""Files of tokens in ComfyUI's folders: listed without walking all that lies there, and found without leaving them."""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import folder_paths

from ..varedit_core.files.token_header import MAX_BYTES, SUFFIX, holds_tokens
from .files import NO_FILE

OUTPUT = " [output]"
"""What ComfyUI writes behind the name of a file in its output folder."""
NOTICED = 0.02
"""Seconds that may pass each time that the list is asked for."""
RESTS = 20
"""A folder that took a second to read is not read again for so many: the server's loop waits meanwhile."""
SETTLED = 60_000_000_000
"""Nanoseconds after which a time stamp is taken for the last one: a file is written for a while, stamps are coarse."""
READS = 0.05
"""Seconds in which unknown files are looked into each time; what is left comes next time, the newest files first."""


@dataclass
class Folder:
    """What was found in a folder. changed: its time stamp then. until: when it may be read again. files: names of files
    that may hold tokens, and the system's numbers of them."""

    changed: int
    until: float = 0.0
    folders: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)


@dataclass
class Known:
    """A file that was looked into. settled: whether it was old enough then that nothing goes on writing it."""

    number: int
    stamp: tuple[int, int] | None
    holds: bool
    settled: bool


class Listing:
    """The files of tokens below folders. A folder is read when its time stamp has changed, a file once, and while it is
    new again when its own has."""

    def __init__(self) -> None:
        self.folders: dict[str, Folder] = {}
        self.files: dict[str, Known] = {}

    def names(self, top: str) -> list[str]:
        """The files of tokens below a folder, as paths from it."""
        folders, files = self._walk(top)
        for kept, there in ((self.folders, folders), (self.files, files)):
            for path in [path for path in kept if path.startswith(top + os.sep) and path not in there]:
                del kept[path]
        asked = {}
        for path, number in files.items():
            known = self.files.get(path)
            if known is None or known.number != number or not known.settled:
                asked[path] = Known(number, *_stamped(path))
        self._look(asked)
        return sorted(os.path.relpath(path, top) for path in files if path in self.files and self.files[path].holds)

    def _walk(self, top: str) -> tuple[set[str], dict[str, int]]:
        """Folders, and files that may hold tokens."""
        waiting, folders, files = [top], set(), {}
        while waiting:
            path = waiting.pop()
            if (found := self._folder(path)) is None:
                continue
            folders.add(path)
            waiting += [os.path.join(path, name) for name in found.folders]
            files |= {os.path.join(path, name): number for name, number in found.files.items()}
        return folders, files

    def _folder(self, path: str) -> Folder | None:
        found, now = self.folders.get(path), time.monotonic()
        try:
            changed = os.stat(path).st_mtime_ns
            if found is None or (found.changed != changed and now >= found.until):
                if time.time_ns() - changed < SETTLED:
                    changed = -1  # the next file may leave the same time stamp
                found = self.folders[path] = _read(path, changed)
                took = time.monotonic() - now
                found.until = time.monotonic() + RESTS * took if took > NOTICED else 0.0
        except OSError:
            return None
        return found

    def _look(self, asked: dict[str, Known]) -> None:
        """Look into files, the newest first, until the time is over."""
        end = time.monotonic() + READS
        for path in sorted(asked, key=lambda path: asked[path].stamp or (0, 0), reverse=True):
            now, before = asked[path], self.files.get(path)
            if before is not None and before.number == now.number and before.stamp == now.stamp:
                now.holds = before.holds
            elif now.stamp is not None and time.monotonic() < end:
                now.holds = holds_tokens(path)
            elif now.stamp is not None:
                continue
            self.files[path] = now


def _read(path: str, changed: int) -> Folder:
    found = Folder(changed)
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found.folders.append(entry.name)
            elif entry.name.endswith(SUFFIX):
                found.files[entry.name] = entry.inode()
    return found


def _stamped(path: str) -> tuple[tuple[int, int] | None, bool, bool]:
    """Time stamp and size of a regular file that is not too large to hold tokens; that it does not, so far; and whether
    it is old."""
    try:
        status = os.stat(path)
    except OSError:
        return None, False, False
    small = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES
    settled = time.time_ns() - status.st_mtime_ns > SETTLED
    return ((status.st_mtime_ns, status.st_size) if small else None), False, settled


LISTING = Listing()
"""Of this process: the schema is asked several times a prompt."""


def token_files() -> list[str]:
    """The files of tokens, those of the input folder first; never empty (see `files.listed`)."""
    kept = LISTING.names(folder_paths.get_input_directory())
    return [*kept, *(name + OUTPUT for name in LISTING.names(folder_paths.get_output_directory()))] or [NO_FILE]


def find(name: str) -> Path | None:
    """The file of a choice; None where there is none inside ComfyUI's folders. A name that leads out of them is none,
    whatever lies there: older ComfyUI does not ask."""
    output = name.endswith(OUTPUT)
    folder = folder_paths.get_output_directory() if output else folder_paths.get_input_directory()
    top = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(top, name.removesuffix(OUTPUT)))
    inside = os.path.splitdrive(path)[0] == os.path.splitdrive(top)[0] and os.path.commonpath([top, path]) == top
    return Path(path) if inside and path != top and os.path.isfile(path) else None


def missing(name: str) -> str:
    """What to say of a file that is not there, "" for one that is."""
    if name != NO_FILE and find(name) is not None:
        return ""
    lack = f"{name} is not" if name != NO_FILE else "there are no tokens"
    return (
        f"{lack} in ComfyUI's folders input and output; save some with VAREdit Save Tokens, or put a file into input, "
        "press R and choose it"
    )


_DATE = re.compile(r"%date:([^%]+)%")
_PARTS = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}


def named(prefix: str) -> str:
    """A file's prefix with dates put in, as ComfyUI's page does for its own save nodes: %date:yyyy-MM-dd% and the like.
    ValueError for a prefix that names no file, and for what only the page could put in."""
    prefix = _DATE.sub(lambda found: _dated(found[1]), prefix)
    if left := re.search(r"%[^%/]+\.[^%/]+%", prefix):
        raise ValueError(f"ComfyUI replaces {left[0]} for its own save nodes alone; write the value itself")
    name = re.split(r"[\\/]", prefix)[-1]
    if not name.strip(". ") or not prefix.isprintable():
        raise ValueError(f"the prefix {prefix!r} names no file; write one such as varedit/edit")
    return prefix


def _dated(form: str) -> str:
    now = datetime.now()
    return re.sub("|".join(_PARTS), lambda part: now.strftime(_PARTS[part[0]]), form)
