"""Files to be read: what a name must be before anything is opened, and JSON that comes from anywhere.

A FIFO or a device would be read for ever, a folder fails in another way on each system: all are asked here.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

from ..wording import with_article

MAX_SHOWN = 1000
"""Letters of a message."""
MAX_JSON = 64 << 20
"""Bytes of a JSON file: the largest index of a published checkpoint has less than one megabyte."""
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_file(path: str | os.PathLike[str], what: str = "file", error: type[ValueError] = ValueError) -> Path:
    """The path, where it is a regular file, or a link to one, that may be read. what: what it should be, for messages
    ("image", "weight file"). FileNotFoundError where there is nothing, `error` where it is anything else; one sentence
    each."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if address := re.match(r"(https?|ftp|file|s3|gs):/", str(path)):  # `Path` makes one slash of two
            advice = "write the path alone" if address[1] == "file" else "download it first"
            raise error(f"{str(path)!r} is an address, not the path of a file; {advice}") from None
        turned = str(path).replace("\\", "/")
        advice = f"write {turned}" if turned != str(path) and Path(turned).exists() else "check the path"
        raise FileNotFoundError(f"there is no {what} at {path}; {advice}") from None
    except (OSError, ValueError) as reason:  # loops of links, names that are too long or hold a null
        raise error(f"{str(path)!r} cannot be the name of a file ({_said(reason)}); check the path") from None
    if stat.S_ISDIR(mode):
        raise error(f"{path} is a folder; name the {what} in it")
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise error(f"{path} is {kind}, not {with_article(what)}; copy what it gives into a file first")
    if not os.access(path, os.R_OK):
        raise error(f"{path} may not be read; change its permissions")
    return path


def read_json(
    path: str | os.PathLike[str], what: str, error: type[ValueError] = ValueError, cure: str = "download it again"
) -> object:
    """What a JSON file in UTF-8 says. what: see `check_file`, whose errors it raises; `error`, too, where it is no
    JSON, larger than MAX_JSON, or nested deeper than Python reads; cure: what helps then."""
    path = check_file(path, what, error)
    if path.stat().st_size > MAX_JSON:
        raise error(f"{path} is too large for {with_article(what)} ({path.stat().st_size >> 20} MB); check the path")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError, OSError) as reason:
        raise error(f"{path} is not a readable {what} ({_said(reason)}); {cure}") from None


def printable(text: str) -> str:
    """A text that may hold names out of a file, as one line that a terminal only shows: what is no letter is escaped,
    and the middle of a long one left out."""
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def _said(reason: Exception) -> str:
    """An error in a few words."""
    words = getattr(reason, "strerror", None) or str(reason).splitlines()[:1]
    return (words if isinstance(words, str) else "".join(words))[:120] or type(reason).__name__
