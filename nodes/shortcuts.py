"""What a sampler leaves out to be faster."""

from __future__ import annotations

from ..varedit_core.controls.registry import Shortcuts
from ._api import io
from .widgets import takes, widgets

ShortcutsType = io.Custom("VAREDIT_SHORTCUTS")


class VAREditShortcuts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditShortcuts",
            display_name="VAREdit Shortcuts",
            category="VAREdit",
            description="Work that the sampler leaves out to be faster. All off at first: none is exact; docs/SPEED.md "
            "has what each costs.",
            search_aliases=["speed", "faster", "turbo", "draft", "two models"],
            inputs=widgets("shortcuts"),
            outputs=[
                ShortcutsType.Output("shortcuts", display_name="shortcuts", tooltip="For the sampler's shortcuts.")
            ],
        )

    @classmethod
    @takes("shortcuts")
    def execute(cls, **values) -> io.NodeOutput:
        return io.NodeOutput(Shortcuts(**values))
