"""LoRA files for the transformer: low-rank updates, weight + strength * alpha / rank * up @ down (arXiv 2106.09685).

Reads the two key styles that ComfyUI's LoRA loader reads, `diffusion_model.<layer>.lora_A.weight` / `.lora_B.weight`
and `lora_unet_<layer, dots as underscores>.lora_down.weight` / `.lora_up.weight`, each with or without `.alpha` (the
rank by default). Updates are merged into the weights, so that edits take no longer. Making such files is the
business of `training.lora`.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.transformer import Transformer
from ..runtime.fp8 import EightBitLinear
from .checkpoints import KIND, TOKENIZER, TRANSFORMER, blank, canonical, describe, holds, tell_taken, told_kind
from .convert import ARCHITECTURES, Entry, check_result, check_space, facts_of
from .reading import printable
from .tensor_files import write_in_turn
from .weights import WeightError, Weights, check_finite, open_weights

logger = logging.getLogger(__name__)

PREFIX, FLAT_PREFIX = "diffusion_model.", "lora_unet_"
_PARTS = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
_KEY = re.compile(rf"({re.escape(PREFIX)}.+|{FLAT_PREFIX}[^.]+)\.({'|'.join(map(re.escape, _PARTS))})")


@dataclass(frozen=True)
class Update:
    """One layer's update: the keys of down [rank, inputs] and up [outputs, rank], its rank and alpha."""

    down: str
    up: str
    shape: tuple[int, int]
    rank: int
    alpha: float


@dataclass(frozen=True)
class Lora:
    """A LoRA file: its tensors, read when asked for, and the updates by the file's own names of the layers."""

    weights: Weights
    updates: dict[str, Update]

    def matched(self, transformer: Transformer, strength: float = 1.0) -> dict[str, Update]:
        """The updates by the transformer's names of its layers.

        Raises WeightError unless every update belongs to a linear layer of that shape, and has defined numbers that a
        weight can hold at this strength.
        """
        path, layers = self.weights.path, linear_layers(transformer)
        names = {prefix: name for name in layers for prefix in (PREFIX + name, FLAT_PREFIX + name.replace(".", "_"))}
        found: dict[str, Update] = {}
        for stem, update in self.updates.items():
            if stem not in names:
                raise WeightError(
                    f"{path} has {update.down} but the transformer has no such layer; choose a LoRA trained for VAREdit"
                )
            name = names[stem]
            wanted = (layers[name].out_features, layers[name].in_features)
            if update.shape != wanted:
                raise WeightError(
                    f"{path} has {update.down} for a layer of shape {list(update.shape)} where the transformer has "
                    f"{list(wanted)}; choose a LoRA trained for a transformer of this size"
                )
            if name in found:
                raise WeightError(f"{path} has both {found[name].down} and {update.down}; remove one of them")
            self._check_numbers(update, strength, name, _kept_as(layers[name], transformer))
            found[name] = update
        return found

    def _check_numbers(self, update: Update, strength: float, name: str, dtype: torch.dtype) -> None:
        path, (up, down) = self.weights.path, (_largest(self.weights[key]) for key in (update.up, update.down))
        if not math.isfinite(up + down):
            raise WeightError(
                f"{path} has infinite or undefined numbers in {update.down} or {update.up}; train or download it again"
            )
        scale = abs(strength * update.alpha / update.rank)
        most = max(scale, up * down * update.rank * max(scale, 1))
        if most > torch.finfo(dtype).max / 2:
            raise WeightError(
                f"{path} may add {most:.0e} to {name} at the strength {strength:g}, which is more than its type holds; "
                "lower the strength, or choose another LoRA"
            )

    def difference(self, update: Update, strength: float, device) -> Tensor:
        """What is added to a layer's weight [outputs, inputs], in fp32."""
        up, down = (self.weights[key].to(device, torch.float32) for key in (update.up, update.down))
        return strength * update.alpha / update.rank * (up @ down)

    def summary(self) -> dict:
        """Number of layers, ranks, alphas, and how many layers of each kind (numbers in their names as `*`)."""
        kinds = Counter(re.sub(r"\d+", "*", re.sub(f"^({PREFIX}|{FLAT_PREFIX})", "", stem)) for stem in self.updates)
        return {
            "layers": len(self.updates),
            "rank": sorted({update.rank for update in self.updates.values()}),
            "alpha": sorted({update.alpha for update in self.updates.values()}),
            "targets": dict(kinds),
        }


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; infinite or NaN where there is such a number, or none that fp32 holds."""
    low, high = tensor.float().aminmax()
    return float(torch.maximum(-low, high)) if tensor.numel() else 0.0


def _kept_as(layer: nn.Linear, transformer: Transformer) -> torch.dtype:
    """The type of a layer's weight after an update."""
    return transformer.dtype if layer.weight.dtype.itemsize == 1 else layer.weight.dtype


