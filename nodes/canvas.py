"""The part of a picture that the model sees: cut out by a mask and put back, or with room added around it."""

from __future__ import annotations

from ..varedit_core.defaults import CROP_MARGIN, FEATHER, FILL, FILLS, FIT, LEAST_MARGIN, LENGTHS, OVERLAP
from ..varedit_core.fitting import FITS
from ._api import io, tell

RegionType = io.Custom("VAREDIT_REGION")
MOST = 16384
"""Pixels of a side, as in ComfyUI's own nodes."""


class VAREditCropRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditCropRegion",
            display_name="VAREdit Crop Region",
            category="VAREdit",
            description="Cuts out what a mask marks, with some of its surroundings, so that a small part of a large "
            "picture is edited at the model's full size.",
            search_aliases=["inpaint crop", "crop by mask", "crop and stitch", "detailer"],
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch, of any size."),
                io.Mask.Input(
                    "mask",
                    tooltip="What may change (not 0), one for all pictures or one for each. Of any size: it is "
                    "stretched over the picture.",
                ),
                io.Float.Input(
                    "margin",
                    default=CROP_MARGIN,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Surroundings that the model sees on every side, as a share of the masked part's longer "
                    f"side; at least {LEAST_MARGIN} pixels.",
                ),
                io.Combo.Input(
                    "shape",
                    options=list(FITS),
                    default=FIT,
                    tooltip="square, or aspect for the nearest of 15 shapes; choose the same as fit of VAREdit Source "
                    "Encode.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The part to edit, for VAREdit Source Encode."),
                io.Mask.Output(
                    "mask",
                    display_name="mask",
                    tooltip="1 where that part may change, else 0, for the sampler; soft edges come back in VAREdit "
                    "Stitch.",
                ),
                RegionType.Output("region", display_name="region", tooltip="Place and mask, for VAREdit Stitch."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, mask, margin: float, shape: str) -> io.NodeOutput:
        from ..varedit_core.pictures.canvas import crop_around, crop_pixels
        from .adapters.given import tell_of_mask

        if mask.any():  # else an error
            tell_of_mask(mask, (image.shape[2], image.shape[1]), lambda text: tell(cls, text))
        region = crop_around((image.shape[2], image.shape[1]), mask, margin, shape)
        part, inside = crop_pixels(image, region)
        return io.NodeOutput(part, inside.to(image.device), region)


class VAREditStitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditStitch",
            display_name="VAREdit Stitch",
            category="VAREdit",
            description="Puts an edited part back into the whole picture, inside the mask only; the rest stays exactly "
            "as it was.",
            search_aliases=["inpaint stitch", "paste back", "uncrop", "crop and stitch"],
            inputs=[
                io.Image.Input("image", tooltip="The whole picture(s), as they went into VAREdit Crop Region."),
                io.Image.Input(
                    "edited",
                    tooltip="The part after the edit, from VAREdit Decode; several variations of each picture too.",
                ),
                RegionType.Input("region", tooltip="From VAREdit Crop Region."),
                io.Int.Input(
                    "feather",
                    optional=True,
                    default=FEATHER,
                    min=0,
                    max=512,
                    tooltip="Pixels over which the edit appears, from the mask's edge inwards; 0 is a hard edge, or "
                    "the mask's own soft one.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The whole picture(s) with the edit in place.")
            ],
        )

    @classmethod
    def execute(cls, image, edited, region, feather: int = FEATHER) -> io.NodeOutput:
        from ..varedit_core.pictures.canvas import stitch_pixels

        return io.NodeOutput(stitch_pixels(image, edited, region, feather))


def _side(id: str):
    return io.Int.Input(id, default=0, min=0, max=MOST, tooltip=f"What is added at the {id}.")


class VAREditExtendCanvas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditExtendCanvas",
            display_name="VAREdit Extend Canvas",
            category="VAREdit",
            description="Adds room around a picture for the model to fill, and the mask of what is new.",
            search_aliases=["outpaint", "pad image for outpainting", "expand image", "uncrop"],
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch."),
                *map(_side, ("left", "top", "right", "bottom")),
                io.Combo.Input(
                    "unit",
                    options=list(LENGTHS),
                    default=LENGTHS[0],
                    tooltip="Of left, top, right and bottom: pixels, or percent of the picture's width and height.",
                ),
                io.Combo.Input(
                    "fill",
                    options=list(FILLS),
                    default=FILL,
                    tooltip="What the model sees there: blur spreads the edges' colours, mirror goes on with what is "
                    "there, white is what published models are padded with.",
                ),
                io.Int.Input(
                    "overlap",
                    default=OVERLAP,
                    min=0,
                    max=MOST,
                    tooltip="Pixels of the old picture, beside what is new, that may be repainted; the mask falls to 0 "
                    "in them.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The larger picture(s), to be edited."),
                io.Mask.Output(
                    "mask", display_name="mask", tooltip="What is new (1), for the sampler and for VAREdit Decode."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image, left: int, top: int, right: int, bottom: int, unit: str, fill: str, overlap: int
    ) -> io.NodeOutput:
        from ..varedit_core.pictures.canvas import extend_pixels, extension_mask

        sides = [side / 100 if unit == "percent" else side for side in (left, top, right, bottom)]
        mask = extension_mask((image.shape[2], image.shape[1]), sides, overlap)
        return io.NodeOutput(extend_pixels(image, sides, fill), mask.to(image.device))
