"""What a sampler leaves out to be faster."""

from __future__ import annotations

from ..varedit_core.controls.registry import NO_SHORTCUTS, Shortcuts
from ._api import io

ShortcutsType = io.Custom("VAREDIT_SHORTCUTS")
MOST = 13
"""Scales of the largest size."""


def _scales(id: str, tooltip: str):
    return io.Int.Input(id, default=getattr(NO_SHORTCUTS, id), min=0, max=MOST, tooltip=tooltip)


class VAREditShortcuts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditShortcuts",
            display_name="VAREdit Shortcuts",
            category="VAREdit",
            description="Work that the sampler leaves out to be faster. All off at first: none is exact, and the README's table has what each costs.",
            search_aliases=["speed", "faster", "turbo", "draft", "two models"],
            inputs=[
                _scales(
                    "unguided",
                    "So many last scales run without guidance, with half the work; little is lost.",
                ),
                _scales(
                    "inside",
                    "At so many last scales only the masked part is computed: the smaller it is, the faster. The part no longer sees the rest, so shapes at its edge may suffer; paint a wide mask. Needs a mask.",
                ),
                io.Float.Input(
                    "window",
                    default=NO_SHORTCUTS.window,
                    min=0.0,
                    max=1.0,
                    step=0.025,
                    round=0.001,
                    tooltip="The last three scales see only rows within this share of the height, such as 0.125; 0 is all. What is far apart may match less. Grids of up to 16 rows are always whole, so nothing changes at 256. Not together with inside.",
                ),
                _scales(
                    "stop",
                    "Only so many first scales run, 0 is all: a draft without fine detail, in which small edits are missing.",
                ),
                _scales(
                    "drafted",
                    "So many first scales are drawn by the sampler's drafter, a second model; the first draws the rest, and its quality shows.",
                ),
            ],
            outputs=[
                ShortcutsType.Output("shortcuts", display_name="shortcuts", tooltip="For the sampler's shortcuts.")
            ],
        )

    @classmethod
    def execute(cls, unguided: int, inside: int, window: float, stop: int, drafted: int) -> io.NodeOutput:
        return io.NodeOutput(Shortcuts(unguided, inside, window, stop, drafted))
