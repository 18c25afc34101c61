"""What every writer asks of the file it is to write."""

from __future__ import annotations

from pathlib import Path


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a file may not be replaced, ValueError where a folder has the name."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists; choose another name or allow overwriting (--overwrite, in Python overwrite=True)"
        )


def make_folder(path: Path) -> None:
    """Make a folder with those above it. ValueError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path} ({error.strerror}); choose another") from error
