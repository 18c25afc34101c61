"""Edits under ComfyUI: memory is asked for once, every scale shows progress and a preview, cancelling acts within a
block.

The driver of `varedit_core` runs them, with the memory, attention and progress bar of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import comfy.ldm.modules.attention as attention
import comfy.model_management as mm
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from torch import Tensor

from ...varedit_core.controls.registry import NEUTRAL, NO_SHORTCUTS, Controls, Shortcuts, problems
from ...varedit_core.model.engine import Engine
from ...varedit_core.model.layers import sdpa
from ...varedit_core.model.transformer import Transformer
from ...varedit_core.pictures.composite import Region
from ...varedit_core.runtime.memory import engine_of, kept_bytes
from ...varedit_core.runtime.plan import STORES, Job, Plan
from ...varedit_core.runtime.workspace import Shape, Workspace
from ...varedit_core.sampling.batch import EditBatch
from ...varedit_core.sampling.checks import facts, patch_size, published_vae
from ...varedit_core.sampling.driver import Wanted, run
from ...varedit_core.sampling.parts import moved
from ...varedit_core.sampling.scale import Scale
from ...varedit_core.sampling.settings import DEFAULT_SETTINGS, SamplingSettings
from ...varedit_core.sampling.tokens import Tokens
from ...varedit_core.tokenizer.schedule import TOKEN_PIXELS
from .advice import without_triton
from .conditioning import Texts, drawn
from .foreign import check_patches, unused
from .given import tell_of_mask
from .holding import Hold, Holder, holder_of
from .keeping import Keeper, on_device
from .latents import KEY, Origin, check_shape, exactly, made, numbers_of, origin_in, tokens_in
from .model import VAREditModel, checked_model, unchanged
from .pictures import fitted_mask, region_area, scale_picture, unfitted_mask
from .room import free_memory, host_memory, may_stay
from .vae import VAREditVAE, checked_vae, flat

TICKS = 1000
"""Steps of the progress bar."""
Tell = Callable[[str], None]
T = TypeVar("T")


def settings_of(seed: int, guidance: float, temperature: float, top_p: float | None) -> SamplingSettings:
    return SamplingSettings(guidance, temperature, DEFAULT_SETTINGS.top_p if top_p is None else top_p, seed)


@dataclass(frozen=True, eq=False)
class Edit:
    """The sampler's inputs beside model and source.

    variations: results of each picture, with one seed after the other. mask: [y, x] or [B, y, x] of any size, above 0
    where the picture may change. drafter: a MODEL for `Shortcuts.drafted`. regions: instead of the texts' instruction,
    several with their places (see `conditioning.Instructions`). begun: a LATENT whose tokens are the first scales of
    this edit. part: how many edits of the node's run came before this one, and how many there are, for its progress.
    """

    texts: Texts | None
    settings: SamplingSettings
    variations: int = 1
    shortcuts: Shortcuts = NO_SHORTCUTS
    mask: Tensor | None = None
    drafter: Any = None
    controls: Controls = NEUTRAL
    regions: Sequence[Region] = ()
    begun: dict | None = None
    part: tuple[int, int] = (0, 1)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """`model.layers.sdpa`, which also asks whether the user cancelled."""
    mm.throw_exception_if_processing_interrupted()
    return sdpa(q, k, v, scale=scale, mask=mask)


torch_attention.recordable = True


def attention_of(transformer_options: dict, head_size: int, dtype: torch.dtype, device: torch.device):
    """ComfyUI's attention with the model's overrides, which also asks whether the user cancelled.

    On the CPU it is torch's own, whose numbers are the library's, unless the user chose another at the start. Where
    torch's it is, nothing of ComfyUI comes in between, so that passes may be recorded and kernels do its work.
    """
    chosen = args.use_split_cross_attention or args.use_quad_cross_attention
    function = attention.optimized_attention
    if not chosen and mm.is_device_cpu(device):
        function = attention.attention_pytorch
    if function is attention.attention_pytorch and "optimized_attention_override" not in transformer_options:
        return torch_attention

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
    """Shows progress by the passes' real cost, and a picture of every scale where one is wanted.

    costs: of the prefill and of every scale that runs. part: see `Edit`.
    """

    def __init__(
        self, costs: Sequence[float], results: int, part: tuple[int, int], origin: Origin, method: str,
        vae: VAREditVAE | None,
    ) -> None:  # fmt: skip
        self.done = [sum(costs[: k + 1]) / sum(costs) for k in range(1, len(costs))]
        self.before, self.edits = part
        self.bar = comfy.utils.ProgressBar(TICKS)
        self.origin, self.method, self.vae, self.results = origin, method, vae, results

    def __call__(self, scale: Scale, results: Sequence[int], pictures: Sequence[int]) -> None:
        """A scale of some results, by their numbers."""
        preview, first = None, results[0]
        if self.method != "off" and not first:
            picture = scale_picture(self.vae, scale.running_sum[:1], scale.grid, self.origin, self.method)
            preview = ("JPEG", picture, None)
        share = (first + len(results) * self.done[scale.index]) / self.results
        self.bar.update_absolute(round(TICKS * (self.before + share) / self.edits), TICKS, preview)


def preview_method(choice: str, vae: VAREditVAE | None, origin: Origin) -> str:
    """own, fast or off. ValueError for a preview that lacks the VAE. Colours are fitted here, before the edit has the
    memory."""
    if choice == "decoded" and vae is not None:
        return "own"
    if choice == "off" or (choice == "auto" and args.preview_method == LatentPreviewMethod.NoPreviews):
        return "off"
    known = choice != "decoded" and origin.colours is not None and origin.colours.map() is not None
    if not known and choice != "auto":
        raise ValueError(f"the preview {choice} needs the VAE; connect it to vae, or choose another preview")
    return "fast" if known else "off"


class ComfyMemory:
    """Memory that ComfyUI manages: models are loaded, and others make way, in one call before the loop.

    models: MODELs of the transformer and of a drafter or none. vae: one that decodes previews meanwhile. beside: bytes
    that it takes for that. tell: where sentences for the user go.
    """

    movable, exact = 0, False

    def __init__(self, models: Sequence, vae: VAREditVAE | None, beside: float, copies: int, tell: Tell) -> None:
        self.models, self.vae, self.beside, self.copies, self.tell = models, vae, int(beside), copies, tell
        self.model = models[0]

    @property
    def networks(self) -> list[Transformer]:
        return [checked_model(model).diffusion_model for model in self.models]

    def free(self, job: Job) -> float:
        return free_memory(self.model) - self.beside

    def host(self) -> float:
        return host_memory()

    def counted(self, job: Job) -> Job:
        return job

    def within(self, plan: Plan, drafts: bool, loop: Callable[[Engine], T]) -> T:
        model, job = self.model, plan.job
        network = checked_model(model)
        plain = plan.store == "exact" and not plan.rows_at_once
        stays = plain and unchanged(model) and may_stay(model, job, self.free(job))
        keeper = network.keeper(model.load_device)
        keeper.prepare(model.patches_uuid, _shape(job, min(self.copies, job.images), network) if stays else None)
        options = model.model_options["transformer_options"]
        attend = attention_of(options, network.diffusion_model.config.head_size, job.dtype, model.load_device)
        models = self.models[: 1 + drafts]
        with on_device(model.load_device), ExitStack() as stack:
            again = self._again(keeper, job) if stays and len(models) == 1 and not self.vae else None
            first = stack.enter_context(again) if again else self._loaded(stack, keeper, plan, models, stays)
            work = keeper.workspace(first) if stays else _workspace(plan)

            def inside(*networks: Transformer) -> T:
                return loop(engine_of(networks, [work, _workspace(plan)], attend))

            return _inside(models, inside)

    def _again(self, keeper: Keeper, job: Job) -> Hold | None:
        """The weights as the last edit left them, where they and the workspace are as they were and the rest fits
        beside them: there is nothing to load."""
        kept = keeper.work.shape is not None and keeper in mm.loaded_models()
        if not kept or mm.get_free_memory(self.model.load_device) < job.activations():
            return None
        return holder(self.model).again(self.model)

    def _loaded(self, stack: ExitStack, keeper: Keeper, plan: Plan, models: Sequence, stays: bool) -> Hold:
        """Load models and the preview's VAE, with room for the edit beside them; the first one's weights, which stand
        still until the stack is left where there is room, as the others' do."""
        # In one call, so that the models do not push each other out.
        loaded = [*self.models, *([self.vae.patcher] if self.vae else [])]
        beside = plan.needed + stays * kept_bytes(plan.job)
        keeper.load(loaded, beside + self.beside, listed=stays)
        room, holds = self.free(plan.job) - beside, []
        for model in models:
            holds.append(stack.enter_context(holder(model).hold(model, room)))
            room -= model.model_size()
        return holds[0]

    def ran_out(self, error: Exception) -> bool:
        try:
            mm.raise_non_oom(error)
        except Exception:
            return False
        return True

    def recover(self) -> None:
        checked_model(self.model).keeper(self.model.load_device).work.forget()
        mm.soft_empty_cache()


