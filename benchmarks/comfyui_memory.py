"""Edits of the 8B size inside ComfyUI when little device memory is free: seconds, peak memory, and whether bits change.

    python benchmarks/comfyui_memory.py --folder /scratch --save benchmarks/comfyui_memory_<gpu>.json

Run it with the Python that runs ComfyUI. Writes a transformer, a VAE and a T5 encoder of the published sizes and
random weights, then edits the same pictures through the pack's nodes in a fresh process a case: with all of the device,
and with all but a limit of it taken by another tensor; with ComfyUI's two kinds of memory management. Prints a table
and one JSON line last. `--tiny` runs on anything, ComfyUI's CPU mode included. PYTORCH_CUDA_ALLOC_CONF says
which of torch's allocators is used, `backend:native` or `backend:cudaMallocAsync`; ComfyUI's choice without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comfyui import FILES, KINDS, ballast, start_comfyui, write
from benchmarks.common import GB, device_name, finish, fresh, parsed, parser


class Peak:
    """The most device memory taken since `reset`, by the device's own account, asked every few milliseconds."""

    def __init__(self) -> None:
        import torch

        self.torch, self.least, self.over = torch, 0, threading.Event()
        self.reset()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()

    def reset(self) -> None:
        self.least = self.torch.cuda.mem_get_info()[0]

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.least = min(self.least, self.torch.cuda.mem_get_info()[0])

    def stop(self) -> int:
        """Bytes that were free at the worst moment; ends the watch."""
        self.over.set()
        self.watcher.join()
        return self.least


def compared(folder: Path, size: str, **tensors) -> dict:
    """The share of numbers equal to the first case's: of the edit, and of what went into the sampler."""
    import torch

    reference = folder / f"reference_{size}.pt"
    if not reference.exists():
        torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, reference)
    expected = torch.load(reference, weights_only=True)
    return {f"equal_{name}": round((x.cpu() == expected[name]).float().mean().item(), 5) for name, x in tensors.items()}


