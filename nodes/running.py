"""Running an edit under ComfyUI: memory asked for once, progress and previews a scale, cancelled within a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace

import comfy.ldm.modules.attention as attention
import comfy.model_management as mm
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from torch import Tensor

from ..varedit_core.config import patch_size
from ..varedit_core.defaults import DEFAULT_SETTINGS, SamplingSettings
from ..varedit_core.operations import sdpa
from ..varedit_core.planning import STORES, Job, Plan, described, gigabytes, plan, plans, too_large
from ..varedit_core.sampling import Scale, sample
from ..varedit_core.schedule import TOKEN_PIXELS, schedule_for
from ..varedit_core.workspace import Workspace
from .model import VAREditModel, checked_model
from .pictures import KEY, Origin, fitting_of, scale_picture
from .text_encoder import MARK
from .vae import VAREditVAE, checked_vae

TICKS = 1000
"""Steps of the progress bar."""


def settings_of(seed: int, guidance: float, temperature: float, top_p: float | None) -> SamplingSettings:
    return SamplingSettings(guidance, temperature, DEFAULT_SETTINGS.top_p if top_p is None else top_p, seed)


@dataclass(frozen=True, eq=False)
class Texts:
    """Features [L, T] of the instructions and negative prompts; a negative is None for the model's own."""

    positive: list[Tensor]
    negative: list[Tensor | None]

    @classmethod
    def read(cls, positive: list, negative: list | None) -> Texts:
        """From CONDITIONING. ValueError where it is empty or of another text encoder."""
        wanted = _features(positive, "positive")
        if any(_says_nothing(text) for text in wanted):
            raise ValueError("the instruction is empty; say what to change in the picture")
        unwanted = _features(negative, "negative") if negative is not None else [None]
        return cls(wanted, [None if text is None or _says_nothing(text) else text for text in unwanted])

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(text) for text in (*self.positive, *self.negative) if text is not None)

    def of(self, image: int) -> tuple[Tensor, Tensor | None]:
        """The pair of picture `image` of a batch; fewer texts than pictures start over."""
        return self.positive[image % len(self.positive)], self.negative[image % len(self.negative)]


def _says_nothing(text: Tensor) -> bool:
    """Whether features are those of the end token alone, or what ConditioningZeroOut leaves."""
    return len(text) < 2 or not text.any()


def _features(conditioning: list, name: str) -> list[Tensor]:
    if not conditioning:
        raise ValueError(f"the {name} conditioning is empty; connect VAREdit Text Encode")
    if len(conditioning) > 1:
        raise ValueError(
            f"the {name} conditioning combines {len(conditioning)} texts, which this model cannot; write one instruction"
        )
    features, facts = conditioning[0]
    if MARK not in facts:
        raise ValueError(
            f"the {name} conditioning is not of VAREdit's text encoder; use a clip from VAREdit Text Encoder Loader"
        )
    if not features.isfinite().all():
        raise ValueError(f"the {name} conditioning holds undefined numbers; check the text encoder's weights")
    return list(features)


def attention_of(transformer_options: dict, head_size: int, dtype: torch.dtype, device: torch.device):
    """ComfyUI's attention with the model's overrides, which also asks whether the user cancelled.

    On the CPU it is torch's own, whose numbers are the library's, unless the user chose another at the start.
    """
    chosen = args.use_split_cross_attention or args.use_quad_cross_attention
    function = attention.optimized_attention
    if not chosen and mm.is_device_cpu(device):
        function = attention.attention_pytorch

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        return function(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, scale=scale, transformer_options=transformer_options
        )

    def prescaled(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
        return attend(q * (scale * q.shape[-1] ** 0.5), k, v, scale=q.shape[-1] ** -0.5, mask=mask)

    return attend if _takes_scale(attend, head_size, dtype, device) else prescaled


def _takes_scale(attend, head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an attention heeds its scale: that of older ComfyUI, and of some nodes, always takes the usual one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 16, head_size, generator=generator).to(device, dtype) for _ in range(3))
    found = attend(q, k, v, scale=1.0).float()
    wanted, usual = (sdpa(q.float(), k.float(), v.float(), scale=scale) for scale in (1.0, head_size**-0.5))
    return bool((found - wanted).abs().mean() < (found - usual).abs().mean())


