"""Compare this implementation with figures recorded from the published one (`varedit parity`).

A record holds weights, inputs and, scale by scale, logits and bits of a greedy run in fp32. Every scale's
logits are compared given the record's earlier bits, so that one flipped bit does not spoil the rest; a second,
free run shows how far the bits agree without help.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files.checkpoints import load_autoencoder, load_transformer
from .files.weights import WeightError, Weights, open_weights
from .model.transformer import Transformer
from .pictures.images import to_uint8
from .runtime.devices import device_of
from .runtime.session import sample
from .sampling.checks import patch_size
from .sampling.scale import Scale
from .sampling.settings import SamplingSettings
from .tokenizer.quantizer import area_resize, codes, decode, latent_grids, linear_resize, to_tokens
from .tokenizer.schedule import TABLES, Schedule
from .tokenizer.vae import Autoencoder

LOGITS = 1e-4  # largest absolute error of a logit
FEATURES = 1e-4  # and of the VAE's features and sums
MARGIN = 1e-3  # a bit whose recorded log-odds are closer to zero may flip
RESIDUAL = 1e-6  # and so may a bit of the VAE's whose residual is
FREE_BITS = 0.999  # share of equal bits of a run without the record's help
HALF = 1e-3  # pictures in [-1, 1] recorded in fp16
# Share of an edited picture's 8-bit values more than one level off: values are truncated, so that one level is
# common, and the recorded decoder worked in channels-last layout, where group normalisation rounds more.
PICTURE = 1e-4
ROUNDED = 0.1  # and of values off at all: rounding in place of truncation would make it half of them


@dataclass
class ScaleParity:
    """One scale: largest logit error (None where none was recorded), share of equal bits given the record's
    earlier bits (all, and those beyond the margin), and of the free run."""

    grid: tuple[int, int]
    logit_error: float | None = None
    forced: float = 1.0
    forced_beyond_margin: float = 1.0
    free: float = 1.0


@dataclass
class Parity:
    """The comparison with one record; `failures` is empty where everything is within tolerance."""

    file: str
    dtype: str
    scales: list[ScaleParity] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    free_bits: float = 1.0
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Record:
    """A recorded file, with the networks it names loaded in `dtype` on `device`."""

    weights: Weights
    transformer: Transformer
    autoencoder: Autoencoder
    schedule: Schedule
    device: torch.device

    @classmethod
    def open(cls, path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Record:
        """Raises WeightError where the file is no record or names weights that are not there."""
        weights = open_weights(path)
        if "in.image_u8" not in weights or "scale_schedule" not in weights.metadata:
            raise WeightError(
                f"{path} is not a recorded run (it lacks in.image_u8 or scale_schedule); see docs/MODEL.md for the "
                "format"
            )
        files = {}
        for part in ("transformer", "vae"):
            name = weights.metadata.get(f"{part}_weights", "self")
            files[part] = Path(path) if name == "self" else Path(path).parent / name
        schedule = schedule_from(json.loads(weights.metadata["scale_schedule"]), float(weights.metadata["ratio"]))
        transformer = load_transformer(files["transformer"], dtype=dtype, device=device)
        return cls(weights, transformer, load_autoencoder(files["vae"], device=device), schedule, torch.device(device))

    @property
    def grids(self) -> list[tuple[int, int]]:
        return latent_grids(self.schedule, patch_size(self.transformer.config, self.autoencoder.config))

    def __getitem__(self, key: str) -> Tensor:
        return self.weights[key].to(self.device)

    def texts(self, kind: str) -> list[Tensor]:
        """Recorded text features, `kind` being "text" or "negative"; empty where there are none."""
        count = sum(key.startswith(f"in.{kind}.") for key in self.weights)
        return [self[f"in.{kind}.{i}"].float() for i in range(count)]

    def bits(self, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
        """Boolean bits [B, d, h, w] unpacked from the record's [B, 1, h, w, d]."""
        batch, depth, height, width = shape
        flat = np.unpackbits(self.weights[f"ref.{name}.{index}"].numpy())[: batch * depth * height * width]
        return torch.from_numpy(flat).reshape(batch, height, width, depth).permute(0, 3, 1, 2).bool().to(self.device)

    def logits(self, index: int) -> Tensor | None:
        """Recorded logits [rows, tokens, token bits, 2] before temperature and guidance, if any."""
        key = f"ref.logits_cond_uncond.{index}"
        return self[key].unflatten(-1, (-1, 2)) if key in self.weights else None

    def settings(self) -> SamplingSettings:
        guidance = json.loads(self.weights.metadata["cfg"])
        return SamplingSettings(guidance=guidance, temperature=0.0, top_p=1.0)

    def run(self, features: Tensor, on_scale: Callable[[Scale, Tensor], None]) -> Tensor:
        """A greedy run from `features`; on_scale gets every scale and its recorded bits. Returns the final sum."""
        for scale in sample(
            self.transformer,
            features,
            self.texts("text"),
            self.schedule,
            self.settings(),
            self.texts("negative") or None,
        ):
            on_scale(scale, self.bits("bits", scale.index, scale.log_odds.shape))
        return scale.running_sum


