"""What only a try tells of a device, tried once and remembered; failures that may pass are not."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import wraps

import torch

logger = logging.getLogger(__name__)

_PASSING = (MemoryError, torch.cuda.OutOfMemoryError, TimeoutError, InterruptedError, BlockingIOError)
_PASSING_NUMBERS = {errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EBUSY}
# Drivers, cuBLAS and Triton say it in the text of a RuntimeError only. cuBLAS calls missing memory "not initialized".
_PASSING_WORDS = (
    "out of memory",
    "alloc_failed",
    "status_not_initialized",
    "captur",
    "no graph can hold",
    "no space left",
    "too many open",
)


def may_pass(error: BaseException | None) -> bool:
    """Whether what failed may work the next time: memory, disk or handles ran out, or a graph was being recorded."""
    looked: list[BaseException] = []  # causes may go round
    while error is not None and not any(error is before for before in looked):
        looked.append(error)
        numbered = isinstance(error, OSError) and error.errno in _PASSING_NUMBERS
        if numbered or isinstance(error, _PASSING) or any(word in str(error).lower() for word in _PASSING_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def tried_once(message: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Makes a function remember what it answers to each set of arguments.

    An error is a no, with a warning: for good, unless it may pass, when the next call tries again. `failed` says no
    after a yes, with the error of what was tried since. message: the warning; %s in it becomes the first line of the
    error.
    """

    def decorate(trial: Callable[..., bool]) -> Callable[..., bool]:
        answers: dict[tuple, bool] = {}
        told: set[str] = set()  # a passing failure may come again at every call

        def failed(error: Exception, *about) -> None:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            if line not in told:
                told.add(line)
                logger.warning(message, line)
            if not may_pass(error):
                answers[about] = False

        @wraps(trial)
        def asked(*about) -> bool:
            if about not in answers:
                try:
                    answers[about] = trial(*about)
                except Exception as error:  # whatever a broken installation raises
                    failed(error, *about)
            return answers.get(about, False)

        asked.cache_clear, asked.failed = answers.clear, failed
        return asked

    return decorate
