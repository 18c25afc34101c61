"""ComfyUI's casting layers, which also take activations along and can be handed weights that stand still.

ComfyUI's layers fetch, cast and patch their weights at every call, which takes the host longer than a small layer
takes the device. While weights stand still (see `holding`) a layer has them in `held` and asks nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...varedit_core.runtime.formats import PARTS, Float8, Format, Int8, Nvfp4, scales_of
from ...varedit_core.runtime.kernels import (
    Rounded,
    fuses_pictures,
    group_norm_silu,
    linear_eight_bit,
    multiplies_eight_bit,
    multiplies_whole,
)
from ...varedit_core.runtime.layers import fuses_gelu, linear_gelu

Held = tuple[Tensor | None, ...]
Keep = Callable[[nn.Module, str, tuple[int, ...], torch.dtype], Tensor]
"""Memory of a layer that keeps its place from edit to edit (see `holding.Holder.place`)."""


class Holding:
    """A casting layer that computes with `held`, weight and bias as they are multiplied with, where it has them."""

    held: Held | None = None

    def take(self, weight: Tensor, bias: Tensor | None, keep: Keep) -> Held | None:
        """What to hold of weights that stand still; None where ComfyUI has to do more with them at every call."""
        return None if hasattr(weight, "_qdata") else (weight, bias)

    def forward(self, x: Tensor, *more, **options) -> Tensor:
        if self.fits(x) and not (more or options):
            return self.computed(x, *self.held)
        return super().forward(x, *more, **options)

    def fits(self, x: Tensor) -> bool:
        """Whether what is held may be computed with x."""
        if self.held is None:
            return False
        return not x.is_floating_point() or all(h is None or h.dtype == x.dtype for h in self.held)

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def within(self, x: Tensor, function) -> Tensor:
        """function(weight, bias) with the weights as they are multiplied with x; the result must not be a part of
        them."""
        if self.fits(x):
            return function(*self.held)
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        try:
            return function(weight, bias)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    @property
    def hooked(self) -> bool:
        """Whether a node has put something around the call, as LoRAs do that leave weights alone."""
        return "forward" in self.__dict__


class Casting(comfy.ops.manual_cast):
    """The namespace of these layers."""

    class Linear(Holding, comfy.ops.manual_cast.Linear):
        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight, bias)

        def gelu(self, x: Tensor) -> Tensor:
            """GELU(tanh) of the layer's result."""
            if self.hooked or not fuses_gelu(x, self.bias):
                return F.gelu(self(x), approximate="tanh")
            return self.within(x, lambda weight, bias: linear_gelu(x, weight, bias))

        def matrix(self, dtype: torch.dtype) -> Tensor | None:
            """The weight [out, in] where it is what the layer multiplies with; None where ComfyUI moves, casts or
            patches it first."""
            if self.hooked:
                return None
            if self.held is not None:
                return self.held[0] if self.held[0].dtype == dtype else None
            changed = self.weight_function or self.bias_function
            moved = hasattr(self, "_v") or hasattr(self, "prev_comfy_cast_weights")
            return None if changed or moved or self.weight.dtype != dtype else self.weight

        def offset(self) -> Tensor | None:
            """The bias that belongs to `matrix`."""
            return self.bias if self.held is None else self.held[1]

    class Conv2d(Holding, comfy.ops.manual_cast.Conv2d):
        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._conv_forward(x, weight, bias)

        def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """The convolution without its bias, and the bias, where kernels run that add it in passing; else with
            it."""
            if not fuses_pictures(x):
                return self(x), None
            if self.fits(x):
                return self._conv_forward(x, self.held[0], None), self.held[1]
            kept = []

            def convolved(weight: Tensor, bias: Tensor) -> Tensor:
                kept.append(bias.clone())  # its own memory is lent
                return self._conv_forward(x, weight, None)

            return self.within(x, convolved), kept[0]

    class GroupNorm(Holding, comfy.ops.manual_cast.GroupNorm):
        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)

        def silu(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
            """SiLU of the norm of [B, C, H, W] + offset [C]."""
            return self.within(x, lambda w, b: group_norm_silu(x, self.num_groups, w, b, self.eps, offset))

    class LayerNorm(Holding, comfy.ops.manual_cast.LayerNorm):
        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    class RMSNorm(Holding, comfy.ops.manual_cast.RMSNorm):
        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)

    class Embedding(Holding, comfy.ops.manual_cast.Embedding):
        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.embedding(x, weight)