@torch.no_grad()
def compare(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Parity:
    """Compare with one record. Tolerances are judged in fp32 only; other types are reported.

    Raises WeightError where the file is not a record.
    """
    # cuDNN's TF32 convolutions would hide what is compared here.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        record = Record.open(path, dtype, device_of(device))
        result = Parity(
            str(path), str(dtype).removeprefix("torch."), [ScaleParity(grid) for grid in record.schedule.grids]
        )
        features = _compare_tokenizer(record, result)
        _compare_forced(record, features, result)
        _compare_free(record, features, result)
    if dtype == torch.float32:
        _judge(result)
    return result


def _compare_tokenizer(record: Record, result: Parity) -> Tensor:
    features, grids = record.autoencoder.encode(record["in.image_u8"].float() / 127.5 - 1), record.grids
    reference = record["ref.vae_features"].float()
    result.errors["vae_features"] = _error(features, reference)
    patch = grids[-1][0] // record.schedule.grids[-1][0]
    result.errors["source_prefix"] = _error(
        to_tokens(area_resize(reference, grids[-1]), patch), record["ref.source_prefix"]
    )
    bits = [record.bits("tokenizer_bits", k, (*reference.shape[:2], *grid)) for k, grid in enumerate(grids)]
    total, wrong = torch.zeros_like(reference), 0
    for grid, recorded in zip(grids, bits):
        residual = area_resize(reference - total, grid)
        wrong += int((((residual > 0) != recorded) & (residual.abs() > RESIDUAL)).sum())
        total = total + linear_resize(codes(recorded), grids[-1])
    result.errors["tokenizer_bits_wrong"] = float(wrong)
    result.errors["tokenizer_features"] = _error(decode(bits, grids[-1]), record["ref.tokenizer_features"])
    if "ref.tokenizer_image" in record.weights:
        result.errors["tokenizer_image"] = _error(
            record.autoencoder.decode(record["ref.tokenizer_features"]), record["ref.tokenizer_image"].float()
        )
    return features


def _compare_forced(record: Record, features: Tensor, result: Parity) -> None:
    guidance = record.settings().per_scale(len(record.schedule))

    def look(scale: Scale, recorded: Tensor) -> None:
        row, reference = result.scales[scale.index], record.logits(scale.index)
        equal = scale.bits == recorded
        # Greedy bits depend on the sign alone, so the margin is that of the logits before temperature.
        margin = scale.log_odds.abs()
        if reference is not None:
            row.logit_error = _error(scale.logits, reference[: len(scale.logits)])
            odds = reference[..., 1] - reference[..., 0]
            batch, weight = len(recorded), guidance[scale.index][0]
            guided = odds[:batch] if weight == 1 else weight * odds[:batch] + (1 - weight) * odds[batch:]
            margin = scale.on_grid(guided).abs()
        row.forced = _share(equal)
        row.forced_beyond_margin = _share(equal[margin > MARGIN])
        scale.bits = recorded

    latents = record.run(features, look)
    if "ref.edited_image_u8_bgr" in record.weights:
        picture = to_uint8(record.autoencoder.decode(latents)).permute(0, 2, 3, 1).flip(-1)
        levels = (picture.int() - record["ref.edited_image_u8_bgr"].int()).abs()
        result.errors["edited_image_levels"] = float(levels.max())
        result.errors["edited_image_unequal"] = _share(levels > 0)
        result.errors["edited_image_beyond_one"] = _share(levels > 1)


def _compare_free(record: Record, features: Tensor, result: Parity) -> None:
    counts = [0, 0]

    def look(scale: Scale, recorded: Tensor) -> None:
        equal = scale.bits == recorded
        result.scales[scale.index].free = _share(equal)
        counts[0] += int(equal.sum())
        counts[1] += equal.numel()

    record.run(features, look)
    result.free_bits = counts[0] / counts[1]


def _judge(result: Parity) -> None:
    limits = {
        "vae_features": FEATURES,
        "source_prefix": FEATURES,
        "tokenizer_features": FEATURES,
        "tokenizer_bits_wrong": 0.0,
        "tokenizer_image": HALF,
        "edited_image_levels": 2.0,
        "edited_image_unequal": ROUNDED,
        "edited_image_beyond_one": PICTURE,
    }
    for name, value in result.errors.items():
        if not value <= limits[name]:
            result.failures.append(f"{name} is off by {value:.2g} (allowed {limits[name]:g})")
    for index, row in enumerate(result.scales, start=1):
        if row.logit_error is not None and not row.logit_error <= LOGITS:
            result.failures.append(f"scale {index}: logits are off by {row.logit_error:.2g} (allowed {LOGITS:g})")
        if row.forced_beyond_margin < 1:
            result.failures.append(
                f"scale {index}: bits beyond the margin differ ({row.forced_beyond_margin:.4%} equal)"
            )
    if result.free_bits < FREE_BITS:
        result.failures.append(
            f"only {result.free_bits:.4%} of the free run's bits are equal (at least {FREE_BITS:.1%} needed)"
        )


def _share(equal: Tensor) -> float:
    return int(equal.sum()) / equal.numel() if equal.numel() else 1.0


def _error(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        raise WeightError(
            f"the record's shape {tuple(reference.shape)} differs from ours, {tuple(value.shape)}; it belongs to "
            "another network"
        )
    return (value.float() - reference.float()).abs().max().item()


def schedule_from(grids: Sequence[Sequence[int]], ratio: float) -> Schedule:
    """The schedule with these token grids ((height, width) or (time, height, width) rows)."""
    return Schedule(min(TABLES, key=lambda key: abs(key - ratio)), tuple((int(g[-2]), int(g[-1])) for g in grids))
