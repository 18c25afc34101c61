"""Tensors of a recording that fails under CUDA's own allocator (`cudaMallocAsync`): they stay for ever.

That allocator cannot take back memory of a recording that came to nothing: trying to ends the process. What stays is no
more than addresses, as nothing of the recording was run.
"""

from __future__ import annotations

import ctypes
from weakref import ref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_present: list[Kept] = []


def failed() -> None:
    """Say that what a recording does has failed, before the frames that hold its tensors are left."""
    for kept in _present:
        kept.fail()


class Kept(TorchDispatchMode):
    """Where what is done within fails, all tensors that were made within stay for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[ref] = []

    def __enter__(self) -> Kept:
        _present.append(self)
        return super().__enter__()

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)
        _present.remove(self)
        if error is not None:
            self.fail()

    def fail(self) -> None:
        living, self.made = [made() for made in self.made], []
        for tensor in living:
            if tensor is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        try:
            result = function(*args, **kwargs or {})
        except BaseException:
            self.fail()
            raise
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.made += [ref(x) for x in results if isinstance(x, Tensor)]
        return result
