"""Every writer of files, from one list: whole or not at all, whatever fails and whoever writes the same name."""

from __future__ import annotations

import ast
import errno
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support import ROOT

from varedit_core.files import safe_write as writing
from varedit_core.files.convert import convert
from varedit_core.files.lora import merge_lora
from varedit_core.files.safe_write import check_target, safe_write, together, write_bytes, write_json, write_text
from varedit_core.files.tokens import save_tokens
from varedit_core.model.config import AutoencoderConfig
from varedit_core.pictures.images import save_image
from varedit_core.sampling.tokens import Tokens
from varedit_core.text.t5 import T5Config, T5Encoder
from varedit_core.tokenizer.schedule import schedule_for
from varedit_core.tokenizer.vae import Autoencoder
from varedit_core.training import run, tasks
from varedit_core.training.lora import save_lora
from varedit_core.training.report import METRICS, Report
from varedit_core.training.words import make_vocabulary

resource = pytest.importorskip("resource", reason="a full disk is simulated by a limit on files")


@dataclass(frozen=True)
class Writer:
    """write(folder, n, **overwrite) makes version n of `file`. choice: whether it takes `overwrite`."""

    file: str
    write: Callable
    choice: bool = False


def picture(n: int) -> Image.Image:
    return Image.effect_noise((40, 30), 20 + 60 * n).convert("RGB")


PICTURES = {n: picture(n) for n in (1, 2)}


def tokens(n: int) -> Tokens:
    schedule = schedule_for("0.06M")
    bits = [
        torch.rand(1, 16, 2 * h, 2 * w, generator=torch.Generator().manual_seed(n)) > 0.5 for h, w in schedule.grids
    ]
    return Tokens(schedule, tuple(bits), (32, 32))


def small_vae(folder: Path, n: int) -> Path:
    """A source for `convert`, apart from what it writes."""
    torch.manual_seed(n)
    path = folder.parent / f"vae-{n}.safetensors"
    save_file(Autoencoder(AutoencoderConfig(14, 32, (32,) * 4, (32,) * 4, 1, 1, 8)).state_dict(), path)
    return path


def lora_state(n: int) -> dict[str, torch.Tensor]:
    key = "diffusion_model.blocks.0.ffn.fc1"
    return {f"{key}.lora_A.weight": torch.full((2, 64), float(n)), f"{key}.lora_B.weight": torch.ones(128, 2)}


def merge(folder: Path, n: int, overwrite: bool = True) -> None:
    parts = folder.parent / f"merge-{n}"
    if not parts.exists():
        config = AutoencoderConfig(14, 32, (32,) * 4, (32,) * 4, 1, 1, 8)
        parts.mkdir()
        network = tasks.new_transformer(tasks.NewTransformer(1, 64, 1, 128, 7), config, 128, 64, 0)
        save_file(network.state_dict(), parts / "t.safetensors")
        save_lora(parts / "l.safetensors", lora_state(n))
    merge_lora(parts / "t.safetensors", parts / "l.safetensors", folder / "merged.safetensors", overwrite=overwrite)


def text_encoder(folder: Path, n: int) -> None:
    torch.manual_seed(n)
    beside = folder.parent / f"words-{n}"
    beside.mkdir(exist_ok=True)
    (beside / "tokenizer.json").write_text(json.dumps(["word"] * 9 * n))
    tasks.save_text(folder, T5Encoder(T5Config(20 * n, 64, 32, 64, 1, 2, True, 16, 64)), beside)


def stage(n: int):
    return tasks.Stage(
        "a", "transformer", steps=10 + n, batch=1, autoencoder="x", text_encoder="y", log_every=1, precision="fp32"
    )


def report(folder: Path, n: int) -> None:
    """Figures of a training that goes on, and their picture."""
    if not (folder / METRICS).exists():
        lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 9)]
        (folder / METRICS).write_text("".join(lines) + '{"st')
    made = Report(folder, stage(n), 8 - n, True)
    made.board = None  # TensorBoard's file has a name of its own
    made.close()


def image_writer(suffix: str) -> Writer:
    def write(folder, n, overwrite=True):
        save_image(PICTURES[n], folder / f"a{suffix}", overwrite)

    return Writer(f"a{suffix}", write, True)


def tensor_state(folder: Path, n: int) -> None:
    tasks._save(
        folder / "t.safetensors",
        {"x": torch.full((9,), float(n))},
        tasks.TRANSFORMER,
        SimpleNamespace(is_main_process=True),
    )