def linear_layers(transformer: Transformer) -> dict[str, nn.Linear]:
    """The layers a LoRA can update, by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def read_lora(source: str | Path | Weights) -> Lora:
    """Open a LoRA file. Raises WeightError where it is another file, incomplete, or holds more than plain LoRA."""
    weights = source if isinstance(source, Weights) else open_weights(source)
    keys: dict[str, dict[str, str]] = {}
    foreign = []
    for key in weights:
        match = _KEY.fullmatch(key)
        if match:
            keys.setdefault(match[1], {})[_PARTS[match[2]]] = key
        else:
            foreign.append(key)
    if foreign and describe(weights) != "a LoRA":
        raise WeightError(f"{weights.path} is {describe(weights)}, not a LoRA; choose a LoRA trained for VAREdit")
    if foreign or not keys:
        named = f"has {min(foreign)}, which is no plain low-rank update of" if foreign else "holds no update of"
        raise WeightError(
            f"{weights.path} {named} a VAREdit layer; choose a LoRA trained for VAREdit, without DoRA or other variants"
        )
    return Lora(weights, {stem: _update(weights, stem, parts) for stem, parts in keys.items()})


def _update(weights: Weights, stem: str, keys: Mapping[str, str]) -> Update:
    missing = {"down", "up"} - keys.keys()
    if missing:
        raise WeightError(
            f"{weights.path} lacks the {' and '.join(sorted(missing))} matrix of {stem}; save or download it again"
        )
    down, up = (tuple(weights.meta[keys[part]].shape) for part in ("down", "up"))
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise WeightError(
            f"{weights.path} has {keys['down']} of shape {list(down)} and {keys['up']} of shape {list(up)} where "
            "[rank, inputs] and [outputs, rank] were expected; choose a LoRA trained for VAREdit"
        )
    for part in ("down", "up"):
        if not weights.meta[keys[part]].is_floating_point():
            kind = str(weights.meta[keys[part]].dtype).removeprefix("torch.")
            raise WeightError(
                f"{weights.path} has {keys[part]} as {kind} where floating-point numbers were expected; save it again"
            )
    return Update(keys["down"], keys["up"], (up[0], down[1]), down[0], _alpha(weights, keys.get("alpha"), down[0]))


def _alpha(weights: Weights, key: str | None, rank: int) -> float:
    if key is None:
        return float(rank)
    meta = weights.meta[key]
    single = meta.numel() == 1 and not meta.dtype.is_complex and meta.dtype != torch.bool
    alpha = float(weights[key].double()) if single else math.nan
    if not math.isfinite(alpha):
        raise WeightError(f"{weights.path} has {key}, which is not one number; save it again with one")
    return alpha


def check_lora(checkpoint: str | Path, lora: str | Path, strength: float = 1.0) -> None:
    """Raise what `apply_lora` would for a transformer's file; reads no weights of the transformer."""
    _check_strength(strength)
    read_lora(lora).matched(blank(canonical(open_weights(checkpoint), TRANSFORMER), TRANSFORMER), strength)


