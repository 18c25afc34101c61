"""The transformer as ComfyUI's MODEL: patched by LoRA loaders, moved, streamed and compiled by stock nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.model_management as mm
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ...varedit_core.defaults import KINDS
from ...varedit_core.files.checkpoints import OF_TEXT_ALONE, TRANSFORMER, blank, canonical, checked_kind, tell_taken
from ...varedit_core.files.weights import WeightError
from ...varedit_core.made_for import UNKNOWN, MadeFor
from ...varedit_core.model.transformer import Transformer
from ...varedit_core.runtime.fp8 import LINEARS
from ...varedit_core.runtime.warm_up import warm_up
from .foreign import Absent, Asked, Settings, missing
from .keeping import Keeper
from .state import Layers, fill, is_quantised, main_dtype, open_file, parameters, patcher_of, plain

DTYPES = [torch.bfloat16, torch.float32]
"""What the blocks may compute in; fp16 overflows in the residual branches of the published weights' kind."""
_PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class ModelConfig(Settings):
    """What ComfyUI reads of a model's configuration."""

    unet_config, quant_config = Settings(), None


class VAREditModel(Asked, nn.Module):
    """What a MODEL's patcher wraps. LoRA loaders find the transformer under `diffusion_model`."""

    model_type = None
    model_sampling, latent_format = Absent("sigmas"), Absent("latent format of diffusion models")
    apply_model = process_latent_in = process_latent_out = Absent("noise prediction")

    def __init__(self, transformer: Transformer, stored: torch.dtype) -> None:
        super().__init__()
        self.diffusion_model = transformer
        self.model_config = ModelConfig()
        self.stored, self.manual_cast_dtype = stored, transformer.dtype
        self.device = None
        self._keeper: Keeper | None = None
        self.made_for = UNKNOWN

    def get_dtype(self) -> torch.dtype:
        return self.stored

    def state_dict_for_saving(
        self, unet_state_dict: dict, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None
    ) -> dict:
        """What the nodes that save models write: a transformer's file, or one with all parts under prefixes."""
        if not self.diffusion_model.config.source:
            unet_state_dict = {**unet_state_dict, OF_TEXT_ALONE: torch.ones(1)}
        if clip_vision_state_dict is not None:
            raise missing("CLIP vision encoder")
        if clip_state_dict is None and vae_state_dict is None:
            return unet_state_dict
        parts = {"model.diffusion_model.": unet_state_dict, "vae.": vae_state_dict or {}}
        found = {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}
        text = {key.removeprefix("transformer."): tensor for key, tensor in (clip_state_dict or {}).items()}
        return {**found, **{f"text_encoders.t5.{key}": tensor for key, tensor in text.items()}}

    def keeper(self, device: torch.device) -> Keeper:
        """What keeps the workspace of edits on a device from one run of a graph to the next."""
        if self._keeper is None or self._keeper.load_device != device:
            self._keeper = Keeper(device)
        return self._keeper

    def run(self, loop: Callable[[Transformer], Tensor], patcher) -> Tensor:
        """A loop over the transformer inside the wrappers that stock nodes put around a model's call."""
        executor, wrappers = comfy.patcher_extension.WrapperExecutor, wrappers_of(patcher)
        return executor.new_class_executor(lambda: loop(self.diffusion_model), self, wrappers).execute()


def wrappers_of(patcher) -> list[Callable]:
    """What stock nodes put around a model's call."""
    extension = comfy.patcher_extension
    given = patcher.model_options["transformer_options"].get("wrappers", {})
    merged = {"wrappers": extension.merge_nested_dicts(given, patcher.wrappers)}
    return extension.get_all_wrappers(extension.WrappersMP.APPLY_MODEL, merged)


def unchanged(patcher) -> bool:
    """Whether nodes changed nothing of a model but its weights, whose patches ComfyUI tells apart."""
    attention = "optimized_attention_override" in patcher.model_options["transformer_options"]
    return not (attention or wrappers_of(patcher) or patcher.injections or patcher.object_patches)


def load_model(path: Path, precision: str = "auto", disable_dynamic: bool = False, kind: str = KINDS[0]):
    """A transformer's file as a model patcher. kind: see `load_transformer`. ValueError for another or incomplete
    file."""
    device, offload = mm.get_torch_device(), mm.unet_offload_device()
    try:
        weights = canonical(open_file(path), TRANSFORMER)
        config = blank(weights, TRANSFORMER, kind=checked_kind(kind)).config
    except WeightError as error:
        raise plain(error) from error
    tell_taken(weights, TRANSFORMER)
    special = is_quantised(weights)
    stored = mm.unet_dtype(device, parameters(weights), DTYPES, None if special else main_dtype(weights))
    computed = _PRECISIONS[precision] or _computed(None if special else stored, stored, device)
    network = Transformer(config, Layers(stored, computed, device, special), computed, device=offload)
    warm_up(network, device, LINEARS[special])
    patcher = patcher_of(VAREditModel(network, stored), device, offload, disable_dynamic)
    fill(network, weights, None if precision == "fp32" else stored, patcher.is_dynamic())
    patcher.model.made_for = MadeFor.of(path) if config.source else UNKNOWN
    patcher.size = 0  # counted again: layers may have had no weights before
    patcher.cached_patcher_init = (partial(load_model, kind=kind), (path, precision))
    return patcher


def _computed(cast: torch.dtype | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What the blocks compute in: ComfyUI's choice where they can, whatever type it was told to store weights in."""
    chosen = mm.unet_manual_cast(cast, device, DTYPES) or stored
    if chosen in DTYPES:
        return chosen
    return torch.bfloat16 if mm.should_use_bf16(device) else torch.float32


def checked_model(model) -> VAREditModel:
    """The network of a MODEL. ValueError where it is another model's."""
    network = getattr(model, "model", None)
    if not isinstance(network, VAREditModel):
        raise ValueError(
            f"this model is a {type(network).__name__}, not VAREdit's; connect one from VAREdit Model Loader"
        )
    return network