WRITERS = {
    **{suffix: image_writer(suffix) for suffix in (".png", ".webp", ".jpg")},
    "tokens": Writer(
        "t.safetensors", lambda f, n, overwrite=True: save_tokens(tokens(n), f / "t.safetensors", overwrite), True
    ),
    "Tokens.save": Writer(
        "t.safetensors", lambda f, n, overwrite=True: tokens(n).save(f / "t.safetensors", overwrite), True
    ),
    "convert": Writer(
        "c.safetensors",
        lambda f, n, overwrite=True: convert(small_vae(f, n), f / "c.safetensors", overwrite=overwrite),
        True,
    ),
    "merge": Writer("merged.safetensors", merge, True),
    "LoRA": Writer(
        "l.safetensors",
        lambda f, n, overwrite=True: save_lora(f / "l.safetensors", lora_state(n), overwrite=overwrite),
        True,
    ),
    "trained weights": Writer("t.safetensors", tensor_state),
    "text encoder": Writer("model.safetensors", text_encoder),
    "text encoder's sizes": Writer("config.json", text_encoder),
    "text encoder's words": Writer("tokenizer.json", text_encoder),
    "vocabulary": Writer("v.json", lambda f, n: make_vocabulary(f / "v.json", 150 + 50 * n)),
    "settings": Writer("settings.json", lambda f, n: run._remember(f, stage(n))),
    "figures": Writer(METRICS, report),
    "picture of the loss": Writer("loss.png", report),
    "pictures of a training": Writer(
        "g.png", lambda f, n: tasks.save_grid(f / "g.png", [torch.full((1, 3, 30, 40), n / 3)])
    ),
    "bytes": Writer("b", lambda f, n, overwrite=True: write_bytes(f / "b", bytes([n]) * 50, overwrite), True),
    "JSON": Writer(
        "j.json", lambda f, n, overwrite=True: write_json(f / "j.json", [n] * 50, overwrite=overwrite), True
    ),
    "text": Writer("t.txt", lambda f, n, overwrite=True: write_text(f / "t.txt", f"{n} " * 50, overwrite), True),
}
CHOOSING = [name for name, writer in WRITERS.items() if writer.choice]


