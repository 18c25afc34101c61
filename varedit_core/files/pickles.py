"""Tensors in PyTorch's own files (`.pth`), found without running them.

Such a file holds a pickle: a program, which may call anything and make things of any size. Here it is only read. A
small machine follows the instructions that `torch.save` writes for nested dictionaries of tensors, calls nothing, and
keeps of each tensor its type, shape and place in the file. Settings and counters beside them are passed over. Nothing
takes memory that the file's own size does not explain.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_READ = 16 << 20
"""Bytes of a file's list of tensors: that of a published checkpoint has less than one megabyte."""
MAX_STEPS = 1_000_000
"""Instructions of a pickle (a tensor takes about fifty), and entries of its dictionaries, which may share others."""
MAX_TENSORS, MAX_DEPTH, MAX_NAME, MAX_NUMBER = 100_000, 16, 1000, 1 << 62
MAX_SHARED = 4
"""How many times its file's size all tensors together may have: some share their numbers (a T5's tables)."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what files begin with that are no zip archives (before torch 1.6)
_DAMAGED = "is truncated or not a torch file ({}); download it again"
_MORE = (
    "is damaged or holds more than tensors, so it was not loaded ({}); download it again, or convert it to safetensors "
    "where you trust it"
)
_OLD = "was written by a very old PyTorch; save it again with a newer one"
_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_TYPES = {
    **{f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"{module} UntypedStorage": torch.uint8 for module in ("torch", "torch.storage")},
    **{f"torch {name}": one for name, one in vars(torch).items() if isinstance(one, torch.dtype)},
}
# What may be called beside tensors: its result is passed over.
_PASSED = {
    "collections Counter", "collections defaultdict", "builtins set", "__builtin__ set", "builtins complex",
    "builtins dict", "builtins list", "builtins int", "builtins float", "builtins str", "builtins bytearray",
    "_codecs encode", "torch device", "torch.Size", "argparse Namespace", "numpy dtype", "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
}  # fmt: skip
_TENSORS = {"torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"}
_PARAMETERS = {"torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"}
_CALLED = {"collections OrderedDict", "torch Size", "torch._tensor _rebuild_from_type_v2"} | _TENSORS | _PARAMETERS
_CLASSES = {"torch._tensor Tensor", "torch Tensor", "torch.nn.parameter Parameter"}  # named beside a tensor's parts
_OTHER = object()
"""Whatever is no tensor and no dictionary."""


_OF_DAMAGE = (
    struct.error, zipfile.BadZipFile, NotImplementedError, OSError, ValueError, IndexError, KeyError, TypeError,
)  # fmt: skip
"""What reading a damaged file raises; the third: an archive that names a newer format."""


class Unread(ValueError):
    """A file that cannot be used: what is said behind its name."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's type, shape, strides (in numbers), and the bytes of the file that it lies in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    key: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor by its storage: offset and strides in numbers of its type."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def find_tensors(path: Path) -> dict[str, Place]:
    """Where the tensors of a torch file lie, by dotted keys. Raises Unread."""
    try:
        with open(path, "rb") as file:
            tree, spans = _from_zip(file) if zipfile.is_zipfile(file) else _from_stream(file)
    except _OF_DAMAGE as error:
        if isinstance(error, Unread):
            raise
        raise Unread(_DAMAGED.format(type(error).__name__)) from error
    size = path.stat().st_size
    places = {key: _place(key, stored, spans) for key, stored in _flat(tree)}
    if sum(math.prod(place.shape) * place.dtype.itemsize for place in places.values()) > MAX_SHARED * size:
        raise Unread("has tensors that are larger together than the file; save it again without shared parts")
    return places


def map_tensors(path: Path, places: Mapping[str, Place]) -> Callable[[str], Tensor]:
    """Key -> tensor, read from the file when it is used."""
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def read(key: str) -> Tensor:
        place = places[key]
        if not math.prod(place.shape):
            return torch.empty(place.shape, dtype=place.dtype)
        part = data[place.begin : place.end]
        if place.begin % place.dtype.itemsize:
            part = part.clone()
        return part.view(place.dtype).as_strided(place.shape, place.stride)

    return read


