"""ComfyUI inside a measuring script: its modules as main.py sets them up, files of random weights, and whole graphs."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from benchmarks.common import GB, ROOT

FILES = {
    "diffusion_models": "8B-random.safetensors",
    "vae": "vae-random.safetensors",
    "text_encoders": "t5-random.safetensors",
}

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""The environment variable in which ComfyUI chooses torch's allocator."""
KINDS = ("static", "dynamic", "lowvram", "novram", "deterministic")
"""ComfyUI's ways to manage memory: layers moved before the run, layers streamed as they come, and its flags;
deterministic is static with convolutions that cannot choose their algorithm by free memory."""


def write(folder: Path, depth: int, width: int, text: int, vae: str, bits: int = 56) -> None:
    """Random weights in bf16 (the VAE in fp32), under the published keys. vae: the model of `bench.models` of whose
    sizes the VAE is. bits: of a token."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.real_size import published_shapes, random_tensor
    from varedit_core.bench.models import MODELS
    from varedit_core.runtime.unfilled import Unfilled
    from varedit_core.text.t5 import T5Config, T5Encoder
    from varedit_core.tokenizer.vae import Autoencoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for name in FILES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    shapes = published_shapes(depth, width, max(1, width // 128), bits, text)
    state = {key: random_tensor(key, shape, device).bfloat16().cpu() for key, shape in shapes.items()}
    save_file(state, folder / "diffusion_models" / FILES["diffusion_models"])
    del state
    torch.manual_seed(1)
    save_file(Autoencoder(MODELS[vae].autoencoder).state_dict(), folder / "vae" / FILES["vae"])
    sizes = dict(
        head_size=64, hidden=text * 5 // 2, layers=24 if depth > 8 else 2, heads=max(1, text // 64), gated=True
    )
    with Unfilled():
        shapes = T5Encoder(T5Config(32128, text, **sizes), device="meta").state_dict()
    state = {
        key: (torch.ones(t.shape) if "norm" in key else torch.randn(t.shape, device=device) * t.shape[-1] ** -0.5)
        .bfloat16()
        .cpu()
        for key, t in shapes.items()
    }
    save_file(state, folder / "text_encoders" / FILES["text_encoders"])


def start_comfyui(folder: Path, comfyui: Path, kind: str = "static"):
    """ComfyUI's modules as main.py sets them up, and the pack's nodes by name. kind: of KINDS.

    The script imports torch after this, so that ComfyUI's choice of an allocator is heeded.
    """
    dynamic = kind == "dynamic"
    sys.path[:] = [
        str(comfyui),
        *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "benchmarks")),
    ]
    from comfy.cli_args import args

    if ALLOCATOR not in os.environ:
        import cuda_malloc  # noqa: F401  sets the variable as main.py does, in time if torch was not imported before
    args.cuda_malloc = "cudaMallocAsync" in os.environ.get(ALLOCATOR, "")
    import torch

    args.cpu = not torch.cuda.is_available()
    args.lowvram, args.novram = kind == "lowvram", kind == "novram"
    if dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher
    import folder_paths

    if dynamic:
        devices = [(d.index, int(args.vram_headroom * 1024**3)) for d in mm.get_all_torch_devices()]
        assert comfy_aimdo.control.init_devices(devices), "comfy-aimdo does not work here"
        comfy_aimdo.control.set_log_info()
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    for name in FILES:
        folder_paths.add_model_folder_path(name, str(folder / name))
    location = {"submodule_search_locations": [str(ROOT)]}
    spec = importlib.util.spec_from_file_location("varedit_pack", ROOT / "__init__.py", **location)
    sys.modules[spec.name] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)

    async def listed():
        extension = await pack.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return {node.__name__: node for node in asyncio.run(listed())}


def ballast(limit: float):
    """A tensor that leaves so many GB of the GPU free; None where there is no GPU, or no limit."""
    import torch

    if not (limit and torch.cuda.is_available()):
        return None
    return torch.empty(int(torch.cuda.mem_get_info()[0] - limit * GB), dtype=torch.uint8, device="cuda")


class Graph:
    """Graphs run by ComfyUI's own executor, as a queued prompt is: caches, memory management and all.

    nodes: of `start_comfyui`. A picture comes from the node BenchPicture (`images`, by its index), results go to the
    node BenchResult.
    """

    def __init__(self, nodes: dict[str, type]) -> None:
        import execution

        from nodes import NODE_CLASS_MAPPINGS

        images, results = self.images, self.results = [], []

        class BenchPicture:
            RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "give", "bench"

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"index": ("INT", {"default": 0})}}

            def give(self, index: int):
                return (images[index],)

        class BenchResult:
            RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "bench", True

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"image": ("IMAGE",), "latent": ("LATENT",)}}

            def take(self, image, latent):
                results[:] = image, latent
                return {}

        NODE_CLASS_MAPPINGS.update(nodes, BenchPicture=BenchPicture, BenchResult=BenchResult)
        self.moments: list[tuple[str | None, float]] = []
        self.spans: dict[str, tuple[float, float]] = {}
        self.server = SimpleNamespace(client_id="bench", last_node_id=None, last_prompt_id=None, send_sync=self._told)
        kind = execution.CacheType.CLASSIC
        memory = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self.executor = execution.PromptExecutor(self.server, cache_type=kind, cache_args=memory)

    def _told(self, event: str, data: dict, *_) -> None:
        if event == "executing":
            self.moments.append((data["node"], time.perf_counter()))

    def run(self, prompt: dict[str, dict], output: str) -> dict[str, float]:
        """Seconds of every node that ran, and of all of it under "all". RuntimeError where a node failed."""
        self.moments.clear()
        self.server.last_prompt_id = name = str(time.time())
        begin = time.perf_counter()
        self.executor.execute(prompt, name, {"client_id": "bench"}, [output])
        end = time.perf_counter()
        if not self.executor.success:
            event, facts = self.executor.status_messages[-1]
            raise RuntimeError(f"{event} at {facts['node_type']}: {facts.get('exception_message', '')}")
        moments = [*self.moments, (None, end)]
        self.spans = {node: (at, later) for (node, at), (_, later) in zip(moments, moments[1:]) if node is not None}
        seconds = {node: round(later - at, 4) for node, (at, later) in self.spans.items()}
        return {**seconds, "all": round(end - begin, 4)}

    def within(self, events: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Seconds of events (when each began, and how long it took) within the nodes of the last run."""
        return {
            node: sum(seconds for began, seconds in events if at <= began < later)
            for node, (at, later) in self.spans.items()
        }
