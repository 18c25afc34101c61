"""Weight files, LoRAs, tokenizers and configurations that are broken or mean harm, and what becomes of each.

Run as a program, `hostile_weights.py FOLDER`, it opens every one in every way under a limit on memory and time, and
prints {name: what happened} as JSON: "used", "refused: SENTENCE", or the name of any other exception.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
MEMORY, SECONDS = 3 << 29, 60
"""Beyond what the process has when it begins; and for one file, in all ways."""
STORAGE = ("storage", "torch FloatStorage", "0", "cpu", 4)


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def called(name: str, *parts: bytes) -> bytes:
    module, _, function = name.partition(" ")
    return f"c{module}\n{function}\n".encode() + b"(" + b"".join(parts) + b"tR"


def storage(kind: str = "torch FloatStorage", key: str = "0", count: int = 4) -> bytes:
    module, _, name = kind.partition(" ")
    return b"(" + text("storage") + f"c{module}\n{name}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(4,), stride=(1,), offset: int = 0, **stored) -> bytes:
    parts = storage(**stored), number(offset), sizes(*shape), sizes(*stride), b"\x89", called("collections OrderedDict")
    return called("torch._utils _rebuild_tensor_v2", *parts)


def dictionary(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def archive(program: bytes, compression: int = zipfile.ZIP_STORED, order: bytes = b"little") -> Callable[[Path], Path]:
    """A file as torch.save writes it around a pickle, with one storage of four numbers."""

    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.pth", "w") as file:
            file.writestr("a/data.pkl", b"\x80\2" + program + b".", compression)
            file.writestr("a/byteorder", order)
            file.writestr("a/version", b"3\n")
            file.writestr("a/data/0", struct.pack("<4f", 1, 2, 3, 4))
        return folder / "a.pth"

    return write


def shared(begin: bytes, twice: bytes, levels: int = 60) -> bytes:
    """Something that holds twice something that holds twice ..., on the stack and in the memo's first place."""
    program = begin + b"q\0"
    for _ in range(levels):
        program += twice + b"q\0"
    return program


def named(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def saved(content: object, **options) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content(), folder / "a.pth", **options)
        return folder / "a.pth"

    return write


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def old(*programs: bytes, rest: bytes = b"") -> Callable[[Path], Path]:
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    return named("a.pth", start + b"".join(b"\x80\2" + program + b"." for program in programs) + rest)


def of_no_end(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with open(folder / name, "wb") as file:
            file.truncate(1 << 40)
        return folder / name

    return write


def pickled_code(folder: Path) -> Path:
    return named("a.pth", pickle.dumps({"a": Payload()}))(folder)


def a_tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.pth", "w") as file:
        (folder / "pickle").write_bytes(pickle.dumps(Payload()))
        for name in ("pickle", "storages", "tensors", "sys_info"):
            file.add(folder / "pickle", name)
    return folder / "a.pth"


def a_script(folder: Path) -> Path:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / "a.pth"))
    return folder / "a.pth"


