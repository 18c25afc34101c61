"""`varedit bench`: edits of the published sizes with random weights. Thin: options in, tables and JSON out."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from ..cli import common as options
from ..cli.common import console
from ..files.reading import read_json
from ..files.safe_write import check_target, write_json
from ..runtime.devices import device_of
from .cases import KINDS, PLAIN, Case, choose
from .ceilings import Ceilings, measure_ceilings
from .measure import Result, measure
from .models import MODELS, build
from .published import check_clone, measure_published
from .tables import print_case, print_summary

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
"""Where --save keeps results: in a clone of the repository."""


def bench(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}; with commas between.")] = "8B,2B",
    sizes: Annotated[str, typer.Option(help="Sides in pixels, with commas between.")] = "512,1024",
    cases: Annotated[str, typer.Option(help=f"Of {', '.join(KINDS)}; with commas between.")] = PLAIN,
    published: Annotated[
        Optional[Path], typer.Option(help="A clone of HiDream-ai/VAREdit, to be timed beside ours.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed edits a case, after two that are not.")] = 5,
    device: options.Device = None,
    report: Annotated[Optional[Path], typer.Option("--json", help="Write the JSON here too.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the JSON as benchmarks/<gpu>.json of the clone.")] = False,
) -> None:
    """Measure edits with models of random weights, made on the device; JSON is the last line."""
    place = device_of(device)
    if place.type not in ("cuda", "cpu"):
        raise ValueError(f"bench measures CUDA devices and CPUs, not {place.type}; choose another --device")
    chosen = choose(models.split(","), sizes.split(","), cases.split(","))
    if published and all(case.kind != PLAIN for case in chosen):
        raise ValueError(f"--published is timed beside plain edits only; add the case {PLAIN}, or leave it out")
    if place.type == "cpu" and any(case.model != "tiny" for case in chosen):
        raise ValueError("models of these sizes need a GPU; use --models tiny --sizes 256 on a CPU")
    if published:
        check_clone(published)
    targets = _targets(report, save, device_name(place))
    facts = run(chosen, place, repeats, published)
    for target in targets:
        write_json(target, merged(target, facts))
    print(json.dumps(facts))


def merged(target: Path, facts: dict) -> dict:
    """The facts with the cases that a file of the same device and PyTorch has beside them."""
    before = _earlier(target)
    if any(before.get(name) != facts[name] for name in ("benchmark", "device", "torch")):
        return facts
    new = {row["name"] for row in facts["cases"]}
    return {**facts, "cases": [row for row in before["cases"] if row["name"] not in new] + facts["cases"]}


def _targets(report: Path | None, save: bool, device: str) -> list[Path]:
    """The files to write. ValueError, before anything is measured, where one has no folder."""
    targets = ([report] if report else []) + ([FOLDER / f"{short_name(device)}.json"] if save else [])
    for target in targets:
        if not target.parent.is_dir():
            raise ValueError(f"there is no folder {target.parent} for {target.name}; make it, or name another file")
        check_target(target)
        _earlier(target)
    return targets


def _earlier(target: Path) -> dict:
    """What a file of results holds. ValueError where it is of something else."""
    before = read_json(target, "file of results", cure="name another file") if target.is_file() else {}
    if not isinstance(before, dict) or not isinstance(before.get("cases", []), list):
        raise ValueError(f"{target} is no file of results; name another")
    return before


def device_name(device: torch.device) -> str:
    """A GPU's model, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def short_name(device: str) -> str:
    """A device's name as a file name: 'NVIDIA H100 80GB HBM3' -> 'h100'."""
    words = re.sub(r"\b(NVIDIA|GeForce|Tesla|AMD)\b|\b\d+GB\b.*", " ", device)
    return "_".join(re.findall(r"[a-z0-9]+", words.lower())) or "gpu"


def run(chosen: Sequence[Case], device: torch.device, repeats: int, published: Path | None) -> dict:
    """Measure cases and print tables; all that is kept as JSON."""
    ceilings = measure_ceilings(device)
    rows = []
    for model in dict.fromkeys(case.model for case in chosen):
        cases = [case for case in chosen if case.model == model]
        results = _ours(cases, device, repeats)
        theirs = _published(published, cases, device, repeats) if published else {}
        for result in results:
            rows.append({**_row(result, ceilings, theirs), "repeats": repeats, "matmul_tflops": ceilings.matmul_tflops})
            print_case(rows[-1])
    print_summary(rows, ceilings)
    return {
        "benchmark": "edits with models of random weights", "device": device_name(device), "torch": torch.__version__,
        "ceilings": asdict(ceilings), "cases": rows,
    }  # fmt: skip


def _row(result: Result, ceilings: Ceilings, theirs: dict[str, dict]) -> dict:
    row = result.to_json(ceilings)
    if found := theirs.get(result.case.name):
        ratio = found["seconds"]["median"] / row["seconds"]["median"]
        row["published"] = {**found, "ratio": round(ratio, 2)}
    return row


def _ours(cases: Sequence[Case], device: torch.device, repeats: int) -> list[Result]:
    """The cases of one model that fit."""
    results = []
    for linears in dict.fromkeys(case.linears for case in cases):
        console.print(f"{cases[0].model}: making random weights")
        editor = build(cases[0].model, device, linears)
        for case in [case for case in cases if case.linears == linears]:
            try:
                results.append(measure(editor, case, repeats))
            except torch.cuda.OutOfMemoryError:
                console.print(f"{case.name}: the device has too little memory")
            else:
                console.print(f"{case.name}: {results[-1].whole.seconds.median:.3f} s")
        del editor
        _free(device)
    return results


def _published(folder: Path, cases: Sequence[Case], device: torch.device, repeats: int) -> dict[str, dict]:
    """Case name -> seconds and peak of the published implementation; only of plain edits that ran."""
    plain, found = [case for case in cases if case.kind == PLAIN], {}
    try:
        for case, timing in measure_published(folder, plain, device, repeats) if plain else ():
            found[case.name] = {
                "seconds": asdict(timing.seconds), "peak_gib": timing.peak_gib, "reserved_gib": timing.reserved_gib,
            }  # fmt: skip
            console.print(f"{case.name}, published: {timing.seconds.median:.3f} s")
    except Exception as error:  # others' code: whatever it fails with, our own figures are worth keeping
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        console.print(f"the published implementation did not run: {type(error).__name__}: {reason}", soft_wrap=True)
    _free(device)
    return found


def _free(device: torch.device) -> None:
    """Give the memory of networks that nobody holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
