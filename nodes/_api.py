"""All that the nodes import from ComfyUI's node API, so that a move of that API is a change here alone."""

import logging
import re
import sys

OLDEST = "0.20.0"


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


try:
    from comfyui_version import __version__ as _version

    if _number(_version) < _number(OLDEST):
        raise ImportError(f"this is {_version}")
    from comfy_api.latest import ComfyExtension, io, ui
except ImportError as error:
    raise ImportError(f"VAREdit needs ComfyUI {OLDEST} or newer; update ComfyUI ({error})") from error

__all__ = ["ComfyExtension", "io", "tell", "ui"]

logger = logging.getLogger("VAREdit")


def tell(node: type[io.ComfyNode], text: str) -> None:
    """Write a sentence on the executing node, where a page is open, below what it has said in this run, and into the
    log; each once a run."""
    hidden = getattr(node, "hidden", None)
    said = [] if hidden is None else vars(hidden).setdefault("varedit_said", [])  # made anew for every run
    if text in said:
        return
    said.append(text)
    logger.warning(text)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and hidden is not None:
        server.send_progress_text("\n".join(said), hidden.unique_id)
