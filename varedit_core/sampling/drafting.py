"""Two transformers for one edit: a drafter for the coarse scales, a refiner for the rest (Collaborative decoding,
arXiv 2411.17787). Both read the source and the text; they must share a tokenizer and a text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from torch import Tensor

from ..defaults import DEFAULT_SETTINGS, SamplingSettings, Shortcuts
from ..model.transformer import Transformer
from ..runtime.workspace import Workspace
from ..tokenizer.schedule import Schedule
from .loop import Promises, Scale, sample


def draft_and_refine(
    drafter: Transformer,
    refiner: Transformer,
    features_BdHW: Tensor,
    texts: Sequence[Tensor],
    schedule: Schedule,
    shortcuts: Shortcuts,
    settings: SamplingSettings = DEFAULT_SETTINGS,
    negatives: Sequence[Tensor | None] | None = None,
    workspaces: tuple[Workspace | None, Workspace | None] = (None, None),
    **more,
) -> Iterator[Scale]:
    """`sampling.sample` with the first `shortcuts.drafted` scales drawn by the drafter and the others by the refiner.

    The refiner passes over the drafter's scales too, since its own later ones attend to them. more: further arguments
    of `sample`. ValueError where the two do not belong together.
    """
    ours, theirs = drafter.config, refiner.config
    if (ours.token_bits, ours.text_width) != (theirs.token_bits, theirs.text_width):
        raise ValueError(
            f"drafter and refiner must share tokenizer and text encoder, but predict {ours.token_bits} and "
            f"{theirs.token_bits} bits a token from {ours.text_width} and {theirs.text_width} text channels"
        )
    if ours.source != theirs.source:
        raise ValueError("drafter and refiner must both edit or both make pictures of text; choose another drafter")
    switch, shortcuts = shortcuts.drafted, replace(shortcuts, drafted=0)
    if not 1 <= switch < (shortcuts.stop or len(schedule)):
        raise ValueError(f"the drafter's scales must be from 1 to {(shortcuts.stop or len(schedule)) - 1}, got {switch}")
    drafted = []
    first = replace(shortcuts, stop=switch)
    args = (features_BdHW, texts, schedule, settings, negatives)
    more["promises"] = later = more.get("promises", Promises()).settled()
    checked = more | {"promises": replace(later, checks=False)}  # nobody else looks at the drafter's logits
    with closing(sample(drafter, *args, workspace=workspaces[0], shortcuts=first, **checked)) as scales:
        for scale in scales:
            yield scale
            drafted.append(scale.bits)
    with closing(sample(refiner, *args, workspace=workspaces[1], shortcuts=shortcuts, **more)) as scales:
        for scale in scales:
            if scale.index < switch:
                scale.bits = drafted[scale.index]
            else:
                yield scale