def holder(model) -> Holder:
    """What makes a MODEL's weights stand still."""
    return holder_of(checked_model(model).diffusion_model, model.load_device)


def sample_latent(model, source: dict, edit: Edit, preview: str, vae, tell: Tell) -> tuple[dict, dict, Tensor]:
    """Edit a LATENT of sources; the LATENTs of the edits and of the sums after every scale, scale by scale, and how
    sure the model was of each place of the edits, a MASK.

    Takes the next way to run (see `runtime.plan`) where memory runs out, saying so; ValueError where none is left.
    """
    network = checked_model(model)
    check_patches(model)
    if vae is not None:
        patch_size(network.diffusion_model.config, checked_vae(vae).first_stage_model.config)
    origin = _origin(network, source, vae)
    method = preview_method(preview, vae, origin)
    batch, known = _batch(edit, source, origin, network.diffusion_model.config.source, tell)
    models = [model, *_drafter(edit, model)]
    said = [network.made_for.doubt(batch.schedule), origin.doubt, without_triton(model.load_device)]
    for sentence in [*said, *problems(facts(batch)), *map(unused, models)]:
        if sentence:
            tell(sentence)
    decoder = vae if method == "own" else None
    beside = vae.memory_used_decode(batch.features.shape, vae.vae_dtype) if decoder else 0
    copies = max(edit.variations, edit.controls.best_of)
    memory = ComfyMemory(models, decoder, beside, copies, tell)
    watcher = Watcher(_costs(batch, network.diffusion_model), len(batch.seeds), edit.part, origin, method, vae)
    result = run(
        moved(batch, model.load_device), memory, watcher, known=known, wanted=Wanted(scales=True, confidence=True)
    )
    result.check()
    device = mm.intermediate_device()
    sums = result.scales.to(device)
    tokens = replace(result.tokens.to(device), fitting=origin.fitting, auto_mask=edit.controls.auto_mask)
    origin = replace(origin, empty=False, tokens=tokens, guessed=False)
    latent = {**_each(source, edit.variations), "samples": sums[-1].clone()}  # a view would keep all scales
    numbers = [edit.variations * n + copy for n in numbers_of(source) for copy in range(edit.variations)]
    latent = made(**latent, origin=origin, numbers=numbers)
    scales = made(sums.flatten(0, 1), replace(origin, scales=len(sums), tokens=None))
    return latent, scales, unfitted_mask(result.confidence, origin.fitting).to(device)


