"""Memory that an edit may take under ComfyUI, and what an edit would take, in words."""

from __future__ import annotations

import comfy.model_management as mm
import torch

from ...varedit_core.runtime.memory import kept_bytes
from ...varedit_core.runtime.plan import Job, described, gigabytes, plan
from ...varedit_core.tokenizer.schedule import schedule_for
from .keeping import Keeper
from .model import checked_model


def free_memory(model) -> int:
    """Bytes an edit may take on a model's device when all models have made way as far as they can."""
    device = model.load_device
    loaded = [other for other in mm.current_loaded_models if other.device == device]
    if mm.is_device_cpu(device):  # weights in host memory stay there
        loaded = [other for other in loaded if isinstance(other.model, Keeper)]
    movable = sum(other.model_loaded_memory() for other in loaded) - _weights_stay() * model.model_size()
    return mm.get_free_memory(device) + movable - mm.extra_reserved_memory()


def may_stay(model, job: Job, free: float) -> bool:
    """Whether the KV cache may stay when the edit is over. Where ComfyUI streams weights all must fit at once, as
    others take from the weights first (see `keeping.Listed`); elsewhere as much again must be free beside them."""
    weights = 0 if mm.is_device_cpu(model.load_device) or _weights_stay() else model.model_size()
    kept = job.stored("exact") + kept_bytes(job)
    return (kept + job.activations() if model.is_dynamic() else 2 * kept) <= free - weights


def _weights_stay() -> bool:
    """Whether weights do not make way for an edit."""
    return mm.vram_state in (mm.VRAMState.HIGH_VRAM, mm.VRAMState.SHARED)


def host_memory() -> int:
    """Bytes of host memory that are free."""
    return mm.get_free_memory(torch.device("cpu"))


def plan_text(model, area: str, images: int, guided: bool) -> str:
    """Lines that say what an edit takes and how the sampler would run it now."""
    network, device = checked_model(model), model.load_device
    transformer = network.diffusion_model
    job, free = Job(transformer.config, schedule_for(area), images, guided, transformer.dtype), free_memory(model)
    height, width = job.schedule.pixels
    kind = str(transformer.dtype).removeprefix("torch.")
    lines = [
        f"{width}x{height}, pictures: {images}, {'with' if guided else 'without'} guidance, {kind} on {device}",
        f"weights: {gigabytes(model.model_size())}",
        f"KV cache: {gigabytes(job.stored('exact'))}",
        f"activations, at most: {gigabytes(job.activations())}",
        f"in all: {gigabytes(model.model_size() + job.needed('exact'))}",
        f"free when other models make way: {gigabytes(free)}",
    ]
    try:
        way = plan(job, free, host_memory())
        lines += [*way.reasons, f"will run {described(way)}: {gigabytes(way.needed)} beside the weights"]
    except ValueError as error:
        lines.append(str(error))
    return "\n".join(lines)
