"""The VAE as one of ComfyUI's: the stock nodes encode, decode and tile with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import ref

import comfy.model_management as mm
import comfy.sd
import torch
from torch import Tensor, nn

from ...varedit_core.coder import RECORDED_SIDE
from ...varedit_core.files.checkpoints import TOKENIZER, blank, canonical, tell_taken
from ...varedit_core.files.weights import WeightError
from ...varedit_core.pictures.preview import ColourMap, fit_colours
from ...varedit_core.runtime.graphs import Recorder
from ...varedit_core.runtime.warm_up import warm_up
from ...varedit_core.sampling.checks import published_vae
from ...varedit_core.tokenizer.vae import Autoencoder
from .foreign import Asked, Missing
from .holding import holder_of
from .keeping import Listed, on_device
from .layers import Casting
from .state import fill, open_file, patcher_of, plain

T = TypeVar("T")
# Bytes a pixel of the finest level takes, by the widths of the published VAE (ComfyUI's figures for its like).
_ENCODE, _DECODE, _STEM = 1767, 2178, 128
_PIXELS = torch.arange(256).float() / 127.5 - 1  # of 8-bit levels, as `images.fit` has them: GPUs divide otherwise


def flat(samples) -> bool:
    """Whether a LATENT holds rows of two sides, as of pictures; those of videos and of several kinds have more."""
    return isinstance(samples, Tensor) and samples.ndim == 4


def of_pictures(name: str) -> Missing:
    return Missing(
        f"VAREdit's VAE is one of pictures and has no {name}; connect the VAE of the model that this node is made for"
    )


class VAREditAutoencoder(Asked, Autoencoder):
    """The VAE where ComfyUI has memory in hand: it makes room beforehand and has tiles of its own. Weights stand still
    within a call. patcher: ComfyUI's, once there is one."""

    patcher: Callable[[], object] = staticmethod(lambda: None)
    lacking = staticmethod(of_pictures)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._held(self.encoder, super().encode, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self._held(self.decoder, partial(Autoencoder.decode.plain, self), latents)

    def _held(self, part: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        patcher = self.patcher()
        if patcher is None or x.device != patcher.load_device:  # a node may have moved it elsewhere
            return function(x)
        holder = holder_of(part, patcher.load_device)
        if holder.busy:
            return function(x)
        with holder.hold(patcher, math.inf):
            return function(x)


class Recorded:
    """Encoder and decoder of small pictures as recorded work, which stays between runs of a graph."""

    busy = False

    def __init__(self, network: VAREditAutoencoder) -> None:
        self.places: dict[nn.Module, Hashable] = {}
        most, stride = RECORDED_SIDE**2, network.config.stride
        self.encode = Recorder(network.encoder, network.encode, 3 * most, self.places.get)
        self.decode = Recorder(
            network.decoder, network.decode, network.config.bits * most // stride**2, self.places.get
        )

    @property
    def nbytes(self) -> int:
        return self.encode.recordings.nbytes + self.decode.recordings.nbytes

    def forget(self) -> None:
        self.encode.forget()
        self.decode.forget()


class VAREditVAE(comfy.sd.VAE):
    """The VAE as one of ComfyUI's; `__init__` sets what `comfy.sd.VAE` would read off a state dict."""

    def __init__(self, weights, disable_dynamic: bool = False) -> None:
        config = blank(weights, TOKENIZER).config
        tell_taken(weights, TOKENIZER)
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
        self.first_stage_model = VAREditAutoencoder(config, Casting, self.vae_dtype, offload, self.decode_dtype)
        warm_up(self.first_stage_model, self.device)
        self.patcher = patcher_of(self.first_stage_model, self.device, offload, disable_dynamic)
        self.first_stage_model.patcher = ref(self.patcher)
        fill(self.first_stage_model, weights, self.decode_dtype, self.patcher.is_dynamic())
        self.colours = Colours(self)
        self.recorded = Recorded(self.first_stage_model)
        self.listed = Listed(self.device, self.recorded)

    def __getattr__(self, name: str):
        raise AttributeError(name) if name.startswith("_") else of_pictures(name)

    @property
    def stride(self) -> int:
        return self.upscale_ratio

    def encode_levels(self, levels_3HW: Tensor) -> Tensor:
        """Unquantised features [1, d, h, w] of 8-bit levels of a size that the stride divides, on the device between
        nodes."""
        network, (_, height, width) = self.first_stage_model, levels_3HW.shape

        def encoded() -> Tensor:
            levels = levels_3HW.to(self.device).int()
            features = self.recorded.encode(_PIXELS.to(self.device)[levels][None])
            return features.to(self.output_device, mm.intermediate_dtype())

        needed = self.memory_used_encode((1, 3, height, width), self.vae_dtype)
        features = self._at_once(network.encoder, needed, encoded)
        return self.encode(levels_3HW.movedim(0, -1)[None].float() / 255) if features is None else features

    def decode_levels(self, latent_dHW: Tensor) -> tuple[Tensor, bool]:
        """8-bit levels [3, y, x] of a latent in host memory, truncated as in the published code, and whether all of
        the picture's numbers are defined."""

        def levels(pixels: Tensor) -> tuple[Tensor, bool]:
            defined = pixels.isfinite().all()
            return (pixels.float() * 255).clamp(0, 255).to(torch.uint8).cpu(), bool(defined)

        def decoded() -> tuple[Tensor, bool]:
            pixels = self.recorded.decode(latent_dHW[None].to(self.device, torch.float32))
            return levels(self.process_output(pixels.to(mm.intermediate_dtype()))[0])

        needed = self.memory_used_decode((1, *latent_dHW.shape), self.vae_dtype)
        found = self._at_once(self.first_stage_model.decoder, needed, decoded)
        return levels(self.decode(latent_dHW[None])[0].movedim(-1, 0)) if found is None else found

    def encode(self, pixel_samples: Tensor) -> Tensor:
        self._adopt()
        return super().encode(_pictures(pixel_samples))

    def encode_tiled(self, pixel_samples: Tensor, *more, **options) -> Tensor:
        return super().encode_tiled(_pictures(pixel_samples), *more, **options)

    def decode(self, samples_in: Tensor, vae_options: dict | None = None) -> Tensor:
        if vae_options:
            raise of_pictures(", ".join(vae_options))
        self._adopt()
        return super().decode(self.checked(samples_in))

    def decode_tiled(self, samples: Tensor, *more, **options) -> Tensor:
        return super().decode_tiled(self.checked(samples), *more, **options)

    def checked(self, samples: Tensor) -> Tensor:
        """The same latents. ValueError where they are another model's."""
        if not flat(samples) or samples.shape[1] != self.latent_channels:
            named = published_vae(samples.shape[1]) if flat(samples) else ""
            raise ValueError(
                f"the latent has the shape {list(samples.shape)} but the VAE takes {self.latent_channels} channels; "
                f"connect a latent of VAREdit, and the VAE that belongs to its model{named}"
            )
        return samples

    def _adopt(self) -> None:
        """Take another network and patcher for its own, as a copy of it has that a node moves to another device."""
        network = self.first_stage_model
        network.patcher = ref(self.patcher)
        if self.recorded.encode.network is not network.encoder:
            self.recorded = Recorded(network)
            self.listed = Listed(self.device, self.recorded)

    def _at_once(self, part: nn.Module, needed: float, work: Callable[[], T]) -> T | None:
        """The result of work with the weights of encoder or decoder as the last picture left them; None where ComfyUI
        has to load them, or memory ran out. needed: bytes beside them."""
        self._adopt()
        if mm.is_device_cpu(self.device) or mm.get_free_memory(self.device) < needed:
            return None
        hold = holder_of(part, self.device).again(self.patcher)
        if hold is None:
            return None
        try:
            with hold, on_device(self.device):
                self.recorded.places[part] = self.patcher.patches_uuid, hold.places
                result = work()
            if self.recorded.nbytes:
                self.listed.list()
            return result
        except Exception as error:
            mm.raise_non_oom(error)
        self.recorded.forget()  # outside the handler, which holds what there was
        return None


class Colours:
    """The map from a VAE's latents to colours, fitted when it is first wanted: that takes sixteen encodes.

    A latent that holds it does not keep the VAE in memory.
    """

    def __init__(self, vae: VAREditVAE) -> None:
        self._vae, self._map = ref(vae), None

    def __getstate__(self) -> dict:
        return {"_map": self._map}  # nodes write latents to files

    def __setstate__(self, state: dict) -> None:
        self._vae, self._map = (lambda: None), state["_map"]

    def map(self) -> ColourMap | None:
        """The fitted map; None where the VAE is gone."""
        vae = self._vae()
        if self._map is None and vae is not None:
            self._map = fit_colours(lambda pixels: vae.encode((pixels.movedim(1, -1) + 1) / 2), vae.stride)
        return self._map


def _pictures(image: Tensor) -> Tensor:
    """Pictures with colours alone. ValueError for what are none, such as sound or videos of another model."""
    if image.ndim != 4 or image.shape[3] not in (1, 3, 4) or not len(image):
        raise ValueError(
            f"this VAE encodes pictures [count, y, x, 1, 3 or 4] but got {list(image.shape)}; the node before is made "
            "for another kind of model, or there is no picture"
        )
    return image.expand(*image.shape[:3], 3) if image.shape[3] == 1 else image[..., :3]


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
