"""The VAE as one of ComfyUI's: the stock nodes encode, decode and tile with it."""

from __future__ import annotations

from pathlib import Path
from weakref import ref

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ...varedit_core.files.checkpoints import TOKENIZER, blank, canonical
from ...varedit_core.files.weights import WeightError
from ...varedit_core.pictures.preview import ColourMap, fit_colours
from ...varedit_core.runtime.kernels import fuses_pictures, group_norm_silu
from ...varedit_core.tokenizer.vae import Autoencoder
from .state import fill, open_file, patcher_of, plain

# Bytes a pixel of the finest level takes, by the widths of the published VAE (ComfyUI's figures for its like).
_ENCODE, _DECODE, _STEM = 1767, 2178, 128


class Layers(comfy.ops.manual_cast):
    """ComfyUI's layers; a group norm can take the activation behind it along, a convolution leave its bias to it."""

    class Conv2d(comfy.ops.manual_cast.Conv2d):
        def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """The convolution without its bias, and the bias, where kernels run that add it in passing; else with
            it."""
            if not fuses_pictures(x):
                return self(x), None
            comfy.ops.run_every_op()
            weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
            y, kept = self._conv_forward(x, weight, None), bias.clone()  # its own memory is lent
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return y, kept

    class GroupNorm(comfy.ops.manual_cast.GroupNorm):
        def silu(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
            """SiLU of the norm of [B, C, H, W] + offset [C]."""
            comfy.ops.run_every_op()
            weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
            y = group_norm_silu(x, self.num_groups, weight, bias, self.eps, offset)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return y


class VAREditAutoencoder(Autoencoder):
    """The VAE where ComfyUI has memory in hand: it makes room beforehand and has tiles of its own."""

    decode = Autoencoder.decode.plain


class VAREditVAE(comfy.sd.VAE):
    """The VAE as one of ComfyUI's; `__init__` sets what `comfy.sd.VAE` would read off a state dict."""

    def __init__(self, weights, disable_dynamic: bool = False) -> None:
        config = blank(weights, TOKENIZER).config
        stride, heaviness = config.stride, config.decoder_widths[0] / _STEM
        self.memory_used_encode = lambda shape, dtype: _ENCODE * heaviness * shape[2] * shape[3] * mm.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: (
            _DECODE * heaviness * shape[2] * shape[3] * stride**2 * mm.dtype_size(self.decode_dtype)
        )
        self.downscale_ratio = self.upscale_ratio = stride
        self.latent_channels, self.latent_dim, self.output_channels = config.bits, 2, 3
        # The order of operations is that of `images.fit`, so that 8-bit pictures give exactly its pixels.
        self.process_input = lambda image: image * 255 / 127.5 - 1
        self.process_output = lambda image: image.mul_(0.5).add_(0.5).clamp_(0, 1)  # ComfyUI wants it in place
        self.working_dtypes = [torch.float32]  # of latents and pixels; the decoder alone may run in bf16
        self.pad_channel_value = self.size = self.extra_1d_channel = self.format_encoded = None
        self.downscale_index_formula = self.upscale_index_formula = None
        self.disable_offload = self.not_video = self.handles_tiling = False
        self.crop_input, self.audio_sample_rate = True, 44100
        self.device = mm.vae_device()
        self.vae_dtype = torch.float32
        allowed = mm.vae_dtype(self.device, [torch.bfloat16, torch.float32])
        self.decode_dtype = allowed if allowed == torch.bfloat16 else torch.float32
        self.output_device = mm.intermediate_device()
        offload = mm.vae_offload_device()
        self.first_stage_model = VAREditAutoencoder(config, Layers, self.vae_dtype, offload, self.decode_dtype)
        self.patcher = patcher_of(self.first_stage_model, self.device, offload, disable_dynamic)
        fill(self.first_stage_model, weights, self.decode_dtype, self.patcher.is_dynamic())
        self.colours = Colours(self)

    @property
    def stride(self) -> int:
        return self.upscale_ratio


class Colours:
    """The map from a VAE's latents to colours, fitted when it is first wanted: that takes sixteen encodes.

    A latent that holds it does not keep the VAE in memory.
    """

    def __init__(self, vae: VAREditVAE) -> None:
        self._vae, self._map = ref(vae), None

    def map(self) -> ColourMap | None:
        """The fitted map; None where the VAE is gone."""
        vae = self._vae()
        if self._map is None and vae is not None:
            self._map = fit_colours(lambda pixels: vae.encode((pixels.movedim(1, -1) + 1) / 2), vae.stride)
        return self._map


def load_vae(path: Path) -> VAREditVAE:
    """A file as a VAE of ComfyUI's. ValueError for another or incomplete file."""
    vae = _load(path)
    vae.patcher.cached_patcher_init = (_patcher, (path,))
    return vae


def _load(path: Path, disable_dynamic: bool = False) -> VAREditVAE:
    try:
        return VAREditVAE(canonical(open_file(path), TOKENIZER), disable_dynamic)
    except WeightError as error:
        raise plain(error) from error


def _patcher(path: Path, disable_dynamic: bool = False):
    return _load(path, disable_dynamic).patcher


def checked_vae(vae) -> VAREditVAE:
    """A VAE of ours. ValueError where it is another model's."""
    if not isinstance(vae, VAREditVAE):
        network = type(getattr(vae, "first_stage_model", vae)).__name__
        raise ValueError(f"this vae is a {network}, not VAREdit's; connect one from VAREdit VAE Loader")
    return vae
