"""The sampler, and the plan of what it will take."""

from __future__ import annotations

from ..varedit_core.controls.curves import bent
from ..varedit_core.controls.registry import NEUTRAL, NO_SHORTCUTS
from ..varedit_core.defaults import PREVIEWS, SIDE, SIZES
from ..varedit_core.sampling.settings import DEFAULT_SETTINGS
from ._api import io, tell, ui
from .controls import ControlsType, CurvesType, RegionsType
from .shortcuts import ShortcutsType
from .widgets import chosen


class VAREditSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditSampler",
            display_name="VAREdit Sampler",
            category="VAREdit",
            description="Edits the source by the instruction, scale by scale from one token to the full grid.",
            search_aliases=["edit image", "next-scale prediction", "ksampler", "instruct edit", "kontext", "inpaint"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from VAREdit Model Loader."),
                io.Latent.Input("source", tooltip="The picture to edit, from VAREdit Source Encode."),
                io.Conditioning.Input("positive", tooltip="The instruction."),
                io.Int.Input(
                    "seed",
                    default=DEFAULT_SETTINGS.seed,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The draw; result i of a batch or of variations uses seed + i. In fp32 one seed is one "
                    "picture on every device.",
                ),
                io.Float.Input(
                    "guidance",
                    default=DEFAULT_SETTINGS.guidance,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.001,
                    tooltip="How strongly the instruction counts. 1 switches guidance off and halves work and memory; "
                    "the demo model wants 2.",
                ),
                io.Float.Input(
                    "temperature",
                    default=DEFAULT_SETTINGS.temperature,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Randomness of the draw; 0 always takes the likelier bit.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to stay away from; unconnected, the model's own learned text is used.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Needed for the preview decoded, and for fast where a stock node encoded the source.",
                ),
                io.Float.Input(
                    "top_p",
                    default=DEFAULT_SETTINGS.top_p,
                    min=0.5,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="A bit value of probability up to 1 - top_p is never drawn.",
                ),
                io.Combo.Input(
                    "preview",
                    options=list(PREVIEWS),
                    default=PREVIEWS[0],
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Pictures of every scale while sampling: auto follows ComfyUI's live preview setting, fast "
                        "maps latents to colours, decoded runs the VAE at the scale's own size, off shows none."
                    ),
                ),
                io.Int.Input(
                    "variations",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Results of each picture, one behind the other, with one seed after the other: the source "
                    "is read once for all.",
                ),
                ShortcutsType.Input(
                    "shortcuts",
                    optional=True,
                    tooltip="What to leave out to be faster, from VAREdit Shortcuts.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the edit may change anything (not 0); outside it, and outside a margin of one token "
                    "around it (feather of VAREdit Controls), every bit is the source's. Of any size; an empty one "
                    "counts as none.",
                ),
                io.Model.Input(
                    "drafter",
                    optional=True,
                    tooltip="A second model of the same VAE and text encoder, for the shortcut drafted.",
                ),
                ControlsType.Input(
                    "controls",
                    optional=True,
                    tooltip="How far the edit may leave its source, from VAREdit Controls.",
                ),
                CurvesType.Input(
                    "curves",
                    optional=True,
                    tooltip="How guidance and temperature run over the scales, from VAREdit Curves.",
                ),
                RegionsType.Input(
                    "regions",
                    optional=True,
                    tooltip="Further instructions with masks, from VAREdit Region. They lie on top of positive, which "
                    "counts inside mask, or everywhere without one.",
                ),
                io.Latent.Input(
                    "begun",
                    optional=True,
                    tooltip="What to go on from: an edit of the same pictures and size whose first scales are taken as "
                    "they are; only the others are drawn.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="The edit, for VAREdit Decode or a stock VAE decode."
                ),
                io.Latent.Output(
                    "scales",
                    display_name="scales",
                    tooltip="The sum after every scale, coarse to fine, for VAREdit Scale Preview.",
                ),
                io.Mask.Output(
                    "certainty",
                    display_name="certainty",
                    tooltip="How sure the model was of each place, from 0 to 1, over all bits and scales.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        source,
        positive,
        seed,
        guidance,
        temperature,
        negative=None,
        vae=None,
        top_p=None,
        preview=None,
        variations=1,
        shortcuts=None,
        mask=None,
        drafter=None,
        controls=None,
        curves=None,
        regions=None,
        begun=None,
    ) -> io.NodeOutput:
        from .adapters.conditioning import Instructions
        from .adapters.model import checked_model
        from .adapters.running import Edit, sample_latent, settings_of

        settings = settings_of(seed, guidance, temperature, top_p)
        settings = bent(settings, *curves) if curves else settings

        def said(text: str) -> None:
            tell(cls, text)

        if sentence := checked_model(model).made_for.doubt_default(settings):
            said(sentence)
        shown = chosen("preview", preview or PREVIEWS[0], PREVIEWS)
        read = Instructions.read(positive, negative, mask, regions or (), said)
        more = dict(controls=controls or NEUTRAL, regions=read.regions, begun=begun)
        edit = Edit(read.texts, settings, variations, shortcuts or NO_SHORTCUTS, read.mask, drafter, **more)
        return io.NodeOutput(*sample_latent(model, source, edit, shown, vae, said))


class VAREditMemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditMemoryPlan",
            display_name="VAREdit Memory Plan",
            category="VAREdit",
            description="Says what an edit will take in GB and how the sampler will run it, before the model goes to "
            "the GPU.",
            search_aliases=["vram", "memory estimate", "kv cache size", "will it fit"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from VAREdit Model Loader."),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=SIDE,
                    tooltip="The working size that VAREdit Source Encode will use.",
                ),
                io.Int.Input(
                    "images", default=1, min=1, max=4096, tooltip="Pictures in the batch, times their variations."
                ),
                io.Boolean.Input(
                    "guided", default=True, tooltip="Whether guidance differs from 1, which doubles the rows."
                ),
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="What the node shows, to save it or to pass it on."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model, size, images, guided):
        return float("nan")  # free memory changes all the time

    @classmethod
    def execute(cls, model, size: str, images: int, guided: bool) -> io.NodeOutput:
        from .adapters.room import plan_text

        text = plan_text(model, SIZES[chosen("size", size, SIZES)], images, guided)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
