"""Edits as their tokens: kept in files of kilobytes, and cut after some scales."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..varedit_core.defaults import MOST_SCALES
from ..varedit_core.files.token_header import SUFFIX
from ._api import io, tell, ui
from .files import stamp
from .token_files import find, missing, named, token_files

PREFIX = "varedit/tokens"
FIRST = 4
"""Scales that are kept at first."""


class VAREditSaveTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditSaveTokens",
            display_name="VAREdit Save Tokens",
            category="VAREdit",
            description="Saves an edit as its tokens, a file of kilobytes that decodes to the same picture bit for "
            "bit. Drop the file on the page to open its graph.",
            search_aliases=["save latent", "export tokens", "save edit"],
            inputs=[
                io.Latent.Input(
                    "latent", tooltip="The edit, from VAREdit Sampler or VAREdit First Scales, as it came."
                ),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    tooltip="Folder and beginning of the name, in ComfyUI's output folder; a number follows.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the file lies; the node shows it.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent, filename_prefix: str) -> io.NodeOutput:
        from .adapters.token_latents import graph_of, save_tokens

        output = folder_paths.get_output_directory()
        folder, name, counter, *_ = folder_paths.get_save_image_path(named(filename_prefix), output)
        path = Path(folder) / f"{name}_{counter:05}_{SUFFIX}"
        facts = save_tokens(latent, path, graph_of(cls.hidden, lambda text: tell(cls, text)))
        text = f"{path.relative_to(output)}\n{facts}, {path.stat().st_size / 1000:.3g} kB"
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))


class VAREditLoadTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditLoadTokens",
            display_name="VAREdit Load Tokens",
            category="VAREdit",
            description="Loads saved tokens as the latent that they were: to decode, to cut, or to edit further.",
            search_aliases=["load latent", "import tokens", "open edit"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=token_files(),
                    tooltip="A file of VAREdit Save Tokens or of varedit edit --save-tokens, in ComfyUI's input or "
                    "output folder.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Gives the sampler's fast preview its colours, and refuses tokens of another model.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="For VAREdit Decode, for VAREdit First Scales, or for a sampler's source.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None):
        return file is None or missing(file) or True

    @classmethod
    def fingerprint_inputs(cls, file: str | None, vae=None):
        return stamp(find(file)) if file else None

    @classmethod
    def execute(cls, file: str, vae=None) -> io.NodeOutput:
        if lack := missing(file):
            raise ValueError(lack)
        from .adapters.token_latents import load_tokens

        return io.NodeOutput(load_tokens(find(file), vae))


class VAREditFirstScales(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditFirstScales",
            display_name="VAREdit First Scales",
            category="VAREdit",
            description="Keeps the first scales of an edit: a draft to look at, or the beginning that other edits go "
            "on from.",
            search_aliases=["cut tokens", "draft", "branch", "truncate"],
            inputs=[
                io.Latent.Input("latent", tooltip="The edit, from VAREdit Sampler or VAREdit Load Tokens, as it came."),
                io.Int.Input(
                    "scales",
                    default=FIRST,
                    min=1,
                    max=MOST_SCALES,
                    tooltip="How many to keep, from the coarsest on; an edit at 256 has 7, at 512 10 and at 1024 13.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The edit as it is after so many scales.")
            ],
        )

    @classmethod
    def execute(cls, latent, scales: int) -> io.NodeOutput:
        from .adapters.token_latents import first_scales

        return io.NodeOutput(first_scales(latent, scales))