def content(path: Path) -> object:
    """What a file holds: safetensors write their metadata in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key).tolist() for key in sorted(file.keys())}, file.metadata()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("events.")}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> Callable[[str, int], object]:
    """What a writer writes when it is alone."""
    known: dict[tuple[str, int], object] = {}

    def make(name: str, n: int) -> object:
        if (name, n) not in known:
            folder = tmp_path_factory.mktemp("alone") / "folder"
            folder.mkdir()
            WRITERS[name].write(folder, n)
            known[name, n] = content(folder / WRITERS[name].file)
        return known[name, n]

    return make


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sources of a writer may lie beside it."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def before_publishing(monkeypatch, file: str, do: Callable[[], None]) -> None:
    """Do something once, when a file of this name is whole under its temporary name."""
    true, done = writing._publish, []

    def publish(temporary, target, overwrite):
        if target.name == file and not done:
            done.append(1)
            do()
        true(temporary, target, overwrite)

    monkeypatch.setattr(writing, "_publish", publish)


@pytest.mark.parametrize("name", WRITERS)
def test_two_writers_of_one_name_do_not_meet(folder, monkeypatch, wanted, name):
    writer = WRITERS[name]
    assert wanted(name, 1) != wanted(name, 2)
    between = []

    def second() -> None:
        writer.write(folder, 2)
        between.append(content(folder / writer.file))

    before_publishing(monkeypatch, writer.file, second)
    writer.write(folder, 1)
    assert between == [wanted(name, 2)], "whole, while the other is half way"
    assert content(folder / writer.file) == wanted(name, 1), "the last one wins"
    assert not [path for path in names(folder) if path.startswith(".")]


@pytest.mark.parametrize("name", CHOOSING)
def test_without_overwrite_the_first_one_wins(folder, monkeypatch, wanted, name):
    writer = WRITERS[name]
    before_publishing(monkeypatch, writer.file, lambda: writer.write(folder, 2, overwrite=False))
    with pytest.raises(FileExistsError, match="exists; choose another name or allow overwriting"):
        writer.write(folder, 1, overwrite=False)
    assert content(folder / writer.file) == wanted(name, 2) and names(folder) == {writer.file}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_nothing_behind_and_the_old_file_as_it_was(folder, monkeypatch, wanted, name):
    writer = WRITERS[name]
    writer.write(folder, 1)
    old, first = names(folder), wanted(name, 1)
    true = writing._made

    def filled(temporary, path):
        mode = true(temporary, path)
        if path.name == writer.file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return mode

    monkeypatch.setattr(writing, "_made", filled)
    named = rf"cannot write .*{re.escape(writer.file)} .*; make room, or choose another place$"
    with full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[0]), pytest.raises(OSError, match=named):
        writer.write(folder, 2)
    assert content(folder / writer.file) == first and names(folder) == old
    monkeypatch.setattr(writing, "_made", true)

    def interrupt():
        raise KeyboardInterrupt

    before_publishing(monkeypatch, writer.file, interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write(folder, 2)
    assert content(folder / writer.file) == first and names(folder) == old
    writer.write(folder, 2)
    assert content(folder / writer.file) == wanted(name, 2), "afterwards it writes again"


@pytest.mark.parametrize("name", WRITERS)
def test_files_have_the_mode_of_new_ones(folder, name):
    before = os.umask(0o027)
    try:
        WRITERS[name].write(folder, 1)
    finally:
        os.umask(before)
    assert (folder / WRITERS[name].file).stat().st_mode & 0o777 == 0o640


def test_the_temporary_name_is_of_one_call_and_beside_the_file(tmp_path):
    with safe_write(tmp_path / "a") as first, safe_write(tmp_path / "a") as second:
        assert first != second and first.parent == second.parent == tmp_path
        assert names(tmp_path) == {first.name, second.name}
    long = "n" * 255
    write_text(tmp_path / long, "a file of the longest name")
    assert names(tmp_path) == {"a", long}


def test_links_are_followed_and_devices_are_never_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_text(tmp_path / "link", "one")
    write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "two"
    (tmp_path / "null").symlink_to(os.devnull)
    write_text(tmp_path / "null", "nothing")
    assert (tmp_path / "null").is_char_device() and (tmp_path / "null").is_symlink()


def test_a_pipe_of_the_shell_is_written_to():
    """As in `--json >(COMMAND)`: it has no name that could be replaced, and a reader."""
    reader, writer = os.pipe()
    try:
        check_target(f"/dev/fd/{writer}")
        write_text(f"/dev/fd/{writer}", "through")
        assert os.read(reader, 99) == b"through"
    finally:
        os.close(reader)
        os.close(writer)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


UNFIT = {
    "pipe": (pipe, "is a pipe; name a file"),
    "link to a pipe": (link_to_a_pipe, "is a pipe; name a file"),
    "link to itself": (link_to_itself, r"cannot write .*symbolic links\); choose another place"),
    "folder": (Path.mkdir, "is a folder; name a file in it"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("ask", [check_target, lambda path: write_text(path, "x")])
def test_what_cannot_be_replaced_is_a_sentence_before_anything_is_written(tmp_path, name, ask):
    make, sentence = UNFIT[name]
    make(tmp_path / "a")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        ask(tmp_path / "a")
    assert names(tmp_path) == before


def protected(monkeypatch, path: Path) -> str:
    true = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != path and true(p, mode))
    return "may not be written; change its permissions, or choose another name"


def mounted(monkeypatch, path: Path) -> str:
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p) == path)
    return "cannot be replaced: something is mounted there"


def of_another_user(monkeypatch, path: Path) -> str:
    path.parent.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    return "cannot be replaced: it belongs to another user"


@pytest.mark.parametrize("guard", [protected, mounted, of_another_user])
def test_a_file_that_is_protected_is_never_replaced(folder, monkeypatch, guard):
    write_text(folder / "a", "old")
    sentence = guard(monkeypatch, folder / "a")
    for ask in (check_target, lambda path: write_text(path, "new")):
        with pytest.raises(ValueError, match=sentence):
            ask(folder / "a")
    assert (folder / "a").read_text() == "old" and names(folder) == {"a"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755, 0o444])
@pytest.mark.parametrize("name", CHOOSING)
def test_the_mode_of_a_file_is_kept(folder, name, mode):
    if mode == 0o444 and os.geteuid():
        pytest.skip("others than root may not replace it")
    WRITERS[name].write(folder, 1)
    (folder / WRITERS[name].file).chmod(mode)
    WRITERS[name].write(folder, 2, overwrite=True)
    assert (folder / WRITERS[name].file).stat().st_mode & 0o777 == mode


def test_a_file_for_few_eyes_is_for_few_while_it_is_written(tmp_path):
    write_text(tmp_path / "a", "old")
    (tmp_path / "a").chmod(0o600)
    with safe_write(tmp_path / "a") as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
        temporary.write_text("new")


def without_links(monkeypatch) -> None:
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "Device or resource busy"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", range(4))
def test_files_of_one_command_are_all_new_or_all_old(folder, monkeypatch, failing, error, links):
    if not links:
        without_links(monkeypatch)
    for n in (0, 2):
        write_text(folder / f"{n}", f"old {n}")
    true = writing._publish

    def publish(temporary, target, overwrite):
        if target.name == str(failing):
            raise error
        true(temporary, target, overwrite)

    monkeypatch.setattr(writing, "_publish", publish)
    with pytest.raises(type(error)) as stop, together() as write:
        for n in range(4):
            write(folder / f"{n}", b"new", True)
    if isinstance(error, OSError):
        assert (
            str(stop.value) == f"cannot write {folder / str(failing)} (Device or resource busy); choose another place"
        )
    assert names(folder) == {"0", "2"} and all((folder / f"{n}").read_text() == f"old {n}" for n in (0, 2))
    monkeypatch.setattr(writing, "_publish", true)
    with together() as write:
        for n in range(4):
            write(folder / f"{n}", b"newer", True)
            write(folder / f"{n}", b"new", True)
    assert names(folder) == set("0123") and all((folder / name).read_bytes() == b"new" for name in "0123")


def test_another_writers_file_is_not_undone(folder):
    """One that was faster, of a set that is not to replace anything."""
    with pytest.raises(FileExistsError, match="exists; choose another name"), together() as write:
        for name in "ab":
            write(folder / name, b"ours", False)
        (folder / "b").write_bytes(b"theirs")
    assert names(folder) == {"b"} and (folder / "b").read_bytes() == b"theirs"


def test_a_folder_that_is_none_is_named_by_the_files_own_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="none/a.txt"):
        write_text(tmp_path / "none" / "a.txt", "x")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        write_text(tmp_path, "x")


def _write_many(path: Path, letter: str) -> None:
    for _ in range(150):
        write_text(path, letter * 200_000)


def test_two_processes_write_one_name_and_a_reader_sees_only_whole_files(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "a" * 200_000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, letter)) for letter in "ab"]
    for one in writers:
        one.start()
    seen = set()
    while any(one.is_alive() for one in writers):
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1
        seen.add(text[0])
    for one in writers:
        one.join()
    assert [one.exitcode for one in writers] == [0, 0] and seen <= {"a", "b"} and names(tmp_path) == {"a.txt"}


def _never_done(path: Path, begun) -> None:
    with safe_write(path) as temporary:
        temporary.write_bytes(b"half")
        begun.set()
        signal.pause()


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_writer_left_goes_when_the_name_is_written_next(tmp_path, ended_by):
    path, context = tmp_path / "a.txt", multiprocessing.get_context("fork")
    events = [context.Event() for _ in range(3)]
    writers = [
        context.Process(target=_never_done, args=(one, begun), daemon=True)
        for one, begun in zip((path, path, tmp_path / "b.txt"), events)
    ]
    killed, alive, other = writers
    for one, begun in zip(writers, events):
        one.start()
        assert begun.wait(30)
    left = {one.name for one in tmp_path.iterdir()}
    os.kill(killed.pid, ended_by)
    killed.join()
    for one in tmp_path.iterdir():  # as if some time had passed
        os.utime(one, (time.time() - 60,) * 2)
    write_text(path, "whole")
    kept = {one.name for one in tmp_path.iterdir()} - {"a.txt"}
    assert len(left) == 3 and len(kept) == 2 and kept < left and path.read_text() == "whole"
    for one in (alive, other):
        one.kill()
        one.join()
    write_text(path, "again")
    write_text(tmp_path / "b.txt", "again")
    assert {one.name for one in tmp_path.iterdir()} == {"a.txt", "b.txt"}


def _convert(source: Path, target: Path) -> None:
    convert(source, target, overwrite=True)


def test_converts_to_one_target_are_whole_and_leave_nothing(folder, wanted):
    context = multiprocessing.get_context("spawn")
    target = folder / "c.safetensors"
    sources = [small_vae(folder, n) for n in (1, 2)]
    writers = [context.Process(target=_convert, args=(source, target)) for source in sources * 2]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert [one.exitcode for one in writers] == [0] * 4 and names(folder) == {"c.safetensors"}
    assert content(target) in (wanted("convert", 1), wanted("convert", 2))


# No writer of another kind.

TEMPORARY = {"rename", "renames", "link", "mkstemp", "mkdtemp", "mktemp", "NamedTemporaryFile", "TemporaryFile",
             "TemporaryDirectory", "SpooledTemporaryFile", "uuid1", "uuid4", "getpid", "token_hex"}  # fmt: skip
WRITING = {"write_text", "write_bytes", "save", "save_file", "savefig", "copy", "copy2", "copyfile", "move", "dump",
           "savez", "tofile", "touch"}  # fmt: skip
ALLOWED = {
    # A checkpoint is a folder of many processes' files: published by a rename, held by tests of its own.
    ("varedit_core/training/states.py", "partial.rename"),
    ("varedit_core/training/states.py", "state.rename"),
    # Lines are added to it while a training runs.
    ("varedit_core/training/report.py", "open(folder / METRICS, 'a')"),
    # A download grows over several runs; it takes its name when its checksum is right.
    ("varedit_core/hub/remote.py", "open(part, 'ab', buffering=0)"),
    ("varedit_core/hub/remote.py", "'.part'"),
    ("varedit_core/hub/remote.py", "os.replace"),
    # Of files that a tokenizer reads at once.
    ("nodes/adapters/text_encoder.py", "TemporaryDirectory"),
    # It ends in a writer of the list.
    ("varedit_core/shapeedit/cli.py", "gallery.save"),
}


def suspicious(tree: ast.AST, memory: frozenset[str] | None = None) -> Iterator[str]:
    """Calls that write a file or make a temporary name outside of a block of `safe_write`. memory: buffers' names."""
    if memory is None:
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        memory = frozenset(ast.unparse(node.targets[0]) for node in assigned if ast.unparse(node.value) == "BytesIO()")
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.With) and any("safe_write(" in ast.unparse(item.context_expr) for item in node.items):
            continue
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.endswith((".tmp", ".partial", ".part"))
        ):
            yield repr(node.value)
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            owner, _, name = function.rpartition(".")
            modes = [*node.args[owner == "" :], *(key.value for key in node.keywords if key.arg == "mode")]
            mode = next((m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)), "r")
            if name == "open" and owner not in ("Image", "os") and set(mode) & set("wax+") and len(mode) < 4:
                yield ast.unparse(node)
            if (
                name in TEMPORARY
                or (owner == "os" and name in ("replace", "open"))
                or (owner and name == "replace" and len(node.args) == 1 and not node.keywords)
            ):
                yield function
            if (
                name in WRITING
                and (owner or name in ("save_file", "copyfile"))
                and not _of_memory(node, owner, name, memory)
            ):
                yield function
        yield from suspicious(node, memory)


