"""How the processes of a training end: its helpers with it, whatever ends it, and itself at a signal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable


def follow_parent(worker: int = 0) -> None:
    """In a process that helps a training (worker: its number, unused): end it as soon as the training's is gone, also
    after a kill, which leaves the training no time to end it. Signals are the training's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has the training's own answer
    sys.excepthook = _unless_left(sys.excepthook)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with the training").start()


def _unless_left(told: Callable) -> Callable:
    """An excepthook that says nothing where the training let go of what a helper handed over: multiprocessing's thread
    for that calls it, and Ctrl-C may come at any moment."""

    def hook(kind: type[BaseException], error: BaseException, trace) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            told(kind, error, trace)

    return hook


def asked_to_stop() -> Callable[[], bool]:
    """Answer SIGTERM from now on: the function says whether one came. The second ends the process at once, code 143."""
    came = threading.Event()

    def answer(number: int, frame) -> None:
        if came.is_set():
            raise SystemExit(128 + number)
        came.set()

    signal.signal(signal.SIGTERM, answer)
    return came.is_set
