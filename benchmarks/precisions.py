"""What fewer bits cost and save: the share of bits that stay, ShapeEdit, seconds and memory of every precision.

    python benchmarks/precisions.py --save benchmarks/precisions_<gpu>.json

Bits, seconds and memory are of random weights at the published sizes, whose draws are near coin flips: greedy, each
scale given the bits of bf16's run before it. ShapeEdit is of the demo model, trained weights of a small network, in the
types a GPU uses; also with its text encoder in 8 bits. "8-bit" multiplies in 8 bits what is stored so (`--linears`).
Prints a table, and one JSON line last. `--tiny` runs on anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import GB, device_name, finish, fresh, parsed, parser

CASES = ("bf16", "fp8", "fp8 8-bit", "int8", "int8 8-bit", "nvfp4")


def stored(network, precision: str) -> None:
    """Store the matrices of a transformer or text encoder as `convert` would, in place."""
    import torch

    from varedit_core.files.checkpoints import TEXT_ENCODER, TRANSFORMER
    from varedit_core.files.convert import planned
    from varedit_core.model.transformer import Transformer

    part = TRANSFORMER if isinstance(network, Transformer) else TEXT_ENCODER
    for entry in planned(network.state_dict(), part, precision).values():
        if entry.stored and entry.part == "weight":
            layer = network.get_submodule(entry.source.removesuffix(".weight"))
            layer.store(entry.stored, layer.weight)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def real_size(options: argparse.Namespace, model: str, size: str) -> dict:
    """Every precision of one model and size, on one network of random weights that is stored anew each time."""
    import torch

    from varedit_core.bench.cases import Case
    from varedit_core.bench.measure import Runs
    from varedit_core.bench.models import build
    from varedit_core.defaults import SIZES
    from varedit_core.files.checkpoints import TRANSFORMER
    from varedit_core.files.convert import planned
    from varedit_core.model.transformer import Transformer
    from varedit_core.runtime.fp8 import eight_bit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, reference = {}, None
    for case in options.cases:
        precision, _, linears = case.partition(" ")
        editor = build(model, device)
        if precision != "bf16":
            stored(editor.transformer, precision)
        if linears:
            eight_bit(editor.transformer)
        with torch.device("meta"):
            state = Transformer(editor.transformer.config).state_dict()
        file = sum(entry.nbytes for entry in planned(state, TRANSFORMER, precision).values())
        facts = {"file_gb": round(file / GB, 2)}
        bits, equal = logits_of(editor, SIZES[size], reference)
        reference = reference or bits
        facts["equal"] = [round(100 * share, 2) for share in equal]
        runs = Runs(editor, Case("edit", model, size))
        facts |= timed(runs.edit, device, options.runs)
        found[case] = facts
        print(model, size, case, facts, file=sys.stderr, flush=True)
        del editor, runs, bits
    return found


def logits_of(editor, area: str, forced: list | None) -> tuple[list, list[float]]:
    """The bits of a greedy edit, and the share equal to those that are forced on it, by scale."""
    import torch

    from varedit_core import SamplingSettings, schedule_for
    from varedit_core.sampling.batch import EditBatch

    generator, config = torch.Generator(editor.device).manual_seed(1), editor.autoencoder.config
    schedule = schedule_for(area)
    grid = [side * editor.patch for side in schedule.grids[-1]]
    features = torch.randn(1, config.bits, *grid, device=editor.device, generator=generator) * 0.5
    width = editor.transformer.config.text_width
    texts = [torch.randn(20, width, device=editor.device, generator=generator) * 0.2]
    batch = EditBatch.of(features, texts, schedule, SamplingSettings(3.0, temperature=0.0))
    bits, equal = [], []
    for scale in editor.scales(batch):
        bits.append(scale.bits.clone())
        if forced:
            equal.append((scale.bits == forced[scale.index]).float().mean().item())
            scale.bits = forced[scale.index]
    editor.forget()
    return bits, equal


def timed(edit: Callable[[], object], device, runs: int) -> dict:
    """Seconds of an edit, and the most memory of it."""
    import torch

    from varedit_core.bench.clock import timed as measured

    result = measured(edit, device, runs, 3)
    facts = {"seconds": round(result.seconds.median, 4)}
    if device.type == "cuda":
        facts["peak_gb"] = round(torch.cuda.max_memory_allocated() / GB, 2)
    return facts


def shapeedit(options: argparse.Namespace) -> dict:
    """ShapeEdit of the demo model in every precision, files written by `convert`."""
    from varedit_core import Editor, SamplingSettings
    from varedit_core.demo import GUIDANCE, demo_files
    from varedit_core.files.convert import convert
    from varedit_core.shapeedit.evaluate import draw, evaluate

    samples, files, found = draw(options.seed, options.count), demo_files(), {}
    cases = [(case, "") for case in options.cases] + [("bf16", text) for text in options.texts]
    with TemporaryDirectory() as folder:
        for case, text in cases:
            precision, _, linears = case.partition(" ")
            paths = [Path(folder) / f"{precision}.safetensors", files[1], files[2]]
            if not paths[0].exists():
                convert(files[0], paths[0], precision)
            more = {}
            if text:
                paths[2] = Path(folder) / f"text {text}.safetensors"
                convert(files[2], paths[2], text)
                more = {"tokenizer": files[2]}
            editor = Editor.load(*paths, linears="8-bit" if linears else "exact", **more)
            report = evaluate(editor, samples, SamplingSettings(guidance=GUIDANCE), options.batch)
            row = report.table()[-1]
            name = f"text {text}" if text else case
            found[name] = {key: round(row[key], 4) for key in ("success", "s", "balance", "psnr", "ssim")}
            print(name, found[name], file=sys.stderr, flush=True)
    return found


def text_encoder(options: argparse.Namespace) -> dict:
    """flan-t5-xl's encoder of random weights in fewer bits: bytes, seconds, and how far its features move."""
    import torch

    from varedit_core.bench.models import build
    from varedit_core.cards import text_bytes

    device, found, exact = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}, None
    for precision in ("fp16", *options.texts):
        editor = build(options.models[-1], device)
        for name, weight in editor.text.model.named_parameters():
            if name.endswith("SelfAttention.q.weight"):  # as T5 begins: its attention knows no scale
                weight.data *= editor.text.model.config.head_size**-0.5
        if precision != "fp16":
            stored(editor.text.model, precision)
        features = editor.encode_text(["a"])[0].float()
        exact = features if exact is None else exact
        seconds = timed(partial(editor.encode_text, ["a"]), device, 3)["seconds"]
        error = ((features - exact).norm() / exact.norm()).item()
        size = text_bytes("bf16" if precision == "fp16" else precision)
        found[precision] = {"file_gb": round(size / GB, 2), "seconds": seconds, "moved": round(100 * error, 2)}
        print(precision, found[precision], file=sys.stderr, flush=True)
        del editor
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="*", default=["2B", "8B"])
    options.add_argument("--sizes", nargs="*", default=["512", "1024"])
    options.add_argument("--cases", nargs="*", default=list(CASES))
    options.add_argument("--texts", nargs="*", default=["fp8", "int8", "nvfp4"])
    options.add_argument("--count", type=int, default=500)
    options.add_argument("--seed", type=int, default=2024)
    options.add_argument("--batch", type=int, default=25)
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--parts", nargs="*", default=["sizes", "shapeedit", "text"])
    options.add_argument("--case", help=argparse.SUPPRESS)
    tiny = dict(models=["tiny"], sizes=["256"], cases=["int8 8-bit"], texts=["int8"], count=1, runs=1)
    args = parsed(options, **tiny)
    if args.case:
        kind, _, rest = args.case.partition(",")
        made = {"shapeedit": shapeedit, "text": text_encoder}
        print(json.dumps(made[kind](args) if kind in made else real_size(args, *rest.split(","))))
        return
    import torch

    result = {"benchmark": "precisions", "device": device_name(), "torch": torch.__version__, "count": args.count}
    result["cases"] = []
    if "sizes" in args.parts:
        for model in args.models:
            for size in args.sizes:
                rows = fresh(f"sizes,{model},{size}")
                for name, facts in rows.items() if "failed" not in rows else [("all", rows)]:
                    result["cases"].append({"model": model, "size": size, "precision": name} | facts)
                    print(told(result["cases"][-1]), flush=True)
    for part in ("shapeedit", "text"):
        if part in args.parts:
            result[part] = fresh(part)
            print(part, json.dumps(result[part]), flush=True)
    finish(result, args.save)


def told(row: dict) -> str:
    """A row of the table."""
    name = f"{row['model']} {row['size']} {row['precision']}"
    if "failed" in row:
        return f"{name}: failed: {row['failed']}"
    text = f"{name:22} {row['file_gb']} GB, {row['seconds']} s, peak {row.get('peak_gb')} GB"
    shares = row["equal"]
    more = f", bits {min(shares):.2f} to {max(shares):.2f}, mean {statistics.mean(shares):.2f} %" if shares else ""
    return text + more


if __name__ == "__main__":
    main()
