"""New networks without torch's first filling of their weights."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """Leaves out torch's first filling of new weights, which on the meta device only costs time (seconds, the first
    time: torch imports its compiler for it)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)