PICKLES: dict[str, Callable[[Path], Path]] = {
    "a list that inflates": archive(b"]" + b"N" * (300 << 20), zipfile.ZIP_DEFLATED),
    "a long list": archive(b"](" + b"]" * (12 << 20) + b"e"),
    "text that doubles": archive(
        dictionary(a=b"C\1a" + b"".join(b"q\0" + called("_codecs encode", b"h\0", text("hex")) for _ in range(45)))
    ),
    "bytes by their number": archive(dictionary(a=called("builtins bytearray", number(10**11)))),
    "a tensor by its number": archive(dictionary(a=called("torch Tensor", number(10**11)))),
    "a storage by its number": archive(dictionary(a=called("torch.storage UntypedStorage", number(10**11)))),
    "dictionaries shared 2^60 ways": archive(
        shared(dictionary(a=tensor()), b"}(" + text("a") + b"h\0" + text("b") + b"h\0u")
    ),
    "tuples shared 2^60 ways for a key": archive(shared(b")", b"h\0h\0\x86") + b"}h\0Ns"),
    "tuples shared 2^60 ways for a storage": archive(
        shared(b")", b"h\0h\0\x86") + dictionary(a=b"h\0Q")
    ),
    "lists shared 2^60 ways": archive(shared(b"]", b"](h\0h\0e") + dictionary(a=b"h\0")),
    "a dictionary in itself": archive(b"}q\0" + text("a") + b"h\0s" + text("b") + tensor() + b"s"),
    "dictionaries 10^5 deep": archive(b"".join(b"}" + text("a") for _ in range(10**5)) + tensor() + b"s" * 10**5),
    "a tensor 16 dictionaries deep": archive(b"".join(b"}" + text("a") for _ in range(20)) + tensor() + b"s" * 20),
    "strides of zero": archive(dictionary(a=tensor((10**9,), (0,)))),
    "strides below zero": archive(dictionary(a=tensor((4,), (-1,), 3))),
    "a shape below zero": archive(dictionary(a=tensor((-4,), (1,)))),
    "a shape that overflows": archive(dictionary(a=tensor((2**61, 2**61), (0, 0)))),
    "an empty shape that overflows": archive(dictionary(a=tensor((2**61, 0, 2**61), (0, 0, 0)))),
    "an offset beyond": archive(dictionary(a=tensor(offset=10**9))),
    "more strides than axes": archive(dictionary(a=tensor((4,), (1, 1)))),
    "a thousand axes": archive(dictionary(a=tensor((1,) * 1000, (1,) * 1000))),
    "a storage larger than the file": archive(dictionary(a=tensor((10**9,), count=10**9))),
    "a storage of another name": archive(dictionary(a=tensor(key="../../etc/passwd"))),
    "a thousand tensors of one storage": archive(dictionary(**{f"a{i}": tensor() for i in range(1000)})),
    "an index of the memo": archive(b"}r\xff\xff\xff\x7f"),
    "a memo that is not there": archive(b"h\7"), "an empty stack": archive(b"s"), "no mark": archive(b"t"),
    "an extension": archive(b"\x82\1"), "an old class": archive(b"(ios\nmkdir\n"), "no pickle": archive(b"\xff"),
    "another order of bytes": archive(dictionary(a=tensor()), order=b"big"),
    "code": archive(dictionary(a=called("posix mkdir", text("ran")))),
    "code by another name": archive(text("posix") + text("mkdir") + b"\x93(" + text("ran") + b"tR"),
    "code in an old pickle": pickled_code, "code in a tar": a_tar, "a script": a_script,
    "code in torch": archive(dictionary(a=called("torch.serialization load", text("x")))),
    "code as state": archive(called("collections OrderedDict") + called("posix mkdir", text("ran")) + b"b"),
    "a module": saved(lambda: torch.nn.Linear(2, 2)), "sparse": saved(lambda: {"a": torch.eye(2).to_sparse()}),
    "sparse rows": saved(lambda: {"a": torch.eye(2).to_sparse_csr()}),
    "nested": saved(lambda: {"a": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])}),
    "on no device": saved(lambda: {"a": torch.ones(2, device="meta")}),
    "nothing": saved(dict), "a number": saved(lambda: 3), "a list": saved(lambda: [torch.ones(2)]),
    "names that are none": saved(lambda: {("a", 1): torch.ones(2), 3: torch.ones(2), None: torch.ones(2)}),
    "a name twice": saved(lambda: {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}),
    "a name of a megabyte": saved(lambda: {"a" * (1 << 20): torch.ones(2)}),
    "terminal's codes for a name": saved(lambda: {"\x1b]0;owned\7\x1b[31m\r\n": torch.ones(2)}),
    "an old file with a large storage": old(dictionary(a=tensor(count=10**11)), pickle.dumps(["0"], 2)[2:-1]),
    "an old file that is cut": old(dictionary(a=tensor()), pickle.dumps(["0"], 2)[2:-1], rest=struct.pack("<q", 4)),
    "an old file with other keys": old(dictionary(a=tensor()), shared(b")", b"h\0h\0\x86") + b"](h\0e"),
    "an old file without end": old(b"X\xff\xff\xff\xff"), "a line without end": old(b"S" + b"a" * (40 << 20)),
    "zeros without end": of_no_end("a.pth"), "nothing at all": named("a.pth", b""),
    "half a zip": named("a.pth", b"PK\3\4"),
}  # fmt: skip


def header(facts: object, data: bytes = b"") -> Callable[[Path], Path]:
    encoded = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return named("a.safetensors", struct.pack("<Q", len(encoded)) + encoded + data)


def one(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8), name: str = "a", **more) -> dict:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