@torch.no_grad()
def apply_lora(transformer: Transformer, lora: str | Path, strength: float = 1.0) -> int:
    """Merge a LoRA file into a loaded transformer's weights; several may follow each other. How many layers it changed.

    Computed in fp32 and rounded to the weight's own type. Updated layers in fewer bits become layers of the
    transformer's `dtype`, at its cost in memory, rather than being rounded again. Raises WeightError, before anything
    has changed, where the file is no LoRA for this transformer, and ValueError for a strength that is no number or
    layers of `eight_bit`.
    """
    _check_strength(strength)
    file = read_lora(lora)
    updates = file.matched(transformer, strength)
    if any(isinstance(transformer.get_submodule(name), EightBitLinear) for name in updates):
        # Rounded again, most of an update would vanish: it is smaller than the steps between 8-bit numbers.
        raise ValueError("a LoRA cannot be merged into linear layers in 8 bits; apply it first, then call `eight_bit`")
    if strength == 0:
        return 0
    for name, update in updates.items():
        layer = transformer.get_submodule(name)
        merged = file.difference(update, strength, layer.weight.device)
        if getattr(layer, "stored", None) is None:
            layer.weight.copy_(merged.add_(layer.weight))
        else:
            merged += layer.matrix(torch.float32)
            layer.store(None, merged.to(transformer.dtype))
    return len(updates)


def merge_lora(
    checkpoint: str | Path,
    lora: str | Path,
    out: str | Path,
    strength: float = 1.0,
    overwrite: bool = False,
    on_tensor: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Write a transformer with a LoRA merged into it, a tensor at a time; returns the metadata written.

    The tensors keep their types and the file its metadata; the keys are canonical ones. on_tensor(done, total): bytes
    written. Raises WeightError for files that are unusable, 8-bit or do not belong together, FileExistsError where
    `out` exists, ValueError for a bad choice.
    """
    checkpoint, lora, out = Path(checkpoint), Path(lora), Path(out)
    _check_strength(strength)
    check_result(out, overwrite)
    opened = open_weights(checkpoint)
    weights = canonical(opened, TRANSFORMER)
    tell_taken(weights, TRANSFORMER)
    if holds(opened, TOKENIZER):
        logger.warning("%s holds a VAE too, which is left out; keep the file for it", checkpoint)
    eight_bit = [key for key, meta in weights.meta.items() if meta.dtype.itemsize == 1]
    if eight_bit:
        raise WeightError(
            f"{checkpoint} has {eight_bit[0]} in 8-bit; merge into the original or a bf16 file, then convert the result"
        )
    file = read_lora(lora)
    updates = file.matched(blank(weights, TRANSFORMER), strength)
    plan = {key: Entry(key, meta.dtype, tuple(meta.shape)) for key, meta in weights.meta.items()}
    earlier = weights.metadata.get("varedit.merged_lora")
    merged = f"{printable(lora.name)}:{strength:g}"
    told = told_kind(weights)  # by its name, perhaps, which the result has not
    metadata = {
        "format": "pt",
        "varedit.architecture": ARCHITECTURES[TRANSFORMER],
        "varedit.converted_from": printable(checkpoint.name),
        **({KIND: told} if told else {}),
        **weights.metadata,
        "varedit.merged_lora": f"{earlier}, {merged}" if earlier else merged,
    }
    total = sum(entry.nbytes for entry in plan.values())
    check_space(out, total)
    write_in_turn(out, facts_of(plan), _merged(weights, file, updates, strength), metadata, overwrite, on_tensor)
    return metadata


def _merged(weights: Weights, file: Lora, updates: Mapping[str, Update], strength: float) -> Iterator[Tensor]:
    for key in weights:
        tensor, update = weights[key], updates.get(key.removesuffix(".weight"))
        if update is not None and strength != 0:
            tensor = file.difference(update, strength, tensor.device).add_(tensor).to(tensor.dtype)
        check_finite(weights, key, tensor)
        yield tensor


def _check_strength(strength: float) -> None:
    if not math.isfinite(strength):
        raise ValueError(f"the strength of a LoRA must be a number, got {strength}; 1 is as trained, 0 is without it")