def _each(source: dict, variations: int) -> dict:
    """A LATENT's other parts for several results of each row: masks of rows are repeated, that of all is not."""
    rest = {key: value for key, value in source.items() if key not in ("samples", KEY)}
    if len(rest.get("noise_mask", ())) > 1:
        rest["noise_mask"] = rest["noise_mask"].repeat_interleave(variations, 0)
    return rest


def _batch(edit: Edit, source: dict, origin: Origin, reads: bool, tell: Tell) -> tuple[EditBatch, Tokens | None]:
    """The batch of edits, and the sources' tokens, where they are known. reads: whether the model reads a source.
    ValueError where inputs do not belong together."""
    features, images = source["samples"], len(source["samples"])
    areas = [region_area(drawn(region.mask, origin.fitting.size), origin.fitting, images) for region in edit.regions]
    areas = torch.stack(areas, dim=1) if areas else None
    mask = _mask(edit, source, origin, areas)
    given = [(edit.mask, "mask"), (source.get("noise_mask"), "mask of the latent")]
    for one, name in [*given, *((region.mask, "mask of a region") for region in edit.regions)]:
        if isinstance(one, Tensor):
            tell_of_mask(one, origin.fitting.size, tell, name)
    _check_source(reads, origin.empty, mask is not None, edit.controls, tell)
    instructions = [region.instruction for region in edit.regions] or [edit.texts]
    texts = [[own.of(image)[0] for own in instructions] for image in range(images)]
    negatives = [instructions[0].of(image)[1] for image in range(images)]
    known, prefix = origin.own(features.device), ()
    if known is not None and not known.complete:
        raise ValueError(
            f"the source is an edit of {len(known)} of {len(known.schedule)} scales, which is no picture yet; connect "
            "it to begun, and to source what it is an edit of"
        )
    if edit.begun is not None:
        tokens = tokens_in(edit.begun)
        if tokens is None:
            raise ValueError(
                "the latent to go on from holds no tokens; connect one of VAREdit Sampler, Load Tokens or First "
                "Scales, as it came"
            )
        begun = origin_in(edit.begun)
        if begun is not None and begun.fitting.size != origin.fitting.size:
            sizes = ["x".join(map(str, one.fitting.size)) for one in (begun, origin)]
            raise ValueError(
                f"the latent to go on from is an edit of a {sizes[0]} picture, and the source is one of {sizes[1]}; "
                "connect the source that it is an edit of"
            )
        if begun is not None and begun.fitting.box != origin.fitting.box:
            raise ValueError(
                "the latent to go on from was encoded with another fit than the source; choose one fit for both"
            )
        prefix = tokens.bits
        if tokens.complete:
            tell(
                "the edit to go on from has all its scales, so nothing is left to draw; keep the first ones by VAREdit "
                "First Scales"
            )
    batch = EditBatch.of(
        features, texts, origin.fitting.schedule, edit.settings, negatives, edit.variations, controls=edit.controls,
        shortcuts=edit.shortcuts, mask=mask, areas=areas, prefix=prefix, source_total=features if known else None,
        numbers=numbers_of(source),
    )  # fmt: skip
    return batch, known


