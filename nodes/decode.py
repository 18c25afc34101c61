"""What comes out of the sampler: the edited picture, and a picture of every scale."""

from __future__ import annotations

from ..varedit_core.defaults import SCALE_PICTURES
from ._api import io, tell, ui
from .widgets import chosen

SEAM, MOST_SEAM = 0, 256
"""Pixels over which an edit fades in at a mask's edge, unless told otherwise and at most."""


class VAREditDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditDecode",
            display_name="VAREdit Decode",
            category="VAREdit",
            description="Decodes an edit to a picture of exactly the source's size, and composites it by a mask, or "
            "the auto mask, if there is one.",
            search_aliases=["vae decode", "masked edit", "composite", "paste back"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE, from VAREdit VAE Loader."),
                io.Latent.Input("latent", tooltip="The edit, from VAREdit Sampler."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture that was edited; needed for a mask, an auto mask, and to keep its alpha.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the edit shows (1); elsewhere the picture stays exactly as it was. Of any size; an "
                    "empty one counts as none.",
                ),
                io.Int.Input(
                    "seam",
                    default=SEAM,
                    min=0,
                    max=MOST_SEAM,
                    optional=True,
                    tooltip="The feather: pixels from the mask's edge inwards over which the edit fades in; outside of "
                    "the mask nothing changes.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", display_name="image", tooltip="The edited picture, as large as the picture that came in."
                ),
                io.Mask.Output(
                    "mask",
                    display_name="mask",
                    tooltip="Where the edit shows: the mask with its feather, or what the auto mask found; 1 "
                    "everywhere without one.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, latent, image=None, mask=None, seam=SEAM) -> io.NodeOutput:
        from .adapters.pictures import decode_edit

        return io.NodeOutput(*decode_edit(vae, latent, image, mask, lambda text: tell(cls, text), seam))


class VAREditScalePreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditScalePreview",
            display_name="VAREdit Scale Preview",
            category="VAREdit",
            description="Shows the picture after every scale, and all of them on one contact sheet.",
            search_aliases=["contact sheet", "preview scales", "intermediate images", "progress pictures"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE, from VAREdit VAE Loader."),
                io.Latent.Input("scales", tooltip="The sampler's scales."),
                io.Combo.Input(
                    "pictures",
                    options=list(SCALE_PICTURES),
                    default=SCALE_PICTURES[0],
                    tooltip="full decodes every scale at the final size, own at the scale's own size, fast maps "
                    "latents to colours.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    is_output_list=True,
                    tooltip="One picture (or batch) a scale, coarse to fine, as a list, since sizes differ.",
                ),
                io.Image.Output("sheet", display_name="sheet", tooltip="The contact sheet that the node shows."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vae, scales, pictures: str) -> io.NodeOutput:
        from .adapters.pictures import scale_pictures

        images, sheet = scale_pictures(vae, scales, chosen("pictures", pictures, SCALE_PICTURES))
        return io.NodeOutput(images, sheet, ui=ui.PreviewImage(sheet, cls=cls))
