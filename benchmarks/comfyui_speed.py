"""Whole edits inside ComfyUI beside the library's: as ComfyUI starts by itself, and with whole static weights.

    python benchmarks/comfyui_speed.py --folder /scratch --save benchmarks/comfyui_speed_<gpu>.json

Run it with the Python that runs ComfyUI. Writes networks of the published sizes and random weights, then edits a new
picture each time, a fresh process a case, all on one machine in one call: the library (`varedit bench`), ComfyUI's
executor over the graph Source Encode, Sampler, Decode, and, with --published CLONE, the published code. A text is
encoded once and cached, as ComfyUI does. Prints a table and one JSON line last. `--tiny` runs on anything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comfyui import ALLOCATOR, FILES, Graph, ballast, start_comfyui, write
from benchmarks.common import GB, ROOT, device_name, finish, fresh, parsed, parser

WAYS = {"default": ("dynamic", "cudaMallocAsync"), "static": ("static", "native")}
"""How ComfyUI is started: its way to manage memory (see `comfyui.KINDS`), and torch's allocator."""
EDITS = ("plain", "lora", "fp8", "int8", "nvfp4")
"""With the bf16 file, a LoRA for it, and files of other precisions beside a text encoder in int8."""
OURS = ("source", "sampler", "decode")
"""Nodes of an edit that run again for every picture."""
LORA_RANK = 16
TEXT = "int8.safetensors"


def prepared(options: argparse.Namespace, further: Iterable[str] = ()) -> None:
    """Networks of each model in a folder of its own, a LoRA and files of other precisions where edits want them.
    further: edits beside those of the options."""
    import torch
    from safetensors.torch import save_file

    from varedit_core.bench.models import MODELS
    from varedit_core.files.convert import PRECISIONS, convert

    for name in options.models:
        folder, sizes = options.folder / name, MODELS[name].transformer
        original = folder / "diffusion_models" / FILES["diffusion_models"]
        if not original.exists():
            write(folder, sizes.depth, sizes.width, sizes.text_width, name, sizes.token_bits)
        wanted = {edit for edit in (*options.edits, *further) if edit in PRECISIONS}
        for precision in sorted(wanted):
            if not (target := folder / "diffusion_models" / f"{precision}.safetensors").exists():
                convert(original, target, precision)
        if wanted and not (target := folder / "text_encoders" / TEXT).exists():
            convert(folder / "text_encoders" / FILES["text_encoders"], target, "int8")
        if "lora" in options.edits:
            (folder / "loras").mkdir(exist_ok=True)
            torch.manual_seed(3)
            state = {}
            for block in range(sizes.depth):
                key, width = f"diffusion_model.blocks.{block}.sa.mat_qkv", sizes.width
                state[f"{key}.lora_A.weight"] = torch.randn(LORA_RANK, width) * width**-0.5
                state[f"{key}.lora_B.weight"] = torch.randn(3 * width, LORA_RANK) * 0.02
            save_file({key: x.bfloat16() for key, x in state.items()}, folder / "loras" / "lora.safetensors")