class _Bounded:
    """A file of which at most MAX_READ bytes are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_READ
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        return self._counted(self._file.read, size)

    def readline(self) -> bytes:
        return self._counted(self._file.readline, -1)

    def _counted(self, read: Callable[[int], bytes], size: int) -> bytes:
        if size > self._left:
            raise Unread(_DAMAGED.format("its list of tensors is too long"))
        data = read(self._left + 1 if size < 0 else size)
        self._left -= len(data)
        if self._left < 0:
            raise Unread(_DAMAGED.format("its list of tensors is too long"))
        return data


def _from_zip(file: BinaryIO) -> tuple[object, dict[str, tuple[int, int]]]:
    """What the pickle of an archive holds, and where its storages lie: key -> (begin, end)."""
    end = file.seek(0, 2)
    with zipfile.ZipFile(_Bounded(file)) as archive:
        infos = archive.infolist()
    spans: dict[str, tuple[int, int]] = {}
    for info in infos:
        _, _, name = info.filename.partition("/")
        if name not in ("data.pkl", "byteorder") and not name.startswith("data/"):
            continue
        file.seek(info.header_offset)
        head = file.read(30)
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
        if head[:4] != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED or begin + info.file_size > end:
            raise Unread(_DAMAGED.format(f"{name} is compressed or lies outside"))
        spans[name.removeprefix("data/")] = begin, begin + info.file_size
    if "byteorder" in spans:
        file.seek(spans["byteorder"][0])
        if file.read(6) != b"little":
            raise Unread("was written on a machine with another order of bytes; convert it to safetensors there")
    file.seek(spans["data.pkl"][0])
    return _Machine().run(_Bounded(file)), spans


def _from_stream(file: BinaryIO) -> tuple[object, dict[str, tuple[int, int]]]:
    """The same of a file without an archive: pickles one after the other, then the storages with their lengths."""
    end, reader = file.seek(0, 2), _Bounded(file)
    file.seek(0)
    if (_Machine().run(reader), _Machine().run(reader)) != (_MAGIC, _PROTOCOL):
        raise Unread(_DAMAGED.format("it begins like none"))
    _Machine().run(reader)  # of the machine that wrote it
    machine = _Machine()
    tree, order = machine.run(reader), _Machine().run(reader)
    spans: dict[str, tuple[int, int]] = {}
    for key in order if isinstance(order, list) else []:
        (count,) = struct.unpack("<q", file.read(8))
        storage = machine.storages[key if isinstance(key, str) else ""]
        begin = file.tell()
        spans[key] = begin, begin + storage.nbytes
        if count * storage.dtype.itemsize != storage.nbytes or spans[key][1] > end:
            raise Unread(_DAMAGED.format("a tensor ends beyond it"))
        file.seek(spans[key][1])
    return tree, spans


class _Machine:
    """Follows a pickle's instructions on a stack, as Python's own reader does, and calls nothing.

    Dictionaries have names only for keys: to hash or to print what else may stand there can take for ever.
    """

    def __init__(self) -> None:
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, file: _Bounded) -> object:
        """What the pickle makes."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if count > MAX_STEPS:
                raise Unread(_DAMAGED.format("its list of tensors is too long"))
            if instruction.name == "STOP":
                break
            self.step(instruction.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name in _TAKEN:
            stack.append(tuple(self.last(_TAKEN[name])))
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            items = self.since_mark()
            stack.append(_paired(items) if name == "DICT" else tuple(items) if name == "TUPLE" else items)
        elif name in _ADDING:
            self.add(self.since_mark() if name.endswith("S") else self.last(_ADDING[name]))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ", 1) if name == "GLOBAL" else self.last(2)
            stack.append(_named(words))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_called(*self.last(2)))
        elif name == "BINPERSID":
            stack.append(self.stored(stack.pop()))
        elif name in ("BUILD", "POP"):  # the state of what was made, and what is not wanted
            stack.pop()
        elif name == "POP_MARK":
            self.since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise Unread(_MORE.format(f"a pickle's {name}"))

    def last(self, count: int) -> list:
        """Take that many things off the stack."""
        if len(self.stack) < count:
            raise IndexError(count)
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def since_mark(self) -> list:
        begin = self.marks.pop()
        taken = self.stack[begin:]
        del self.stack[begin:]
        return taken

    def add(self, items: list) -> None:
        """Put things into what then lies on top: pairs into a dictionary; nothing else is wanted but lists."""
        top = self.stack[-1]
        if isinstance(top, dict):
            top.update(_paired(items))
        elif isinstance(top, list):
            top.extend(items)

    def stored(self, told: object) -> _Storage:
        """What torch.save writes in a storage's place: ("storage", type, key, device, numbers[, part of another])."""
        if (
            not isinstance(told, tuple)
            or len(told) not in (5, 6)
            or told[0] != "storage"
            or told[5:] not in ((), (None,))
        ):
            raise Unread(_OLD)
        _, named, key, _, count, *_ = told
        dtype = _TYPES.get(named.name) if isinstance(named, _Global) else None
        if dtype is None or not isinstance(key, str) or not _is_size(count):
            raise Unread(_DAMAGED.format("a storage's type or size is none"))
        self.storages[key] = _Storage(dtype, key, count * dtype.itemsize)
        return self.storages[key]


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_MADE = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list,
}  # fmt: skip
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ADDING = {"APPEND": 1, "SETITEM": 2, "APPENDS": 0, "SETITEMS": 0, "ADDITEMS": 0}


