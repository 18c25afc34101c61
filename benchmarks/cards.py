"""Which precision a card of some memory takes, by the planner, and whole edits of the library with that much free.

    python benchmarks/cards.py --folder /scratch --tokenizer T5/tokenizer.json --save benchmarks/cards_<gpu>.json

Writes networks of random weights of the published sizes, in the precisions that `varedit_core.cards` chooses, then
loads each choice and edits three pictures in a fresh process, with all but so many GB of the device taken by another
tensor from the beginning: what loading takes at most counts, too. Prints a table, and one JSON line last. `--tiny` runs
on anything.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comfyui import FILES, ballast, write
from benchmarks.common import GB, ROOT, device_name, finish, fresh, parsed, parser
from benchmarks.library_memory import Said

WANTED = (("2B", "512"), ("8B", "512"), ("8B", "1024"))
EDITS = 3


def choices(options: argparse.Namespace) -> Iterator[tuple[float, str, str, object]]:
    """Memory in GB, model, size, and what is chosen for them (None where nothing fits)."""
    from varedit_core.cards import choose
    from varedit_core.defaults import SIZES

    for limit in options.limits:
        for model, size in WANTED:
            yield limit, model, size, choose(model, SIZES[size], limit * GB, eight=options.eight)


def prepared(folder: Path, model: str, precision: str, text: str) -> None:
    """The files of a choice, where they are not there yet."""
    from varedit_core.bench.models import MODELS
    from varedit_core.files.convert import convert

    sizes = MODELS[model].transformer
    if not (folder / model).exists():
        write(folder / model, sizes.depth, sizes.width, sizes.text_width, model, sizes.token_bits)
    for kind, wanted in (("diffusion_models", precision), ("text_encoders", text)):
        target = file(folder / model, kind, wanted)
        if not target.exists():
            convert(file(folder / model, kind, "bf16"), target, wanted)


def file(folder: Path, kind: str, precision: str) -> Path:
    """A file of a model; random weights are written in bf16."""
    return folder / kind / (FILES[kind] if precision == "bf16" else f"{precision}.safetensors")


def one_case(options: argparse.Namespace, limit: float, model: str, size: str, precision: str, text: str) -> dict:
    """Load and edit within a limit: seconds, the least that was free, and what was said."""
    import numpy as np
    import torch
    from PIL import Image

    from varedit_core import Editor, SamplingSettings
    from varedit_core.defaults import SIZES

    said, cuda, folder = Said(), torch.cuda.is_available(), options.folder / model
    logging.getLogger("varedit_core").addHandler(said)
    taken, watch = ballast(limit), None
    if cuda:
        from benchmarks.comfyui_memory import Peak

        watch, free = Peak(), torch.cuda.mem_get_info()[0]
    begin = time.perf_counter()
    editor = Editor.load(
        file(folder, "diffusion_models", precision), folder / "vae" / FILES["vae"],
        file(folder, "text_encoders", text), options.tokenizer, linears=options.linears,
    )  # fmt: skip
    facts: dict = {"load_seconds": round(time.perf_counter() - begin, 1), "seconds": []}
    side = int(size)
    for n in range(EDITS):
        noise = np.random.default_rng(n).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        begin = time.perf_counter()
        editor.edit(picture, "make it a rainy night", size=SIZES[size], settings=SamplingSettings(seed=n))
        facts["seconds"].append(round(time.perf_counter() - begin, 3))
    facts |= {"store": editor.workspace.kind.__name__, "said": list(dict.fromkeys(said.lines))}
    if cuda:
        facts |= {"peak_gb": round((free - watch.stop()) / GB, 2), "free_gb": round(free / GB, 2)}
        del taken
    return facts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--tokenizer", type=Path, help="of T5: a tokenizer.json")
    options.add_argument("--limits", type=float, nargs="*", default=[6, 8, 12, 16, 24])
    options.add_argument("--eight", default="fp8", help="the 8-bit precision that the card multiplies")
    options.add_argument("--linears", default="8-bit", help="of what is stored in 8 bits: exact or 8-bit")
    options.add_argument("--seconds", type=float, help="the longest that a case may take")
    options.add_argument("--case", help=argparse.SUPPRESS)
    args = parsed(options, limits=[8], tokenizer=ROOT / "demo" / "text_encoders")
    if args.case:
        limit, *rest = args.case.split(",")
        print(json.dumps(one_case(args, float(limit), *rest)))
        return
    cases, known = [], {}
    for limit, model, size, choice in choices(args):
        case = {"limit_gb": limit, "model": model, "size": size}
        if choice is None:
            cases.append(case)
            print(limit, model, size, "nothing runs whole", flush=True)
            continue
        precisions = {"precision": choice.precision, "text_precision": choice.text_precision}
        case |= precisions | {
            "text_on_host": choice.text_on_host,
            "store": choice.plan.store,
            "needed_gb": round(choice.needed / GB, 2),
        }
        tried = ("tiny", "256") if args.tiny else (model, size)
        prepared(args.folder, tried[0], *precisions.values())
        alike = (model, size, *precisions.values(), replace(choice.plan, reasons=()), choice.text_on_host)
        if alike in known:  # the same way, with more left
            case["as_with_gb"] = known[alike]
        else:
            known[alike] = limit
            case["measured"] = fresh(",".join(map(str, (limit, *tried, *precisions.values()))), args.seconds)
        cases.append(case)
        print(json.dumps(cases[-1]), flush=True)
        if args.tiny:
            break
    import torch

    result = {"benchmark": "cards", "device": device_name(), "torch": torch.__version__}
    finish(result | {"eight": args.eight, "linears": args.linears, "cases": cases}, args.save)


if __name__ == "__main__":
    main()
