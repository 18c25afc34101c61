"""ComfyUI's casting layers, which also take activations along and can be handed weights that stand still.

ComfyUI's layers fetch, cast and patch their weights at every call, which takes the host longer than a small layer
takes the device. While weights stand still (see `holding`) a layer has them in `held` and asks nobody.
"""

from __future__ import annotations

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor

from ...varedit_core.runtime.kernels import fuses_pictures, group_norm_silu
from ...varedit_core.runtime.layers import fuses_gelu, linear_gelu

Held = tuple[Tensor, Tensor | None]


class Holding:
    """A casting layer that computes with `held`, weight and bias as they are multiplied with, where it has them."""

    held: Held | None = None

    def forward(self, x: Tensor, *more, **options) -> Tensor:
        if self.fits(x) and not (more or options):
            return self.computed(x, *self.held)
        return super().forward(x, *more, **options)

    def fits(self, x: Tensor) -> bool:
        """Whether what is held may be computed with x."""
        return self.held is not None and (self.held[0].dtype == x.dtype or not x.is_floating_point())

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def within(self, x: Tensor, function) -> Tensor:
        """function(weight, bias) with the weights as they are multiplied with x; the result must not be a part of
        them."""
        if self.fits(x):
            return function(*self.held)
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        y = function(weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y


class Casting(comfy.ops.manual_cast):
    """The namespace of these layers."""

    class Linear(Holding, comfy.ops.manual_cast.Linear):
        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight, bias)

        def gelu(self, x: Tensor) -> Tensor:
            """GELU(tanh) of the layer's result."""
            if not fuses_gelu(x, self.bias):
                return F.gelu(self(x), approximate="tanh")
            return self.within(x, lambda weight, bias: linear_gelu(x, weight, bias))

        def matrix(self, dtype: torch.dtype) -> Tensor | None:
            """The weight [out, in] where it is what the layer multiplies with; None where ComfyUI moves, casts or
            patches it first."""
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
