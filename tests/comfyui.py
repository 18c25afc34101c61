"""A real ComfyUI for the tests: finding it, running its Python, and serving the pack with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support import ROOT

HOW = "set COMFYUI_PATH to a ComfyUI folder and COMFYUI_PYTHON to the Python that runs it"

# ComfyUI imports torchaudio for audio models only, but without a guard.
_PROBE = """
import importlib, sys
try:
    importlib.import_module("torchaudio")
except (ImportError, OSError):
    print("stand-in")
    sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import comfy.ops
"""


class NotFound(Exception):
    """There is no usable ComfyUI; the message says how to provide one."""


@dataclass(frozen=True)
class ComfyUI:
    folder: Path
    python: str
    environment: dict[str, str]

    @classmethod
    def find(cls, scratch: Path) -> ComfyUI:
        """Raises NotFound. scratch: an empty folder, for a stand-in of torchaudio where that is missing."""
        folder = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()
        if not (folder / "comfy" / "ops.py").is_file():
            raise NotFound(f"no ComfyUI in {folder}; {HOW}")
        python = os.environ.get("COMFYUI_PYTHON") or _python_beside(folder)
        if not shutil.which(python):
            raise NotFound(f"{python} cannot be run; {HOW}")
        (scratch / "torchaudio").mkdir()
        for module in ("__init__", "functional", "transforms"):
            (scratch / "torchaudio" / f"{module}.py").touch()
        probe = subprocess.run(
            [python, "-c", _PROBE, str(scratch)], cwd=folder, capture_output=True, text=True, timeout=300
        )
        if probe.returncode:
            raise NotFound(
                f"{python} cannot import {folder}'s comfy.ops ({probe.stderr.strip().splitlines()[-1]}); {HOW}"
            )
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if "stand-in" in probe.stdout:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(scratch), os.environ.get("PYTHONPATH")]))
        return cls(folder, python, environment)

    def drop_in(self, scratch: Path) -> dict:
        """What `drop_in.py` finds in a process of ComfyUI's Python."""
        return self.run(ROOT / "tests" / "drop_in.py", scratch)

    def run(self, *arguments, seconds: float = 300) -> dict:
        """The JSON that a process of ComfyUI's Python prints last."""
        done = subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    @contextmanager
    def server(self, base: Path, *more: str, pack: Path = ROOT) -> Iterator[Server]:
        """A running server that knows no custom nodes but this pack and no models but those in `base`/models."""
        for name in (
            "custom_nodes",
            "models/diffusion_models",
            "models/vae",
            "models/text_encoders",
            "input",
            "output",
            "temp",
            "user",
        ):
            (base / name).mkdir(parents=True, exist_ok=True)
        _install(pack, base / "custom_nodes" / "varedit")
        port = _free_port()
        options = [
            "--cpu",
            "--disable-api-nodes",
            "--port",
            str(port),
            "--base-directory",
            str(base),
            "--database-url",
            "sqlite:///:memory:",
            *more,
        ]
        server = Server(f"http://127.0.0.1:{port}", base)
        with open(server.log_file, "wb") as log:
            process = subprocess.Popen(
                [self.python, "main.py", *options],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            server.wait(process)
            server.process.append(process.pid)
            yield server
        finally:
            _end(process)


@dataclass(frozen=True)
class Server:
    url: str
    base: Path
    process: list[int] = field(default_factory=list)

    @property
    def log_file(self) -> Path:
        return self.base / "log.txt"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait(self, process: subprocess.Popen, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            try:
                self.get("/queue")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log[-3000:]}")

    def memory(self) -> int:
        """Bytes of memory the server's process holds, without the files it has mapped."""
        lines = Path(f"/proc/{self.process[0]}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def get(self, path: str):
        return json.loads(self.text(path))

    def queue(self, graph: dict) -> dict:
        """The server's answer to a graph in API format; with "node_errors" where it was refused."""
        request = urllib.request.Request(
            f"{self.url}/prompt", json.dumps({"prompt": graph}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def run(self, graph: dict, seconds: float = 60) -> dict:
        """The history entry of a graph that was run."""
        answer = self.queue(graph)
        assert "prompt_id" in answer, answer
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return history[answer["prompt_id"]]
            time.sleep(0.05)
        raise RuntimeError(f"the graph was not done after {seconds} s:\n{self.log[-3000:]}")


def _python_beside(folder: Path) -> str:
    environments = (folder.parent / "venv", folder / ".venv", folder / "venv")
    known = [environment / "bin" / "python" for environment in environments]
    return str(next((python for python in known if python.exists()), sys.executable))


def _install(pack: Path, target: Path) -> None:
    try:
        target.symlink_to(pack, target_is_directory=True)
    except OSError:
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "output", "models"))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