def _of_memory(call: ast.Call, owner: str, name: str, memory: frozenset[str]) -> bool:
    """Copies of objects, what is written to a buffer, and `Tokens.save`, which is on the list."""
    ours = (name == "copy" and owner != "shutil") or (name == "save" and owner.split(".")[-1] == "tokens")
    return ours or any(ast.unparse(one) in memory for one in call.args[:1])


def test_every_writer_of_the_package_is_safe_write():
    files = [path for part in ("varedit_core", "nodes") for path in sorted((ROOT / part).rglob("*.py"))]
    assert len(files) > 80
    found = {
        (str(path.relative_to(ROOT)), one)
        for path in files
        if path != Path(writing.__file__)
        for one in suspicious(ast.parse(path.read_text(encoding="utf-8")))
    }
    strays = {(file, one) for file, one in found if (file, one) not in ALLOWED and not _part_of_checkpoint(file, one)}
    assert not strays, "write files with files.safe_write"
    assert ALLOWED <= found, "no longer there"


def _part_of_checkpoint(file: str, one: str) -> bool:
    return file == "varedit_core/training/states.py" and one.strip("'").endswith(".partial")


@pytest.mark.parametrize(
    "code",
    [
        "os.replace(a, b)",
        "a.rename(b)",
        "a.replace(b)",
        "path.with_name(name + '.tmp')",
        "f'{path}.partial'",
        "uuid4().hex",
        "tempfile.NamedTemporaryFile()",
        "path.write_text('x')",
        "open(path, 'wb')",
        "path.open('w')",
        "open(path, mode='x')",
        "image.save(path)",
        "save_file(state, path)",
        "torch.save(state, path)",
        "json.dump(x, file)",
        "shutil.copy(a, b)",
        "figure.savefig(path)",
    ],
)
def test_the_check_sees_other_ways_to_write(code):
    assert list(suspicious(ast.parse(code)))
    assert not list(suspicious(ast.parse(f"with safe_write(path) as temporary:\n    {code}")))
    assert not list(suspicious(ast.parse("open(path, 'rb').read(); text.replace('a', 'b'); open(path)")))
