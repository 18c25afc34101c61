"""Set up the development environment in .venv and run the project in it. Needs Python >= 3.10 and pip only.

    python dev.py edit [ARGS...]      `varedit edit ARGS`; without any, `varedit demo`: six edits with the demo model
    python dev.py test [ARGS...]      the tests; ARGS go to pytest
    python dev.py varedit ARGS...     any `varedit` command
    python dev.py render              fill the tables of README, docs and help pages, and write what is made of controls

The versions are those of constraints.txt. They are installed by the first run, and again when pyproject.toml or
constraints.txt change. The exit code is that of the command.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

# Two at a time, a file in one process: most tests leave one of two cores idle, and a file shares what it starts.
PARALLEL = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
# Memory that a process freed stays its own: to take and clear it anew is a tenth of the tests' time. glibc reads this.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}  # fmt: skip
MAIN_JOB = ["demo", "--output", "output/demo", "--overwrite"]

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main(command: str = "", *args: str) -> int:
    if command == "test":
        return prepare("test") or run("pytest", [*PARALLEL, *args], ROOT, KEEP_MEMORY)
    if command == "edit":
        return prepare("cli") or run("varedit_core", ["edit", *args] if args else MAIN_JOB, None if args else ROOT)
    if command == "varedit":
        return prepare("cli") or run("varedit_core", args)
    if command == "render":
        return prepare("cli") or run("benchmarks.render", args, ROOT)
    print(__doc__, file=sys.stderr)
    return 0 if command in ("-h", "--help") else 2


def run(module: str, args, folder: Path | None = None, settings: dict[str, str] | None = None) -> int:
    """Run a module with .venv's Python, in the current folder unless one is named; its exit code. settings: of the
    environment, where it does not say otherwise.

    The current folder is anybody's: its modules are not imported (-I).
    """
    apart = ["-I"] if folder is None else []
    try:
        environment = {**(settings or {}), **os.environ}
        code = subprocess.call([str(PYTHON), *apart, "-m", module, *args], cwd=folder, env=environment)
    except KeyboardInterrupt:
        return 130
    return code if code >= 0 else 128 - code


def prepare(extra: str) -> int:
    """Make .venv hold the pinned packages of an extra; 0, or the exit code of the step that failed."""
    if sys.version_info < (3, 10):
        return complain(f"Python 3.10 or newer is needed, and this is {sys.version.split()[0]}.")
    if VENV.is_symlink():
        return complain(f"{VENV} is a link to another environment; remove the link, and run this again.")
    stamp, wanted = VENV / "installed.txt", fingerprint()
    held = stamp.read_text().split() if PYTHON.exists() and stamp.is_file() else []
    if held in ([extra, wanted], ["test", wanted]):  # "test" holds all that "cli" does
        return 0
    # .venv has no pip of its own: where it is the active environment, the Python that made it does the work.
    python = getattr(sys, "_base_executable", sys.executable) if Path(sys.prefix) == VENV else sys.executable
    code = check_pip(python) or (0 if PYTHON.exists() else step(python, "venv", "--clear", "--without-pip", str(VENV)))
    if not code:
        stamp.unlink(missing_ok=True)
        print(
            f"Installing the packages of constraints.txt into {VENV}; PyTorch makes the first time slow.",
            file=sys.stderr,
        )
        options = ["--no-compile", "-c", "constraints.txt", "-e", f".[{extra}]"]
        code = step(python, "pip", "--python", str(PYTHON), "install", *options)
    if not code:
        # pip would compile with one core, and more files: packages' own tests, and hundreds of models of transformers.
        # Of some packages a file is no Python, which does not matter.
        skipped = r"[/\\](tests|transformers[/\\]models)[/\\]"
        step(str(PYTHON), "compileall", "-q", "-q", "-j", "0", "-x", skipped, str(VENV / "lib"))
        stamp.write_text(f"{extra} {wanted}")
    return code


def fingerprint() -> str:
    """Changes with what is to be installed, and with the folder that the editable install points to."""
    parts = [str(ROOT).encode(), *((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def check_pip(python: str) -> int:
    answer = subprocess.run([python, "-m", "pip", "--version"], cwd=ROOT, capture_output=True, text=True).stdout
    found = re.match(r"pip (\d+)\.(\d+)", answer)
    if not found:
        return complain(f"{python} has no pip; install it (on Debian and Ubuntu: apt install python3-pip).")
    if (int(found[1]), int(found[2])) < (22, 3):
        return complain(f"{found[0]} is too old, 22.3 is needed; run: {python} -m pip install --upgrade pip")
    return 0


def step(python: str, module: str, *args: str) -> int:
    """Run a Python module in the root, its output on standard error so that the command's own stays clean."""
    return subprocess.call([python, "-m", module, *args], cwd=ROOT, stdout=sys.stderr)


def complain(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
