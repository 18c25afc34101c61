"""VAREdit for ComfyUI: what ComfyUI looks for in a custom node folder."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
