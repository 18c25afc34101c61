"""What goes into the sampler: the instruction and the source picture, or an empty source."""

from __future__ import annotations

from ..varedit_core.defaults import FIT, RATIO, RATIOS, SIDE, SIZES
from ..varedit_core.fitting import FITS, FITS_HELP
from ._api import io, tell
from .widgets import chosen

CACHES = ("off", "on")
"""Whether text features are kept in files."""


class VAREditTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditTextEncode",
            display_name="VAREdit Text Encode",
            category="VAREdit",
            description="Turns an instruction (or a negative prompt) into conditioning.",
            search_aliases=["instruction", "prompt", "clip text encode", "edit text"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder, from VAREdit Text Encoder Loader."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="what to change, as an order: make it a rainy night",
                    tooltip="What to change in the picture, up to 512 tokens (64 with the demo model); parentheses are "
                    "plain text, not weights.",
                ),
                io.Combo.Input(
                    "cache",
                    options=list(CACHES),
                    default=CACHES[0],
                    optional=True,
                    tooltip="on keeps the text's features in a file of ComfyUI's user folder, and takes them from "
                    "there the next time: the text encoder is then not loaded onto the GPU. The text itself is not "
                    "kept.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="For the sampler's positive or negative input."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text: str, cache: str = CACHES[0]) -> io.NodeOutput:
        from .adapters.text_encoder import checked_clip, encode

        conditioning, notice = encode(checked_clip(clip), text, chosen("cache", cache, CACHES) == CACHES[1])
        if notice:
            tell(cls, notice)
        return io.NodeOutput(conditioning)


class VAREditSourceEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditSourceEncode",
            display_name="VAREdit Source Encode",
            category="VAREdit",
            description="Brings the picture to edit to a size of the model and encodes it.",
            search_aliases=["vae encode", "source image", "reference image", "image to edit"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE, from VAREdit VAE Loader."),
                io.Image.Input("image", tooltip="One picture or a batch, of any size and shape; alpha is not edited."),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=SIDE,
                    tooltip="Working size in pixels: the one the weights were trained for (demo 256, 8B-512 and 2B-512 "
                    "512, 8B-1024 1024).",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=FIT,
                    tooltip=f"How it is brought to the model's shape: {FITS_HELP}.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "source",
                    display_name="source",
                    tooltip="For the sampler's source; remembers the picture's size for VAREdit Decode.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, image, size: str, fit: str) -> io.NodeOutput:
        from .adapters.pictures import encode_source

        area = SIZES[chosen("size", size, SIZES)]
        return io.NodeOutput(encode_source(vae, image, area, fit, lambda text: tell(cls, text)))


class VAREditEmptySource(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditEmptySource",
            display_name="VAREdit Empty Source",
            category="VAREdit",
            description="Size and shape of pictures that an Infinity model makes of text alone.",
            search_aliases=["empty latent", "text to image", "infinity", "txt2img"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE, from VAREdit VAE Loader."),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=SIDE,
                    tooltip="Side of a square of the same area, in pixels: the one the weights were trained for "
                    "(Infinity 2B and 8B 1024).",
                ),
                io.Combo.Input(
                    "ratio",
                    options=list(RATIOS),
                    default=RATIO,
                    tooltip="Width to height.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="Pictures, with one seed after the other."
                ),
            ],
            outputs=[io.Latent.Output("source", display_name="source", tooltip="For the sampler's source.")],
        )

    @classmethod
    def execute(cls, vae, size: str, ratio: str, batch_size: int) -> io.NodeOutput:
        from .adapters.pictures import empty_source

        area, shape = SIZES[chosen("size", size, SIZES)], RATIOS[chosen("ratio", ratio, RATIOS)]
        return io.NodeOutput(empty_source(vae, area, shape, batch_size))