class Watcher:
    """Shows progress by the passes' real cost, and a picture of every scale where one is wanted."""

    def __init__(self, job: Job, images: int, origin: Origin, method: str, vae: VAREditVAE | None) -> None:
        source, *scales = job.shares()
        self.done = [sum(scales[: k + 1]) + source for k in range(len(scales))]
        self.bar = comfy.utils.ProgressBar(TICKS)
        self.origin, self.method, self.vae, self.images = origin, method, vae, images

    def passed(self, scale: Scale, first: int, count: int) -> None:
        """A scale of the pictures `first` to `first + count` is drawn."""
        preview = None
        if self.method != "off" and not first:
            picture = scale_picture(self.vae, scale.running_sum[:1], scale.grid, self.origin, self.method)
            preview = ("JPEG", picture, None)
        share = (first + count * self.done[scale.index]) / self.images
        self.bar.update_absolute(round(TICKS * share), TICKS, preview)


def preview_method(choice: str, vae: VAREditVAE | None, origin: Origin) -> str:
    """own, fast or off. ValueError for a preview that lacks the VAE."""
    if choice == "decoded" and vae is not None:
        return "own"
    if choice == "auto":
        return "off" if args.preview_method == LatentPreviewMethod.NoPreviews or origin.colours is None else "fast"
    if choice == "decoded" or (choice == "fast" and origin.colours is None):
        raise ValueError(f"the preview {choice} needs the VAE; connect it to vae, or choose another preview")
    return choice


def sample_latent(
    model, source: dict, texts: Texts, settings: SamplingSettings, preview: str, vae, tell: Callable[[str], None]
) -> tuple[dict, dict]:
    """Edit a LATENT of sources; the LATENTs of the edits and of the sums after every scale, scale by scale.

    Takes the next way to run (see `planning`) where memory runs out, saying so; ValueError where none is left.
    """
    network = checked_model(model)
    vae = checked_vae(vae) if vae is not None else None
    features = source["samples"]
    origin = _origin(network, source, vae)
    method = preview_method(preview, vae, origin)
    transformer = network.diffusion_model
    schedule = origin.fitting.schedule
    job = Job(transformer.config, schedule, len(features), settings.guided, transformer.dtype, texts.longest)
    beside = vae.memory_used_decode(features.shape, vae.vae_dtype) if method == "own" else 0

    def attempt(way: Plan) -> Tensor:
        # In one call, so that the models do not push each other out.
        mm.load_models_gpu([model, vae.patcher] if method == "own" else [model], memory_required=way.needed + beside)
        watcher = Watcher(job, len(features), origin, method, vae)
        return _run(model, features.to(model.load_device), texts, settings, way, watcher)

    def free() -> int:
        return free_memory(model) - int(beside)

    sums = _as_it_fits(job, free, attempt, tell).to(mm.intermediate_device())
    rest = {key: value for key, value in source.items() if key not in ("samples", KEY)}
    latent = {**rest, "samples": sums[-1].clone(), KEY: origin}  # a view would keep all scales
    return latent, {"samples": sums.flatten(0, 1), KEY: replace(origin, scales=len(sums))}


def _as_it_fits(
    job: Job, free: Callable[[], int], attempt: Callable[[Plan], Tensor], tell: Callable[[str], None]
) -> Tensor:
    """The result of the planned way to run, or of the first one after it that memory lasts for."""
    host = host_memory()
    way = plan(job, free(), host)
    if way.reasons:
        tell(f"{'; '.join(way.reasons)}; running {described(way)} instead")
    ways = [other for other in plans(job) if other.needed_on_host <= host]
    left = ways[ways.index(replace(way, reasons=())) :]
    while True:
        way, *left = left
        try:
            return attempt(way)
        except Exception as error:
            mm.raise_non_oom(error)
        # Outside the handler: until its end the exception holds what the loop had made.
        mm.soft_empty_cache()
        # Of fewer pictures at a time not the next number, but one that takes clearly less.
        clearly = 0.75 * way.needed
        left = [other for other in left if other.needed < (way.needed if other.job.images == 1 else clearly)]
        if not left:
            raise ValueError(too_large(job, free(), host))
        tell(f"memory ran out {described(way)}; running {described(left[0])} instead")


