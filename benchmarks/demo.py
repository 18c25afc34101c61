"""What the demo model costs on this machine's CPU: `python benchmarks/demo.py [--threads N] [--save]`.

A fresh process imports, loads and edits one photograph at 256 pixels with guidance on. Prints a table and one JSON
line; --save writes it to demo_cpu.json (or to another file), from which `render.py` fills the table of docs/SPEED.md.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import FOLDER, ROOT, finish, parsed, parser

RECORD = FOLDER / "demo_cpu.json"
PICTURE, INSTRUCTION = ROOT / "samples" / "cat.jpg", "make it sepia"


def measure(threads: int, repeats: int) -> dict:
    """Seconds of every step, of edits the median of `repeats`, and the process's peak memory."""
    seconds, begin = {}, time.perf_counter()

    def step(name: str) -> None:
        nonlocal begin
        seconds[name] = time.perf_counter() - begin
        begin = time.perf_counter()

    import torch

    step("import_torch")
    from varedit_core import Editor
    from varedit_core.demo import SIZE, demo_files

    torch.set_num_threads(threads)
    step("import_varedit")
    editor = Editor.load(*demo_files(), device="cpu")
    step("load")
    editor.edit(PICTURE, INSTRUCTION, size=SIZE)
    step("first_edit")
    times = []
    for _ in range(repeats):
        editor.forget()  # the same picture again would find its source read
        begin = time.perf_counter()
        editor.edit(PICTURE, INSTRUCTION, size=SIZE)
        step("edit")
        times.append(seconds["edit"])
    seconds["edit"] = statistics.median(times)
    fitted = editor.fit(PICTURE, SIZE)
    features = editor.encode_source([fitted])
    step("encode_source")
    editor.decode(features, [fitted])
    step("decode")
    # Linux counts KiB, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    count = sum(p.numel() for p in editor.transformer.parameters())
    return {
        "device": "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "transformer_parameters": count,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_gb": round(peak / 1e9, 3),
    }


def main() -> None:
    known = parser(__doc__, save=RECORD)
    known.add_argument("--threads", type=int, default=2)
    known.add_argument("--repeats", type=int, default=5)
    options = parsed(known, repeats=1)
    facts = measure(options.threads, options.repeats)
    for name, value in (*facts["seconds"].items(), ("peak_gb", facts["peak_gb"])):
        print(f"{name:<22}{value:>9.3f}")
    finish(facts, options.save)


if __name__ == "__main__":
    main()
