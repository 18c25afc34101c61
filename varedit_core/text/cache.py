"""Text features in files, so that a text that was encoded before needs no text encoder.

A folder has a safetensors file for each text, encoder and way to compute, of 4 bytes a number: tokens x channels
(2048 for flan-t5-xl), so 8 KiB a token. Its name is a hash; the text itself stands in none. Several processes may use a
folder, as each file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..defaults import TEXT_TOKENS
from ..files.safe_write import make_folder
from ..files.tensor_files import write_tensors
from ..files.weights import WeightError, Weights, check_finite, open_weights
from .encoder import Prompts, TextEncoder, blank_encoder, encoder_weights, load_text_encoder
from .tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

FORMAT, FEATURES = "varedit text features", "features"
MOST_BYTES = 256 << 20
"""Of the files of a folder: those that were used longest ago go."""
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_ENDS, _BETWEEN = 64, 16
"""Numbers at a tensor's ends and between them that tell its weights from others."""


@dataclass(frozen=True)
class FeatureFolder:
    """Features [L, channels] (fp32) by their keys. most: bytes of all files."""

    folder: Path
    most: int = MOST_BYTES

    def get(self, key: str) -> Tensor | None:
        """What was kept, None where there is nothing; a file that is damaged is told and counts as nothing."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            weights = open_weights(path)
            features = weights[FEATURES].clone()
            if features.ndim != 2 or weights.metadata != _facts(key, features):
                raise WeightError("it is not what was written")
            check_finite(weights, FEATURES, features)
        except (ValueError, KeyError, OSError):
            logger.warning("the file of text features %s is damaged and is made anew", path)
            return None
        with suppress(OSError):
            os.utime(path)
        return features

    def put(self, key: str, features: Tensor) -> None:
        """Keep features, and let the oldest go where they are too many. A folder that takes none is told."""
        kept = features.detach().float().cpu().contiguous()
        try:
            make_folder(self.folder)
            write_tensors(self._path(key), {FEATURES: kept}, _facts(key, kept))
            self._trim()
        except (OSError, ValueError) as error:
            logger.warning("the text features cannot be kept: %s", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _trim(self) -> None:
        """Take away the files of ours that were used longest ago, until the others are not too many."""
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process was faster
                if _NAME.fullmatch(path.name):
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= self.most:
                break
            path.unlink(missing_ok=True)
            left -= size


class CachedText:
    """In place of a `TextEncoder`: one that is loaded when first a text has no features in the folder.

    identity: of the encoder and of how it computes (see `identity`), without which other features would be taken.
    needed: bytes that it takes on the device. make_room: called with them before it is loaded.
    """

    def __init__(
        self, prompts: Prompts, identity: str, folder: FeatureFolder, load: Callable[[], TextEncoder], device,
        needed: int = 0,
    ) -> None:  # fmt: skip
        self.prompts, self.identity, self.folder, self._load = prompts, identity, folder, load
        self.device, self.needed, self.loaded = torch.device(device), needed, None
        self.make_room: Callable[[int], None] = lambda needed: None

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The encoder, where it is loaded."""
        return self.loaded.networks if self.loaded else ()

    def encode(self, prompts: Sequence[str], most: int = TEXT_TOKENS) -> list[Tensor]:
        """As of `TextEncoder`, and the same numbers."""
        return [self._features(ids) for ids in self.prompts.read(prompts, most)]

    def _features(self, ids: list[int]) -> Tensor:
        key = key_of(self.identity, ids)
        found = self.folder.get(key)
        if found is not None:
            return found.to(self.device)
        if self.loaded is None:
            self.make_room(self.needed)
            self.loaded = self._load()
        features = self.loaded.of_ids(ids)
        self.folder.put(key, features)
        return features

    def forget(self) -> None:
        """Give back what recorded passes hold."""
        if self.loaded:
            self.loaded.forget()

    def let_go(self) -> None:
        """Give back the encoder; it is loaded again for the next new text."""
        self.forget()
        self.loaded = None


def cached_text_encoder(
    path: str | Path, folder: str | Path, tokenizer: str | Path | None = None, dtype: torch.dtype = torch.float32,
    device="cpu",
) -> CachedText:  # fmt: skip
    """`load_text_encoder`, which is not done before a text has no features in a folder. WeightError as there, for what
    a file's header tells, and ValueError for a folder that is a file."""
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file; name a folder for text features")
    weights = encoder_weights(open_weights(path))
    blank = blank_encoder(Path(path), weights, dtype=dtype)
    prompts = Prompts(load_tokenizer(tokenizer or path), blank.config.vocabulary)
    own = identity(fingerprint(weights), blank.config, dtype, torch.device(device))
    return CachedText(
        prompts, own, FeatureFolder(Path(folder)), lambda: load_text_encoder(path, tokenizer, dtype, device), device,
        sum(weight.nbytes for weight in blank.parameters()),
    )  # fmt: skip


def fingerprint(weights: Weights) -> str:
    """What tells weights from others: names, shapes and types, and some numbers of each tensor, as all of a large file
    takes long to read."""
    found = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].detach().reshape(-1)
        step = max(1, tensor.numel() // _BETWEEN)
        parts = (tensor[:_ENDS], tensor[::step], tensor[-_ENDS:])
        found.update(f"{key} {tuple(weights.meta[key].shape)} {tensor.dtype} ".encode())
        for part in parts:
            found.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def identity(weights: str, config: object, dtype: torch.dtype | str, device: torch.device) -> str:
    """All but the text that features are made of: the encoder, and how and where it computes, as other devices and
    versions round differently. weights: their `fingerprint`."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{weights} {config} {dtype} {where} {torch.__version__}"


def key_of(identity: str, ids: Sequence[int]) -> str:
    """The name of a text's features, by its token ids."""
    return hashlib.sha256(f"{FORMAT} {identity} {list(ids)}".encode()).hexdigest()


def _facts(key: str, features: Tensor) -> dict[str, str]:
    """What a file says of itself."""
    bits = hashlib.sha256(features.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return {"format": FORMAT, "key": key, "digest": f"{features.dtype} {tuple(features.shape)} {bits}"}
