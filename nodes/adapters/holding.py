"""Weights that stand still while an edit runs, under each of ComfyUI's ways to manage memory.

Where ComfyUI streams weights (dynamic VRAM), every call of a layer asks for its pages, casts and gives them back. Here
all pages of a network are asked for at once and pinned, filled where they are not, and given back when the edit is
over, however it ends. The layers have their weights in hand meanwhile, at addresses that stay the same from edit to
edit, so that passes may be recorded. Where there is no room for all of them, they are fetched layer by layer as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.model_management as mm
import comfy.ops
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

from .layers import Holding

logger = logging.getLogger(__name__)

SMALL = 1 << 20
"""Bytes up to which weights that ComfyUI brings to another place at every load are copied to one of their own."""
STEP = 128 << 20
"""Bytes of pages that are asked for at once: as much again must be free beside them, or others lose theirs."""
_UNKNOWN = (AttributeError, ImportError, KeyError, TypeError, ValueError)
"""What another ComfyUI than the ones known would raise."""


class Holder:
    """The layers of one network on one device. Its copies of small weights keep their place between edits."""

    refused = False
    """Whether ComfyUI's way to stream weights is not one that is known here."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self.layers: list[nn.Module] = [m for m in network.modules() if hasattr(m, "comfy_cast_weights")]
        self.bare = [m for m in network.modules() if not hasattr(m, "comfy_cast_weights") and _own(m)]
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.signature: bytes = b""
        self.marks: list[object] = []
        self.last: _Last | None = None
        self.busy = False

    def place(self, layer: nn.Module, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for something of a layer that keeps its place from edit to edit."""
        kept = self.kept.get((id(layer), name))
        if kept is None or (kept.shape, kept.dtype) != (shape, dtype):
            kept = self.kept[id(layer), name] = torch.empty(shape, dtype=dtype, device=self.device)
        return kept

    def hold(self, patcher, room: float) -> Hold:
        """Make weights stand still until `Hold.release`. The model must have been loaded. room: bytes of the device
        that its weights may take."""
        held, self.last = Hold(self), None
        try:
            if not patcher.is_dynamic():
                held.as_they_lie()
            elif not Holder.refused:
                held.pin(room)
                if held.whole:
                    self.last = _Last.of(patcher, held)
        except _UNKNOWN as error:
            held.release()
            Holder.refused = True
            logger.warning("this ComfyUI streams weights in a way that is not known, so edits are slower: %r", error)
        except BaseException:
            held.release()
            raise
        return held

    def again(self, patcher) -> Hold | None:
        """The last hold once more, where nothing has happened to the weights since; None where ComfyUI has to load
        them, which means a walk through all layers."""
        if self.busy or Holder.refused or mm.is_device_cpu(self.device) or not _current(patcher):
            return None
        if patcher.is_dynamic() and (self.last is None or not self.last.stands(patcher, self.marks)):
            return None
        held = Hold(self)
        try:
            held.repeat(self.last) if patcher.is_dynamic() else held.as_they_lie()
        except BaseException:
            held.release()
            raise
        if not held.whole:
            held.release()
            return None
        return held


@dataclass(frozen=True)
class _Last:
    """A hold of all layers, by what must be as it was for it to hold again."""

    patches: object
    span: tuple
    places: tuple
    layers: list[nn.Module]
    held: list[tuple[nn.Module, tuple]]

    @classmethod
    def of(cls, patcher, hold: Hold) -> _Last | None:
        if hold.span is None:
            return None
        pairs = [(layer, layer.__dict__["held"]) for layer in hold.holder.layers]
        return cls(patcher.patches_uuid, hold.span, hold.places, _streamed(hold.holder.layers), pairs)

    def stands(self, patcher, marks: Sequence[object]) -> bool:
        """Whether a model has the same patches, and its pages are filled as they were. marks: of the layers' pages
        then."""
        present = [layer._v_signature if hasattr(layer, "_v") else None for layer in self.layers]
        return patcher.patches_uuid == self.patches and _filled(present, marks)


class Hold:
    """Layers whose weights stand still. `whole`: all of them, so that passes may be recorded. `places`: where they lie,
    to be compared; whoever recorded anything has recorded these."""

    def __init__(self, holder: Holder) -> None:
        self.holder, self.device = holder, holder.device
        self.whole, self.places = False, ()
        self.span: tuple | None = None
        self.pinned: list[tuple] = []
        self.lent: list[nn.Module] = []
        holder.busy = True

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Give all back."""
        for layer in self.holder.layers:
            layer.__dict__.pop("held", None)
        for layer in self.lent:
            layer.__dict__.pop("_prefetch", None)
        self.holder.busy = False
        self.lent, self.whole = [], False
        self._unpin()

    def as_they_lie(self) -> None:
        """Of a model that ComfyUI has moved as a whole, or in part: the layers that lie on the device."""
        for layer in self.holder.layers:
            if _still(layer, self.device) and isinstance(layer, Holding):
                # Apart from the parameters, which ComfyUI may give other storage within the edit.
                bias = getattr(layer, "bias", None)
                self._hand(layer, layer.weight.detach(), None if bias is None else bias.detach())
        elsewhere = (x for m in self.holder.bare for x in _own(m) if x.device != self.device)
        self.whole = all("held" in layer.__dict__ for layer in self.holder.layers) and next(elsewhere, None) is None
        self.places = tuple((x.data_ptr(), x.is_inference() or x._version) for x in self._weights())

    def repeat(self, last: _Last) -> None:
        """Of streamed weights that stand as they stood, where their pages are the same ones."""
        last.span[0].prioritize()  # as loading would
        if self._pin(last.span) == self.holder.signature:
            for layer, pair in last.held:
                layer.held = pair
            self.whole, self.places = True, last.places

    def pin(self, room: float) -> None:
        """Of a model whose weights ComfyUI streams, where there is room for all of them."""
        layers = self.holder.layers
        streamed, small = _streamed(layers), [layer for layer in layers if not hasattr(layer, "_v")]
        if streamed and (_end(streamed[-1]) - streamed[0]._v[1] > room or not self._pinned(streamed)):
            return
        self._lend(streamed)
        self._copy(small)
        self.whole = all("held" in layer.__dict__ for layer in layers) and not self.holder.bare
        self.places = tuple(x.data_ptr() for x in self._weights())

    def _weights(self) -> Iterator[Tensor]:
        """All that layers hold."""
        return (x for layer in self.holder.layers for x in layer.__dict__.get("held", ()) if x is not None)

    def _pinned(self, layers: Sequence[nn.Module]) -> bool:
        """Ask for the pages of layers and pin them; fill those that are not. False where there is no memory for
        them."""
        first, holder = layers[0]._v, self.holder
        found = self._pin((first[0], first[1], _end(layers[-1]) - first[1]))
        if found is None:
            return False
        if found != holder.signature or not _filled([layer._v_signature for layer in layers], holder.marks):
            for layer in layers:
                mm.throw_exception_if_processing_interrupted()
                self._fill(layer)
        holder.signature, holder.marks = found, [layer._v_signature for layer in layers]
        if any(mark is None for mark in holder.marks):  # others want memory: pages were given away meanwhile
            self._unpin()
            return False
        return True

    def _pin(self, span: tuple) -> bytes | None:
        """Ask for pages and pin them; their signature, by which it shows whether any were lost since. None where there
        is no memory for them."""
        pages, (of, begin, size) = _pages(), span
        self.span, found = span, b""
        for at in range(begin, begin + size, STEP):
            part = (of, at, min(STEP, begin + size - at))
            signature = pages.vbar_fault(part)
            if signature is None:
                self._unpin()
                return None
            self.pinned.append(part)
            found += bytes(signature)
        return found

    def _unpin(self) -> None:
        """Give the pages back."""
        pinned, self.pinned, self.span = self.pinned, [], None
        for part in pinned:
            _pages().vbar_unpin(part)

    def _fill(self, layer: nn.Module) -> None:
        """Have ComfyUI bring a layer's weights, with their patches, into its pages where they are not there."""
        dtype = _kind(layer, "weight", layer.weight)
        more = {"want_requant": True, "compute_dtype": dtype} if hasattr(layer.weight, "_qdata") else {}
        _let_go(layer)
        try:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                layer, dtype=dtype, device=self.device, bias_dtype=dtype, offloadable=True, **more
            )
        except BaseException:
            _let_go(layer)
            raise
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)

    def _lend(self, layers: Sequence[nn.Module]) -> None:
        """Hand layers their pinned weights; to those that need more of ComfyUI, as it does itself before a pass."""
        for layer in layers:
            plain = isinstance(layer, Holding) and not (layer.weight_function or layer.bias_function)
            if not (plain and self._hand(layer, layer._v_weight, layer._v_bias)):
                layer._prefetch = {"signature": layer._v_signature, "resident": True}
                self.lent.append(layer)

    def _hand(self, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
        """Hand a layer its weights; whether it computes with them by itself."""
        taken = layer.take(weight, bias, self.holder.place)
        if taken is not None:
            layer.held = taken
        return taken is not None

    def _copy(self, layers: Sequence[nn.Module]) -> None:
        """Small weights, which ComfyUI brings to another place at every load, where they keep theirs."""
        targets, sources = [], []
        for layer in layers:
            if not isinstance(layer, Holding) or layer.weight_function or layer.bias_function:
                continue
            own = {name: getattr(layer, name) for name in ("weight", "bias") if getattr(layer, name, None) is not None}
            if any(x.device != self.device or x.nbytes > SMALL for x in own.values()):
                continue
            kept = {name: self.holder.place(layer, name, x.shape, _kind(layer, name, x)) for name, x in own.items()}
            targets += kept.values()
            sources += [x.detach() for x in own.values()]
            self._hand(layer, kept["weight"], kept.get("bias"))
        if targets:
            torch._foreach_copy_(targets, sources)


def holder_of(network: nn.Module, device: torch.device) -> Holder:
    """What makes a network's weights stand still on a device; the network keeps it."""
    holders = vars(network).setdefault("_holders", {})
    if device not in holders:
        holders[device] = Holder(network, device)
    return holders[device]


def _current(patcher) -> bool:
    """Whether a model is loaded as its nodes want it, and loading it again would do nothing but that."""
    special = patcher.get_all_callbacks(CallbacksMP.ON_LOAD) or patcher.injections or patcher.forced_hooks
    special = special or patcher.object_patches or patcher.object_patches_backup
    loaded = patcher in mm.loaded_models() and patcher.model.current_weight_patches_uuid == patcher.patches_uuid
    return loaded and not special


def _own(module: nn.Module) -> list[Tensor]:
    """A module's tensors, without those of its parts."""
    return [x for part in (module._parameters, module._buffers) for x in part.values() if x is not None]


def _let_go(layer: nn.Module) -> None:
    """Give back what ComfyUI leaves of a cast that failed: it would take it for the weights of the next one."""
    left = layer.__dict__.pop("_prefetch", None)
    for name in ("weight_lowvram_function", "bias_lowvram_function"):
        if left is not None and hasattr(getattr(layer, name, None), "clear_prepared"):
            getattr(layer, name).clear_prepared()
    if left is not None and left["signature"] is not None:
        _pages().vbar_unpin(layer._v)


def _end(layer: nn.Module) -> int:
    return layer._v[1] + layer._v[2]


def _still(layer: nn.Module, device: torch.device) -> bool:
    """Whether a layer's weights lie on the device as they are multiplied with."""
    moved = hasattr(layer, "_v") or hasattr(layer, "prev_comfy_cast_weights")
    changed = layer.weight_function or layer.bias_function
    return not (moved or changed) and all(x.device == device for x in _own(layer))


def _kind(layer: nn.Module, name: str, x: Tensor) -> torch.dtype:
    """The type in which a layer computes with a weight."""
    return getattr(layer, f"{name}_comfy_model_dtype", None) or x.dtype


def _streamed(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that lie in pages, by where."""
    return sorted((layer for layer in layers if hasattr(layer, "_v")), key=lambda layer: layer._v[1])


def _filled(marks: Sequence[object], before: Sequence[object]) -> bool:
    """Whether ComfyUI's marks of layers are the same objects as before: their pages hold what they held."""
    return len(marks) == len(before) and all(a is not None and a is b for a, b in zip(marks, before))


def _pages():
    """ComfyUI's calls for pages of streamed weights."""
    import comfy_aimdo.model_vbar

    return comfy_aimdo.model_vbar
