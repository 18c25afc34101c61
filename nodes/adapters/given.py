"""What other nodes hand on, judged by its kind where it comes in: what is no picture, mask or latent is one sentence
before anything is made of it. What comes out here is as every adapter may rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ...varedit_core.pictures.images import shape_complaint

INDEX = "batch_index"
"""Where ComfyUI keeps the numbers of a LATENT's rows, by which they draw."""
BEYOND = 2
"""How far numbers may lie outside 0 to 1 and are taken for the nearest of them, as other nodes do: resizing, sharpening
and bright lights make such."""
NAMES = {"edited": "edited crop", "scales": "latent of scales", "begun": "latent to go on from"}
"""What inputs are called in a sentence where their own name would be none."""


def checked_image(image, name: str = "image") -> Tensor:
    """An IMAGE [count, y, x, 1, 3 or 4] of numbers from 0 to 1. ValueError for anything else."""
    _check_tensor(image, name, "picture")
    if image.ndim != 4:
        raise ValueError(f"the {name} has the shape {list(image.shape)}; connect one of [count, y, x, channels]")
    if image.shape[3] not in (1, 3, 4):
        raise ValueError(f"the {name} has {image.shape[3]} channels; connect one with 1, 3 or 4")
    if not image.numel():
        raise ValueError(f"the {name} has no pixels ({list(image.shape)}); connect at least one picture")
    _check_floats(image, name)
    return _within(image, name)


def checked_mask(mask, name: str = "mask") -> Tensor:
    """A MASK or noise_mask, [y, x] or [..., y, x], of numbers from 0 to 1. ValueError for anything else."""
    _check_tensor(mask, name, "mask")
    if mask.ndim < 2 or not mask.numel():
        raise ValueError(f"the {name} has the shape {list(mask.shape)}; connect one of [y, x] or [count, y, x]")
    return _within(mask if mask.is_floating_point() and mask.element_size() > 1 else mask.float(), name)


def tell_of_mask(mask: Tensor, size: tuple[int, int], tell: Callable[[str], None], name: str = "mask") -> None:
    """Tell of a mask that is empty, and of one that has another shape than its picture, unless it is the same
    everywhere. size: (width, height) of the picture."""
    rows = mask.flatten(-2).any(-1).flatten().tolist()
    if not any(rows):
        tell(f"the {name} is empty, so it counts as none; paint where the picture may change")
        return
    if empty := [str(n) for n, marks in enumerate(rows, start=1) if not marks]:
        tell(f"row {', '.join(empty)} of the {name} is empty, so that it marks nothing in its picture")
    if mask.min() != mask.max():
        sentence = shape_complaint((mask.shape[-1], mask.shape[-2]), size, name)
        if sentence:
            tell(f"{sentence}; it is stretched over the picture")


def checked_latent(latent, name: str = "latent") -> dict:
    """A LATENT of at least one row, whose numbers are defined, as those of its mask and of its rows. ValueError for
    anything else; whether it is one of ours is asked where its model or VAE is known."""
    if not isinstance(latent, Mapping) or "samples" not in latent:
        raise ValueError(f"the {name} is {_kind(latent)}, no latent; connect one of VAREdit Source Encode or Sampler")
    samples = latent["samples"]
    if not getattr(samples, "is_nested", False):  # those of several kinds are told as such
        _check_tensor(samples, name, "latent")
        if not samples.numel():
            raise ValueError(f"the {name} has no rows ({list(samples.shape)}); connect one of at least one picture")
        _check_floats(samples, name)
        if not samples.isfinite().all():
            raise _undefined(name)
    numbers = latent.get(INDEX)
    if numbers is not None and not (isinstance(numbers, Sequence) and all(isinstance(n, Integral) for n in numbers)):
        raise ValueError(f"the {name} numbers its rows by something else than whole numbers; leave out its node")
    return _with_mask(latent, "noise_mask", "mask of the latent")


def checked_conditioning(conditioning, name: str) -> list:
    """A CONDITIONING: features with facts, as many as there are, and their masks. ValueError for anything else; whether
    it is one of ours is asked by `conditioning`."""
    pairs = isinstance(conditioning, list | tuple) and all(
        isinstance(entry, list | tuple) and len(entry) == 2 for entry in conditioning
    )
    if not pairs or any(not (isinstance(x, Tensor) and isinstance(facts, Mapping)) for x, facts in conditioning):
        raise ValueError(f"{name} is {_kind(conditioning)}, no conditioning; connect VAREdit Text Encode")
    return [[x, _with_mask(facts, "mask", "mask of a conditioning")] for x, facts in conditioning]


def checked(type_name: str, name: str, value):
    """What a node takes for an input of a type: `value` as the functions above give it back."""
    check: Callable = {
        "IMAGE": checked_image, "MASK": checked_mask, "LATENT": checked_latent, "CONDITIONING": checked_conditioning,
    }[type_name]  # fmt: skip
    return check(value, NAMES.get(name, name))


def _with_mask(facts: Mapping, key: str, name: str) -> Mapping:
    """The same, with the mask that stands there, if any, as `checked_mask` gives it back."""
    mask = facts.get(key)
    return facts if mask is None else {**facts, key: checked_mask(mask, name)}


def _check_tensor(x, name: str, kind: str) -> None:
    """ValueError for what is not numbers that lie in memory one by one."""
    if not isinstance(x, Tensor):
        raise ValueError(f"the {name} is {_kind(x)}, no {kind}; connect a node that makes one")
    if x.layout != torch.strided or x.is_meta or x.is_complex():
        what = "complex" if x.is_complex() else "on no device" if x.is_meta else "sparse"
        raise ValueError(f"the {name} is {what}; connect a node that makes an ordinary {kind}")


def _check_floats(x: Tensor, name: str) -> None:
    if not x.is_floating_point() or x.element_size() < 2:
        kind = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"the {name} is of {kind} numbers; connect one of floating-point numbers, of 16 bits or more")


def _within(x: Tensor, name: str) -> Tensor:
    """The same from 0 to 1, in one pass over what is so already."""
    low, high = (float(end) for end in x.aminmax())
    if not abs(low) + abs(high) < float("inf"):
        raise _undefined(name)
    if low < -BEYOND or high > 1 + BEYOND:
        raise ValueError(
            f"the {name} has numbers from {low:.4g} to {high:.4g} where 0 to 1 belong; divide or clamp it before"
        )
    return x if low >= 0 and high <= 1 else x.clamp(0, 1)


def _undefined(name: str) -> ValueError:
    return ValueError(f"the {name} holds undefined numbers; check the node that made it")


def _kind(x) -> str:
    return "nothing" if x is None else f"a {type(x).__name__}"
