"""How the sampler is held to its source, where each instruction counts, and how its settings run over the scales."""

from __future__ import annotations

from ..varedit_core.controls.curves import OWN, PRESETS
from ..varedit_core.controls.registry import Controls
from ..varedit_core.sampling.settings import Curve
from ._api import io, tell
from .widgets import chosen, takes, widgets

ControlsType = io.Custom("VAREDIT_CONTROLS")
CurvesType = io.Custom("VAREDIT_CURVES")
RegionsType = io.Custom("VAREDIT_REGIONS")


class VAREditControls(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditControls",
            display_name="VAREdit Controls",
            category="VAREdit",
            description="How far an edit may leave its source, and which of several beginnings goes on. As it comes, "
            "it changes nothing.",
            search_aliases=["strength", "denoise", "preserve", "auto mask", "best of", "candidates"],
            inputs=widgets("controls"),
            outputs=[ControlsType.Output("controls", display_name="controls", tooltip="For the sampler's controls.")],
        )

    @classmethod
    @takes("controls")
    def execute(cls, **values) -> io.NodeOutput:
        return io.NodeOutput(Controls(**values))


class VAREditCurves(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditCurves",
            display_name="VAREdit Curves",
            category="VAREdit",
            description="Lets guidance and temperature rise or fall from the first scale to the last, as factors on "
            "the sampler's own.",
            search_aliases=["preset", "schedule", "faithful", "creative", "guidance curve", "temperature curve"],
            inputs=widgets("curves"),
            outputs=[CurvesType.Output("curves", display_name="curves", tooltip="For the sampler's curves.")],
        )

    @classmethod
    def execute(cls, preset, guidance_start, guidance_end, temperature_start, temperature_end) -> io.NodeOutput:
        own = Curve(guidance_start, guidance_end), Curve(temperature_start, temperature_end)
        return io.NodeOutput(own if preset == OWN else PRESETS[chosen("preset", preset, PRESETS)])


class VAREditRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditRegion",
            display_name="VAREdit Region",
            category="VAREdit",
            description="Another instruction for a part of the picture, beside the sampler's own; several of these lie "
            "on top of each other.",
            search_aliases=["regional prompt", "second instruction", "attention couple", "area conditioning"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The instruction for this part."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where it counts (not 0), instead of all that lies below it. Of any size, one for all "
                    "pictures or one for each.",
                ),
                RegionsType.Input(
                    "regions",
                    optional=True,
                    tooltip="Regions below this one: where both are, this one counts.",
                ),
            ],
            outputs=[
                RegionsType.Output(
                    "regions",
                    display_name="regions",
                    tooltip="For the sampler's regions, or for another region on top.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, conditioning, mask, regions=None) -> io.NodeOutput:
        from .adapters.conditioning import regions as places
        from .adapters.pictures import masks_of

        if not masks_of(mask).any():
            raise ValueError("the region's mask is empty; paint where its instruction is to count")
        found = places(conditioning, lambda text: tell(cls, text), "region's", mask)
        return io.NodeOutput((*(regions or ()), *found))