def one_case(options: argparse.Namespace, limit: float, kind: str) -> dict:
    """Edit `options.runs` pictures; the times of each, and what the last took. Then the last one with another seed.

    Only two, and no other seed, where nothing stays between edits: more would be as the second. Where `options.file`
    names two transformers, with a + between them, both are loaded and edit in turns.
    """
    folder, comfyui, file, size, runs = (getattr(options, n) for n in ("folder", "comfyui", "file", "size", "runs"))
    nodes = start_comfyui(folder, comfyui, kind)
    import comfy.model_management as mm
    import torch

    torch.backends.cudnn.deterministic = kind == "deterministic"
    cuda = torch.cuda.is_available()
    taken = ballast(limit)
    before = torch.cuda.mem_get_info()[0] if cuda else 0
    torch.manual_seed(2)
    images = [torch.rand(1, 700, 1000, 3) for _ in range(runs)]
    facts: dict = {"limit_gb": limit, "kind": kind, "file": file, "size": size, "seconds": []}
    facts["allocator"] = torch.cuda.get_allocator_backend() if cuda else None
    said: list[str] = []
    sys.modules["varedit_pack.nodes.sampler"].tell = lambda node, text: said.append(text)

    def timed(name: str, function, *arguments):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = function(*arguments).result
        if cuda:
            torch.cuda.synchronize()
        times[name] = round(time.perf_counter() - begin, 3)
        return result

    with torch.inference_mode():
        times: dict = {}
        models = [timed("load Model", nodes["VAREditModelLoader"].execute, name, "auto")[0] for name in file.split("+")]
        clip, vae = (
            timed(f"load {part}", nodes[f"VAREdit{part}Loader"].execute, FILES[name])[0]
            for part, name in (("TextEncoder", "text_encoders"), ("VAE", "vae"))
        )
        model = models[0]
        facts["load_seconds"] = times
        facts["plan"] = nodes["VAREditMemoryPlan"].execute(model, size, 1, True).result[0].splitlines()
        peak = Peak() if cuda else None
        left = runs * len(models)
        while left:
            model, image = models[-left % len(models)], images[(left - 1) // len(models)]
            left -= 1
            times, said[:] = {}, []
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                peak.reset()
            (text,) = timed("text", nodes["VAREditTextEncode"].execute, clip, "make it a rainy night")
            (source,) = timed("source", nodes["VAREditSourceEncode"].execute, vae, image, size, "square")
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            latent, *_ = timed("sampler", nodes["VAREditSampler"].execute, model, source, text, 0, 3.0, 0.1)
            if cuda:
                facts["sampler_allocated_gb"] = round(torch.cuda.max_memory_allocated() / GB, 2)
            timed("decode", nodes["VAREditDecode"].execute, vae, latent)
            facts["seconds"].append({**times, "all": round(sum(times.values()), 3)})
            if left % len(models) == 0 and model.model.keeper(model.load_device).work.shape is None:
                left = min(left, len(models))
        facts["said"] = said
        if cuda:
            facts["peak_gb"] = round((before - peak.stop()) / GB, 2)
            facts["weights_gb"] = round(model.model_size() / GB, 2)
            facts["ballast_gb"] = round(taken.nbytes / GB, 2) if taken is not None else 0
        work = model.model.keeper(model.load_device).work
        facts["recorded"] = len(work.recordings)
        if work.shape is not None:
            timed("sampler, other seed", nodes["VAREditSampler"].execute, model, source, text, 1, 3.0, 0.1)
            facts["other_seed"] = times["sampler, other seed"]
    facts |= compared(folder, size, text=text[0][0], source=source["samples"], edit=latent["samples"])
    del model, models, clip, vae, latent, work
    gc.collect()
    mm.cleanup_models_gc()
    mm.soft_empty_cache()
    if cuda:
        facts["left_gb"] = round((before - torch.cuda.mem_get_info()[0]) / GB, 2)
    return facts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--comfyui", type=Path, default=Path.home() / "comfy" / "ComfyUI")
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--limits", type=float, nargs="*", default=[0, 24, 16, 12], help="GB; 0: all of the device")
    options.add_argument("--kinds", nargs="*", default=["static", "dynamic"], choices=KINDS)
    options.add_argument(
        "--file", default=FILES["diffusion_models"], help="the transformer, or two with a + between them"
    )
    options.add_argument("--size", default="1024")
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--seconds", type=float, help="the longest that a case may take")
    options.add_argument("--depth", type=int, default=40)
    options.add_argument("--width", type=int, default=3584)
    options.add_argument("--text", type=int, default=2048)
    options.add_argument("--vae", default="8B", help="the model whose VAE's sizes are taken")
    options.add_argument("--case", help=argparse.SUPPRESS)
    tiny = dict(depth=2, width=256, text=256, vae="tiny", limits=[0], kinds=KINDS[:1], size="256", runs=2)
    args = parsed(options, **tiny)
    if args.case:
        limit, kind = args.case.split(",")
        print(json.dumps(one_case(args, float(limit), kind)))
        return
    if not (args.folder / "text_encoders" / FILES["text_encoders"]).exists():
        write(args.folder, args.depth, args.width, args.text, args.vae)
    cases = []
    for kind in args.kinds:
        for limit in args.limits:
            facts = {"limit_gb": limit, "kind": kind, **fresh(f"{limit},{kind}", args.seconds)}
            cases.append(facts)
            if "failed" in facts:
                print(kind, limit, "failed:", facts["failed"], flush=True)
            else:
                again = {"first": facts["seconds"][0]["all"], "other seed": facts.get("other_seed")}
                last = {**facts["seconds"][-1], **again}
                equal = [facts[f"equal_{name}"] for name in ("text", "source", "edit")]
                print(kind, limit, facts.get("peak_gb"), last, "equal", *equal, *facts["said"], flush=True)
    import torch

    result = {"benchmark": "edits inside ComfyUI", "device": device_name(), "torch": torch.__version__, "cases": cases}
    finish(result, args.save)


if __name__ == "__main__":
    main()
