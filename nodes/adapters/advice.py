"""What is said once about the machine that ComfyUI runs on."""

from __future__ import annotations

import platform
from importlib.util import find_spec

import torch

from ...varedit_core.runtime.kernels import takes_triton

_told: set[str] = set()


def without_triton(device: torch.device) -> str | None:
    """How to install Triton where a GPU could use it and it is missing; said once."""
    usable = device.type == "cuda" and torch.version.hip is None and takes_triton(device)
    if not usable or find_spec("triton") is not None or "triton" in _told:
        return None
    _told.add("triton")
    windows = platform.system() == "Windows"
    command = "python_embeded\\python.exe -m pip install triton-windows" if windows else "python -m pip install triton"
    return (
        f"edits are faster with Triton, which is not installed; run {command} with ComfyUI's Python, then restart "
        "ComfyUI"
    )
