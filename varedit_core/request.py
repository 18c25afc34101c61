"""One call of an editor: from pictures, instructions and options to a batch of edits, and from results to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from .coder import Coder, Picture
from .controls.registry import NEUTRAL, NO_SHORTCUTS, Controls, Shortcuts, problems
from .defaults import FIT, MOST_FEATHER, MOST_VARIATIONS
from .fitting import Fitting, fitting_for
from .pictures.composite import Region, areas, check_masks, check_regions, drawn_masks
from .pictures.edited import Decoded, Edited
from .pictures.images import FittedImage, load_image, load_mask, to_uint8, unfit
from .pictures.reading import NO_DETAILS, is_picture
from .sampling.batch import EditBatch
from .sampling.checks import facts, right_kinds, whole_number
from .sampling.driver import Result
from .sampling.results import joined
from .sampling.scale import Scale
from .sampling.settings import SamplingSettings
from .sampling.tokens import LOST, Tokens
from .wording import counted, there_are


@dataclass(frozen=True, eq=False)
class Options:
    """What `Editor.run` and `make` take by name beside pictures, instructions and settings.

    variations: results of each picture, one behind the other, of as many seeds. mask: where the pictures may change
    (white; see `images.load_mask`), one for all or one each; elsewhere they stay as they are. regions: in place of
    instructions, several of them with masks. given: the first scales of this edit, or of the edit this one branches off
    from. steer: functions of a `Scale`, called behind the controls at every scale that runs, so also at those of the
    candidates of `best_of` (`on_scale` sees the results' own scales alone, of which the first are drawn already then).
    seam: the feather, pixels from a mask's edge inwards over which the edit fades in. explain: whether to find out,
    too, what changed and how sure the model was. features: of the pictures, by `encode_source`, where known. idle:
    whether knobs that would do nothing are allowed. ValueError for what is none of these.
    """

    variations: int = 1
    shortcuts: Shortcuts = NO_SHORTCUTS
    mask: Image.Image | Sequence[Image.Image] | None = None
    controls: Controls = NEUTRAL
    regions: Sequence[Region] = ()
    given: Tokens | None = None
    steer: Sequence[Callable[[Scale], None]] = ()
    seam: int = 0
    explain: bool = False
    features: Tensor | None = None
    idle: bool = False

    def __post_init__(self) -> None:
        self._set("variations", whole_number("variations", self.variations, 1, MOST_VARIATIONS))
        self._set("seam", whole_number("seam", self.seam, 0, MOST_FEATHER))
        self._set("given", self.given.tokens if isinstance(self.given, Edited) else self.given)
        for name, neutral in (("controls", NEUTRAL), ("shortcuts", NO_SHORTCUTS)):
            self._set(name, neutral if getattr(self, name) is None else getattr(self, name))
        for name, one in (("regions", Region), ("steer", Callable)):  # gone through more than once
            given = getattr(self, name)
            self._set(name, (given,) if isinstance(given, one) else tuple(given or ()))
        right_kinds(vars(self))
        for name in ("explain", "idle"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, kind in {"given": Tokens, "features": Tensor, "regions": Region, "steer": Callable}.items():
            given = getattr(self, name)
            for one in given if isinstance(given, tuple) else [given] if given is not None else []:
                if not isinstance(one, kind):
                    what = "functions of a scale" if kind is Callable else kind.__name__
                    raise ValueError(f"{name} must be {what}, got {type(one).__name__}")
        for region in self.regions:
            _words(region.instruction, "the instruction of a region")
        if self.mask is not None:
            one = is_picture(self.mask) or not hasattr(self.mask, "__iter__")
            masks = [self.mask] if one else list(self.mask)
            self._set("mask", [load_mask(mask) for mask in masks])
        given = [(region, region.mask) for region in self.regions]
        self._set("regions", tuple(r if mask is None else replace(r, mask=load_mask(mask)) for r, mask in given))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class Request:
    """Fitted pictures, what is to be done with them, and the tokens of those that are edits themselves.

    texts: the instructions of all pictures, R of each. negatives: a negative prompt a picture, "" for none.
    """

    fitted: list[FittedImage]
    texts: list[str | Tensor]
    negatives: list[str | Tensor]
    settings: SamplingSettings
    options: Options
    source: Tokens | None = None

    @classmethod
    def of(
        cls, fitted: list[FittedImage], instructions, negatives, settings: SamplingSettings, options: Options,
        source: Tokens | None = None,
    ) -> Request:  # fmt: skip
        """The same with an instruction and a negative prompt for every picture."""
        if options.given is not None:
            _check_begun(options.given, fitted)
        if len({image.schedule for image in fitted}) > 1:
            raise ValueError(
                "the pictures of a batch need different aspect tables; edit them one by one or fit them to squares"
            )
        prompts = _listed(instructions, "instruction")
        if source is not None and isinstance(prompts, list) and len(prompts) == 1:
            (prompts,) = prompts  # an edit of several results is one thing to go on from
        check_regions(options.regions, len(prompts) > 0)
        check_masks(options.mask or (), options.regions, [image.source.size for image in fitted])
        if not (options.regions or len(prompts)):
            raise ValueError("there is no instruction; say what to change in the picture, or give regions")
        rows = [region.instruction for _ in fitted for region in options.regions]
        rows = rows or each(prompts, len(fitted), "instruction")
        unwanted = each("" if negatives is None else negatives, len(fitted), "negative prompt")
        return cls(fitted, rows, unwanted, settings, options, source)

    def batch(self, coder: Coder) -> tuple[EditBatch, list[Image.Image] | None]:
        """The batch of edits, and a mask for each picture."""
        options, count = self.options, len(self.fitted)
        negatives = [
            None if isinstance(n, str) and not n.strip() else coder.features_of([n])[0] for n in self.negatives
        ]
        places, masks, mask = areas(options.regions, self.fitted, drawn_masks(options.mask, count))
        total = self.source and self.source.total()
        features, hints = options.features if self.source is None else total, {}
        if features is not None and features.ndim == 4 and len(features) != count:
            raise ValueError(
                f"features are of {counted(len(features), 'picture')}, but {there_are(count, 'picture')}; give one each"
            )
        if features is None:
            features, texts, hints = coder.begin(self.fitted, self.texts)
        else:
            texts = coder.features_of(self.texts)
        own = len(texts) // count
        batch = EditBatch.of(
            features, [texts[n : n + own] for n in range(0, len(texts), own)], self.fitted[0].schedule, self.settings,
            negatives, options.variations, controls=options.controls, shortcuts=options.shortcuts, mask=mask,
            areas=places, prefix=options.given.to(coder.device).bits if options.given else (), source_total=total,
            **hints,
        )  # fmt: skip
        return batch, masks

    def check(self, batch: EditBatch) -> None:
        """Raise ValueError for knobs that would do nothing, unless these are allowed."""
        complaints = [] if self.options.idle else problems(replace(facts(batch), seam=self.options.seam))
        if complaints:
            raise ValueError("; ".join(complaints))

    def edited(self, coder: Coder, result: Result, masks: list[Image.Image] | None) -> Edited:
        """The results as pictures. masks: those of `batch`."""
        options, fittings = self.options, {image.fitting for image in self.fitted}
        shown = [image for image in self.fitted for _ in range(options.variations)]
        fitting = self.fitted[0].fitting if len(fittings) == 1 else None
        tokens = replace(
            result.tokens, fitting=fitting, auto_mask=options.controls.auto_mask, lost=_lost(self.fitted, self.source)
        )
        decoded = Decoded(coder.decode_pixels, result.total, shown, result.before)
        found = decoded.found(tokens) if options.controls.auto_mask else None
        result.check()
        drawn = masks and [mask for mask in masks for _ in range(options.variations)]
        pictures = decoded.composited((drawn, found), options.seam)
        for picture, image in zip(pictures, shown):
            picture.info |= image.source.info
        return Edited(pictures, tokens, found, *(decoded.maps(result.confidence) if options.explain else ()))


def _lost(fitted: list[FittedImage], source: Tokens | None) -> tuple[str, ...]:
    """What the pictures had, or those that tokens were made of, that tokens do not hold."""
    had = set(source.lost if source else ())
    for one in (image.source for image in fitted):
        kinds = zip(LOST, (not one.opaque, one.icc_profile, one.details != NO_DETAILS))
        had.update(name for name, there in kinds if there)
    return tuple(name for name in LOST if name in had)


def sources(
    coder: Coder, pictures: Sequence[Picture | Tokens | Edited], size: str, method: str, sized: bool
) -> tuple[list[FittedImage], Tokens | None]:
    """Pictures as the model sees them; of tokens, which are decoded for this alone, with the tokens. sized: whether
    the size was asked for."""
    known = [picture.tokens if isinstance(picture, Edited) else picture for picture in pictures]
    if not any(isinstance(picture, Tokens) for picture in known):
        return [coder.fit(picture, size, method) for picture in pictures], None
    if not all(isinstance(picture, Tokens) and picture.complete for picture in known):
        raise ValueError(
            "tokens of some of the scales are no picture yet: finish them (--begun, given), and do not mix tokens "
            "with pictures"
        )
    if len({tokens.schedule for tokens in known}) > 1:
        raise ValueError("these edits have different sizes or aspect tables; go on from them one by one")
    if any(tokens.fitting is None for tokens in known if isinstance(pictures[0], Edited)):
        raise ValueError("the pictures of this edit have different sizes; go on from edits of one picture each")
    for tokens in known:
        tokens.check_vae(coder.autoencoder.config.bits, coder.autoencoder.config.stride)
        if (sized or method != FIT) and not _alike(fitting_for(tokens.shown.size, size, method), tokens.shown, method):
            raise ValueError("tokens have the size and fit they were made with; leave out size and method")
    source, shown = joined(known).to(coder.device), []
    for picture, tokens in zip(pictures, known):
        seen = picture.pictures if isinstance(picture, Edited) else _shown(coder, tokens.to(coder.device))
        shown += [FittedImage(torch.empty(0), tokens.shown, load_image(one)) for one in seen]
    return shown, source


def _alike(fitting: Fitting, own: Fitting, method: str) -> bool:
    """Whether tokens have the size that is asked for and, where that is asked for, the fit."""
    return fitting.schedule == own.schedule and (method == FIT or fitting.box == own.box)


def _shown(coder: Coder, tokens: Tokens) -> list[Image.Image]:
    return [unfit(to_uint8(coder.decode_pixels(total[None])[0]), tokens.shown) for total in tokens.total()]


def each(given, count: int, name: str) -> list:
    """One of something for every picture, where one is given for all. ValueError for another number of them."""
    listed = _listed(given, name)
    if isinstance(listed, (str, Tensor)):
        return [listed] * count
    if len(listed) != count:
        raise ValueError(
            f"{there_are(count, 'picture')} but {counted(len(listed), name)} in the list; give one each, or a single "
            "one for all"
        )
    return listed


def _listed(given, name: str) -> list | str | Tensor:
    """Words or text features as they are; several of them as a list."""
    if isinstance(given, (str, Tensor)):
        return given
    listed = list(given) if hasattr(given, "__iter__") and not isinstance(given, (bytes, bytearray)) else [given]
    for one in listed:
        _words(one, name)
    return listed


def _words(given, name: str) -> None:
    if not isinstance(given, (str, Tensor)):
        raise ValueError(f"{name} must be words, or text features of encode_text, got {type(given).__name__}")


def _check_begun(given: Tokens, fitted: list[FittedImage]) -> None:
    """ValueError for tokens that leave nothing to draw, or are of another picture's shape."""
    if given.complete:
        raise ValueError(
            f"these tokens are of all {len(given)} scales, so that nothing is left to draw; keep fewer of them"
        )
    if given.fitting is None:
        return
    width, height = given.fitting.size
    if {image.fitting.size for image in fitted} != {(width, height)}:
        raise ValueError(f"the tokens are of a {width}x{height} picture, not of this one; go on with theirs")
    if {image.fitting.box for image in fitted} != {given.fitting.box}:
        raise ValueError("the tokens were made with another fit; choose the one that they were made with")
