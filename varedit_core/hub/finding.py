"""The weights that `varedit get` put on this machine: where they are, and whether they are still whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cards import beside
from ..files.convert import PRECISIONS
from .catalogue import PRECISION, SETS, Part, check_precision, parts_of
from .manifest import Manifest, Watch
from .places import Place, places

ORDER = (PRECISION, *(one for one in PRECISIONS if one != PRECISION))
"""Of several precisions that are here the first is taken."""


@dataclass(frozen=True)
class Found:
    """A part that is here."""

    part: Part
    precision: str
    place: Place
    manifest: Manifest

    @property
    def weights(self) -> Path:
        return self.place.weights(self.part, self.precision)

    @property
    def path(self) -> Path:
        """What is named to load it."""
        return self.place.path(self.part, self.precision)

    def faults(self, watch: Watch = lambda *_: None) -> list[str]:
        """Sentences for what is wrong with its files, all of which are read."""
        return list(self.manifest.faults(self.weights.parent, watch))


def here(part: Part) -> Iterator[Found]:
    """A part's files, whole or not, in the order in which one is chosen. ValueError for a damaged manifest."""
    for precision in ORDER:
        for place in places():
            manifest = Manifest.read(place.weights(part, precision))
            if manifest:
                yield Found(part, precision, place, manifest)


def find(name: str, precision: str | None = None, text: str | None = None) -> tuple[Path, Path, Path]:
    """Transformer, VAE and text encoder of a set, as `Editor.load` takes them.

    precision, text: of transformer and text encoder; by default bf16, else the one with most bits that is here, of text
    encoders first the one that `varedit get` takes beside that transformer. ValueError, which says what to run, where a
    part is not here or not whole.
    """
    transformer, vae, encoder = parts_of(name)
    for given in (precision, text):
        check_precision(given)
    first = _one(name, transformer, [precision] if precision else [])
    wanted = [text] if text else [beside(first.precision), *ORDER]
    return first.path, _one(name, vae, []).path, _one(name, encoder, wanted, "--text-precision").path


def vae_of(name: str) -> Path:
    """The VAE of a set. ValueError as `find`."""
    return _one(name, parts_of(name)[1], []).path


def _one(name: str, part: Part, precisions: Sequence[str], option: str = "--precision") -> Found:
    """The part in the first of these precisions that is here; of any where none is named."""
    found = list(here(part))
    wanted = [one for want in precisions or ORDER for one in found if one.precision == want]
    if not wanted:
        asked = f" {option} {precisions[0]}" if precisions and len(precisions) == 1 else ""
        have = f", but in {', '.join(dict.fromkeys(one.precision for one in found))}" if found else ""
        kind = f" in {precisions[0]}" if asked else ""
        raise ValueError(
            f"{part.name} of the weights {name} is not here{kind}{have}; fetch it with: varedit get {name}{asked}"
        )
    lacks = [one.manifest.lacking(one.weights.parent) for one in wanted]
    whole = [one for one, lack in zip(wanted, lacks) if not lack]
    if not whole:
        raise ValueError(f"{lacks[0][0]}; {cure(wanted[0], name)}")
    return whole[0]


def all_here(names: Sequence[str] = ()) -> list[Found]:
    """The parts of these sets, or of all, that are here."""
    parts = dict.fromkeys(part for name in names or SETS for part in parts_of(name))
    return [found for part in parts for found in here(part)]


def set_of(part: Part) -> str:
    """The first set that a part belongs to."""
    return next(name for name, parts in SETS.items() if part in parts)


def cure(found: Found, name: str | None = None) -> str:
    """What to do about a part with faults."""
    command = f"varedit get {name or set_of(found.part)}"
    option = "--text-precision" if found.part.beside else "--precision"
    command += f" {option} {found.precision}" if found.precision != found.part.precision(PRECISION) else ""
    if found.place != places()[0]:
        command += f" --comfyui {found.place.folder.parent}"
    return f"delete what is left of it and run: {command}"
