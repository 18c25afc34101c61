"""What ComfyUI's nodes expect of models of another kind, and put onto them: one sentence for either.

Nodes look into models. What only diffusion models have is absent here in a way that says so (`Missing`, `Absent`,
`Settings`, `Asked`); what they leave on a model for a diffusion sampler is told by the edit (`unused`).
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_patcher
import comfy.patcher_extension
import comfy.weight_adapter
from torch import Tensor

APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
_USED = {"transformer_options", "torch_compile_kwargs"}
_USED_IN_TRANSFORMER = {"optimized_attention_override", "wrappers", "callbacks"}
_NETWORK = "diffusion_model"
"""Where nodes may put another network, as compilation does."""


class Missing(AttributeError, ValueError):
    """Something that only models of another kind have. `hasattr` finds it missing; whoever goes on reading it shows
    the sentence."""


Missing.__module__, Missing.__qualname__, Missing.__name__ = "builtins", "ValueError", "ValueError"  # as ComfyUI shows


def missing(name: str) -> Missing:
    return Missing(
        f"a VAREdit model predicts scales, not noise, and has no {name}; connect it to VAREdit Sampler instead of a "
        "diffusion sampler, and leave out nodes that are made for diffusion models"
    )


class Absent:
    """In place of a part of diffusion models: nodes may hand it on, and none can use it."""

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):  # a node makes another one of its kind
            raise missing("sigmas")
        self._name = name

    def __getattr__(self, name: str):
        raise AttributeError(name) if name.startswith("__") else missing(self._name)

    def __call__(self, *arguments, **kw):
        raise missing(self._name)


class Asked:
    """For networks into which nodes look: what they lack is said. lacking: the sentence, by the name of what is."""

    lacking: Callable[[str], Missing] = staticmethod(missing)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise (error if name.startswith("_") else self.lacking(name)) from None


class Settings(dict):
    """A model's settings, as attributes and by key."""

    def __getattr__(self, name: str):
        raise AttributeError(name) if name.startswith("__") else missing(name)

    def __missing__(self, name: str):
        raise missing(name)


def unused(patcher) -> str | None:
    """What nodes left on a model that an edit does not use, in one sentence; None for nothing."""
    options, extension = patcher.model_options, comfy.patcher_extension
    transformer = options["transformer_options"]
    found = {name for name in options if name not in _USED and options[name]}
    for name, value in transformer.items():
        if name in ("patches", "patches_replace"):
            found.update(kind for kind, patches in value.items() if patches)
        elif name not in _USED_IN_TRANSFORMER and value:
            found.add(name)
    given = extension.merge_nested_dicts(transformer.get("wrappers", {}), patcher.wrappers)
    found.update(kind for kind, by_key in given.items() if kind != APPLY_MODEL and any(by_key.values()))
    found.update(name for name in patcher.object_patches if name.split(".")[0] != _NETWORK)
    found.update(name for name in ("hook_patches", "additional_models") if getattr(patcher, name, None))
    if not found:
        return None
    return (
        f"the model carries {', '.join(sorted(found))}, which only diffusion models use; it changes nothing here, so "
        "take out the nodes that set it"
    )


def check_patches(patcher) -> None:
    """ValueError for updates of weights that do not fit them: ComfyUI would leave them out and keep the rest."""
    for key, updates in patcher.patches.items():
        weight = comfy.model_patcher.get_key_weight(patcher.model, key)[0]
        shape = getattr(weight, "shape", None)
        for _, update, _, offset, _ in updates:
            found = None if offset else _shape_of(update)
            if None not in (shape, found) and found != tuple(shape):
                raise ValueError(
                    f"a model or LoRA that was merged into this one does not fit it: {key} is {list(shape)} here and "
                    f"{list(found)} there; merge models of one size"
                )


def _shape_of(update) -> tuple[int, ...] | None:
    """The shape of the weight that an update is for; None where its kind does not tell."""
    if isinstance(update, list):  # another model's weight, with its own updates behind it
        first = update[0][0] if isinstance(update[0], tuple) else update[0]
        return tuple(first.shape) if isinstance(first, Tensor) else None
    if isinstance(update, tuple) and update and update[0] == "diff" and len(update[1]) == 1:
        return tuple(update[1][0].shape)
    if isinstance(update, comfy.weight_adapter.LoRAAdapter):
        up, down, _, middle, _, reshaped = update.weights
        plain = up.ndim == down.ndim == 2 and middle is None and reshaped is None
        return (up.shape[0], down.shape[1]) if plain else None
    return None
