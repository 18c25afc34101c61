"""A picture that comes with the pack, so that the workflows run at once."""

from __future__ import annotations

from pathlib import Path

from ._api import io, ui
from .files import stamp

FOLDER = Path(__file__).resolve().parents[1] / "samples"
PICTURES = ("scene.png", "cat.jpg")


class VAREditSampleImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditSampleImage",
            display_name="VAREdit Sample Image",
            category="VAREdit",
            description="A picture to try the pack with; put Load Image in its place for pictures of your own.",
            search_aliases=["example image", "test picture", "load image"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=list(PICTURES),
                    default=PICTURES[0],
                    tooltip="scene.png is a drawn scene such as the demo model knows, cat.jpg a photograph.",
                )
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The picture.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, picture: str | None):
        return stamp(FOLDER / picture if picture else None)

    @classmethod
    def execute(cls, picture: str) -> io.NodeOutput:
        from ..varedit_core.pictures.images import load_image
        from .adapters.pictures import to_image

        image = to_image([load_image(FOLDER / picture).rgb])
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
