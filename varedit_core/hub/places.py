"""Where fetched weights lie: a folder of our own, or the `models` of a ComfyUI, both in ComfyUI's layout.

The folder of our own remembers which ComfyUIs were given, so that weights are found wherever `varedit get` put them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..files.checkpoints import TEXT_ENCODER
from ..files.reading import read_json
from ..files.safe_write import make_folder, write_json
from .catalogue import FOLDERS, Part

HOME = "VAREDIT_HOME"
"""The environment's variable that names the folder of our own."""
_SIGNS = ("main.py", "folder_paths.py", "custom_nodes")
"""What lies in a ComfyUI folder, or in the base folder that ComfyUI's desktop application keeps apart from its code."""


def home() -> Path:
    """The folder of our own: what VAREDIT_HOME names, else `varedit` where the platform keeps caches."""
    if named := os.environ.get(HOME):
        return Path(named).expanduser().absolute()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "varedit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "varedit"
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "varedit"


def originals() -> Path:
    """Where downloads lie until they are converted."""
    return home() / "originals"


@dataclass(frozen=True)
class Place:
    """A folder of models in ComfyUI's layout."""

    folder: Path

    def weights(self, part: Part, precision: str) -> Path:
        """The file of a part's converted weights. A text encoder's is in a folder of its own, with its tokenizer."""
        stem, folder = part.stem(precision), self.folder / FOLDERS[part.what]
        return (folder / stem if part.what == TEXT_ENCODER else folder) / f"{stem}.safetensors"

    def path(self, part: Part, precision: str) -> Path:
        """What is named to load it: the file, or the text encoder's folder."""
        file = self.weights(part, precision)
        return file.parent if part.what == TEXT_ENCODER else file


def own() -> Place:
    """The place where weights go unless another is named."""
    return Place(home() / "models")


def of_comfyui(folder: Path) -> Place:
    """The models of a ComfyUI. ValueError for a folder that is none."""
    folder = folder.expanduser().absolute()
    models = folder / "models"
    if models.is_dir() and any((folder / sign).exists() for sign in _SIGNS):
        return Place(models)
    if folder.name == "models" and any((folder.parent / sign).exists() for sign in _SIGNS):
        raise ValueError(f"{folder} is the folder of ComfyUI's models; name the folder above it, {folder.parent}")
    lack = "does not exist" if not folder.exists() else "is no ComfyUI folder: there is no models beside main.py in it"
    raise ValueError(f"{folder} {lack}; name the folder that ComfyUI was installed to, or leave --comfyui out")


def remember(place: Place) -> None:
    """Note a place, so that its weights are found. Raises as `files.safe_write`."""
    known = places()
    if place not in known:
        make_folder(home())
        write_json(_list(), [str(one.folder) for one in (*known[1:], place)])


def places() -> list[Place]:
    """All places: the own one first, then those of ComfyUI in the order in which they were given. ValueError where the
    list of them is damaged."""
    if not _list().exists():
        return [own()]
    cure = "delete it, and run varedit get once more for each ComfyUI"
    listed = read_json(_list(), "list of folders", cure=cure)
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise ValueError(f"{_list()} is not a readable list of folders; {cure}")
    return [own(), *(Place(Path(one)) for one in listed)]


def _list() -> Path:
    return home() / "places.json"