def _check_source(read: bool, empty: bool, masked: bool, controls: Controls, tell: Callable[[str], None]) -> None:
    """ValueError where the model or its controls cannot take a source. Tells the user where a source is not read at
    all."""
    if read and empty:
        raise ValueError(
            "this model edits pictures but the source is empty; connect VAREdit Source Encode, or set kind to "
            "text-to-image in VAREdit Model Loader if the file is an Infinity checkpoint"
        )
    if empty and masked:
        raise ValueError(
            "the source is empty, so that there is nothing to keep outside the mask; connect VAREdit Source Encode"
        )
    if empty:
        controls.check_source()
    if not (read or empty or masked or controls.held):
        tell(
            "this model makes pictures of text alone and takes only the source's size; connect a mask to repaint a "
            "part of it"
        )


def _mask(edit: Edit, source: dict, origin: Origin, areas: Tensor | None) -> Tensor | None:
    """The mask beside the fitted sources, None for an empty one: where both the sampler's and the latent's let the
    picture change; of regions that have all a mask, what they cover."""
    given = [one for one in (edit.mask, source.get("noise_mask")) if one is not None]
    fitted = [fitted_mask(one, origin.fitting, len(source["samples"])) for one in given]
    mask = reduce(torch.minimum, [one for one in fitted if one is not None] or [None])
    if mask is not None and not mask.any():
        raise ValueError(
            "mask and the mask of the latent leave no place in common, so that nothing may change; disconnect one"
        )
    if edit.regions and all(region.mask is not None for region in edit.regions):
        covered = areas.amax(1)
        mask = covered if mask is None else covered * (mask > 0)
    if edit.shortcuts.inside and mask is None:
        raise ValueError("the shortcut inside needs a mask that is not empty; connect one to mask, or set inside to 0")
    return mask


