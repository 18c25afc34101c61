"""What runs on a GPU where Triton is missing: torch's own operations, in as few passes over memory as they allow.

The meaning is that of the plain forms, up to rounding. On Windows, and on cards that are too old for Triton, small
steps over large tensors would take more time than the products between them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LONG = 256
"""From so many tokens on it takes less to normalise rows one by one, each with its own scale and shift in one kernel;
of fewer tokens the launches count."""


def add_norm(
    x_RnC: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = x_RnC
    if y is not None:
        x = x + y if gate is None else torch.addcmul(x, y, gate[:, None])
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    if len(scale) == len(x) and x.shape[1] >= LONG:
        for target, row, own, more in zip(h, x, scale, shift):
            target.copy_(F.layer_norm(row, x.shape[-1:], own, more, eps))
        return x, h
    return x, torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), scale[:, None], out=h)


def heads_into(qkv_RnC: Tensor, query_scale: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, k, v = qkv_RnC.unflatten(-1, (3, keys.shape[1], -1)).unbind(2)
    values.copy_(v.transpose(1, 2))
    turns = torch.view_as_complex(rotary.permute(1, 2, 0).contiguous())[:, None]
    queries = torch.empty(q.shape, dtype=qkv_RnC.dtype, device=q.device)  # token by token, as attention's output is
    for x, gain, target in ((q, query_scale[:, None], queries), (k, None, keys.transpose(1, 2))):
        x = x.float().contiguous()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns
        torch.div(torch.view_as_real(turned).flatten(-2), length if gain is None else length / gain, out=target)
    return queries.transpose(1, 2)


def group_norm(x_BCHW: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Torch's own takes one block of a GPU for each group."""
    images, channels = x_BCHW.shape[:2]
    grouped = x_BCHW.reshape(images, groups, -1)
    if x_BCHW.dtype == torch.float32:
        variance, mean = torch.var_mean(grouped, -1, correction=0)
    else:  # in fp32, which the call above would round again
        mean = grouped.mean(-1, dtype=torch.float32)
        squares = torch.linalg.vector_norm(grouped, dim=-1, dtype=torch.float32) ** 2
        variance = (squares / grouped.shape[-1] - mean**2).clamp_min_(0)
    mean, variance = (x.repeat_interleave(channels // groups, 1).flatten() for x in (mean, variance))
    gains = (x.float().repeat(images) for x in (weight, bias))
    return F.batch_norm(x_BCHW.flatten(0, 1)[None], mean, variance, *gains, False, 0.0, eps).view(x_BCHW.shape)
