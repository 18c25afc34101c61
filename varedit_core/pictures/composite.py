"""Where an edit shows in its picture."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from ..controls.effects import differing
from ..tokenizer.tokens import Tokens
from .images import unfit_mask


def found_mask(tokens: Tokens, levels_3yx: Tensor, decode: Callable[[Tensor], Tensor]) -> Image.Image:
    """Where an edit with an auto mask changed its picture (see `controls.differing`): white, mode L, of its size.

    tokens: of one edit. levels_3yx: of the decoded edit, in 8 bits. decode: the same of a running sum [d, H, W].
    """
    if tokens.free is None:  # nothing was held to the source: all may have changed
        return Image.new("L", tokens.shown.size, 255)
    before = decode(tokens.under.total()[0])
    return unfit_mask(differing(levels_3yx, before, tokens.free[0], tokens.auto_mask), tokens.shown)
