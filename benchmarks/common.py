"""What the measuring scripts of this folder share: options, a tiny size, fresh processes, and where results go."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
GB, GIB = 1e9, 2**30
T = TypeVar("T")


def parser(about: str, save: Path | None = None) -> argparse.ArgumentParser:
    """A script's options, with the two that all have. about: its docstring. save: the file where none is named."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="as little as shows that the script runs, on any machine")
    own = {"nargs": "?", "const": save} if save else {}
    made.add_argument(
        "--save", "--output", "--json", type=Path, metavar="FILE", help="write the result here, too", **own
    )
    return made


def parsed(options: argparse.ArgumentParser, arguments: Sequence[str] | None = None, **tiny) -> argparse.Namespace:
    """The options' values. tiny: defaults of a tiny run."""
    given = sys.argv[1:] if arguments is None else arguments
    if "--tiny" in given:
        options.set_defaults(**tiny)
    return options.parse_args(given)


def few(values: Iterable[T], options: argparse.Namespace, count: int = 2) -> list[T]:
    """All values; of a tiny run the first and the last, or the first alone."""
    listed = list(values)
    return [listed[0], listed[-1]][:count] if options.tiny else listed


def finish(result: dict, save: Path | None) -> None:
    """Print a result as one JSON line, and write it to a file where one is named."""
    if save:
        save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def fresh(case: str, seconds: float | None = None, **variables: str) -> dict:
    """What this script prints last for one of its cases (`--case`), in a process of its own; "failed" says why there is
    nothing. variables: of its environment."""
    command, environment = [sys.executable, *sys.argv, "--case", case], {**os.environ, **variables}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def device_name() -> str:
    """The GPU by its model, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
