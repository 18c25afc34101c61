"""All files that a command will write, judged together before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.safe_write import check_target
from ..files.tokens import check_target as check_tokens
from ..pictures.images import check_target as check_picture
from ..wording import with_article


@dataclass(frozen=True)
class Result:
    """A file to be written. what: its part in the command, for messages. check(path, overwrite): raises where it cannot
    be written."""

    path: Path
    what: str
    check: Callable[[Path, bool], None] = check_target


def picture(path: Path, what: str = "result", transparent: bool = False) -> Result:
    return Result(path, what, lambda path, overwrite: check_picture(path, transparent, overwrite))


def tokens(path: Path) -> Result:
    return Result(path, "file of tokens", check_tokens)


def check_results(results: Sequence[Result], read: Iterable[Path | None], overwrite: bool) -> None:
    """Raise ValueError where two results have one name, or one would replace a file, or a part of a folder, that the
    command reads; then what writing each would raise. read: these files; None is skipped."""
    inputs = {_place(path): path for path in read if path is not None}
    known: dict[Path, Result] = {}
    for result in results:
        place = _place(result.path)
        if other := known.get(place):
            raise ValueError(
                f"{result.path} would be both {with_article(other.what)} and {with_article(result.what)}; choose "
                "another name for one of them"
            )
        known[place] = result
        if found := next((inputs[one] for one in (place, *place.parents) if one in inputs), None):
            if place == _place(found) or place.exists():
                raise ValueError(
                    f"the {result.what} {result.path} would replace {found}, which is read; choose another"
                )
    for result in results:
        result.check(result.path, overwrite)


def _place(path: Path) -> Path:
    """What a name stands for: without links, and in one spelling."""
    return Path(os.path.normcase(os.path.realpath(path)))