def library(options: argparse.Namespace, model: str, size: str) -> dict:
    """Seconds of a whole edit and of another seed, by the library."""
    kinds = "edit,reroll" + (",8-bit" if "fp8" in options.edits else "")
    cases = ["--models", model, "--sizes", size, "--cases", kinds, "--repeats", str(options.runs)]
    more = ["--published", str(options.published)] if options.published else []
    command = [sys.executable, "-m", "varedit_core", "bench", *cases, *more]
    variables = {**os.environ, ALLOCATOR: "backend:native", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    if done.returncode:
        return {"way": "library", "model": model, "size": size, "failed": done.stderr.strip().splitlines()[-1]}
    rows = {case["kind"]: case for case in json.loads(done.stdout.splitlines()[-1])["cases"]}
    facts = {"way": "library", "model": model, "size": size, "edit": "plain"}
    facts |= {"all": rows["edit"]["seconds"]["median"], "other_seed": rows["reroll"]["seconds"]["median"]}
    facts |= {"eight_bit": rows["8-bit"]["seconds"]["median"]} if "8-bit" in rows else {}
    published = rows["edit"].get("published")
    return facts | ({"published": published["seconds"]["median"]} if published else {})


def prompt(model: str, edit: str, size: str, picture: int, seed: int) -> dict[str, dict]:
    """The graph, its nodes by what the table calls them."""
    plain = edit in ("plain", "lora")
    file = FILES["diffusion_models"] if plain else f"{edit}.safetensors"
    found = {
        "model": node("VAREditModelLoader", model_name=file, precision="auto"),
        "clip": node("VAREditTextEncoderLoader", text_encoder_name=FILES["text_encoders"] if plain else TEXT),
        "vae": node("VAREditVAELoader", vae_name=FILES["vae"]),
        "picture": node("BenchPicture", index=picture),
        "text": node("VAREditTextEncode", clip=["clip", 0], text="make it a rainy night"),
        "source": node("VAREditSourceEncode", vae=["vae", 0], image=["picture", 0], size=size, fit="square"),
        "sampler": node(
            "VAREditSampler", model=["lora" if edit == "lora" else "model", 0], source=["source", 0],
            positive=["text", 0], seed=seed, guidance=3.0, temperature=0.5, preview="off",
        ),
        "decode": node("VAREditDecode", vae=["vae", 0], latent=["sampler", 0]),
        "result": node("BenchResult", image=["decode", 0], latent=["sampler", 0]),
    }  # fmt: skip
    if edit == "lora":
        found["lora"] = node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="lora.safetensors", strength_model=1.0
        )
    return found


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def one_case(options: argparse.Namespace, model: str, size: str, way: str, edit: str, limit: float) -> dict:
    """The first edits one by one, medians of those after them, and of other seeds for the last picture."""
    folder = options.folder / model
    nodes = start_comfyui(folder, options.comfyui, WAYS[way][0])
    import comfy.model_management as mm
    import folder_paths
    import torch

    folder_paths.add_model_folder_path("loras", str(folder / "loras"))
    cuda = torch.cuda.is_available()
    taken = ballast(limit)
    before = torch.cuda.mem_get_info()[0] if cuda else 0
    graph = Graph({n.GET_SCHEMA().node_id: n for n in nodes.values()})
    reading, read = timed_reading(), {}
    torch.manual_seed(2)
    warmups, repeats, more = (3, 2, 0) if limit else (options.warmups, options.runs, 2)  # these take long
    side = int(size)
    graph.images[:] = [torch.randint(256, (1, side, side, 3)) / 255 for _ in range(warmups + repeats)]
    firsts, runs, seeds = [], [], []
    for n in range(warmups + repeats):
        (firsts if n < warmups else runs).append(graph.run(prompt(model, edit, size, n, n), "result"))
        read = read or graph.within(reading)
    for seed in range(repeats + more):
        seeds.append(graph.run(prompt(model, edit, size, warmups + repeats - 1, 1000 + seed), "result"))
    facts = {"way": way, "model": model, "size": size, "edit": edit, "limit_gb": limit, "first": firsts}
    facts |= {"reading": round(sum(read.values()), 2), "kernels": "cold" if options.cold else "warm"}
    facts["beyond"] = round(sum(firsts[0][name] - read.get(name, 0) for name in OURS), 2)
    facts |= {name: round(statistics.median(run[name] for run in runs), 4) for name in (*OURS, "all")}
    facts["spread"] = [min(run["all"] for run in runs), max(run["all"] for run in runs)]
    facts["other_seed"] = round(statistics.median(run["all"] for run in seeds[more:]), 4)
    if cuda:
        facts["ballast_gb"] = round(taken.nbytes / GB, 2) if taken is not None else 0
        facts["allocator"] = torch.cuda.get_allocator_backend()
        facts["taken_gb"] = round((before - torch.cuda.mem_get_info()[0]) / GB, 2)
    loaded = [m for m in mm.loaded_models() if hasattr(m.model, "keeper")]
    facts["recorded"] = sum(len(m.model.keeper(m.load_device).work.recordings) for m in loaded)
    image, latent = graph.results
    facts["checked"] = bool(torch.isfinite(image).all() and image.std() > 0)
    return facts


def timed_reading() -> list[tuple[float, float]]:
    """When ComfyUI brings streamed weights from their files to the device, and for how many seconds, in a list that
    grows: where it does so layer by layer."""
    ops, spans = importlib.import_module("comfy.ops"), []
    cast = ops.cast_bias_weight

    def timed(*arguments, **options):
        begin = time.perf_counter()
        try:
            return cast(*arguments, **options)
        finally:
            spans.append((begin, time.perf_counter() - begin))

    ops.cast_bias_weight = timed
    return spans


