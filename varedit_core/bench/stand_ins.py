"""Stand-ins for packages that the published implementation imports and that are not installed here.

Only what its inference reads has a meaning: attention to the text through torch's own kernels, and two rearrangements
of axes. The rest (training losses, pictures, tables, time zones) is never called by an edit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None) -> Tensor:
    """Attention with heads behind the tokens: q [B, n, H, D], k and v [B, m, H, D] -> [B, n, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


def packed_attention(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of rows of different lengths laid end to end: q [sum n, H, D], kv [sum m, 2, H, D] -> [sum n, H, D].

    cu_seqlens: where the rows begin and the last one ends. Rows of one length, as those of an edit are, are one
    batch and make nobody wait for the device.
    """
    rows = len(cu_seqlens_k) - 1
    if len(q) == rows * max_seqlen_q and len(kv) == rows * max_seqlen_k:
        k, v = kv.unflatten(0, (rows, -1)).unbind(2)
        return attention(q.unflatten(0, (rows, -1)), k, v, softmax_scale=softmax_scale).flatten(0, 1)
    lengths = (cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
    parts = zip(q.split(lengths[0]), kv.split(lengths[1]))
    return torch.cat([attention(a[None], *b[None].unbind(2), softmax_scale=softmax_scale)[0] for a, b in parts])


def rearrange(x: Tensor, pattern: str, **_: int) -> Tensor:
    """The two patterns that an edit uses. NotImplementedError for others."""
    if pattern == "... c d -> ... (c d)":
        return x.flatten(-2)
    if pattern == "b ... d -> b d ...":
        return x.movedim(-1, 1)
    raise NotImplementedError(f"the stand-in for einops does not know {pattern!r}; install einops")


class DropPath(nn.Module):
    """Nothing, as is the original outside of training."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x


def _never(*_: object, **__: object) -> None:
    raise NotImplementedError("this is a stand-in of varedit bench for a package that is not installed")


STAND_INS: Mapping[str, Mapping[str, object]] = {
    "flash_attn": {"flash_attn_func": attention, "flash_attn_varlen_kvpacked_func": packed_attention},
    "einops": {"rearrange": rearrange, "reduce": _never, "pack": _never, "unpack": _never},
    "timm": {},
    "timm.loss": {"SoftTargetCrossEntropy": type("SoftTargetCrossEntropy", (nn.Module,), {})},
    "timm.models": {"register_model": lambda function: function},
    "timm.models.layers": {"DropPath": DropPath, "drop_path": lambda x, *_: x},
    "torchvision": {},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"to_tensor": _never},
    "cv2": {},
    "imageio": {},
    "pandas": {},
    "pytz": {"timezone": _never},
    "tqdm": {"tqdm": _never},
    "yaml": {},
}
"""Module -> what the published implementation takes from it."""


@contextmanager
def stand_ins(table: Mapping[str, Mapping[str, object]] = STAND_INS) -> Iterator[list[str]]:
    """Put modules in the place of those that cannot be imported; yields their names, and takes them back at the end."""
    put = [name for name, names in table.items() if not _importable(name, names)]
    for name in put:
        sys.modules[name] = module = ModuleType(name)
        # Who asks whether a package is there (transformers does) would fail on a module without one.
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(table[name])
        parent, _, leaf = name.rpartition(".")
        if parent in put:
            setattr(sys.modules[parent], leaf, module)
    try:
        yield put
    finally:
        for name in put:
            sys.modules.pop(name, None)


def _importable(name: str, names: Mapping[str, object]) -> bool:
    try:
        module = import_module(name)
    except Exception:  # a broken installation raises whatever its first failing line raises
        return False
    return all(hasattr(module, wanted) for wanted in names)
