"""Pictures and instructions in, edited pictures out: the networks, the loop and the image handling put together.

With a transformer that reads no source (Infinity) it is text in, pictures out: `Editor.generate` in place of `edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from .controls.effects import Certainty, changed, differing
from .defaults import (
    DEFAULT_SETTINGS,
    FIT,
    FITS,
    KINDS,
    NEUTRAL,
    NO_SHORTCUTS,
    SIZE,
    TEXT_SETTINGS,
    Controls,
    SamplingSettings,
    Shortcuts,
)  # fmt: skip
from .files.checkpoints import load_autoencoder, load_transformer
from .model.config import patch_size
from .model.transformer import Transformer
from .pictures.canvas import faded
from .pictures.images import (
    FittedImage,
    SourceImage,
    empty,
    fit,
    fit_mask,
    load_image,
    restore,
    to_uint8,
    unfit,
    unfit_mask,
)  # fmt: skip
from .runtime.fp8 import LINEARS
from .runtime.graphs import Recorder
from .runtime.memory import Elsewhere, make_room, planned
from .runtime.plan import Job, Plan
from .runtime.tiling import bytes_to_decode
from .runtime.workspace import Workspace
from .sampling.batch import Request, edits, repeated
from .sampling.loop import Control, Promises, Scale
from .text.encoder import TextEncoder, load_text_encoder
from .tokenizer.schedule import Schedule, nearest_ratio, schedule_for
from .tokenizer.tokens import Tokens, joined, tokens_of
from .tokenizer.vae import Autoencoder

RECORDED_SIDE = 640
"""Squares of up to so many pixels a side are encoded and decoded by recorded graphs: smaller ones wait for launches."""

Picture = str | Path | Image.Image | SourceImage


class Editor:
    """A transformer, its tokenizer and (unless text features are given) a text encoder, on one device.

    workspace: where edits keep keys and values. `edit` plans its own by the memory that is free (see `memory`), unless
    it is given another. drafter: a second transformer for `Shortcuts.drafted`. exact: whether `edit` must never keep
    keys and values in 8 bits, however little is free.
    """

    def __init__(
        self, transformer: Transformer, autoencoder: Autoencoder, text: TextEncoder | None = None, device="cpu"
    ) -> None:
        patch_size(transformer.config, autoencoder.config)
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.device = torch.device(device)
        self.workspace = self._planned = Workspace()
        self.exact = False
        self.drafter: Transformer | None = None
        self._drafts, self._elsewhere = Workspace(), Elsewhere()
        self._last: tuple[list[Tensor], list[str | Tensor]] = [], []
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        most, stride = RECORDED_SIDE**2, autoencoder.config.stride
        self._encoder = Recorder(autoencoder, autoencoder.encode, 3 * most)
        self._decoder = Recorder(autoencoder, autoencoder.decode, autoencoder.config.bits * most // stride**2)

    def forget(self) -> None:
        """Give back all memory that is kept from edit to edit."""
        self._last = [], []
        for kept in (self.workspace, self._drafts, self._elsewhere, *self._recordings):
            kept.forget()

    @property
    def _recordings(self) -> list:
        """What keeps recorded work of other networks than the transformer."""
        return [self._encoder, self._decoder, *([self.text] if self.text else [])]

    @classmethod
    def load(
        cls,
        transformer: str | Path,
        autoencoder: str | Path,
        text_encoder: str | Path | None = None,
        tokenizer=None,
        device=None,
        dtype=None,
        linears: str = LINEARS[0],
        kind: str = KINDS[0],
    ) -> Editor:
        """Load the parts from files (see `checkpoints` and `text`). Raises WeightError.

        device: CUDA where there is one by default. dtype: of the transformer's blocks; bf16 on CUDA, else fp32.
        The text encoder runs in fp16 on CUDA as published. Pictures are encoded in fp32, always, and decoded in fp32
        too, but on CUDA in bf16 where the blocks run in bf16. linears: of the transformer's blocks, "exact" or "8-bit"
        (an approximation, see `eight_bit`). kind: what the transformer was trained for (see `load_transformer`).
        """
        device = device_of(device)
        on_cuda = device.type == "cuda"
        dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
        text = text_encoder and load_text_encoder(
            text_encoder, tokenizer, torch.float16 if on_cuda else torch.float32, device
        )
        network = load_transformer(transformer, dtype=dtype, device=device, linears=linears, kind=kind)
        decode_dtype = torch.bfloat16 if on_cuda and dtype == torch.bfloat16 else torch.float32
        vae = load_autoencoder(autoencoder, device=device, decode_dtype=decode_dtype)
        return cls(network, vae, text or None, device)

    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text features [L_i, channels] of the prompts. ValueError without a text encoder."""
        if self.text is None:
            raise ValueError("no text encoder is loaded; give one, or give text features instead of an instruction")
        if self._beside is not None:  # where it may be at work
            torch.cuda.current_stream(self.device).wait_stream(self._beside)
        return self.text.encode(prompts)

    def _features(self, prompt: str | Tensor) -> Tensor:
        return prompt if isinstance(prompt, Tensor) else self.encode_text([prompt])[0]

    def fit(self, image: Picture, size: str = SIZE, method: str = FIT) -> FittedImage:
        """Bring a picture to a size the model runs at (see `images.fit`)."""
        return fit(image if isinstance(image, SourceImage) else load_image(image), size, method)

    def _sources(self, pictures: Sequence, size: str, method: str) -> tuple[list[FittedImage], Tokens | None]:
        """Pictures as the model sees them; of tokens, which are decoded for this alone, with the tokens."""
        known = [picture.tokens if isinstance(picture, Edited) else picture for picture in pictures]
        if not any(isinstance(picture, Tokens) for picture in known):
            return [self.fit(picture, size, method) for picture in pictures], None
        if not all(isinstance(picture, Tokens) and picture.complete for picture in known):
            raise ValueError("tokens of some of the scales are no picture yet: finish them (--begun, given), and do not mix tokens with pictures")
        if len({tokens.schedule for tokens in known}) > 1:
            raise ValueError("these edits have different sizes or aspect tables; go on from them one by one")
        if any(tokens.fitting is None for tokens in known if isinstance(pictures[0], Edited)):
            raise ValueError("the pictures of this edit have different sizes; go on from edits of one picture each")
        source, shown = joined(known).to(self.device), []
        for picture, tokens in zip(pictures, known):
            seen = picture.pictures if isinstance(picture, Edited) else self._shown(tokens.to(self.device))
            shown += [FittedImage(torch.empty(0), tokens.shown, load_image(one)) for one in seen]
        return shown, source

    def _shown(self, tokens: Tokens) -> list[Image.Image]:
        return [unfit(to_uint8(self.decode_pixels(total[None])[0]), tokens.shown) for total in tokens.total()]

    @torch.no_grad()
    def encode_source(self, images: Sequence[FittedImage]) -> Tensor:
        """Unquantised features [B, d, H, W] of fitted pictures, each encoded alone; zeros of those of `images.empty`."""
        return torch.cat(
            [self._encoder(i.pixels.to(self.device)) if i.pixels.numel() else self._nothing(i.schedule) for i in images]
        )

    def _nothing(self, schedule: Schedule) -> Tensor:
        config = self.autoencoder.config
        return torch.zeros(1, config.bits, *(side // config.stride for side in schedule.pixels), device=self.device)

    def encode(self, images: Sequence[FittedImage], prompts: Sequence[str | Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`encode_source` of pictures and the text features of prompts, side by side where the device can."""
        features, texts, promises = self.begin(images, prompts)
        promises.settled()
        return features, texts

    def begin(
        self, images: Sequence[FittedImage], prompts: Sequence[str | Tensor]
    ) -> tuple[Tensor, list[Tensor], Promises]:
        """`encode` for an edit that follows at once: with what is promised to `sample`, which the device works on while
        it still encodes the picture."""
        given = [image.pixels for image in images], list(prompts)
        fresh, self._last = not _alike(given, self._last), given
        if self.device.type != "cuda":
            return self.encode_source(images), [self._features(prompt) for prompt in prompts], Promises(True, fresh)
        here, beside = torch.cuda.current_stream(self.device), self._beside
        beside.wait_stream(here)
        with torch.cuda.stream(beside):  # the text's kernels are too small to keep the device busy
            texts = [self._features(prompt) for prompt in prompts]
        features = self.encode_source(images)
        for text in texts:
            text.record_stream(here)
        return features, texts, Promises(True, fresh, beside)

    @torch.no_grad()
    def decode(self, latents_BdHW: Tensor, images: Sequence[FittedImage]) -> list[Image.Image]:
        """Pictures of a running sum, each of exactly its input's size, alpha kept."""
        return [restore(self.decode_pixels(latent[None])[0].cpu(), image) for latent, image in zip(latents_BdHW, images)]

    @torch.no_grad()
    def decode_pixels(self, latent_1dHW: Tensor) -> Tensor:
        """Pixels [1, 3, y, x] in [-1, 1] of one running sum."""
        return self._decoder(latent_1dHW)

    def sample(
        self,
        features_BdHW: Tensor,
        texts: Sequence[Tensor],
        schedule: Schedule,
        settings: SamplingSettings = DEFAULT_SETTINGS,
        negatives: Sequence[Tensor | None] | None = None,
        variations: int = 1,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        mask: Tensor | None = None,
        promises: Promises = Promises(),
        controls: Controls = NEUTRAL,
        given: Sequence[Tensor] = (),
        steer: Sequence[Control] = (),
        source_total: Tensor | None = None,
    ) -> Iterator[Scale]:
        """`sampling.sample` with the editor's transformer and workspace, and `controls`; `drafting` where scales are
        drafted.

        variations: edits of each image with one seed after the other. ValueError where there is no drafter.
        """
        request = Request(features_BdHW, [[text] for text in texts], negatives, mask, None, given, source_total)
        more = dict(shortcuts=shortcuts, controls=controls, steer=steer, promises=promises)
        return self._edits(request, schedule, settings, variations, **more)

    def _edits(self, request: Request, schedule: Schedule, settings: SamplingSettings, copies: int, **more) -> Iterator[Scale]:
        networks = [self.transformer, *([self.drafter] if self.drafter else [])]
        return edits(request, networks, schedule, settings, (self.workspace, self._drafts), copies=copies, **more)

    def edit(self, *args, **more) -> list[Image.Image]:
        """The pictures of `run`: each edited by its own instruction, in one batch, and of exactly its input's size."""
        return self.run(*args, **more).pictures

    def run(
        self,
        images: Sequence[Picture | Tokens | Edited] | Picture | Tokens | Edited,
        instructions: Sequence[str | Tensor] | str | Tensor = (),
        negatives: Sequence[str | Tensor] | str | None = None,
        size: str = SIZE,
        method: str = FIT,
        settings: SamplingSettings = DEFAULT_SETTINGS,
        on_scale: Callable[[Scale, list[FittedImage]], None] | None = None,
        variations: int = 1,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        mask: Image.Image | Sequence[Image.Image] | None = None,
        controls: Controls = NEUTRAL,
        regions: Sequence[Region] = (),
        given: Tokens | None = None,
        steer: Sequence[Control] = (),
        seam: int = 0,
        explain: bool = False,
        features: Tensor | None = None,
    ) -> Edited:
        """Edit pictures, each by its own instruction, in one batch.

        images: pictures, or edits to go on from: their tokens are read, nothing is decoded and encoded in between; what
        a mask leaves is that of the edit's pictures, for tokens alone what they decode to. instructions: prompts, or their
        text features [L_i, channels]. negatives: the same, "" for none; one string serves every picture. variations:
        results of each picture, one behind the other, of as many seeds. mask: where the pictures may change (white),
        one for all or one each; elsewhere they stay as they are. regions: in place of instructions, several of them
        with masks. given: the first scales of this edit, or of the edit this one branches off from. steer: further
        controls (see `controls`). seam: pixels from a mask's edge inwards over which the edit fades in. explain: whether
        to find out, too, what changed and how sure the model was. features: of the pictures, by `encode_source`, where they are known.
        on_scale: called with every `Scale` before its bits are drawn, and the fitted pictures; raise in it to
        cancel. ValueError where pictures, instructions, masks and model do not belong together.
        """
        if not self.transformer.config.source:
            raise ValueError(
                "this transformer makes pictures of text alone; use `generate`, or load it as the kind edit if it learned to edit"
            )
        pictures = [images] if isinstance(images, (str, Path, Image.Image, SourceImage, Tokens, Edited)) else list(images)
        prompts = [instructions] if isinstance(instructions, (str, Tensor)) else list(instructions)
        if not pictures:
            raise ValueError("there is no picture to edit; pass at least one")
        _check_regions(regions, prompts)
        fitted, source = self._sources(pictures, size, method)
        prompts = prompts * len(fitted) if source is not None and len(prompts) == 1 else prompts
        if given is not None:
            _check_begun(given, fitted)
        if len({image.schedule for image in fitted}) > 1:
            raise ValueError(
                "the pictures of a batch need different aspect tables; edit them one by one or fit them to squares"
            )
        more = dict(controls=controls, regions=regions, given=given, steer=steer, seam=seam, explain=explain)
        more["features"] = features
        return self._run(fitted, prompts, negatives, settings, on_scale, variations, shortcuts, mask, source, **more)

    def generate(
        self,
        prompts: Sequence[str | Tensor] | str | Tensor,
        size: str = SIZE,
        ratio: float = 1.0,
        settings: SamplingSettings = TEXT_SETTINGS,
        negatives: Sequence[str | Tensor] | str | None = None,
        variations: int = 1,
        picture: Picture | None = None,
        mask: Image.Image | None = None,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        on_scale: Callable[[Scale, list[FittedImage]], None] | None = None,
        controls: Controls = NEUTRAL,
        **more,
    ) -> list[Image.Image]:
        """Pictures of texts alone, in one batch, by a transformer that reads no source; of the model's size and the
        nearest table to `ratio` (height / width).

        picture, mask: instead, repaint a picture where the mask is white: the rest stays as it is, and the results have
        its size and shape. prompts, negatives, variations, on_scale, more: as instructions and the like of `run`.
        ValueError for a transformer that edits, for a picture without a mask or the other way round, and for controls that
        hold to a source where there is none.
        """
        if self.transformer.config.source:
            raise ValueError(
                "this transformer edits pictures; use `edit`, or load it as the kind text-to-image if it is an Infinity checkpoint"
            )
        if (picture is None) != (mask is None):
            raise ValueError("to repaint a picture give both: the picture, which is read only outside the mask, and the mask")
        texts = [prompts] if isinstance(prompts, (str, Tensor)) else list(prompts)
        if not texts:
            raise ValueError("there is nothing to make; give at least one prompt")
        _check_regions(more.get("regions", ()), texts)
        made = empty(schedule_for(size, nearest_ratio(ratio))) if picture is None else self.fit(picture, size, FITS[1])
        if picture is None:
            controls.check_source()
        more["controls"] = controls
        return self._run([made] * len(texts), texts, negatives, settings, on_scale, variations, shortcuts, mask, **more).pictures

    def _run(
        self,
        fitted: list[FittedImage],
        prompts: list,
        negatives,
        settings: SamplingSettings,
        on_scale,
        variations: int,
        shortcuts: Shortcuts,
        mask,
        source: Tokens | None = None,
        controls: Controls = NEUTRAL,
        regions: Sequence[Region] = (),
        given: Tokens | None = None,
        steer: Sequence[Control] = (),
        seam: int = 0,
        explain: bool = False,
        features: Tensor | None = None,
    ) -> Edited:
        """What `run` and `generate` share: from fitted pictures and prompts to pictures. source: tokens of the sources."""
        unwanted = None
        if negatives is not None:
            listed = [negatives] * len(fitted) if isinstance(negatives, str) else negatives
            unwanted = [None if isinstance(n, str) and not n else self._features(n) for n in listed]
        count = max(1, len(regions))
        if regions:
            prompts = [region.instruction for _ in fitted for region in regions]
        drawn, where = _masks(mask, fitted)
        areas, drawn, where = _areas(regions, fitted, drawn, where)
        self._make_room(fitted[0], 2)
        total = source and source.total()
        features = features if source is None else total
        if features is None:
            features, texts, promises = self.begin(fitted, prompts)
        else:
            texts, promises = [self._features(p) for p in prompts], Promises(True)
        rows = [texts[n : n + count] for n in range(0, len(texts), count)]
        bits = given.to(self.device).bits if given else ()
        request = Request(features, rows, unwanted, where, areas, bits, total)
        more = dict(shortcuts=shortcuts, controls=controls, promises=promises, steer=steer)
        parts = self._parts(request, fitted, source, on_scale, variations, settings, explain, more)
        self._make_room(fitted[0])
        sums, shown = torch.cat([part.sums for part in parts]), repeated(fitted, variations)
        results, found, tokens = self.decode(sums, shown), None, joined([part.tokens for part in parts])
        moved = None
        if controls.auto_mask or explain:
            before = torch.cat([part.before for part in parts])
            moved = [self._moved(*pair) for pair in zip(sums, before)]
        if controls.auto_mask:
            free = tokens.free if tokens.free is not None else torch.ones(1, 1, *tokens.grid, dtype=torch.bool)
            free = free.any(1, keepdim=True).expand(len(sums), -1, -1, -1).to(self.device)
            found = [unfit_mask(differing(*m, f, controls.auto_mask), i.fitting) for m, f, i in zip(moved, free, shown)]
        for part in parts:
            part.last.check()
        for layer in (drawn and repeated(drawn, variations), found):
            results = [masked(*one, seam) for one in zip(results, shown, layer)] if layer else results
        if not explain:
            return Edited(results, tokens, found)
        side = fitted[0].schedule.pixels
        sure = F.interpolate(torch.cat([part.sure for part in parts])[:, None], side, mode="bilinear")[:, 0]
        soft = [changed(*(levels[None].float() / 127.5 - 1 for levels in pair))[0] for pair in moved]
        maps = [[unfit_mask(x, image.fitting) for x, image in zip(each, shown)] for each in (soft, sure)]
        return Edited(results, tokens, found, *maps)

    def _parts(
        self, request: Request, fitted: list[FittedImage], source: Tokens | None, on_scale, variations: int,
        settings: SamplingSettings, explain: bool, more: dict,
    ) -> list[_Part]:  # fmt: skip
        """The edits of all pictures, of as many at a time as memory lasts for; their last scales are not checked yet."""
        schedule, others = fitted[0].schedule, [self.text.model] if self.text else []
        others += [] if on_scale else [self.autoencoder]  # who watches may decode
        best, each = more["controls"].best_of, request.regions  # rows of a result
        count = len(request) * each * max(variations, best)
        job = Job(self.transformer.config, schedule, count, settings.guided, self.transformer.dtype, request.longest)
        way = Plan(job)
        if self.workspace is self._planned:
            way, self._planned = planned(job, self.transformer, self.device, self.workspace, others, self.exact)
            self.workspace = self._planned
        step, copies = len(fitted), variations
        if way.job.images < count:  # every result a picture of its own; those of one source still share its pass
            each *= best
            if way.job.images < each:
                raise ValueError(f"memory lasts for {way.job.images} of {each} rows of regions and candidates; use fewer")
            request, fitted = request.repeated(variations), repeated(fitted, variations)
            source = source and source.of(repeated(range(source.images), variations))
            step, copies = way.job.images // each, 1
        if way.movable or step < len(fitted):
            more |= {"promises": more["promises"].settled()}
        for kept in self._recordings if way.movable else ():
            kept.forget()
        parts = []
        with self._elsewhere(others if way.movable else (), self.device):
            for first in range(0, len(fitted), step):
                rows = range(len(fitted))[first : first + step]
                own, shown = request.part(slice(first, first + step)), repeated([fitted[n] for n in rows], copies)
                seeded = replace(settings, seed=(settings.seed + first) % 2**64)
                bits, sure = [], Certainty() if explain else None
                with closing(self._edits(own, schedule, seeded, copies, **more)) as scales:
                    for scale in scales:
                        if sure:
                            sure(scale)
                        if on_scale:
                            on_scale(scale, shown)
                        bits.append(scale.bits)
                under = source and source.of(repeated(rows, copies))
                pick = partial(own.own, copies=copies)
                fitting = shown[0].fitting if len({image.fitting for image in shown}) == 1 else None
                tokens = tokens_of(bits, scale, schedule, fitting, under, pick)
                before = pick(scale.source.total) if explain or more["controls"].auto_mask else None
                parts.append(_Part(scale, tokens, pick(scale.running_sum), before, pick(sure.map) if sure else None))
        return parts

    def _moved(self, latent: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """8-bit levels [3, y, x] of a sum [d, H, W], and of its source's."""
        return tuple(to_uint8(self.decode_pixels(x[None])[0]) for x in (latent, before))

    def _make_room(self, image: FittedImage, times: float = 1) -> None:
        """Forget what is kept between edits where it leaves too little to decode a picture, or that several times."""
        tokens = image.schedule.tokens[-1] * patch_size(self.transformer.config, self.autoencoder.config) ** 2
        make_room(self.workspace, self.device, times * tokens * bytes_to_decode(self.autoencoder))


def _alike(given: tuple[list, list], last: tuple[list, list]) -> bool:
    """Whether pictures and prompts may be the last ones: pictures by some of their pixels."""
    counts = (len(a) == len(b) for a, b in zip(given, last))
    pictures = (a.shape == b.shape and torch.equal(a[..., ::31, ::31], b[..., ::31, ::31]) for a, b in zip(given[0], last[0]))
    return all(counts) and all(pictures) and all(a is b or (isinstance(a, str) and a == b) for a, b in zip(given[1], last[1]))


@dataclass(frozen=True, eq=False)
class Region:
    """An instruction, a prompt or its text features [L, channels], and where it counts (white); None: everywhere."""

    instruction: str | Tensor
    mask: Image.Image | None = None


@dataclass(frozen=True, eq=False)
class Edited:
    """What comes of edits. pictures, of the inputs' sizes, and the tokens they are decoded from, variations of a picture
    behind each other. masks: what each auto mask found, white where the picture changed. changes: how much each place
    changed (`controls.changed`), and certainty: how sure the model was of it (`controls.Certainty`), the whiter the more;
    all as large as the pictures, mode L, None where not asked for."""

    pictures: list[Image.Image]
    tokens: Tokens
    masks: list[Image.Image] | None = None
    changes: list[Image.Image] | None = None
    certainty: list[Image.Image] | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """Edits that ran together: their sums [B, d, H, W]; where asked for, the sources' sums and how sure the model was."""

    last: Scale
    tokens: Tokens
    sums: Tensor
    before: Tensor | None
    sure: Tensor | None


def _masks(mask, fitted: list[FittedImage]) -> tuple[list[Image.Image] | None, Tensor | None]:
    """Masks of the pictures, and of what the model sees of them, [B, y, x]."""
    if mask is None:
        return None, None
    masks = [mask] if isinstance(mask, Image.Image) else list(mask)
    if len(masks) not in (1, len(fitted)):
        raise ValueError(f"there are {len(masks)} masks for {len(fitted)} pictures; give one, or one for each")
    masks = masks if len(masks) == len(fitted) else masks * len(fitted)
    return masks, torch.cat([fit_mask(one, image.fitting) for one, image in zip(masks, fitted)])


def _areas(regions: Sequence[Region], fitted: list[FittedImage], drawn, where):
    """Regions [B, R, y, x], and the masks of `_masks` within them."""
    if not regions:
        return None, drawn, where
    whole = Image.new("L", (1, 1), 255)
    masks = [region.mask or whole for region in regions]
    areas = torch.stack([torch.cat([fit_mask(mask, image.fitting) for mask in masks]) for image in fitted])
    if any(region.mask is None for region in regions):
        return areas, drawn, where
    size = max(image.source.size for image in fitted)
    union = [mask.convert("L").resize(size, Image.Resampling.BILINEAR) for mask in masks]
    union = reduce(ImageChops.lighter, union)
    within, touched = _masks(union, fitted)
    if drawn is None:
        return areas, within, touched
    return areas, [_darker(*pair) for pair in zip(drawn, within)], torch.minimum(where, touched)


def _darker(a: Image.Image, b: Image.Image) -> Image.Image:
    return ImageChops.darker(a.convert("L").resize(b.size, Image.Resampling.BILINEAR), b)


def _check_begun(given: Tokens, fitted: list[FittedImage]) -> None:
    """ValueError for tokens that leave nothing to draw, or are of another picture's shape."""
    if given.complete:
        raise ValueError(f"these tokens are of all {len(given)} scales, so that nothing is left to draw; keep fewer of them")
    sizes = {image.fitting.size for image in fitted}
    if given.fitting is not None and sizes != {given.fitting.size}:
        raise ValueError(
            f"the tokens are of a {given.fitting.size[0]}x{given.fitting.size[1]} picture, not of this one; go on with theirs"
        )


def _check_regions(regions: Sequence[Region], prompts: list) -> None:
    if regions and prompts:
        raise ValueError("give an instruction or regions, not both; an instruction for everywhere is a region without a mask")
    for number, region in enumerate(regions, start=1):
        if region.mask is not None and region.mask.convert("L").getbbox() is None:
            raise ValueError(f"the mask of region {number} is empty; paint where its instruction is to count")
        if isinstance(region.instruction, str) and not region.instruction.strip():
            raise ValueError(f"region {number} has no instruction; say what to change in it, or leave it out")


def masked(edited: Image.Image, image: FittedImage, mask: Image.Image, seam: int = 0) -> Image.Image:
    """The edit where the mask is white, the picture itself where it is black. seam: see `Editor.run`."""
    result = Image.composite(edited.convert("RGB"), image.source.rgb, faded(mask, edited.size, seam))
    if image.source.alpha is not None:
        result.putalpha(image.source.alpha)
    return result


def device_of(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, CUDA where there is one by default. ValueError where it cannot be used here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"the device {name} cannot be used here; use cpu, or install a PyTorch that supports it"
        ) from None
    return device
