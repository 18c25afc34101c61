"""Where an edit changed its picture."""

from __future__ import annotations

from ..varedit_core.controls.auto_mask import AUTO_MASK
from ._api import io

LEAST = 0.1
"""Below this not even black for white would count."""


class VAREditChangeMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditChangeMap",
            display_name="VAREdit Change Map",
            category="VAREdit",
            description="Finds where an edit changed its picture, as masks: both are decoded, so that what the VAE "
            "alone changes does not count.",
            search_aliases=["difference", "what changed", "auto mask", "diff mask"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE, from VAREdit VAE Loader."),
                io.Latent.Input("latent", tooltip="The edit, from VAREdit Sampler."),
                io.Latent.Input("source", tooltip="What was edited: the sampler's source."),
                io.Float.Input(
                    "amount",
                    default=AUTO_MASK,
                    min=LEAST,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How soon a difference counts as a change: the larger, the more is inside the mask.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "changed",
                    display_name="changed",
                    tooltip="1 where the picture changed, else 0; of the picture's size.",
                ),
                io.Mask.Output(
                    "amount",
                    display_name="amount",
                    tooltip="By how much: 0 not at all, 1 enough to count; soft, of the picture's size.",
                ),
            ],
        )

    @classmethod
    def execute(cls, vae, latent, source, amount: float) -> io.NodeOutput:
        from .adapters.token_latents import change_map

        return io.NodeOutput(*change_map(vae, latent, source, amount))
