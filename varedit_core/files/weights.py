"""Weight files, opened without reading their tensors: safetensors, `.pth`, and models in several files.

Knows containers and bytes; what the tensors mean is the business of `checkpoints`. Pickled files are read, never run
(see `pickles`). What a file declares is held against its size before anything is made of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .pickles import MAX_NAME, MAX_TENSORS, Unread, find_tensors, map_tensors
from .places import is_optimisers, places, unwrapped
from .reading import check_file, printable, read_json
from .shards import INDEX, index_of, numbered

logger = logging.getLogger(__name__)

REOPEN_AFTER = 2 << 30
MAX_HEADER = 32 << 20
"""Bytes of a safetensors file's header: a published checkpoint's has less than one megabyte."""
SAFETENSORS = {".safetensors", ".sft"}
PICKLED = {".pth", ".pt", ".bin", ".ckpt"}
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in _NAMES.items() if hasattr(torch, dtype)
}
"""The types of a safetensors file that this version of torch has."""
Enough = Callable[[Iterable[str]], bool]
"""Whether tensors of these keys are all that is needed."""


class WeightError(ValueError):
    """A weight file that cannot be used; the message names the file, what it is and what to do.

    Names out of files stand in it, so it is made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


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

    meta: key -> empty tensor on the `meta` device with the stored shape and dtype. metadata: the file's own. place:
    the part of the file that they are, "" for the whole; others: parts that hold the same network (see `places`).
    """

    place: str = ""
    others: tuple[str, ...] = ()

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
        meta = {new: self.meta[old] for new, old in names.items()}
        return Weights(self.path, meta, lambda key: self[names[key]], self.metadata).of(self.place, self.others)

    def of(self, place: str, others: Sequence[str] = ()) -> Weights:
        """The same, named as a part of the file."""
        self.place, self.others = place, tuple(others)
        return self


def open_weights(path: str | Path, enough: Enough = lambda keys: False) -> Weights:
    """Open a weight file, or a model in several files by its folder, its index or any one of them (see `shards`).

    FILE:PART is what a file holds below the name PART. enough: asked where one of numbered files is not there, whether
    the keys of those before it are all that is needed. Raises WeightError (missing, truncated, unsafe, unknown format).
    """
    file, _, part = str(path).rpartition(":")
    if part and os.path.exists(file) and not os.path.exists(path):
        return _below(open_weights(file, enough), part)
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, enough)
    try:
        check_file(path, "weight file", WeightError)
    except FileNotFoundError:
        raise WeightError(f"{path} does not exist; check the path or download the file first") from None
    index = path if path.name.endswith(INDEX) else index_of(path)
    return _open_index(index) if index else _open_numbered(path, enough)


def _open_file(path: Path) -> Weights:
    """A file that holds tensors itself."""
    if path.suffix in SAFETENSORS:
        return _open_safetensors(path)
    if path.suffix in PICKLED:
        return _open_pickled(path)
    raise WeightError(
        f"{path} is not a weight file; expected .safetensors, {', '.join(sorted(PICKLED))} or a folder with an index"
    )


def _open_safetensors(path: Path) -> Weights:
    meta = {}
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > min(MAX_HEADER, path.stat().st_size):
                raise WeightError(
                    f"{path} is truncated or not a safetensors file (its header is too long); download or convert it "
                    "again"
                )
        handle = safe_open(path, framework="pt")
        for key in handle.keys()[: MAX_TENSORS + 1]:
            part = handle.get_slice(key)
            meta[key] = _empty(path, key, part.get_shape(), DTYPES.get(part.get_dtype(), part.get_dtype()))
    except MemoryError as error:
        raise _unmapped(path) from error
    except (SafetensorError, OSError) as error:
        raise WeightError(
            f"{path} is truncated or not a safetensors file ({error}); download or convert it again"
        ) from error
    if len(meta) > MAX_TENSORS:
        raise WeightError(f"{path} has more than {MAX_TENSORS} tensors; save it with fewer")
    return Weights(path, meta, _Mapped(lambda: safe_open(path, framework="pt").get_tensor), handle.metadata())


def _open_pickled(path: Path) -> Weights:
    try:
        places = find_tensors(path)
    except Unread as error:
        raise WeightError(f"{path} {error}") from error
    if not places:
        raise WeightError(f"{path} holds no tensors; expected a state dict")
    meta = {key: _empty(path, key, place.shape, place.dtype) for key, place in places.items()}
    try:
        return Weights(path, meta, _Mapped(lambda: map_tensors(path, places)))
    except RuntimeError as error:
        raise _unmapped(path) from error


def _unmapped(path: Path) -> WeightError:
    return WeightError(f"{path} does not fit into the memory that this process may map; raise that limit (ulimit -v)")


def _empty(path: Path, key: str, shape, dtype: torch.dtype | str) -> Tensor:
    """A tensor without numbers. WeightError where torch has no such type or shape, or the name is no name."""
    if len(key) > MAX_NAME:
        raise WeightError(f"{path} has {key}, a name of {len(key)} letters; save it with shorter names")
    if isinstance(dtype, str):
        raise WeightError(f"{path} has {key} of the type {dtype}, which this PyTorch does not read; convert the file")
    try:
        return torch.empty(shape, dtype=dtype, device="meta")
    except (RuntimeError, TypeError) as error:
        raise WeightError(
            f"{path} has {key} of the shape {list(shape)}, which no tensor has; download it again"
        ) from error


def _open_folder(path: Path, enough: Enough) -> Weights:
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise WeightError(f"{path} cannot be read ({error.strerror}); change its permissions") from error
    index = next((file for file in files if file.name.endswith(INDEX)), None)
    if index:
        return open_weights(index)
    found = [file for file in files if file.suffix in SAFETENSORS] or [file for file in files if file.suffix in PICKLED]
    if found and set(found) <= set(numbered(found[0])) and not found[0].is_dir():
        return open_weights(found[0], enough)
    names = ", ".join(file.name for file in found) or "no weight file"
    raise WeightError(f"{path} holds {names} and no *.index.json; name the file, or put the index beside the shards")


def _open_index(path: Path) -> Weights:
    listed = read_json(path, "shard index", WeightError)
    shard_of = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise WeightError(f"{path} is not a shard index (no readable weight_map); download it again")
    names = sorted(set(shard_of.values()))
    for name in names:
        _check_shard(path, name)
    shards = {name: _open_file(path.parent / name) for name in names}
    absent = sorted(key for key, name in shard_of.items() if key not in shards[name])
    if absent:
        raise WeightError(
            f"{path.parent / shard_of[absent[0]]} lacks the tensor {absent[0]} that {path.name} lists; download the "
            "shard again"
        )
    unlisted = sorted(key for shard in shards.values() for key in shard if key not in shard_of)
    if unlisted:
        logger.warning(
            "%s does not list %d tensors of its shards, such as %s; they are left out", path, len(unlisted),
            printable(unlisted[0]),
        )  # fmt: skip
    return _joined(path.parent, shards, shard_of)


def _open_numbered(path: Path, enough: Enough) -> Weights:
    """A file that holds tensors, or all files that its number makes it one of; the first of them, if they are
    enough."""
    files = numbered(path)
    if len(files) == 1:
        return _open_file(path)
    shards, shard_of = {}, {}
    for file in files:
        try:
            shards[file.name] = _open_file(check_file(file, "shard", WeightError))
        except FileNotFoundError:
            if enough(shard_of):
                break
            raise WeightError(
                f"{path.parent} lacks {file.name}, without which {path.name} is not whole; download it into that folder"
            ) from None
        for key in shards[file.name]:
            if key in shard_of:
                raise WeightError(
                    f"{path.parent} has {key} twice, in {shard_of[key]} and {file.name}; download both again"
                )
            shard_of[key] = file.name
    return _joined(path, shards, shard_of)


def _joined(path: Path, shards: Mapping[str, Weights], shard_of: Mapping[str, str]) -> Weights:
    """The tensors of several files as those of one. shard_of: key -> name of its file."""
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return Weights(
        path,
        {key: shards[name].meta[key] for key, name in shard_of.items()},
        lambda key: shards[shard_of[key]][key],
        metadata,
    )


def _check_shard(index: Path, name: str) -> None:
    """WeightError unless an index's name of a shard is that of a file beside it: an index comes from anywhere, and its
    names may lead to any place."""
    if any(name in ("", ".", "..") or kind(name).name != name for kind in (PurePosixPath, PureWindowsPath)):
        raise WeightError(
            f"{index} names the shard {name}, which is not the name of a file beside it; correct the index"
        )
    try:
        check_file(index.parent / name, "shard", WeightError)
    except FileNotFoundError:
        raise WeightError(
            f"{index.parent} lacks the shard {name} that {index.name} names; download it into that folder"
        ) from None


def check_finite(weights: Weights, key: str, tensor: Tensor) -> None:
    """WeightError where a tensor made of `key` has infinite or undefined numbers."""
    if not tensor.is_floating_point():
        return
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # Sums of finite numbers are nearly always finite, and take no memory.
    if not (numbers.sum(dtype=torch.float32).isfinite() or numbers.isfinite().all()):
        raise WeightError(f"{weights.path} has infinite or undefined numbers in {key}; download it again")


def under(weights: Weights, marker: str) -> Weights | None:
    """The tensors of the part of a file (see `places`) that has one whose key ends in the regular expression `marker`;
    None without one. Their keys are those in that part."""
    names = {key: unwrapped(key) for key in weights if not is_optimisers(key)}
    found = places(names.values(), marker)
    if not found:
        return None
    place, *others = found
    prefix = f"{place}." if place else ""
    copies = tuple(f"{other}." for other in others if other.startswith(prefix))
    taken: dict[str, str] = {}
    for key, name in names.items():
        if (
            name.startswith(prefix)
            and not name.startswith(copies)
            and taken.setdefault(name[len(prefix) :], key) != key
        ):
            first = taken[name[len(prefix) :]]
            raise WeightError(f"{weights.path} has {name} twice, as {first} and {key}; save it again with one of them")
    place, *others = (".".join(filter(None, (weights.place, one))) for one in found)
    return weights.renamed(taken).of(place, others)


def _below(weights: Weights, part: str) -> Weights:
    """What a file holds below a name. WeightError where there is nothing, or an optimiser's state."""
    prefix = f"{part}."
    names = {key[len(prefix) :]: key for key in weights if key.startswith(prefix)}
    if is_optimisers(part):
        raise WeightError(f"{weights.path}:{part} is the state of an optimiser; name a part that holds weights")
    if not names:
        known = ", ".join(sorted({key.rpartition(".")[0] for key in weights}, key=len)[:3])
        raise WeightError(f"{weights.path} holds nothing under {part}; name one of its parts, such as {known}")
    return weights.renamed(names).of(part)
