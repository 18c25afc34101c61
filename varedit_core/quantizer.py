"""Where scripts found the quantizer before it moved to `tokenizer.quantizer`."""

from .tokenizer.quantizer import *  # noqa: F403
