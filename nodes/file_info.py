"""VAREdit File Info: what a weight file in ComfyUI's folders is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import folder_paths

from ._api import io, ui
from .files import names, stamp

FOLDERS = ("diffusion_models", "vae", "text_encoders")
NO_FILE = "no weight file found"


class VAREditFileInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditFileInfo",
            display_name="VAREdit File Info",
            category="VAREdit",
            description=(
                "Says what a weight file is: the model, its sizes, parameters, number types and bytes. "
                "Reads the header only."
            ),
            search_aliases=["inspect weights", "model info", "checkpoint info", "safetensors header"],
            inputs=[
                io.Combo.Input(
                    "file",
                    # An empty list would show "undefined" and fail as a missing connection.
                    options=_files() or [NO_FILE],
                    tooltip=(
                        f"A weight file in ComfyUI's folders {', '.join(FOLDERS)}, as folder/name. "
                        "Press R after adding files."
                    ),
                )
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="What the node shows, to save it or to pass it on."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None):
        """Changes when the file does, so that a replaced file is read again; a linked name is read every time."""
        return stamp(_find(file) if file else None)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from ..varedit_core.files.info import inspect
        from ..varedit_core.files.weights import WeightError

        path = _find(file)
        if path is None:
            lack = "there is no weight file" if file == NO_FILE else f"{file} is not"
            raise ValueError(
                f"{lack} in ComfyUI's folders {', '.join(FOLDERS)}; put the file there, press R and choose it"
            )
        try:
            text = describe(path.name, inspect(path))
        except WeightError as error:
            # ComfyUI shows a class by its module, here a whole path; a built-in class by its name alone.
            raise ValueError(str(error)) from error
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _files() -> list[str]:
    return [f"{folder}/{name}" for folder in FOLDERS for name in names(folder)]


def _find(file: str) -> Path | None:
    folder, _, name = file.partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in FOLDERS else None
    return Path(path) if path else None


def describe(name: str, facts: dict) -> str:
    """The facts of `varedit_core.files.info.inspect`, in lines that fit a node of ordinary width."""
    others = ("types", "metadata")
    parts = {key: value for key, value in facts.items() if isinstance(value, dict) and key not in others}
    types = [f"{kind} {_count(count)}" for kind, count in sorted(facts["types"].items(), key=lambda item: -item[1])]
    return "\n".join(
        [
            name,
            f"is {facts['is']}",
            *(f"{part}:\n{_wrapped(map(_size, sizes, sizes.values()))}" for part, sizes in parts.items()),
            f"{_count(facts['parameters'])} parameters in {facts['tensors']} tensors:\n{_wrapped(types)}",
            f"{facts['bytes'] / 1e9:.3g} GB",
        ]
    )


def _size(name: str, value: int | tuple[int, ...]) -> str:
    return f"{name.replace('_', ' ')} {'/'.join(map(str, value)) if isinstance(value, tuple) else value}"


def _wrapped(facts: Iterable[str]) -> str:
    # Lines break between facts only: textwrap leaves no-break spaces alone.
    text = ", ".join(fact.replace(" ", "\u00a0") for fact in facts)
    return textwrap.fill(text, 62, initial_indent="  ", subsequent_indent="  ").replace("\u00a0", " ")


def _count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"
