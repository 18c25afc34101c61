"""A stand-in for ComfyUI, as much of it as the pack imports before first use: the node API, its folders, its server.

What the node API does not have is a mistake here too: an unknown argument raises, as the real one does. The names are
those of ComfyUI 0.33 (`test_the_stand_in_has_nothing_that_comfyui_has_not` compares them with a real one).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

EXTENSIONS = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
FOLDERS = ("diffusion_models", "vae", "text_encoders", "loras")
FOLDER_PATHS = (
    "add_model_folder_path", "get_filename_list", "get_full_path", "get_input_directory", "get_output_directory",
    "get_annotated_filepath", "exists_annotated_filepath", "get_save_image_path",
)  # fmt: skip
"""What the pack uses of `folder_paths`."""

_INPUT = ("display_name", "optional", "tooltip", "lazy", "extra_dict", "raw_link", "advanced")
_WIDGET = (*_INPUT, "default", "socketless")
_TYPED = (*_WIDGET, "force_input")
_OUTPUT = ("display_name", "tooltip", "is_output_list")
KINDS = {
    "Model": ("MODEL", _INPUT),
    "Clip": ("CLIP", _INPUT),
    "Vae": ("VAE", _INPUT),
    "Conditioning": ("CONDITIONING", _INPUT),
    "Latent": ("LATENT", _INPUT),
    "Image": ("IMAGE", _INPUT),
    "Mask": ("MASK", _INPUT),
    "Int": ("INT", (*_TYPED, "min", "max", "step", "control_after_generate", "display_mode")),
    "Float": ("FLOAT", (*_TYPED, "min", "max", "step", "round", "display_mode", "gradient_stops")),
    "Boolean": ("BOOLEAN", (*_TYPED, "label_on", "label_off")),
    "String": ("STRING", (*_TYPED, "multiline", "placeholder", "dynamic_prompts")),
    "Combo": ("COMBO", (*_WIDGET, "options", "control_after_generate", "upload", "image_folder", "remote")),
}
"""Name in `io` -> what links of it are called, and what its inputs take beside their id."""


class Slot(SimpleNamespace):
    """An input or output as it was declared; what was left out is None."""

    def __init__(self, kind: str, known: tuple[str, ...], id: str, given: dict) -> None:
        unknown = given.keys() - set(known)
        if unknown:
            raise TypeError(f"{kind} {id} takes no {', '.join(sorted(unknown))}")
        super().__init__(**dict.fromkeys(known), **{"kind": kind, "id": id})
        vars(self).update(given)

    def get_io_type(self) -> str:
        return self.kind


def _kind(name: str) -> SimpleNamespace:
    kind, known = KINDS[name]
    return SimpleNamespace(
        Input=lambda id, **given: Slot(kind, known, id, given),
        Output=lambda id, **given: Slot(kind, _OUTPUT, id, given),
    )


def custom(io_type: str) -> SimpleNamespace:
    """A pack's own kind of link."""
    return SimpleNamespace(
        Input=lambda id, **given: Slot(io_type, _INPUT, id, given),
        Output=lambda id, **given: Slot(io_type, _OUTPUT, id, given),
    )


class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


class Schema(SimpleNamespace):
    def __init__(
        self,
        *,
        node_id,
        display_name=None,
        category="sd",
        inputs=(),
        outputs=(),
        hidden=(),
        description="",
        search_aliases=(),
        is_input_list=False,
        is_output_node=False,
        has_intermediate_output=False,
        is_deprecated=False,
        is_experimental=False,
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})
        for slots in (inputs, outputs):
            ids = [slot.id for slot in slots]
            if len(set(ids)) < len(ids):
                raise ValueError(f"{node_id}: ids must be unique, got {ids}")
        if not all(isinstance(entry, Hidden) for entry in hidden):
            raise TypeError(f"{node_id}: hidden takes members of io.Hidden, got {hidden}")


class NodeOutput(SimpleNamespace):
    def __init__(self, *args, ui=None, expand=None, block_execution=None) -> None:
        super().__init__(result=args or None, ui=ui, expand=expand, block_execution=block_execution)


class ComfyNode:
    hidden = None
    """While a node runs: `unique_id` and the rest that its schema asks for."""


