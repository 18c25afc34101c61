"""Two networks for one edit: a drafter for the coarse scales, another for the rest (Collaborative decoding, arXiv
2411.17787). Both read the source and the text; they must share a VAE and a text encoder."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..controls.drafted import Drafted, out_of_range
from ..model.config import TransformerConfig
from ..model.engine import Engine
from .batch import EditBatch
from .checks import facts


class Drafting:
    """An engine of two: the drafter gives the logits of the first scales, then it is done and the refiner takes over.

    The refiner passes over the drafter's scales too, since its own later ones attend to them. configs: of drafter and
    refiner. ValueError where the two do not belong together.
    """

    def __init__(self, drafter: Engine, refiner: Engine, configs: tuple[TransformerConfig, TransformerConfig]) -> None:
        ours, theirs = configs
        if (ours.token_bits, ours.text_width) != (theirs.token_bits, theirs.text_width):
            raise ValueError(
                f"drafter and refiner must share VAE and text encoder, but predict {ours.token_bits} and "
                f"{theirs.token_bits} bits a token from {ours.text_width} and {theirs.text_width} text channels; "
                "choose another drafter"
            )
        if ours.source != theirs.source:
            raise ValueError("drafter and refiner must both edit or both make pictures of text; choose another drafter")
        self.drafter, self.refiner, self.configs = drafter, refiner, configs

    def prefill(self, batch: EditBatch) -> None:
        count = batch.shortcuts.drafted
        wrong = Drafted.refuse(facts(batch)) if count else out_of_range(count, len(batch.plan))
        if wrong:
            raise ValueError(wrong)
        self.drafter.prefill(batch)
        self.batch, self.count, self.present = batch, count, self.drafter
        self.totals: list[tuple[Tensor, bool]] = []

    def logits(self, k: int, total: Tensor, guided: bool) -> Tensor:
        if k < self.count:
            self.totals.append((total, guided))
        elif self.present is self.drafter:
            self._hand_over()
        return self.present.logits(k, total, guided)

    def _hand_over(self) -> None:
        self.drafter.close()
        self.present = self.refiner
        self.refiner.prefill(replace(self.batch, stream=None))
        for k, (total, guided) in enumerate(self.totals):
            self.refiner.logits(k, total, guided)
        self.totals = []

    def computed(self, k: int) -> Tensor | None:
        return self.present.computed(k)

    def close(self) -> None:
        self.drafter.close()
        self.refiner.close()
