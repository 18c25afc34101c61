"""Many edits inside ComfyUI with all that may happen between them: is every picture the right one, does memory grow?

    python benchmarks/comfyui_soak.py --folder /scratch --edits 200 --save benchmarks/comfyui_soak_<gpu>.json

Run it with the Python that runs ComfyUI. Between edits, by lot: a cancelled edit, everything unloaded, the model in
another precision, another text, another size. Every edit has one of several LoRA strengths and pictures, and is
compared with the first one of its kind, which was made with everything loaded anew: every number is to be the same.
Prints a line a failure and one JSON line last. `--tiny` runs on anything.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import sys
import threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comfyui import ALLOCATOR, Graph, ballast, start_comfyui
from benchmarks.comfyui_speed import WAYS, prepared, prompt
from benchmarks.common import GB, device_name, finish, parsed, parser

STRENGTHS = (None, 1.0, 0.5, -0.7)
"""Of the LoRA; None: without one."""
EVENTS = ("nothing", "nothing", "nothing", "cancel", "unload", "precision", "text", "size")
SEED, TEXT = 7, "make it a rainy night"


class Soak:
    """Edits of a model and size, and what happens between them."""

    def __init__(self, options: argparse.Namespace, graph: Graph) -> None:
        import comfy.model_management as mm
        import torch

        self.options, self.graph, self.mm, self.torch = options, graph, mm, torch
        self.cuda, self.lots = torch.cuda.is_available(), random.Random(4)
        torch.manual_seed(2)
        side = int(options.size)
        graph.images[:] = [torch.randint(256, (1, side, side, 3)) / 255 for _ in range(3)]
        self.kinds = [(strength, picture) for strength in STRENGTHS for picture in range(2)]

    def edit(self, strength: float | None, picture: int, seed: int = SEED, text: str = TEXT, **changes) -> object:
        """The latent of an edit. changes: inputs of nodes by the node's name."""
        found = prompt(self.options.model, "plain" if strength is None else "lora", self.options.size, picture, seed)
        if strength is not None:
            found["lora"]["inputs"]["strength_model"] = strength
        found["text"]["inputs"]["text"] = text
        for node, inputs in changes.items():
            found[node]["inputs"].update(inputs)
        self.graph.run(found, "result")
        return self.graph.results[1]["samples"]

    def unload(self) -> float:
        """As ComfyUI's buttons do; GB that are free then."""
        self.graph.results.clear()
        self.mm.unload_all_models()
        self.graph.executor.reset()
        gc.collect()
        self.mm.soft_empty_cache()
        return round(self.torch.cuda.mem_get_info()[0] / GB, 3) if self.cuda else 0.0

    def cancelled(self) -> None:
        """An edit that is cancelled somewhere on its way."""
        timer = threading.Timer(self.lots.random() * self.options.longest, self.mm.interrupt_current_processing)
        timer.start()
        try:
            self.edit(*self.lots.choice(self.kinds), seed=self.lots.randrange(2**32))
        except RuntimeError as error:
            if "interrupted" not in str(error):
                raise
        timer.join()
        self.mm.interrupt_current_processing(False)

    def event(self, name: str) -> None:
        another = self.lots.randrange(2**32)
        if name == "cancel":
            self.cancelled()
        elif name == "precision":
            self.edit(None, 2, another, model={"precision": "fp32"})
        elif name == "text":
            self.edit(None, 2, another, "make it a sunny day " * self.lots.choice([1, 9, 20]))
        elif name == "size":
            self.edit(None, 2, another, source={"size": "256" if self.options.size != "256" else "512"})

    def run(self) -> dict:
        first, free = {}, []
        for kind in self.kinds:
            free.append(self.unload())
            first[kind] = self.edit(*kind).clone()
        plain = [first[kind] for kind in self.kinds[::2]]
        apart = max((a == b).float().mean().item() for a, b in zip(plain, plain[1:]))
        wrong, shares, events = [], [], Counter()
        for number in range(self.options.edits):
            name, kind = self.lots.choice(EVENTS), self.lots.choice(self.kinds)
            events[name] += 1
            if name == "unload":
                free.append(self.unload())
            else:
                self.event(name)
            shares.append((self.edit(*kind) == first[kind]).float().mean().item())
            if shares[-1] < 1:
                wrong.append(f"edit {number} of {kind} after {name}: {shares[-1]:.4f} of its numbers are the first's")
                print(wrong[-1], flush=True)
        free.append(self.unload())
        return {
            "edits": len(shares), "events": dict(events), "wrong": wrong, "least": round(min(shares), 4),
            "other_kinds": round(apart, 4), "free_gb": free,
        }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--comfyui", type=Path, default=Path.home() / "comfy" / "ComfyUI")
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--model", default="2B")
    options.add_argument("--size", default="512")
    options.add_argument("--way", default="default", choices=WAYS)
    options.add_argument("--edits", type=int, default=200)
    options.add_argument("--limit", type=float, default=0, help="GB free; 0: all")
    options.add_argument("--longest", type=float, default=0.1, help="seconds within which an edit is cancelled")
    args = parsed(options, model="tiny", size="256", way="static", edits=6, longest=0.3)
    os.environ[ALLOCATOR] = f"backend:{WAYS[args.way][1]}"
    prepared(argparse.Namespace(models=[args.model], folder=args.folder, edits=["lora"]))
    nodes = start_comfyui(args.folder / args.model, args.comfyui, WAYS[args.way][0])
    importlib.import_module("folder_paths").add_model_folder_path("loras", str(args.folder / args.model / "loras"))
    import torch

    taken = ballast(args.limit)
    found = Soak(args, Graph({node.GET_SCHEMA().node_id: node for node in nodes.values()})).run()
    about = {"benchmark": "many edits inside ComfyUI", "device": device_name(), "torch": torch.__version__}
    settings = {"model": args.model, "size": args.size, "way": args.way, "limit_gb": args.limit}
    finish(about | settings | {"taken_gb": taken.nbytes / GB if taken is not None else 0} | found, args.save)


if __name__ == "__main__":
    main()