class ComfyExtension:
    async def on_load(self) -> None:
        pass


class PreviewText:
    def __init__(self, value: str) -> None:
        self.value = value

    def as_dict(self) -> dict:
        return {"text": (self.value,)}


class PreviewImage:
    def __init__(self, image, animated: bool = False, cls=None) -> None:
        self.image, self.cls = image, cls


class Folders:
    """`folder_paths`: names of folders, each standing for several on the disk, the user's own first."""

    def __init__(self, models) -> None:
        self.paths = {name: [str(models / name)] for name in FOLDERS}
        self.base = models

    def add_model_folder_path(self, folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
        paths = self.paths.setdefault(folder_name, [])
        if full_folder_path not in paths:
            paths.insert(0 if is_default else len(paths), full_folder_path)

    def get_filename_list(self, folder_name: str) -> list[str]:
        found = set()
        for path in self.paths[folder_name]:
            for folder, _, files in os.walk(path, followlinks=True):
                found.update(os.path.relpath(os.path.join(folder, file), path) for file in files)
        return sorted(file for file in found if os.path.splitext(file)[1].lower() in EXTENSIONS)

    def get_full_path(self, folder_name: str, filename: str) -> str | None:
        relative = os.path.relpath(os.path.join("/", filename), "/")
        candidates = (os.path.join(path, relative) for path in self.paths.get(folder_name, ()))
        return next((path for path in candidates if os.path.isfile(path)), None)

    def get_input_directory(self) -> str:
        return str(self.base / "input")

    def get_output_directory(self) -> str:
        return str(self.base / "output")

    def get_annotated_filepath(self, name: str, default_dir: str | None = None) -> str:
        output = name.endswith(" [output]")
        folder = self.get_output_directory() if output else default_dir or self.get_input_directory()
        return os.path.abspath(os.path.join(folder, name.removesuffix(" [output]")))

    def exists_annotated_filepath(self, name) -> bool:
        return os.path.exists(self.get_annotated_filepath(name))

    def get_save_image_path(self, filename_prefix: str, output_dir: str, image_width=0, image_height=0):
        subfolder, name = os.path.split(filename_prefix)
        folder = os.path.join(output_dir, subfolder)
        os.makedirs(folder, exist_ok=True)
        return folder, name, len(os.listdir(folder)) + 1, subfolder, filename_prefix


class Server:
    """`server.PromptServer.instance`: keeps what nodes told the page."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def send_progress_text(self, text: str, node_id: str, sid=None) -> None:
        self.told.append((node_id, text))


def modules(models, version: str = "0.33.0") -> dict[str, ModuleType]:
    """The modules of ComfyUI that the pack imports; `models` is the folder of weight files."""
    folders = Folders(models)
    contents = {
        "comfyui_version": {"__version__": version},
        "comfy_api": {},
        "comfy_api.latest": {
            "ComfyExtension": ComfyExtension,
            "io": SimpleNamespace(
                ComfyNode=ComfyNode,
                Schema=Schema,
                NodeOutput=NodeOutput,
                Hidden=Hidden,
                Custom=custom,
                **{k: _kind(k) for k in KINDS},
            ),
            "ui": SimpleNamespace(PreviewText=PreviewText, PreviewImage=PreviewImage),
        },
        "folder_paths": {name: getattr(folders, name) for name in FOLDER_PATHS},
        "server": {"PromptServer": SimpleNamespace(instance=Server())},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, module in made.items():
        vars(module).update(contents[name])
    return made


PACK = "pack_x_varedit"
"""A name of ComfyUI's choice."""


def load_pack() -> ModuleType:
    """The pack as ComfyUI imports it: by path. The stand-in's modules must be in `sys.modules`."""
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(PACK, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unload_pack() -> None:
    for name in [name for name in sys.modules if name.startswith(PACK)]:
        del sys.modules[name]


def nodes_of(pack: ModuleType, loaded: bool = False) -> list[type]:
    """What ComfyUI asks of the pack; loaded: after telling it that it is loaded, as ComfyUI does."""

    async def ask():
        extension = await pack.comfy_entrypoint()
        if loaded:
            await extension.on_load()
        return await extension.get_node_list()

    return asyncio.run(ask())
