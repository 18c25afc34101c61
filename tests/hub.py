"""A hub on this machine, as far as `huggingface_hub` asks one: repositories of small random weights, and its failures.

Large files are answered by a redirect to another address, as the hub does, and in ranges.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing

from benchmarks.real_size import published_shapes, random_tensor
from varedit_core.model.config import AutoencoderConfig
from varedit_core.text.t5 import T5Config, T5Encoder
from varedit_core.tokenizer.vae import Autoencoder

LARGE = (".pth", ".safetensors", ".model")
VAREDIT, INFINITY, T5 = "HiDream-ai/VAREdit", "FoundationVision/infinity", "google/flan-t5-xl"


@dataclass
class Repository:
    """files: name -> content. card: what the page's head says. refused: status and the hub's word for it."""

    files: dict[str, bytes]
    card: dict | None = None
    revision: str = "a" * 40
    refused: tuple[int, str] | None = None


@dataclass
class Hub:
    """A server of repositories. asked: every request as (method, path, range). cut: file -> bytes after which each
    answer ends, for as many answers as there are numbers; wrong: files that come with other bytes; short: that come
    without their end; waiting: called
    in place of a cut; tokens: what the hub, and the other address of large files, were given to know the user by."""

    repositories: dict[str, Repository]
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    waiting: Callable[[], None] | None = None
    tokens: dict[str, set[str]] = field(default_factory=lambda: {"hub": set(), "cdn": set()})

    def __enter__(self) -> Hub:
        self.server = Server(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.other = f"http://localhost:{self.server.server_port}"
        return self

    def __exit__(self, *about) -> None:
        self.server.shutdown()
        self.server.server_close()

    def ranges(self, name: str) -> list[str]:
        """The ranges in which a file was asked for, "" for the whole."""
        return [ranged for method, path, ranged in self.asked if method == "GET" and path.endswith(f"/cdn/{name}")]


class Server(ThreadingHTTPServer):
    """Quiet about who went away in the middle."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        pass


class Answers(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *about) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        words = path.strip("/").split("/")
        self.hub.tokens["cdn" if words[2] == "cdn" else "hub"].add(self.headers.get("Authorization", ""))
        owner = words[2:4] if words[:2] == ["api", "models"] else words[:2]
        repository = self.hub.repositories.get("/".join(owner))
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        if repository.refused:
            return self.refuse(*repository.refused)
        if words[0] == "api":
            return self.tell("/".join(owner), repository, words[5] if len(words) > 5 else "main")
        kind, name = words[2], "/".join(words[3:] if words[2] == "cdn" else words[4:])
        if name not in repository.files:
            return self.refuse(404, "EntryNotFound")
        if kind == "resolve" and name.endswith(LARGE):
            return self.answer(302, b"", Location=f"{self.hub.other}/{'/'.join(owner)}/cdn/{name}")
        self.give(name, repository.files[name])

    def tell(self, name: str, repository: Repository, revision: str) -> None:
        """What a repository holds."""
        if revision not in ("main", "v1", repository.revision):
            return self.refuse(404, "RevisionNotFound")
        siblings = []
        for file, data in repository.files.items():
            one = {"rfilename": file, "size": len(data), "blobId": sha1(b"blob %d\0" % len(data) + data).hexdigest()}
            if file.endswith(LARGE):
                one["lfs"] = {"size": len(data), "sha256": sha256(data).hexdigest(), "pointerSize": 99}
            siblings.append(one)
        facts = {"id": name, "modelId": name, "sha": repository.revision, "siblings": siblings, "private": False,
                 "downloads": 0, "likes": 0, "tags": [], "cardData": repository.card}  # fmt: skip
        self.answer(200, json.dumps(facts).encode(), **{"Content-Type": "application/json"})

    def give(self, name: str, data: bytes) -> None:
        """A file, or the rest of it; cut where that is asked for."""
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        rest = bytearray(data[begin : -99 if name in self.hub.short else None])
        if name in self.hub.wrong:
            rest[-1] ^= 255
        headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        ends = self.hub.cut.get(name)
        self.answer(206 if begin else 200, bytes(rest), ends.pop(0) if ends else None, **headers)

    def refuse(self, status: int, word: str) -> None:
        self.answer(status, b"{}", **{"X-Error-Code": word, "X-Error-Message": "no"})

    def answer(self, status: int, body: bytes, end: int | None = None, **headers) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "ETag": '"x"'}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:end])
        if end is not None:
            self.wfile.flush()
            self.close_connection = True
            if self.hub.waiting:
                self.hub.waiting()


def pickled(state: dict[str, torch.Tensor]) -> bytes:
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def transformer(token_bits: int) -> bytes:
    """A transformer of random weights in the published key style."""
    torch.manual_seed(3)
    shapes = published_shapes(depth=2, width=64, heads=1, token_bits=token_bits, text=64)
    return pickled({key: random_tensor(key, shape, "cpu") for key, shape in shapes.items()})


def vae(bits: int, levels: int) -> bytes:
    torch.manual_seed(4)
    config = AutoencoderConfig(bits, 32, (32,) * levels, (32,) * levels, 1, 1, 2 ** (levels - 1))
    return pickled(Autoencoder(config).state_dict())


def sharded(state: dict[str, torch.Tensor], folder: str = "") -> dict[str, bytes]:
    """The files of weights in two shards, with their index."""
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = [{key: state[key].contiguous() for key in sorted(state)[n::2]} for n in range(2)]
    where = {key: name for name, half in zip(names, halves) for key in half}
    files = {name: save(half, {"format": "pt"}) for name, half in zip(names, halves)}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": where}).encode()
    return {folder + name: data for name, data in files.items()}


def text_encoder() -> dict[str, bytes]:
    """A T5 in the layout of flan-t5-xl's repository, with what is not to be fetched."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(5)
    encoder = T5Encoder(T5Config(30, 64, 32, 64, 1, 2, True))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(64, 64)}
    return sharded({key: tensor.detach() for key, tensor in encoder.state_dict().items()} | decoder) | {
        "config.json": json.dumps(encoder.config.to_json()).encode(), "tokenizer.json": tokenizer.to_str().encode(),
        "spiece.model": b"pieces", "tf_model.h5": b"not this one", "README.md": b"nor this",
    }  # fmt: skip


def repositories() -> dict[str, Repository]:
    """All that the sets are made of."""
    small, large = transformer(32), transformer(56)
    state = {key: tensor for key, tensor in torch.load(BytesIO(large), weights_only=True).items()}
    return {
        VAREDIT: Repository(
            {"8B-512.pth": large, "8B-1024.pth": large, "2B-512.pth": small}, {"license": "mit"}, "1" * 40
        ),
        INFINITY: Repository(
            {"infinity_2b_reg.pth": small, "infinity_vae_d32reg.pth": vae(32, 5),
             "infinity_vae_d56_f8_14_patchify.pth": vae(14, 4), **sharded(state, "infinity_8b_weights/")},
            {"license": "other", "license_name": "a licence of its own", "license_link": "LICENSE"}, "2" * 40,
        ),
        T5: Repository(text_encoder(), None, "3" * 40),
    }  # fmt: skip


def kept(folder: Path) -> set[str]:
    """The files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
