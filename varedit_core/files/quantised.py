"""What a file says of weights that it stores in fewer bits, and whether their parts are those of the formats we run.

Files say it in ComfyUI's ways: in `_quantization_metadata`, or in a tensor `comfy_quant` beside every weight, both in
JSON. A scale beside a weight in float8 alone is enough, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor, nn

from ..runtime.formats import Float8, Format, read
from .reading import printable
from .weights import WeightError, Weights

METADATA = "_quantization_metadata"
SCALE = (".weight_scale", ".weight_scale_2")
"""The ends of keys of scales that our layers multiply with."""
_UNREAD = (".comfy_quant", ".input_scale")
BESIDE = (*SCALE, *_UNREAD, ".weight_s_rel", ".weight_s_channel", ".weight_codebook", ".pre_quant_scale")
"""What stands beside a quantised matrix, in our files and in those of all of ComfyUI's formats."""
_MOST = 1000  # bytes of what is said of one layer
_NUMBERS = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
}  # fmt: skip
"""The types of weights. Others are read as numbers of another meaning, if at all."""


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor's type is one of weights."""
    return str(tensor.dtype).removeprefix("torch.") in _NUMBERS


def quantised(weights: Weights) -> set[str]:
    """The keys of matrices with a scale or the name of a format beside them."""
    return {f"{key.rpartition('.')[0]}.weight" for key in weights if key.endswith(BESIDE)}


def told(layers: Mapping[str, Format]) -> dict[str, str]:
    """The metadata that says how layers are stored."""
    said = {name: stored.settings for name, stored in layers.items()}
    return {METADATA: json.dumps({"format_version": "1.0", "layers": said})} if said else {}


def formats_of(weights: Weights) -> dict[str, Format]:
    """The format of every matrix that is stored in fewer bits, by its layer's name. WeightError for others than ours,
    and where a file does not say."""
    said, found = _settings(weights), {}
    for key in quantised(weights):
        name = key.removesuffix(".weight")
        if key not in weights:
            raise WeightError(f"{weights.path} has scales of {name} without its weight; download or convert it again")
        if name not in said:
            if not str(weights.meta[key].dtype).startswith("torch.float8"):
                raise WeightError(
                    f"{weights.path} does not say in which format it stores {key}; use the original or convert it with "
                    "`varedit convert`"
                )
            found[name] = Float8()
            continue
        try:
            found[name] = read(said[name])
        except ValueError as error:
            raise WeightError(
                f"{weights.path} stores {key} in {printable(str(error))}, which only ComfyUI runs; use the original or "
                "convert it with `varedit convert`"
            ) from error
    return found


def _settings(weights: Weights) -> dict[str, Mapping]:
    """What the file says of its layers, by their names."""
    found = {}
    for name, said in _listed(weights).items():
        while f"{name}.weight" not in weights and "." in name:  # named with a prefix that is taken off here
            name = name.partition(".")[2]
        found[name] = said
    for key in weights:
        if key.endswith(".comfy_quant"):
            meta = weights.meta[key]
            text = bytes(weights[key].flatten().tolist()) if meta.dtype.itemsize == 1 and meta.numel() < _MOST else b""
            found[key.removesuffix(".comfy_quant")] = _parsed(weights, text, key)
    return found


def _listed(weights: Weights) -> Mapping[str, Mapping]:
    if METADATA not in weights.metadata:
        return {}
    layers = _parsed(weights, weights.metadata[METADATA], METADATA).get("layers")
    if not isinstance(layers, dict) or not all(isinstance(said, dict) for said in layers.values()):
        raise _unreadable(weights, METADATA)
    return layers


def _parsed(weights: Weights, text: str | bytes, key: str) -> Mapping:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise _unreadable(weights, key)
    return said


def _unreadable(weights: Weights, key: str) -> WeightError:
    return WeightError(f"{weights.path} has {key}, which says nothing readable; download or convert it again")


def store(network: nn.Module, weights: Weights) -> None:
    """Make a network's layers, on the meta device, ready for what a file stores in fewer bits.

    WeightError where the parts are not those of the format, or belong to no linear layer.
    """
    for name, stored in formats_of(weights).items():
        layer = network.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise WeightError(
                f"{weights.path} has scales of {name}, which is no linear layer; use the original or convert it with "
                "`varedit convert`"
            )
        _check_parts(weights, name, stored, (layer.out_features, layer.in_features))
        layer.store(stored)


def _check_parts(weights: Weights, name: str, stored: Format, shape: tuple[int, int]) -> None:
    if not stored.fits(shape):
        raise WeightError(
            f"{weights.path} stores {name} as {stored.name}, which its shape does not take; convert it again"
        )
    kinds = stored.kinds(shape)
    beside = {key for key in weights if key.rpartition(".")[0] == name and key.endswith(BESIDE)}
    unknown = beside - {f"{name}.{part}" for part in kinds} - {f"{name}{end}" for end in _UNREAD}
    if unknown:
        raise WeightError(
            f"{weights.path} is quantised in a way that only ComfyUI runs ({min(unknown)}); use the original or "
            "convert it with `varedit convert`"
        )
    for part, (dtype, wanted) in kinds.items():
        meta = weights.meta.get(f"{name}.{part}")
        if meta is None:
            raise WeightError(f"{weights.path} lacks {name}.{part}; download or convert it again")
        one_a_row = part == "weight_scale" and stored.rows and tuple(meta.shape) in ((), (1,), shape[:1])
        right = tuple(meta.shape) in (wanted, (1,) if wanted == () else wanted) or one_a_row
        kind = meta.dtype == dtype or (dtype.is_floating_point and dtype.itemsize > 1 and has_numbers(meta))
        if not (right and kind):
            raise WeightError(
                f"{weights.path} has {name}.{part} of shape {list(meta.shape)} and type "
                f"{str(meta.dtype).removeprefix('torch.')} where {stored.name} has {list(wanted)} and "
                f"{str(dtype).removeprefix('torch.')}; use the original or convert it with `varedit convert`"
            )