def _origin(network: VAREditModel, source: dict, vae: VAREditVAE | None) -> Origin:
    """The source's origin; ValueError where its latents are of another tokenizer than the model's."""
    config, samples, origin = network.diffusion_model.config, source["samples"], source.get(KEY)
    if samples.ndim != 4 or config.token_bits not in (samples.shape[1], 4 * samples.shape[1]):
        raise ValueError(
            f"the source has the shape {list(samples.shape)} but the model predicts tokens of {config.token_bits} bits; "
            "encode it with VAREdit Source Encode and the VAE that belongs to the model"
        )
    if origin is not None and origin.scales != 1:
        raise ValueError("these are the sums of all scales; connect the sampler's latent, or VAREdit Source Encode")
    if origin is not None:
        return origin
    if vae is None:
        side = 1 if config.token_bits == samples.shape[1] else 2  # latents along a token's edge
        return Origin(fitting_of(samples, TOKEN_PIXELS // side))
    patch_size(config, vae.first_stage_model.config)
    return Origin(fitting_of(samples, vae.stride), vae.colours)


def _run(model, features: Tensor, texts: Texts, settings: SamplingSettings, way: Plan, watcher: Watcher) -> Tensor:
    """Sums [K, B, d, H, W] of all scales on the model's device."""
    options = model.model_options["transformer_options"]
    config = way.job.config
    attend = attention_of(options, config.head_size, way.job.dtype, model.load_device)
    work, size = Workspace(STORES[way.store], kept=False, rows_at_once=way.rows_at_once), way.job.images
    schedule = way.job.schedule

    def loop(transformer) -> Tensor:
        parts = []
        for first in range(0, len(features), size):
            part = features[first : first + size]
            pairs = [texts.of(first + i) for i in range(len(part))]
            seeded = replace(settings, seed=(settings.seed + first) % 2**64)
            wanted, unwanted = map(list, zip(*pairs))
            run = sample(transformer, part, wanted, schedule, seeded, unwanted, attend, work)
            sums = []
            with closing(run) as scales:
                for scale in scales:
                    sums.append(scale.running_sum)
                    watcher.passed(scale, first, len(part))
            parts.append(torch.stack(sums))
        return torch.cat(parts, dim=1)

    model.pre_run()
    try:
        # Sets the current one of several GPUs; ComfyUI has it since 0.23.
        context = getattr(mm, "cuda_device_context", nullcontext)
        with context(model.load_device):
            return checked_model(model).run(loop, model)
    finally:
        model.cleanup()


def free_memory(model) -> int:
    """Bytes an edit may take on a model's device when all models have made way as far as they can."""
    device = model.load_device
    loaded = sum(other.model_loaded_memory() for other in mm.current_loaded_models if other.device == device)
    if mm.is_device_cpu(device):
        loaded = 0  # weights in host memory stay there
    whole = mm.vram_state in (mm.VRAMState.HIGH_VRAM, mm.VRAMState.SHARED)  # its weights do not make way
    return mm.get_free_memory(device) + loaded - mm.extra_reserved_memory() - whole * model.model_size()


def host_memory() -> int:
    """Bytes of host memory that are free."""
    return mm.get_free_memory(torch.device("cpu"))


def plan_text(model, area: str, images: int, guided: bool) -> str:
    """What an edit takes and how the sampler would run it now, in lines."""
    network, device = checked_model(model), model.load_device
    transformer = network.diffusion_model
    job, free = Job(transformer.config, schedule_for(area), images, guided, transformer.dtype), free_memory(model)
    height, width = job.schedule.pixels
    kind = str(transformer.dtype).removeprefix("torch.")
    lines = [
        f"{width}x{height}, pictures: {images}, {'with' if guided else 'without'} guidance, {kind} on {device}",
        f"weights: {gigabytes(model.model_size())}",
        f"keys and values: {gigabytes(job.stored('exact'))}",
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
