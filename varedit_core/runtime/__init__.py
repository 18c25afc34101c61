"""Why it is fast and why it fits: graphs, kernels, KV caches, plans. The model can be understood without it.

Importing any of it replaces the networks' operations by the runtime's faster forms (`replaceable.REPLACEMENTS`). Each
runs only where it can; everywhere else the plain one does.
"""

from ..replaceable import REPLACEMENTS
from .kernels import add_norm, double_picture, laid_out
from .layers import feed_forward, norm_silu, residual_block
from .tiling import decode

REPLACEMENTS.update(
    {
        "add_norm": add_norm,
        "double_picture": double_picture,
        "laid_out": laid_out,
        "norm_silu": norm_silu,
        "FeedForward.forward": feed_forward,
        "ResidualBlock.forward": residual_block,
        "Autoencoder.decode": decode,
    }
)
