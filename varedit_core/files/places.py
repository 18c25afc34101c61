"""Where in a file a network lies, by the names of its tensors: bare, or below the names that a training gave its parts.

Knows names alone. One rule: of several copies of a network the trained weights count, as in the published code; a
moving average (EMA) only where there are no others; an optimiser's state, which has the same names in it, never.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module."""
_OPTIMISER = {"opt", "optim", "optimizer", "optimizers", "optimiser", "optimisers"}
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_PUBLISHED = re.compile(r"(?:.*\.)?(?:trainer\..*|gpt_fsdp|gpt_ema_fsdp|gpt_wo_ddp|gpt_ema_for_vis|vae_local)")
"""Parts of a checkpoint of VAREdit's and Infinity's own trainer."""


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers of modules put into it."""
    return _WRAPPERS.sub("", name)


def is_optimisers(name: str) -> bool:
    """Whether a name, of a tensor or a part, is that of an optimiser's state."""
    return any(part in _MOMENTS or not _OPTIMISER.isdisjoint(part.split("_")) for part in name.split("."))


def is_average(place: str) -> bool:
    """Whether a part of a file is a moving average."""
    return any("ema" in part.split("_") for part in place.split("."))


def places(names: Iterable[str], marker: str) -> list[str]:
    """The parts of a file, "" for the whole, that hold a tensor whose name ends in the regular expression `marker`: the
    one to take first. Of those that are no average the shortest name counts."""
    pattern = re.compile(rf"(?:^|(?<=\.)){marker}$")
    found = {name[: match.start()].rstrip(".") for name in names for match in [pattern.search(name)] if match}
    return sorted((place for place in found if not is_optimisers(place)), key=lambda p: (is_average(p), len(p), p))


def told(place: str) -> str:
    """What a part of a file is, in a few words; nothing for a network as it is, or with a name in front."""
    kind = "the moving average" if is_average(place) else "the trained weights"
    if _PUBLISHED.fullmatch(place):
        return f"in a checkpoint of the published training, where {place} is taken, {kind}"
    return f"where {place} is taken, {kind}" if is_average(place) else ""
