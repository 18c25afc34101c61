"""Tensors of which a process may hold a part only (DTensors of accelerate's FSDP 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_exact(accelerator) -> None:
    """Let FSDP 2 multiply in bf16 where the training does, and round nothing else: accelerate's own policy rounds sums
    of gradients, and the loss, too."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of it."""
    return hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """A parameter's values, gathered from all processes where it is sharded: then all of them must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter; the parameter's own memory."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_as(part: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of something that is sharded as a parameter is, as one of its kind."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = parameter.size(), parameter.stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
