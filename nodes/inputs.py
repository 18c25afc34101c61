"""What comes into a node is judged by the types in its schema, before the node sees it."""

from __future__ import annotations

import inspect
from functools import cache, wraps

from ._api import io

JUDGED = ("IMAGE", "MASK", "LATENT", "CONDITIONING")
"""Types that any node may hand on anything for. Widgets are ComfyUI's to judge (and `widgets.chosen`), a MODEL, CLIP or
VAE is asked whether it is ours where it is used, and types of our own come from our nodes alone."""


def judging(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, with an `execute` that is given only what `adapters.given` has judged; None where an input may lack."""
    execute = node.execute.__func__
    signature = inspect.signature(execute)

    @cache  # not at every run: a schema may list files
    def judged() -> list:
        return [one for one in node.define_schema().inputs if one.get_io_type() in JUDGED]

    @wraps(execute)
    def judged_execute(cls, *args, **values) -> io.NodeOutput:
        bound = signature.bind(cls, *args, **values)
        for one in judged():
            given = bound.arguments.get(one.id)
            if one.id in bound.arguments and not (one.optional and given is None):
                from .adapters.given import checked

                bound.arguments[one.id] = checked(one.get_io_type(), one.id, given)
        return execute(*bound.args, **bound.kwargs)

    node.execute = classmethod(judged_execute)
    return node
