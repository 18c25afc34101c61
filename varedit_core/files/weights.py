"""Weight files, opened without reading their tensors: safetensors, `.pth`, and sharded folders with an index.

Knows containers and bytes; what the tensors mean is the business of `checkpoints`. Pickled files are only
ever read with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

REOPEN_AFTER = 2 << 30
SAFETENSORS = {".safetensors", ".sft"}
PICKLED = {".pth", ".pt", ".bin", ".ckpt"}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class WeightError(ValueError):
    """A weight file that cannot be used; the message names the file, what it is and what to do."""


class _Mapped:
    """Reads tensors of a mapped file, opening it anew every 2 GB so that the pages read leave the process."""

    def __init__(self, opened: Callable[[], Callable[[str], Tensor]]) -> None:
        self._opened, self._get, self._read = opened, opened(), 0

    def __call__(self, key: str) -> Tensor:
        if self._read > REOPEN_AFTER:
            self._get, self._read = self._opened(), 0
        tensor = self._get(key)
        self._read += tensor.nbytes
        return tensor


class Weights(Mapping[str, Tensor]):
    """Tensors of one file or folder by key; each is read when asked for.

    meta: key -> empty tensor on the `meta` device with the stored shape and dtype. metadata: the file's own.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Tensor],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.meta, self.metadata, self._read = path, dict(meta), dict(metadata or {}), read

    def __getitem__(self, key: str) -> Tensor:
        return self._read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.meta

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self.meta.items()}

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The same tensors under new keys (new -> old); keys not named are left out."""
        return Weights(
            self.path, {new: self.meta[old] for new, old in names.items()}, lambda key: self[names[key]], self.metadata
        )


def open_weights(path: str | Path) -> Weights:
    """Open a weight file or sharded folder. Raises WeightError (missing, truncated, unsafe, unknown format)."""
    path = Path(path)
    if not path.exists():
        raise WeightError(f"{path} does not exist; check the path or download the file first")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in SAFETENSORS:
        return _open_safetensors(path)
    if path.suffix in PICKLED:
        return _open_pickled(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    raise WeightError(
        f"{path} is not a weight file; expected .safetensors, {', '.join(sorted(PICKLED))} or a folder with an index"
    )


def _open_safetensors(path: Path) -> Weights:
    try:
        handle = safe_open(path, framework="pt")
        meta = {}
        for key in handle.keys():
            part = handle.get_slice(key)
            meta[key] = torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
    except (SafetensorError, OSError) as error:
        raise WeightError(
            f"{path} is truncated or not a safetensors file ({error}); download or convert it again"
        ) from error
    return Weights(path, meta, _Mapped(lambda: safe_open(path, framework="pt").get_tensor), handle.metadata())


def _open_pickled(path: Path) -> Weights:
    tensors, mapped = _unpickle(path)
    if not tensors:
        raise WeightError(f"{path} holds no tensors; expected a state dict")
    meta = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    return Weights(path, meta, _Mapped(lambda: _unpickle(path)[0].__getitem__) if mapped else tensors.__getitem__)


def _unpickle(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Tensors of a torch file, and whether they are mapped (files older than torch 1.6 are no zip archives)."""
    mapped = zipfile.is_zipfile(path)
    try:
        return _flat(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)), mapped
    except pickle.UnpicklingError as error:
        raise WeightError(
            f"{path} is damaged or holds more than tensors, so it was not loaded; download it again, or convert it to "
            "safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise WeightError(
            f"{path} is truncated or not a torch file ({type(error).__name__}); download it again"
        ) from error


def _flat(tree: object, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of nested dicts under dotted keys; everything else (counters, settings) is left out."""
    if isinstance(tree, Tensor):
        return {prefix[:-1]: tree}
    if not isinstance(tree, Mapping):
        return {}
    return {key: tensor for name, part in tree.items() for key, tensor in _flat(part, f"{prefix}{name}.").items()}


def _open_folder(path: Path) -> Weights:
    indices = sorted(path.glob("*.index.json"))
    if indices:
        return _open_index(indices[0])
    files = sorted(p for p in path.iterdir() if p.suffix in SAFETENSORS) or sorted(
        p for p in path.iterdir() if p.suffix in PICKLED
    )
    if len(files) == 1:
        return open_weights(files[0])
    found = ", ".join(p.name for p in files) or "no weight file"
    raise WeightError(f"{path} holds {found} and no *.index.json; name the file, or put the index beside the shards")


def _open_index(path: Path) -> Weights:
    try:
        shard_of = json.loads(path.read_text())["weight_map"]
        names = {str(shard) for shard in shard_of.values()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{path} is not a shard index (no readable weight_map); download it again") from error
    missing = sorted(name for name in names if not (path.parent / name).is_file())
    if missing:
        raise WeightError(
            f"{path.parent} lacks the shard {missing[0]} that {path.name} names; download it into that folder"
        )
    shards = {name: open_weights(path.parent / name) for name in names}
    absent = sorted(key for key, name in shard_of.items() if key not in shards[name])
    if absent:
        raise WeightError(
            f"{path.parent / shard_of[absent[0]]} lacks the tensor {absent[0]} that {path.name} lists; download the "
            "shard again"
        )
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return Weights(
        path.parent,
        {key: shards[name].meta[key] for key, name in shard_of.items()},
        lambda key: shards[shard_of[key]][key],
        metadata,
    )


def under(weights: Weights, marker: str) -> Weights | None:
    """The tensors below a prefix in front of a key that ends in the regular expression `marker`; None without one.

    Of several prefixes the shortest counts, and averaged weights (`ema`) only where there are no others.
    """
    pattern = re.compile(rf"(?:^|(?<=\.)){marker}$")
    prefixes = [key[: match.start()] for key in weights for match in [pattern.search(key)] if match]
    if not prefixes:
        return None
    prefix = min(prefixes, key=lambda name: (bool(re.search(r"(^|[._])ema[._]", name)), len(name)))
    return weights.renamed({key[len(prefix) :]: key for key in weights if key.startswith(prefix)})
