"""Weight files in ComfyUI's folders: listing them, finding them, and noticing that one was replaced."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..varedit_core.defaults import PUBLISHED_TRANSFORMERS, PUBLISHED_VAES

DEMO = Path(__file__).resolve().parents[1] / "demo"
"""Has a folder for each of ComfyUI's that the demo model has files for."""
NO_FILE = "no file found"
PUBLISHED = {
    "diffusion_models": f"{', '.join(PUBLISHED_TRANSFORMERS[:-1])} or {PUBLISHED_TRANSFORMERS[-1]} of "
    "https://huggingface.co/HiDream-ai/VAREdit",
    "vae": " or ".join(f"{name} ({size})" for size, name in PUBLISHED_VAES.items())
    + " of https://huggingface.co/FoundationVision/infinity",
    "text_encoders": "the encoder of https://huggingface.co/google/flan-t5-xl",
}
"""Where the files of a folder are published."""


def add_demo_folders() -> None:
    """Show the demo model's files in ComfyUI's lists; a file of the user's with the same name comes first."""
    for folder in DEMO.iterdir() if DEMO.is_dir() else ():
        if folder.is_dir():
            folder_paths.add_model_folder_path(folder.name, str(folder))


def listed(folder: str) -> list[str]:
    """The choices of a folder; never empty, as an empty list would show "undefined" and fail as a missing link."""
    return names(folder) or [NO_FILE]


def names(folder: str) -> list[str]:
    """The files of a folder, with "/" between folders on every system: a graph made on one names its files on
    another, and the page compares names letter by letter. ComfyUI finds files by either."""
    return [name.replace(os.sep, "/") for name in folder_paths.get_filename_list(folder)]


def find(folder: str, name: str) -> Path:
    """The path of a file. ValueError, saying where it belongs and where it is published, where it is not there."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(_missing(folder, name))
    return Path(path)


def check(folder: str, name: str | None) -> bool | str:
    """What a loader's `validate_inputs` answers: True, or what is missing. A linked name (None) is not known yet."""
    return True if name is None or folder_paths.get_full_path(folder, name) else _missing(folder, name)


def _missing(folder: str, name: str) -> str:
    lack = f"{name} is not" if name != NO_FILE else "there is no file"
    return f"{lack} in ComfyUI's folder models/{folder}; put {PUBLISHED[folder]} there, press R and choose it"


def stamp(path: Path | str | None):
    """Changes when the file does; nan, which never equals itself, where there is none or its name is not known."""
    if path is None or not Path(path).exists():
        return float("nan")
    status = Path(path).stat()
    return str(path), status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


def fingerprint(folder: str, name: str | None):
    """`stamp` of a file by its name in a folder; of a linked name (None) only the name itself counts."""
    return stamp(folder_paths.get_full_path(folder, name)) if name else None
