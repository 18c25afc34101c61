"""The nodes. Each is a schema and a short `execute`; the work is done in `varedit_core`.

What comes into any of them is judged first (`inputs`, by `adapters.given`).

Adapters between the two: `state` (weight files to ComfyUI's layers), `model`, `text_encoder` and `vae` (ComfyUI's
native types), `conditioning` (instructions and where they count), `foreign` (what nodes for other models expect and
leave behind), `pictures` (IMAGE and MASK), `latents` (LATENTs, whoever hands them on), `token_latents` (those known by
their tokens), `grids` (sweeps), `keeping` (what stays between runs) and `running` (memory, progress, previews). They
are imported at first use.
"""

from ._api import ComfyExtension
from .canvas import VAREditCropRegion, VAREditExtendCanvas, VAREditStitch
from .change import VAREditChangeMap
from .controls import VAREditControls, VAREditCurves, VAREditRegion
from .decode import VAREditDecode, VAREditScalePreview
from .encode import VAREditEmptySource, VAREditSourceEncode, VAREditTextEncode
from .file_info import VAREditFileInfo
from .files import add_demo_folders
from .inputs import judging
from .loaders import VAREditModelLoader, VAREditTextEncoderLoader, VAREditVAELoader
from .sample_image import VAREditSampleImage
from .sampler import VAREditMemoryPlan, VAREditSampler
from .shortcuts import VAREditShortcuts
from .sweep import VAREditSweep
from .tokens import VAREditFirstScales, VAREditLoadTokens, VAREditSaveTokens

NODES = [judging(node) for node in (
    VAREditModelLoader, VAREditTextEncoderLoader, VAREditVAELoader, VAREditTextEncode, VAREditSourceEncode,
    VAREditSampler, VAREditDecode, VAREditScalePreview, VAREditMemoryPlan, VAREditFileInfo,
    VAREditSampleImage, VAREditShortcuts, VAREditCropRegion, VAREditStitch, VAREditExtendCanvas, VAREditEmptySource,
    VAREditControls, VAREditCurves, VAREditRegion,
    VAREditSaveTokens, VAREditLoadTokens, VAREditFirstScales, VAREditChangeMap, VAREditSweep,
)]  # fmt: skip


class VAREditExtension(ComfyExtension):
    async def on_load(self) -> None:
        add_demo_folders()

    async def get_node_list(self) -> list[type]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    return VAREditExtension()
