"""Loads a weight file into a network of ComfyUI's layers.

The layers cast, offload, patch and dequantise behind their call; the networks of `varedit_core` never look at a weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch
from torch import Tensor, nn

from ...varedit_core.files import quantised
from ...varedit_core.files.checkpoints import expected
from ...varedit_core.files.shards import parts_of
from ...varedit_core.files.weights import SAFETENSORS, Enough, WeightError, Weights, open_weights
from .layers import Casting
from .layers import quantised as quantised_layers


def open_file(path: Path, enough: Enough = lambda keys: False) -> Weights:
    """A weight file as ComfyUI reads it: safetensors stay file-backed, old quantised formats take the present form.

    One of several files of a model stands for all of them. enough: see `open_weights`. Raises ValueError for a file
    that cannot be used.
    """
    try:
        opened = open_weights(path, enough)
    except WeightError as error:
        raise plain(error) from error
    if path.suffix not in SAFETENSORS or len(parts_of(path)) > 1:
        return opened
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    weights = Weights(path, {key: tensor.to("meta") for key, tensor in state.items()}, state.__getitem__, metadata)
    check_formats(weights)
    return weights


def plain(error: Exception) -> ValueError:
    """The same sentence in a class that ComfyUI shows by its name alone, not by a path of modules."""
    return ValueError(str(error))


def patcher_of(network: nn.Module, device, offload, disable_dynamic: bool):
    """A patcher of ComfyUI's present kind, or of the one that never streams weights."""
    # Looked up here: ComfyUI exchanges the class when it starts.
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return kind(network, load_device=device, offload_device=offload)


class Layers:
    """A namespace of ComfyUI's layers: `narrow` for what computes in the blocks' type, `wide` for the fp32 parts.

    ComfyUI has one computing type a network; here norms, modulation, embeddings and head stay fp32 beside bf16 blocks.
    """

    def __init__(self, stored: torch.dtype, computed: torch.dtype, device: torch.device, is_quantised: bool) -> None:
        class Settings:
            quant_config = {"mixed_ops": True} if is_quantised else None

        def picked(dtype: torch.dtype):
            if mm.is_device_cpu(device):  # ComfyUI asks the device for CUDA's properties
                mixed = comfy.ops.mixed_precision_ops
                return quantised_layers(mixed(Settings.quant_config, dtype, True)) if is_quantised else Casting
            layers = comfy.ops.pick_operations(stored, dtype, load_device=device, model_config=Settings)
            if is_quantised:
                return quantised_layers(layers)
            # Files may hold any part in fewer bits than it computes in.
            return Casting if layers in (comfy.ops.disable_weight_init, comfy.ops.manual_cast) else layers

        self.computed, self.narrow = computed, picked(computed)
        self.wide = picked(torch.float32) if is_quantised else Casting

    def __getattr__(self, name: str):
        def make(*args, dtype: torch.dtype, **kw) -> nn.Module:
            layers = self.narrow if dtype == self.computed else self.wide
            return getattr(layers, name)(*args, dtype=dtype, **kw)

        return make


def check_formats(weights: Weights) -> None:
    """ValueError where this ComfyUI does not know a format in which a file stores matrices."""
    said = {weights[key].numpy().tobytes(): key for key in weights if key.endswith(".comfy_quant")}
    for text, key in said.items():
        try:
            settings = json.loads(text)
            name, rotated = settings.get("format"), settings.get("convrot")
        except (ValueError, AttributeError):
            raise ValueError(f"{weights.path} has {key}, which says nothing readable; convert it again") from None
        kind = comfy.quant_ops.QUANT_ALGOS.get(name)
        fields = _fields(kind["comfy_tensor_layout"]) if kind and rotated else {"convrot"}
        if kind is None or (rotated and "convrot" not in fields):
            raise ValueError(
                f"{weights.path} stores weights as {name}, which this ComfyUI does not run; update ComfyUI, or convert "
                "the original to another precision"
            )


def _fields(layout: str) -> Mapping[str, object]:
    """What a layout of ComfyUI's knows of a weight."""
    return getattr(comfy.quant_ops.get_layout_class(layout).Params, "__dataclass_fields__", {})


def is_quantised(weights: Weights) -> bool:
    """Whether ComfyUI's quantised layers have to run a file."""
    return any(key.endswith(".comfy_quant") for key in weights)


def fill(network: nn.Module, weights: Weights, stored: torch.dtype | None, dynamic: bool) -> nn.Module:
    """Load all of a network's tensors, checked before to be the right ones.

    stored: what matrices of more bits are rounded to, where the network computes in fewer; None: kept as they are.
    Where ComfyUI streams weights (dynamic) they stay in the file, and it rounds them on the way.
    """
    mm.archive_model_dtypes(network)
    wanted, scaled = expected(network), quantised.quantised(weights)

    def fitted(key: str, tensor: Tensor) -> Tensor:
        kept = dynamic or stored is None or key not in wanted or key in scaled
        if kept or wanted[key].dtype == torch.float32 or tensor.dtype.itemsize <= stored.itemsize:
            return tensor
        return tensor.to(stored)

    state = {key: fitted(key, weights[key]) for key in weights}
    result = network.load_state_dict(state, strict=False, assign=True)
    beside = [*result.missing_keys, *result.unexpected_keys]
    if beside:
        raise ValueError(
            f"{weights.path} has tensors that could not be loaded, such as {min(beside)}; convert it again"
        )
    return network.eval().requires_grad_(False)


def parameters(weights: Weights) -> int:
    """Number of parameters, for ComfyUI's choice of types."""
    return sum(tensor.numel() for tensor in weights.meta.values())


def main_dtype(weights: Weights) -> torch.dtype | None:
    """The type most of a file's numbers have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in weights.meta.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.get) if counts else None
