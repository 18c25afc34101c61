"""`varedit get`: published weights by their name, downloaded and converted; what is here, and whether it is whole."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..cards import Card, beside
from ..files.convert import PRECISIONS
from ..files.reading import printable
from ..hub.catalogue import PRECISION, SETS, parts_of
from ..hub.fetching import Plan, Step, leftovers, plan
from ..hub.finding import all_here, cure
from ..hub.places import originals
from .common import command, console, watching

AUTO = "auto"


@dataclass(frozen=True)
class Wanted:
    """How weights are fetched."""

    precision: Annotated[
        str,
        typer.Option(
            help=f"Of the transformer's matrices: {', '.join((AUTO, *PRECISIONS))}. A VAE is kept in fp32. "
            f"{AUTO}: what the GPU here runs best, {PRECISION} without one."
        ),
    ] = AUTO
    text_precision: Annotated[
        Optional[str],
        typer.Option(
            help=f"The same of the text encoder's: {', '.join(PRECISIONS)}.",
            show_default=f"{beside('fp8')} with a transformer in fewer bits than 16, else its own",
        ),
    ] = None
    comfyui: Annotated[
        Optional[Path],
        typer.Option(help="ComfyUI folder to put the files into.", show_default="a folder of our own"),
    ] = None
    revision: Annotated[
        Optional[list[str]],
        typer.Option(help="OWNER/NAME@REVISION, a commit, branch or tag of a repository; may be given several times."),
    ] = None
    keep_original: Annotated[bool, typer.Option(help="Keep the downloads beside what they are converted to.")] = False
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Download without a question.")] = False

    def plan(self, names: list[str]) -> Plan:
        """What is to be done. Raises as `hub.plan`."""
        precision, card = self.precision, Card.here() if self.precision == AUTO and names else None
        if self.precision == AUTO:
            precision, why = PRECISION, "no GPU is found here"
            if card:
                precision, why = card.advice([parts_of(name)[0].sizes for name in names])
            if names:
                _say(f"precision {precision}: {why}; --precision takes another")
        return plan(names, precision, self.text_precision, self.comfyui, self.revision or (), self.keep_original)

    def check_idle(self, option: str) -> None:
        """ValueError where anything is set, beside an option that fetches nothing."""
        if self != Wanted():
            raise ValueError(f"{option} fetches nothing; name weights alone beside it, and leave out all other options")


@command
def get(
    wanted: Wanted,
    names: Annotated[Optional[list[str]], typer.Argument(help=f"Sets of weights: {', '.join(SETS)}.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say which sets there are, and what of them is here.")] = False,
    check: Annotated[bool, typer.Option(help="Read all that is here, and say what is damaged.")] = False,
) -> None:
    """Download published weights and convert them, so that `varedit edit --weights NAME` finds them.

    What is missing, its size and its licence are said first, and asked about. A run that was interrupted goes on.
    """
    if list_ and check:
        raise ValueError("--list and --check are two questions; ask one of them")
    if list_ or check:
        wanted.check_idle("--list" if list_ else "--check")
        return _list(names or list(SETS)) if list_ else _check(names or [])
    made = wanted.plan(names or [])
    _tell(made)
    made.check_space()
    if made.open and not (wanted.yes or _agreed()):
        console.print("nothing was downloaded")
        raise typer.Exit(1)
    with watching() as watch:
        made.run(watch)
    if made.open:
        _say(f"{_named(made)} here, in {made.place.folder}")


def _agreed() -> bool:
    """Ask. ValueError where nobody can answer."""
    if not sys.stdin.isatty():
        raise ValueError("this asks before it downloads, and there is no terminal to answer on; add --yes")
    return typer.confirm("Download them?", err=True)


def _named(made: Plan) -> str:
    return f"{', '.join(made.names)} {'is' if len(made.names) == 1 else 'are'}"


def _tell(made: Plan) -> None:
    """Say what is here and what will be downloaded, of what licence, to where, and what room it takes."""
    for step in made.steps:
        _say(f"here: {step.weights} ({_size(step.made.bytes)})" if step.made else _missing(step))
    if not made.open:
        return _say(f"{_named(made)} here; there is nothing to download")
    _say(
        f"to download: {_size(made.missing)}; takes about {_size(made.result)} in {made.place.folder}, and at most "
        f"about {_size(made.most)} in between, when a download lies in {originals()} to be converted"
    )


def _missing(step: Step) -> str:
    remote, licence = step.remote, step.remote.licence
    told = licence.get("license_name") or licence.get("license")
    of = f"licence {told}" if told else "its page tells no licence"
    files = "\n".join(f"  {file.name} ({_size(file.bytes)})" for file in remote.files)
    return (
        f"missing: {step.weights}, from {remote.repo} at {remote.revision[:12]} ({of}; {_size(step.missing)} to "
        f"download):\n{files}"
    )


def _list(names: list[str]) -> None:
    """Every set with its parts: published where, here in which precisions."""
    for name in names:
        print(name)
        found = all_here([name])
        for part in parts_of(name):
            own = [one for one in found if one.part == part]
            for one in own:
                lack = one.manifest.lacking(one.weights.parent)
                state = f"NOT WHOLE: {lack[0]}" if lack else _size(one.manifest.bytes)
                print(f"  {part.name}: {one.precision}, {state}, {printable(str(one.path))}")
            if not own:
                print(f"  {part.name}: not here; of {part.repo}")
    for folder, size in leftovers().items():
        print(f"downloads that are kept, or not yet converted: {printable(str(folder))}, {_size(size)}")


def _check(names: list[str]) -> None:
    """Read every file that is here. Exit code 1 where one is not as it was written."""
    found, wrong = all_here(names), 0
    with watching() as watch:
        for one in found:
            faults = one.faults(watch)
            wrong += bool(faults)
            said = f"{'; '.join(faults)}; {cure(one)}" if faults else f"{one.weights}: whole"
            print(printable(said))
    if not found:
        raise ValueError(f"nothing of {', '.join(names) or 'any set'} is here; fetch it with: varedit get NAME")
    if wrong:
        raise typer.Exit(1)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def _size(count: int) -> str:
    """Bytes in words."""
    unit, name = next((one for one in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= one[0]), (1, "bytes"))
    return f"{count / unit:.3g} {name}"
