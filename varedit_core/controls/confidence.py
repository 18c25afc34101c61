"""Confidence: how sure the model was of each place of an edit."""

from __future__ import annotations

from torch import Tensor

from ..tokenizer.quantizer import linear_resize


class Confidence:
    """The mean over bits and scales of |2p - 1| of the model's own probabilities with the instruction, before
    temperature and guidance. Scales of which a part was left out do not count."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def __call__(self, scale) -> None:
        if scale.whole:
            own = scale.logits[: len(scale.log_odds)].softmax(-1)[..., 1]
            sure = scale.on_grid((2 * own - 1).abs()).mean(1, keepdim=True)
            self._sum, self._count = self._sum + linear_resize(sure, scale.source.grids[-1]), self._count + 1

    @property
    def map(self) -> Tensor:
        """[B, H, W] from 0 to 1."""
        return (self._sum / self._count)[:, 0]