class Stored(Holding):
    """A linear layer of ComfyUI's quantised ones, which multiplies as the library does where it can.

    In 8 bits what comes in is rounded token by token, which is exacter than ComfyUI's one scale for all, and as fast;
    weights in 4 bits are unpacked where the device does not multiply them.
    """

    @property
    def reads_rounded(self) -> bool:
        """Whether it takes numbers that are rounded already."""
        device = self.held[0].device if self.held else None
        return device is not None and not self.hooked and isinstance(self.form(device), Float8)

    def form(self, device: torch.device) -> Format | None:
        """The format in which the library multiplies on a device, by no other scales than the weight's; None where
        ComfyUI does."""
        scaled = any(getattr(self, name, None) is not None for name in ("pre_quant_scale", "input_scale"))
        if scaled or self.weight_function or self.bias_function:
            return None
        name, exact = getattr(self, "quant_format", None), self._full_precision_mm
        if name == Float8.name and not exact and multiplies_eight_bit(device):
            return Float8()
        if name == Int8.name and not exact and multiplies_whole(device):
            params = self.weight._params
            return Int8(params.convrot_groupsize if getattr(params, "convrot", False) else 0)
        return Nvfp4() if name == Nvfp4.name and exact and unpacks(device) else None

    def take(self, weight: Tensor, bias: Tensor | None, keep: Keep) -> Held | None:
        if not hasattr(weight, "_qdata"):
            return weight, bias
        form = self.form(weight.device)
        if form is None:
            return None
        if isinstance(form, Nvfp4):
            return *_parts(form, weight, self.out_features).values(), bias
        scales = keep(self, "scale", (self.out_features,), torch.float32)
        parts = _parts(form, weight, self.out_features)
        return parts["weight"], scales.copy_(parts["weight_scale"]), bias

    def forward(self, x: Tensor | Rounded, *more, gelu: bool = False, **options) -> Tensor:
        form = None if more or options else self.form((x.codes if isinstance(x, Rounded) else x).device)
        if form is not None:
            return self._product(form, x, gelu)
        if gelu:
            x = F.gelu(x, approximate="tanh")
        if self.fits(x):
            return F.linear(x, *self.held)
        return super(Holding, self).forward(x, *more, **options)

    def after_gelu(self, x: Tensor) -> Tensor:
        """The layer behind GELU(tanh) of x, which is rounded only once."""
        return self(F.gelu(x, approximate="tanh")) if self.hooked else self(x, gelu=True)

    def _product(self, form: Format, x: Tensor | Rounded, gelu: bool) -> Tensor:
        if self.held is not None:
            *parts, bias = self.held
            return _multiplied(form, dict(zip(PARTS, parts)), x, None if bias is None else bias.to(x.dtype), gelu)
        comfy.ops.run_every_op()
        device = (x.codes if isinstance(x, Rounded) else x).device
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, dtype=x.dtype, device=device, bias_dtype=x.dtype, offloadable=True, compute_dtype=x.dtype,
            want_requant=True,
        )  # fmt: skip
        try:
            return _multiplied(form, _parts(form, weight, self.out_features), x, bias, gelu)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)


def unpacks(device: torch.device) -> bool:
    """Whether weights in 4 bits are unpacked here where the device does not multiply them."""
    return device.type == "cuda"


def _parts(form: Format, weight: Tensor, count: int) -> dict[str, Tensor]:
    """The parts of one of ComfyUI's quantised weights; of those that multiply in 8 bits the scale of every output
    channel, fp32 [count]."""
    params = weight._params
    if isinstance(form, Nvfp4):
        return dict(zip(PARTS, (weight._qdata, params.block_scale, params.scale)))
    return dict(zip(PARTS, (weight._qdata, scales_of(params.scale, count))))


def _multiplied(form: Format, parts: Mapping[str, Tensor], x: Tensor | Rounded, bias: Tensor | None, gelu: bool):
    """x @ weight.T + bias, of GELU(tanh) of x where that is wanted."""
    if isinstance(form, Nvfp4):
        return F.linear(F.gelu(x, approximate="tanh") if gelu else x, form.turned(parts, x.dtype), bias)
    return linear_eight_bit(x, parts["weight"], parts["weight_scale"], bias, gelu, form.group)


def quantised(layers) -> type:
    """A namespace of ComfyUI's quantised layers, with ours beside them."""

    class Quantised(Casting):
        class Linear(Stored, layers.Linear):
            pass

        class Embedding(Holding, layers.Embedding):
            def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return F.embedding(x, weight)

    return Quantised
