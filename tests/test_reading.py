"""Names of files to be read: all that is no regular file is refused with a sentence, and nothing waits for ever."""

import os
import socket

import pytest

from varedit_core.files.reading import MAX_JSON, check_file, read_json


def made(kind, folder):
    path = folder / "file"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    if kind == "link to a device":
        path.symlink_to("/dev/zero")
    if kind == "socket":
        own = socket.socket(socket.AF_UNIX)
        own.bind(str(path))
        own.close()
    if kind == "loop of links":
        path.symlink_to(path)
    if kind == "name too long":
        return folder / ("x" * 300)
    if kind == "null in the name":
        return f"{path}\0"
    if kind == "no permission":
        path.touch(mode=0)
    if kind == "below a file":
        path.touch()
        return path / "other"
    return path


KINDS = {
    "nothing": "there is no weight file at", "below a file": "there is no weight file at", "folder": "is a folder",
    "pipe": "is a pipe", "link to a pipe": "is a pipe", "link to a device": "is a device", "socket": "is a socket",
    "loop of links": "cannot be the name", "name too long": "cannot be the name",
    "null in the name": "cannot be the name", "no permission": "may not be read",
}  # fmt: skip


@pytest.mark.parametrize("read", [check_file, read_json])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(tmp_path, kind, read):
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read(made(kind, tmp_path), "weight file")
    assert KINDS[kind] in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_path_with_the_other_slashes_is_named(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "8B.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=f"; write {tmp_path}/models/8B.safetensors$"):
        check_file(f"{tmp_path}\\models\\8B.safetensors")


JSON = {
    "cut": b'{"a": [1, 2', "deep": b"[" * 100_000, "no UTF-8": b'{"a": "\xff"}', "empty": b"", "a null": b"\0" * 20,
    "numbers": b'{"a": ' + b"9" * 5000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_none_is_refused(tmp_path, kind):
    path = tmp_path / "config.json"
    path.write_bytes(JSON[kind])
    with pytest.raises(ValueError, match="is not a readable configuration .*; download it again") as raised:
        read_json(path, "configuration")
    assert len(str(raised.value)) < 300 + len(str(path))


def test_json_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # as Windows' editors begin it
    assert read_json(path, "configuration") == {"a": 1}


def test_json_that_is_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(MAX_JSON + 1)
    with pytest.raises(ValueError, match="too large for a configuration"):
        read_json(path, "configuration")


@pytest.mark.parametrize("address", ["https://example.com/a.png", "http://a/b", "file:///a.png", "s3://a/b"])
def test_an_address_is_called_one(address):
    with pytest.raises(ValueError, match="is an address, not the path of a file; (download it first|write the path)"):
        check_file(address)
