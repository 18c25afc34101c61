"""What the demo model's parts and settings are worth, on ShapeEdit's held-out samples.

    python benchmarks/ablations.py --count 200 --seed 77 --save benchmarks/ablations.json

Guidance, temperature, the scale-aligned reference left out at inference (the first block then sees the whole source,
as the others do), and the source prefix removed (no scale sees the source at all). Prints a table, then one JSON
line; --save also writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import finish, parsed, parser
from varedit_core import Editor, SamplingSettings
from varedit_core.cli.common import hardware
from varedit_core.demo import demo_files
from varedit_core.model.kv_cache import SOURCE
from varedit_core.runtime.kv_caches import DeviceCache
from varedit_core.runtime.workspace import Workspace
from varedit_core.shapeedit.evaluate import draw, evaluate

COLUMNS = ("success", "s", "balance", "psnr", "ssim")
GREEDY = {"temperature": 0.0}


class WholeSource(DeviceCache):
    """A cache whose first block sees the source as it is: no scale-aligned reference."""

    def keep(self, block, first, qkv, query_scale, step):
        return super().keep(block, False, qkv, query_scale, step)

    def seen(self, block, first, step):
        return super().seen(block, False, step)


class NoSource(DeviceCache):
    """A cache in which no scale sees the source."""

    def seen(self, block, first, step):
        keys, values = super().seen(block, first, step)
        if step.index == SOURCE:
            return keys, values
        hidden = self.schedule.tokens[step.index] if first else self.source
        return keys[:, :, hidden:], values[:, :, hidden:]


RUNS = {
    **{f"guidance {g}": (DeviceCache, {"guidance": g, **GREEDY}) for g in (1, 2, 3, 5)},
    "guidance 3, off at the last scale": (DeviceCache, {"guidance": [3] * 6 + [1], **GREEDY}),
    "guidance 3, off at the last three": (DeviceCache, {"guidance": [3] * 4 + [1] * 3, **GREEDY}),
    **{f"temperature {t}": (DeviceCache, {"guidance": 3, "temperature": t}) for t in (0.1, 0.5, 1.0)},
    "no scale-aligned reference": (WholeSource, {"guidance": 3, **GREEDY}),
    "no source prefix": (NoSource, {"guidance": 3, **GREEDY}),
}


TINY = ("guidance 3, off at the last scale", "no scale-aligned reference", "no source prefix")


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--count", type=int, default=200)
    known.add_argument("--seed", type=int, default=77)
    known.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="RUN", help="names of runs")
    known.add_argument("--batch", type=int, default=10)
    options = parsed(known, count=1, only=TINY)
    editor, samples, rows = Editor.load(*demo_files()), draw(options.seed, options.count), {}
    for name in options.only:
        store, settings = RUNS[name]
        editor.workspace = Workspace(store, kept=False)
        *_, whole = evaluate(editor, samples, SamplingSettings(**settings), options.batch).table()
        rows[name] = {column: round(whole[column], 3) for column in COLUMNS}
        print(f"{name:34s}", *(f"{column} {value:7.3f}" for column, value in rows[name].items()), flush=True)
    facts = {"count": options.count, "seed": options.seed, **hardware(editor)}
    finish({"benchmark": "ShapeEdit ablations", **facts, "runs": rows}, options.save)


if __name__ == "__main__":
    main()
