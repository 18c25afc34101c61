"""Operations of the networks that the runtime may do in a faster way, to the same numbers up to rounding.

The table of faster forms is empty until `varedit_core.runtime` is imported, which fills it with its kernels. Whoever
loads networks or edits with them has imported it, so nobody has to choose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

REPLACEMENTS: dict[str, Callable] = {}
"""Faster forms by the qualified names of the operations. One that does not run here, or not for these tensors, returns
None, and the plain form runs."""


def replaceable(plain: Callable) -> Callable:
    """Mark an operation that the runtime may replace. `plain` of the result is what is written here."""
    name = plain.__qualname__

    @wraps(plain)
    def operation(*args):
        faster = REPLACEMENTS.get(name)
        found = None if faster is None else faster(*args)
        return plain(*args) if found is None else found

    operation.plain = plain
    return operation
