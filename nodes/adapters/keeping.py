"""A workspace that stays between runs of a graph, in ComfyUI's hands.

It is listed among the loaded models: as large as what it holds, and gone when ComfyUI wants its memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import nn

from ...varedit_core.model.transformer import Transformer
from ...varedit_core.runtime.workspace import Shape, Workspace
from .holding import Hold


class Weights:
    """The state of a network that a workspace depends on: ComfyUI's patches (by their id) and, where passes are
    recorded, where weights lie; elsewhere ComfyUI may move them."""

    def __init__(self) -> None:
        self.patches: Hashable = None
        self.places: Hashable = None

    def __call__(self, transformer: Transformer) -> Hashable:
        return self.patches, self.places


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes one of several GPUs the current one; ComfyUI does it since 0.23."""
    return getattr(mm, "cuda_device_context", nullcontext)(device)


class Keeps(Protocol):
    """What keeps memory of a device between runs of a graph."""

    nbytes: int
    busy: bool

    def forget(self) -> object: ...


class VAREditWorkspace(nn.Module):
    """What a patcher here wraps: a name for ComfyUI's log."""


class Listed(comfy.model_patcher.ModelPatcher):
    """Memory that stays as one of ComfyUI's loaded models. work: what keeps it, and owns nothing of which this
    knows."""

    def __init__(self, device, work: Keeps) -> None:
        super().__init__(VAREditWorkspace(), device, device)
        self.work = work

    def loaded_size(self) -> int:
        return self.work.nbytes

    def model_size(self) -> int:
        """What is missing of this on the device goes first when ComfyUI wants memory. Where it streams all weights they
        are to go before, since it fetches just those it needs again: so less than nothing is missing."""
        if not getattr(comfy.memory_management, "aimdo_enabled", False):
            return self.work.nbytes
        others = [known.model for known in mm.current_loaded_models if known.device == self.load_device]
        moved = [model for model in others if model and not (model.is_dynamic() or isinstance(model, Listed))]
        return self.work.nbytes if moved else 0

    def partially_load(self, *args, **kw) -> int:
        return 0  # it fills while an edit runs

    def partially_unload(self, *args, **kw) -> int:
        freed = 0 if self.work.busy else self.work.nbytes  # an edit at work keeps it, and lets go at its end
        self.work.forget()
        return freed

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        if unpatch_all:
            self.work.forget()
        return self.model

    def list(self) -> None:
        """Let ComfyUI know of it. Loading it would do the same, and before that push others out for memory that it does
        not need: a transformer, say, that was loaded a moment ago."""
        if self not in mm.loaded_models():
            listed = mm.LoadedModel(self)
            listed.model_load()
            mm.current_loaded_models.insert(0, listed)


class Keeper(Listed):
    """A workspace as one of ComfyUI's loaded models.

    The network that owns it owns nothing of which this knows, so that both end when the last node lets go of a model.
    """

    def __init__(self, device) -> None:
        self.state = Weights()
        super().__init__(device, Workspace(state=self.state))

    def prepare(self, patches: Hashable, shape: Shape | None) -> None:
        """Free all that the next edit cannot use. shape: of the edit; None: it has another workspace."""
        held = self.work.shape
        if held is not None and (
            shape is None or patches != self.state.patches or held != replace(shape, device=held.device)
        ):
            self.work.forget()
        self.state.patches = patches

    def load(self, models: Sequence, needed: float, listed: bool) -> None:
        """Load models with `needed` bytes beside them, of which the workspace may hold some already.

        listed: whether the workspace is to stay, so that ComfyUI must know of it.
        """
        held = self.work.nbytes
        mm.load_models_gpu(models, memory_required=needed - held)
        if self.work.nbytes < held:  # it had to make way, and so needs as much again
            mm.load_models_gpu(models, memory_required=needed)
        if listed:
            self.list()

    def workspace(self, hold: Hold) -> Workspace:
        """The workspace for the next edit. hold: of the weights; where all of them stand still passes may be
        recorded."""
        self.work.record = hold.whole
        self.state.places = hold.places if hold.whole else None
        return self.work
