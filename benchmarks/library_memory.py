"""Whole edits through `Editor.edit` when a GPU has little memory: the way that is planned, seconds, traffic, result.

    python benchmarks/library_memory.py --limits 0 32 24 --save benchmarks/library_memory_<gpu>.json

Models of random weights of the 8B sizes at 1024 pixels. All but a limit (GiB) of the device is taken by another tensor;
0 leaves all. A fresh process a case. Seconds include reading and writing the picture; the last of three edits counts,
the first is reported too. "equal": the share of the picture's levels that the first case of the same layers has too.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import GIB, device_name, finish, fresh, parsed, parser


class Said(logging.Handler):
    """What the library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def one_case(limit: float, linears: str, options: argparse.Namespace) -> dict:
    """Edit a picture a few times within a limit. Leaves the result in `options.pictures`, to compare others with."""
    import numpy as np
    import torch
    from PIL import Image

    from varedit_core.bench.models import build
    from varedit_core.sampling.settings import SamplingSettings

    said = Said()
    logging.getLogger("varedit_core").addHandler(said)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    editor = build(options.model, device, linears)
    facts: dict = {"limit_gib": limit, "linears": linears, "seconds": []}
    ballast = None
    if cuda and limit:
        free, total = torch.cuda.mem_get_info()
        ballast = torch.empty(int(free - (limit * GIB - (total - free))), dtype=torch.uint8, device=device)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((1024, 1024), Image.Resampling.BICUBIC)
    for _ in range(options.edits):
        said.lines.clear()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        (result,) = editor.edit(picture, "make it a rainy night", size=options.area, settings=SamplingSettings(seed=1))
        facts["seconds"].append(round(time.perf_counter() - begin, 3))
        editor.workspace.source = ()  # the next edit reads its source, too
    if cuda:
        peak = torch.cuda.max_memory_allocated() - (ballast.nbytes if ballast is not None else 0)
        facts["peak_gib"] = round(peak / GIB, 2)
    facts["store"] = editor.workspace.kind.__name__
    facts["moved_gb"] = {way: round(n / 1e9, 1) for way, n in getattr(editor.workspace, "moved", {}).items()}
    facts["said"] = list(said.lines)
    levels, reference = np.asarray(result), options.pictures / f"{linears}.npy"
    if not reference.exists():
        np.save(reference, levels)
    facts["equal"] = round(float((levels == np.load(reference)).mean()), 4)
    return facts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--limits", type=float, nargs="*", default=[0, 32, 24], help="GiB; 0: all of the device")
    options.add_argument("--linears", nargs="*", default=["exact"])
    options.add_argument("--model", default="8B")
    options.add_argument("--area", default="1M")
    options.add_argument("--pictures", type=Path, default=Path("/tmp"), help="a folder for the results to compare")
    options.add_argument("--edits", type=int, default=3)
    options.add_argument("--case", help=argparse.SUPPRESS)
    args = parsed(options, limits=[0], model="tiny", area="0.06M", edits=1)
    if args.case:
        limit, linears = args.case.split(",")
        print(json.dumps(one_case(float(limit), linears, args)))
        return
    cases = []
    for linears in args.linears:
        for limit in args.limits:
            cases.append({"limit_gib": limit, "linears": linears, **fresh(f"{limit},{linears}")})
            print(json.dumps(cases[-1]), flush=True)
    import torch

    result = {"benchmark": "edits of the library in little memory", "device": device_name(), "torch": torch.__version__}
    finish(result | {"model": args.model, "area": args.area, "cases": cases}, args.save)


if __name__ == "__main__":
    main()