def beside(case: dict, library: dict | None) -> dict:
    """A case's ratios: to the library's whole edit of this call and, where that was measured, the published code's."""
    if library is None or "failed" in case:
        return {}
    found = {"over": {name: round(case[name] / library[name], 3) for name in ("all", "other_seed")}}
    if "published" in library:
        found["faster_than_published"] = round(library["published"] / case["all"], 2)
    return found


def told(row: dict) -> str:
    """A row of the table."""
    name = f"{row['model']} {row['size']} {row['way']} {row.get('edit', '')} {row.get('limit_gb') or ''}"
    if "failed" in row:
        return f"{name:32} failed: {row['failed']}"
    parts = [f"{part} {row[part]:.4f}" for part in (*OURS, "all", "other_seed") if part in row]
    ratio = [f"x{row['over']['all']:.3f} x{row['over']['other_seed']:.3f}"] if "over" in row else []
    if "faster_than_published" in row:
        ratio.append(f"{row['faster_than_published']:.2f} times as fast as the published code")
    firsts = []
    if "first" in row:
        spans = " ".join(f"{run['all']:.2f}" for run in row["first"])
        firsts.append(f"first {spans} with {row['kernels']} kernels, of which reading {row['reading']}")
        firsts.append(f"{row['beyond']} beyond it in source, sampler and decode")
    more = [f"recorded {row['recorded']}, took {row.get('taken_gb')} GB"] if "recorded" in row else []
    return f"{name:32} " + ", ".join([*parts, *ratio, *firsts, *more])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--comfyui", type=Path, default=Path.home() / "comfy" / "ComfyUI")
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--published", type=Path, help="a clone of HiDream-ai/VAREdit")
    options.add_argument("--models", nargs="*", default=["8B", "2B"])
    options.add_argument("--sizes", nargs="*", default=["512", "1024"])
    options.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    options.add_argument("--edits", nargs="*", default=list(EDITS), choices=EDITS)
    options.add_argument("--limits", type=float, nargs="*", default=[0, 24, 16, 12], help="GB free; 0: all")
    options.add_argument(
        "--free", type=lambda text: (float(text.split("=")[0]), text.split("=")[1]), nargs="*", default=[],
        metavar="GB=EDIT", help="further edits with that much free, such as 12=int8",
    )  # fmt: skip
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--warmups", type=int, default=3)
    options.add_argument("--seconds", type=float, help="the longest that a case may take")
    options.add_argument("--cold", action="store_true", help="let every case compile its kernels anew")
    options.add_argument("--case", help=argparse.SUPPRESS)
    tiny = dict(models=["tiny"], sizes=["256"], ways=["static"], edits=["plain", "lora"], limits=[0])
    tiny |= dict(runs=1, warmups=1)
    args = parsed(options, **tiny)
    if args.case:
        model, size, way, edit, limit = args.case.split(",")
        print(json.dumps(one_case(args, model, size, way, edit, float(limit))))
        return
    prepared(args, (edit for _, edit in args.free))
    cases, whole = [], {}
    for model in args.models:
        for size in args.sizes:
            cases.append(library(args, model, size))
            whole |= {(model, size): cases[-1]} if "failed" not in cases[-1] else {}
            print(told(cases[-1]), flush=True)
            for way, edit, limit in rows(args):
                variables = {ALLOCATOR: f"backend:{WAYS[way][1]}"}
                with TemporaryDirectory() as kernels:
                    variables |= {"TRITON_CACHE_DIR": kernels} if args.cold else {}
                    found = fresh(f"{model},{size},{way},{edit},{limit}", args.seconds, **variables)
                case = {"way": way, "model": model, "size": size, "edit": edit, "limit_gb": limit} | found
                cases.append(case | beside(case, whole.get((model, size))))
                print(told(cases[-1]), flush=True)
    import torch

    result = {"benchmark": "whole edits inside ComfyUI and in the library", "device": device_name()}
    finish(result | {"torch": torch.__version__, "cases": cases}, args.save)


def rows(args: argparse.Namespace) -> list[tuple[str, str, float]]:
    """The cases of a model and size: every way and edit with all of the device, and plain edits in less of it."""
    free = [(way, edit, 0.0) for way in args.ways for edit in args.edits if 0 in args.limits]
    plain = [(way, "plain", limit) for way in args.ways for limit in args.limits if limit]
    return free + plain + [(way, edit, limit) for way in args.ways for limit, edit in args.free]


if __name__ == "__main__":
    main()
