"""Whole edits through `Editor.edit` when a GPU has little memory: the way the plan chooses, seconds, traffic, the result.

    python benchmarks/library_memory.py --limits 0 32 24 --save benchmarks/library_memory_<gpu>.json

Models of random weights of the 8B sizes at 1024 pixels. All but a limit (GiB) of the device is taken by another tensor;
0 leaves all. A fresh process a case. Seconds include reading and writing the picture; the last of three edits counts,
the first is reported too. "equal": the share of the picture's levels that the first case of the same layers has too.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GIB = 2**30
EDITS = 3


class Said(logging.Handler):
    """What the library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def one_case(limit: float, linears: str, model: str, area: str, pictures: Path) -> dict:
    """Edit a picture a few times within a limit. Leaves the result in `pictures` for others to be compared with."""
    import numpy as np
    import torch
    from PIL import Image

    from varedit_core.bench.models import build
    from varedit_core.sampling.settings import SamplingSettings

    said = Said()
    logging.getLogger("varedit_core").addHandler(said)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    editor = build(model, device, linears)
    facts: dict = {"limit_gib": limit, "linears": linears, "seconds": []}
    ballast = None
    if cuda and limit:
        free, total = torch.cuda.mem_get_info()
        ballast = torch.empty(int(free - (limit * GIB - (total - free))), dtype=torch.uint8, device=device)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((1024, 1024), Image.Resampling.BICUBIC)
    for _ in range(EDITS):
        said.lines.clear()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        (result,) = editor.edit(picture, "make it a rainy night", size=area, settings=SamplingSettings(seed=1))
        facts["seconds"].append(round(time.perf_counter() - begin, 3))
        editor.workspace.source = ()  # the next edit reads its source, too
    if cuda:
        peak = torch.cuda.max_memory_allocated() - (ballast.nbytes if ballast is not None else 0)
        facts["peak_gib"] = round(peak / GIB, 2)
    facts["store"] = editor.workspace.kind.__name__
    facts["moved_gb"] = {way: round(n / 1e9, 1) for way, n in getattr(editor.workspace, "moved", {}).items()}
    facts["said"] = list(said.lines)
    levels, reference = np.asarray(result), pictures / f"{linears}.npy"
    if not reference.exists():
        np.save(reference, levels)
    facts["equal"] = round(float((levels == np.load(reference)).mean()), 4)
    return facts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--limits", type=float, nargs="*", default=[0, 32, 24], help="GiB; 0: all of the device")
    options.add_argument("--linears", nargs="*", default=["exact"])
    options.add_argument("--model", default="8B")
    options.add_argument("--area", default="1M")
    options.add_argument("--pictures", type=Path, default=Path("/tmp"), help="a folder for the results to compare")
    options.add_argument("--save", type=Path)
    options.add_argument("--case", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.case:
        limit, linears = args.case.split(",")
        print(json.dumps(one_case(float(limit), linears, args.model, args.area, args.pictures)))
        return
    cases = []
    for linears in args.linears:
        for limit in args.limits:
            command = [sys.executable, __file__, *sys.argv[1:], "--case", f"{limit},{linears}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                cases.append({"limit_gib": limit, "linears": linears, "failed": done.stderr.strip().splitlines()[-1]})
            else:
                cases.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(cases[-1]), flush=True)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"benchmark": "edits of the library in little memory", "device": device, "torch": torch.__version__}
    result |= {"model": args.model, "area": args.area, "cases": cases}
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