def _paired(items: list) -> dict:
    """A dictionary of keys and values that follow each other."""
    return {key: value for key, value in zip(items[::2], items[1::2]) if isinstance(key, str | int)}


def _is_size(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < MAX_NUMBER


def _named(words: list) -> _Global:
    name = " ".join(word for word in words if isinstance(word, str) and len(word) < 100)
    if name not in _CALLED | _PASSED | _CLASSES and name not in _TYPES:
        raise Unread(_MORE.format(name))
    return _Global(name)


def _called(function: object, arguments: object) -> object:
    """What a call of torch.save's would make."""
    name = function.name if isinstance(function, _Global) else ""
    if name in _PASSED or name in _CLASSES or name in _TYPES:
        return _OTHER
    if name not in _CALLED or not isinstance(arguments, tuple):
        raise Unread(_MORE.format("a call of something unknown"))
    if name in _PARAMETERS or name == "torch Size":
        return arguments[0]
    if name == "torch._tensor _rebuild_from_type_v2":
        return _called(arguments[0], arguments[2])
    if name in _TENSORS:
        return _tensor(name, arguments)
    if arguments:  # pairs for an OrderedDict, as Python 2 wrote them
        raise Unread(_OLD)
    return {}


def _tensor(name: str, arguments: tuple) -> _Stored:
    storage, offset, shape, stride = arguments[:4]
    named = arguments[6] if name.endswith("v3") else None
    dtype = _TYPES.get(named.name) if isinstance(named, _Global) else getattr(storage, "dtype", None)
    if not isinstance(storage, _Storage) or dtype is None or not _are_sizes(shape, stride) or not _is_size(offset):
        raise Unread(_DAMAGED.format("a tensor's type or shape is none"))
    return _Stored(storage, offset, shape, stride, dtype)


def _are_sizes(*shapes: object) -> bool:
    """Whether these are sizes of at most 64 axes, which is what torch takes."""
    return all(isinstance(one, tuple) and len(one) <= 64 and all(map(_is_size, one)) for one in shapes)


def _flat(tree: object) -> Iterator[tuple[str, _Stored]]:
    """Tensors of nested dictionaries under dotted keys; everything else is left out."""
    seen: set[str] = set()
    waiting, entries = [("", 0, tree)], 0
    while waiting:
        name, depth, part = waiting.pop()
        if isinstance(part, _Stored):
            if name in seen:
                raise Unread(f"holds {name} twice; save it again with one of them")
            seen.add(name)
            yield name, part
        elif isinstance(part, dict):
            entries += len(part)
            if depth > MAX_DEPTH or entries > MAX_STEPS or len(seen) > MAX_TENSORS:
                raise Unread("holds dictionaries that are too many or too deep; save its tensors alone")
            inner = [(key, one) for key, one in part.items() if isinstance(one, dict | _Stored)]
            waiting.extend((_joined(name, key), depth + 1, one) for key, one in reversed(inner))


def _joined(name: str, key: str | int) -> str:
    text = key if isinstance(key, str) else str(key if _is_size(key) else "?")
    if len(name) + len(text) > MAX_NAME:
        raise Unread(f"has a name of more than {MAX_NAME} letters; save its tensors alone")
    return f"{name}.{text}" if name else text


def _place(key: str, stored: _Stored, spans: Mapping[str, tuple[int, int]]) -> Place:
    size = stored.dtype.itemsize
    begin, end = spans.get(stored.storage.key, (0, -1))
    count = math.prod(stored.shape)
    reach = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride)) + 1 if count else 0
    held = min(stored.storage.nbytes, end - begin)
    if len(stored.shape) != len(stored.stride) or reach * size > held or count * size > max(held, 0):
        raise Unread(f"has {key} larger than what the file holds of it; download it again, or save it contiguous")
    return Place(stored.dtype, stored.shape, stored.stride, begin + stored.offset * size, begin + reach * size)