def _drafter(edit: Edit, model) -> list:
    """The model that draws the first scales, where one does. model: the other one."""
    if edit.shortcuts.drafted and edit.drafter is None:
        raise ValueError("drafted scales need a second model; connect one to drafter, or set drafted to 0")
    if edit.drafter is not None and not edit.shortcuts.drafted:
        raise ValueError("a drafter needs scales to draw; set drafted in VAREdit Shortcuts, or disconnect it")
    if (
        edit.drafter is not None
        and edit.drafter.model is model.model
        and edit.drafter.patches_uuid != model.patches_uuid
    ):
        raise ValueError(
            "drafter and model are one loaded model, which has one of them's LoRAs at a time; load the drafter with a "
            "VAREdit Model Loader of its own"
        )
    return [edit.drafter] if edit.shortcuts.drafted else []


def _costs(batch: EditBatch, network: Transformer) -> list[float]:
    """What the prefill and each scale that runs cost, in any unit."""
    source, *scales = Job(network.config, batch.schedule, 1, True, network.dtype).shares()
    guided = [guidance != 1 for guidance, *_ in batch.plan]
    return [source * (1 + any(guided)) / batch.copies, *(cost * (1 + twice) for cost, twice in zip(scales, guided))]


def _shape(job: Job, copies: int, network: VAREditModel) -> Shape:
    """The shape of a workspace, by the longest text; the device does not matter here."""
    texts = [range(job.text_tokens)] * (job.rows // copies)
    return Shape.of(job.schedule, texts, copies, network.diffusion_model.dtype, torch.device("cpu"))


def _workspace(way: Plan) -> Workspace:
    """A workspace that is freed after the edit."""
    return Workspace(STORES[way.store], kept=False, rows_at_once=way.rows_at_once)


def _origin(network: VAREditModel, source: dict, vae: VAREditVAE | None) -> Origin:
    """The source's origin; ValueError where its latents are of another VAE than the model's."""
    config, samples = network.diffusion_model.config, source["samples"]
    if not flat(samples) or config.token_bits not in (samples.shape[1], 4 * samples.shape[1]):
        raise ValueError(
            f"the source has the shape {list(samples.shape)} but the model predicts tokens of {config.token_bits} "
            "bits; encode it with VAREdit Source Encode and the VAE that belongs to the model"
            f"{published_vae(config.token_bits)}"
        )
    origin = origin_in(source)
    if origin is not None and origin.scales:
        raise ValueError("these are the sums of all scales; connect the sampler's latent, or VAREdit Source Encode")
    stride = TOKEN_PIXELS // (1 if config.token_bits == samples.shape[1] else 2)  # by latents along a token's edge
    if origin is not None:
        check_shape(samples, origin, stride)
        return origin
    if vae is None:
        return exactly(samples, stride)
    return exactly(samples, vae.stride, vae.colours)


def _inside(models: Sequence, loop: Callable[..., T], *networks) -> T:
    """A loop over the networks of models, inside what nodes put around the calls of each."""
    if not models:
        return loop(*networks)
    model, *rest = models
    model.pre_run()
    try:
        return checked_model(model).run(lambda network: _inside(rest, loop, *networks, network), model)
    finally:
        model.cleanup()
