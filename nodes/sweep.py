"""One edit at several values of its settings, side by side."""

from __future__ import annotations

from ..varedit_core.controls.registry import SWEPT
from ..varedit_core.sampling.settings import DEFAULT_SETTINGS
from ._api import io, tell, ui

NONE = "none"


class VAREditSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditSweep",
            display_name="VAREdit Sweep",
            category="VAREdit",
            description="Runs one edit at several values of one or two settings, and shows the results as a labelled "
            "grid.",
            search_aliases=["xy plot", "grid", "compare settings", "parameter sweep"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from VAREdit Model Loader."),
                io.Latent.Input("source", tooltip="The picture to edit, from VAREdit Source Encode."),
                io.Conditioning.Input("positive", tooltip="The instruction."),
                io.Vae.Input("vae", tooltip="The VAE, from VAREdit VAE Loader."),
                io.Int.Input(
                    "seed",
                    default=DEFAULT_SETTINGS.seed,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The draw, the same for every edit unless the sweep is over seed.",
                ),
                io.Float.Input(
                    "guidance",
                    default=DEFAULT_SETTINGS.guidance,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.001,
                    tooltip="How strongly the instruction counts, unless the sweep is over it; the demo model wants 2.",
                ),
                io.Float.Input(
                    "temperature",
                    default=DEFAULT_SETTINGS.temperature,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Randomness of the draw, unless the sweep is over it.",
                ),
                io.Combo.Input("x", options=list(SWEPT), default="guidance", tooltip="The setting from left to right."),
                io.String.Input(
                    "x_values",
                    default="1, 2, 3",
                    tooltip="Its values, with commas between them; names for score and preset.",
                ),
                io.Combo.Input(
                    "y", options=[NONE, *SWEPT], default=NONE, tooltip="The setting from top to bottom, or none."
                ),
                io.String.Input("y_values", default="", tooltip="Its values, with commas between them."),
                io.Conditioning.Input("negative", optional=True, tooltip="What to stay away from."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture that was edited; needed for a mask, and to keep its alpha.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the edits may change anything (not 0); an empty one counts as none.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "grid", display_name="grid", tooltip="The labelled grid that the node shows, of the first picture."
                ),
                io.Image.Output(
                    "cells",
                    display_name="cells",
                    is_output_list=True,
                    tooltip="The edits, row by row, as a list of pictures (or batches) at their full size.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, source, positive, vae, seed, guidance, temperature, x, x_values, y, y_values,
        negative=None, image=None, mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        from .adapters.conditioning import Instructions
        from .adapters.grids import Swept, edit_grid
        from .adapters.running import settings_of

        def said(text: str) -> None:
            tell(cls, text)

        if y == NONE and y_values.strip():
            said("y is none, so its values are not used; choose a setting for y, or empty them")
        axes = [(x, x_values), *([(y, y_values)] if y != NONE else [])]
        read = Instructions.read(positive, negative, mask, (), said)
        swept = Swept(read, settings_of(seed, guidance, temperature, None), axes, image, mask)
        grid, cells = edit_grid(model, source, vae, swept, said)
        return io.NodeOutput(grid, cells, ui=ui.PreviewImage(grid, cls=cls))
