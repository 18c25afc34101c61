"""The nodes. Each is a schema and a short `execute`; the work is done in `varedit_core`."""

from ._api import ComfyExtension
from .file_info import VAREditFileInfo


class VAREditExtension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return [VAREditFileInfo]


async def comfy_entrypoint() -> ComfyExtension:
    return VAREditExtension()