SAFETENSORS: dict[str, Callable[[Path], Path]] = {
    **{f"type {kind}": header(one(kind, (8,), (0, int(8 * size))), bytes(int(8 * size))) for kind, size in {
        "F4": 0.5, "F6_E2M3": 0.75, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8, "BOOL": 1,
        "I8": 1, "I64": 8, "BANANA": 1}.items()},
    "a shape below zero": header(one(shape=[-2]), bytes(8)), "a shape of text": header(one(shape="2"), bytes(8)),
    "a shape of 2^63": header(one(shape=[2**63, 0], offsets=(0, 0))),
    "a shape of 2^64": header(one(shape=[0, 2**64 - 1], offsets=(0, 0))),
    "an empty shape that overflows": header(one(shape=[0, 2**62, 2**62], offsets=(0, 0))),
    "a shape beyond numbers": header(one(shape=[10**400]), bytes(8)),
    "a thousand axes": header(one(shape=[1] * 1000, offsets=(0, 4)), bytes(4)),
    "offsets beyond": header(one(offsets=(0, 2**50)), bytes(8)),
    "offsets backwards": header(one(offsets=(8, 0)), bytes(8)),
    "a hole": header(one(offsets=(8, 16)), bytes(16)), "one after the other's begin": header(
        one() | one(name="b", offsets=(4, 12)), bytes(12)),
    "nested metadata": header(one(__metadata__={"a": {"b": "c"}}), bytes(8)),
    "metadata of numbers": header(one(__metadata__={"a": 3}), bytes(8)),
    "terminal's codes in metadata": header(one(__metadata__={"\x1b[31m": "\x1b]0;owned\7"}), bytes(8)),
    "terminal's codes for a name": header(one(name="\x1b]0;owned\7\x1b[31m\r\n"), bytes(8)),
    "a name of a megabyte": header(one(name="." * (1 << 20)), bytes(8)),
    "a header 10^5 deep": header(b"[" * 10**5), "a header that is none": header(b"null"), "no header": header(b""),
    "a header longer than the file": named("a.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "zeros without end": of_no_end("a.safetensors"),
    "200,000 tensors": header({f"t{i}": one(shape=[0], offsets=(0, 0))["a"] for i in range(200_000)}),
    "nothing at all": named("a.safetensors", b""),
}  # fmt: skip


def listed(*shards: object, whole: bytes | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        inside = folder / "inside"
        inside.mkdir()
        for place in (folder / "out.safetensors", inside / "in.safetensors"):
            save_file({"a": torch.ones(2)}, place)
        os.mkfifo(inside / "pipe.safetensors")
        names = [name.format(folder=folder) if isinstance(name, str) else name for name in shards]
        facts = {"weight_map": {f"a{i}" if i else "a": name for i, name in enumerate(names)}}
        (inside / "x.index.json").write_bytes(whole or json.dumps(facts).encode())
        return inside

    return write


INDEXES: dict[str, Callable[[Path], Path]] = {
    "a shard above": listed("../out.safetensors"), "a shard anywhere": listed("{folder}/out.safetensors"),
    "a shard above by another bar": listed("..\\out.safetensors"), "a drive": listed("C:out.safetensors"),
    "the folder": listed("."), "itself": listed("x.index.json"), "no name": listed(""), "a null": listed("a\0"),
    "a pipe for a shard": listed("pipe.safetensors"), "a number for a shard": listed(3), "a list": listed(["in"]),
    "a shard in a folder": listed("./in.safetensors"), "a shard that is not there": listed("other.safetensors"),
    "a list 10^5 deep": listed(whole=b"[" * 10**5), "no list": listed(whole=b"[]"), "a list of lists": listed(
        whole=b'{"weight_map": []}'), "no text": listed(whole=b"\xff\xfe"),
}  # fmt: skip


def special(kind: str, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as own:
                os.chdir(folder)
                own.bind(name)
        return path

    return write


SPECIAL = {
    f"{kind} named {name}": special(kind, name)
    for kind in ("pipe", "device", "loop", "socket", "missing")
    for name in ("a.safetensors", "a.pth", "a.index.json", "tokenizer.json", "spiece.model")
}
FILES = {
    **{f"pth, {name}": make for name, make in PICKLES.items()},
    **{f"safetensors, {name}": make for name, make in SAFETENSORS.items()},
    **{f"index, {name}": make for name, make in INDEXES.items()},
    **SPECIAL,
}


def ways(path: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """Every slot that takes a weight file."""
    from varedit_core import load_autoencoder, load_text_encoder, load_transformer
    from varedit_core.files.convert import convert
    from varedit_core.files.info import inspect
    from varedit_core.files.lora import read_lora
    from varedit_core.files.weights import open_weights
    from varedit_core.text.encoder import load_tokenizer

    return {
        "info": lambda: inspect(path),
        "read": lambda: [tensor.clone() for tensor in open_weights(path).values()],
        "transformer": lambda: load_transformer(path),
        "VAE": lambda: load_autoencoder(path),
        "text encoder": lambda: load_text_encoder(path, path),
        "tokenizer": lambda: load_tokenizer(path),
        "LoRA": lambda: read_lora(path),
        "convert": lambda: convert(path, folder / "converted.safetensors"),
    }


def outcome(use: Callable[[], object]) -> str:
    try:
        use()
    except (ValueError, FileNotFoundError) as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "used"


def main(folder: Path) -> None:
    results: dict[str, dict[str, str]] = {}

    def too_long(*_) -> None:
        raise TimeoutError("too long")

    signal.signal(signal.SIGALRM, too_long)
    ways(folder, folder)  # so that all is imported before memory is limited
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for number, (name, make) in enumerate(FILES.items()):
        inside = folder / str(number)
        inside.mkdir()
        os.chdir(inside)
        path = make(inside)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        room = os.stat(path).st_size if path.is_file() and name.endswith("without end") else 0
        resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY + room, hard))
        signal.alarm(SECONDS)
        results[name] = {way: outcome(use) for way, use in ways(path, inside).items()}
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        left = [one.name for one in inside.iterdir() if one.name in ("ran", "converted.safetensors")]
        results[name]["left"] = " ".join(left)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]))
