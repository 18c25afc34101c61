"""What each shortcut costs in quality: ShapeEdit with the demo model, in the types a GPU uses, against the exact run.

    python benchmarks/shortcuts.py --count 200 --seed 77 --save benchmarks/shortcuts.json

The demo model runs seven scales, so late means the last of these; windows see an eighth of the height each way, the
refiner is the demo's small one. Prints a table, then one JSON line; --save also writes it. What each is worth in time
is measured by `varedit bench` at the published sizes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import finish, parsed, parser
from varedit_core import Editor, SamplingSettings, load_transformer
from varedit_core.cli.common import hardware
from varedit_core.controls.registry import NO_SHORTCUTS, Shortcuts
from varedit_core.demo import FOLDER, GUIDANCE, demo_files
from varedit_core.runtime.eight_bit_cache import EightBitCache
from varedit_core.runtime.workspace import Workspace
from varedit_core.shapeedit.evaluate import draw, evaluate

COLUMNS = ("success", "s", "balance", "psnr", "ssim")
REFINER = FOLDER / "diffusion_models" / "varedit_demo_refiner.safetensors"
RUNS: dict[str, dict] = {
    "exact": {},
    **{f"unguided {count}": {"shortcuts": Shortcuts(unguided=count)} for count in (1, 2, 3, 4)},
    "window": {"shortcuts": Shortcuts(window=0.125)},
    "masked": {"masked": True},
    **{f"inside {count}": {"masked": True, "shortcuts": Shortcuts(inside=count)} for count in (3, 6)},
    "draft": {"shortcuts": Shortcuts(stop=5)},
    "drafted 5": {"shortcuts": Shortcuts(drafted=5)},
    "8-bit linears": {"linears": "8-bit"},
    "8-bit keys and values": {"store": EightBitCache},
    "8-bit all": {"linears": "8-bit", "store": EightBitCache},
    "unguided 3, 8-bit linears": {"linears": "8-bit", "shortcuts": Shortcuts(unguided=3)},
    **{
        f"unguided 3, 8-bit linears, inside {count}": {
            "linears": "8-bit", "masked": True, "shortcuts": Shortcuts(unguided=3, inside=count),
        } for count in (3, 6)
    },
}  # fmt: skip


def measure(run: dict, samples, batch: int, device: torch.device) -> tuple[dict, Editor]:
    shortcuts, linears = run.get("shortcuts", NO_SHORTCUTS), run.get("linears", "exact")
    editor = Editor.load(*demo_files(), linears=linears, device=device)
    if "store" in run:
        editor.workspace = Workspace(run["store"], kept=False)
    if shortcuts.drafted:
        editor.drafter = editor.transformer
        editor.transformer = load_transformer(REFINER, dtype=editor.transformer.dtype, device=editor.device)
    settings = SamplingSettings(guidance=GUIDANCE)
    batch = 1 if shortcuts.inside else batch  # a batch computes what any of its masks covers
    report = evaluate(editor, samples, settings, batch, shortcuts=shortcuts, masked=run.get("masked", False))
    return report.table()[-1], editor


TINY = ("inside 3", "draft", "drafted 5", "8-bit all")


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--count", type=int, default=200)
    known.add_argument("--seed", type=int, default=77)
    known.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="RUN", help="names of runs")
    known.add_argument("--batch", type=int, default=20)
    known.add_argument("--device")
    options = parsed(known, count=1, only=TINY)
    samples, rows = draw(options.seed, options.count), {}
    for name in options.only:
        whole, editor = measure(RUNS[name], samples, options.batch, options.device)
        rows[name] = {column: round(whole[column], 4) for column in COLUMNS}
        print(f"{name:36s}", *(f"{column} {value:7.3f}" for column, value in rows[name].items()), flush=True)
    result = {"benchmark": "ShapeEdit shortcuts", "count": options.count, "seed": options.seed, **hardware(editor)}
    finish(result | {"ceiling_psnr": round(whole["ceiling_psnr"], 2), "runs": rows}, options.save)


if __name__ == "__main__":
    main()
