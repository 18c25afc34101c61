"""How the sampler is held to its source, where each instruction counts, and how its settings run over the scales."""

from __future__ import annotations

from ..varedit_core.controls.best_of import MOST_CANDIDATES, SCORES
from ..varedit_core.controls.mask import MOST_FEATHER
from ..varedit_core.controls.registry import NEUTRAL, Controls
from ..varedit_core.sampling.settings import FLAT, PRESET, PRESETS, Curve
from ._api import io
from .shortcuts import MOST

ControlsType = io.Custom("VAREDIT_CONTROLS")
CurvesType = io.Custom("VAREDIT_CURVES")
RegionsType = io.Custom("VAREDIT_REGIONS")
OWN = "own"
"""In place of a preset: the curves that the node's numbers say."""


def _share(id: str, tooltip: str):
    return io.Float.Input(
        id, default=getattr(NEUTRAL, id), min=0.0, max=1.0, step=0.05, round=0.001, tooltip=tooltip
    )


def _count(id: str, least: int, most: int, tooltip: str, advanced: bool = False):
    return io.Int.Input(id, default=getattr(NEUTRAL, id), min=least, max=most, advanced=advanced, tooltip=tooltip)


def _factor(id: str, default: float, tooltip: str):
    return io.Float.Input(id, default=default, min=0.0, max=16.0, step=0.05, round=0.001, tooltip=tooltip)


class VAREditControls(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditControls",
            display_name="VAREdit Controls",
            category="VAREdit",
            description="How far an edit may leave its source, and which of several beginnings goes on. As it comes, it changes nothing.",
            search_aliases=["strength", "denoise", "preserve", "auto mask", "best of", "candidates"],
            inputs=[
                _share(
                    "strength",
                    "1 is the free edit. Below it the first scales keep the source's bits, so that layout and colours stay: 0.75 still recolours and restyles. 0 is the source through the tokenizer.",
                ),
                _share(
                    "preserve",
                    "Pulls every bit towards the source's, at all scales: 0 not at all, 0.5 by so much that unsure ones stay, 1 wholly.",
                ),
                _share(
                    "source_attention",
                    "What the source weighs while the edit looks around: 1 is as trained, less lets more go, 0 does not see it. Not together with the shortcut window.",
                ),
                _count(
                    "feather",
                    0,
                    MOST_FEATHER,
                    "Tokens of 16 pixels around a mask that may change, too, so that the edit can join its surroundings.",
                ),
                _share(
                    "auto_mask",
                    "Above 0 the edit finds out by itself where it changes something, and the rest stays the source's; the larger, the more is taken for changed. 0.5 is a good start. Connect the picture to VAREdit Decode.",
                ),
                _count(
                    "best_of",
                    1,
                    MOST_CANDIDATES,
                    "So many candidates are begun, from one look at the source, and only the best one of each result is finished.",
                    advanced=True,
                ),
                _count(
                    "best_at",
                    1,
                    MOST,
                    "After so many scales the best candidate is chosen.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "score",
                    options=list(SCORES),
                    default=NEUTRAL.score,
                    advanced=True,
                    tooltip=(
                        "What the best candidate is: likelihood the most probable one, instruction the one that the "
                        "instruction explains best (needs guidance), near the nearest to the source, far the farthest."
                    ),
                ),
            ],
            outputs=[ControlsType.Output("controls", display_name="controls", tooltip="For the sampler's controls.")],
        )

    @classmethod
    def execute(
        cls, strength, preserve, source_attention, feather, auto_mask, best_of, best_at, score
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Controls(strength, preserve, source_attention, feather, auto_mask, best_of, best_at, score)
        )


class VAREditCurves(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditCurves",
            display_name="VAREdit Curves",
            category="VAREdit",
            description="Lets guidance and temperature rise or fall from the first scale to the last, as factors on the sampler's own.",
            search_aliases=["preset", "schedule", "faithful", "creative", "guidance curve", "temperature curve"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, OWN],
                    default=PRESET,
                    tooltip=(
                        "balanced changes nothing, faithful lets guidance end and halves temperature, creative begins warm "
                        "and with more guidance, own takes the four numbers below."
                    ),
                ),
                _factor(
                    "guidance_start",
                    FLAT.start,
                    "For own: at the first scale so many times what guidance is above 1; 0 is no guidance there.",
                ),
                _factor("guidance_end", FLAT.end, "For own: the same at the last scale; between them in equal steps."),
                _factor(
                    "temperature_start",
                    FLAT.start,
                    "For own: at the first scale so many times the temperature. Layout and shapes are drawn there.",
                ),
                _factor(
                    "temperature_end",
                    FLAT.end,
                    "For own: the same at the last scale, where fine detail is drawn.",
                ),
            ],
            outputs=[CurvesType.Output("curves", display_name="curves", tooltip="For the sampler's curves.")],
        )

    @classmethod
    def execute(cls, preset, guidance_start, guidance_end, temperature_start, temperature_end) -> io.NodeOutput:
        own = Curve(guidance_start, guidance_end), Curve(temperature_start, temperature_end)
        return io.NodeOutput(own if preset == OWN else PRESETS[preset])


class VAREditRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditRegion",
            display_name="VAREdit Region",
            category="VAREdit",
            description="Another instruction for a part of the picture, beside the sampler's own; several of these lie on top of each other.",
            search_aliases=["regional prompt", "second instruction", "attention couple", "area conditioning"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The instruction for this part."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where it counts (not 0), instead of all that lies below it. Of any size, one for all pictures or one for each.",
                ),
                RegionsType.Input(
                    "regions",
                    optional=True,
                    tooltip="Regions below this one: where both are, this one counts.",
                ),
            ],
            outputs=[
                RegionsType.Output(
                    "regions", display_name="regions", tooltip="For the sampler's regions, or for another region on top."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning, mask, regions=None) -> io.NodeOutput:
        from .adapters.running import Region, Texts

        if not mask.any():
            raise ValueError("the region's mask is empty; paint where its instruction is to count")
        return io.NodeOutput((*(regions or ()), Region(Texts.read(conditioning, None), mask)))
