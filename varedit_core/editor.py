"""Pictures and instructions in, edited pictures out: the networks, the driver and the pictures put together.

With a transformer that reads no source (Infinity) it is text in, pictures out: `Editor.generate` in place of `edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock

import torch
from PIL import Image
from torch import Tensor

from .controls.registry import NEUTRAL, NO_SHORTCUTS, Controls, Shortcuts, problems
from .defaults import FIT, FITS, KINDS, SIZE
from .files.checkpoints import load_autoencoder, load_transformer
from .fitting import nearest_ratio
from .model.transformer import Transformer
from .pictures.composite import Region, areas, check_regions, check_rest, drawn_masks
from .pictures.edited import Decoded, Edited
from .pictures.images import FittedImage, SourceImage, empty, fit, fitting_for, load_image, restore, to_uint8, unfit
from .runtime.fp8 import LINEARS
from .runtime.graphs import Recorder
from .runtime.memory import TorchMemory, engine_of, make_room
from .runtime.session import check_alone, checked
from .runtime.tiling import bytes_to_decode
from .runtime.workspace import Workspace
from .sampling.batch import EditBatch
from .sampling.checks import facts, patch_size
from .sampling.driver import Wanted, check, run
from .sampling.loop import sample
from .sampling.results import joined
from .sampling.scale import Scale
from .sampling.settings import DEFAULT_SETTINGS, TEXT_SETTINGS, SamplingSettings
from .sampling.tokens import Tokens
from .text.encoder import TextEncoder, load_text_encoder
from .tokenizer.schedule import Schedule, schedule_for
from .tokenizer.vae import Autoencoder

RECORDED_SIDE = 640
"""Squares of up to so many pixels a side are encoded and decoded by recorded graphs: smaller ones wait for launches."""

Picture = str | Path | Image.Image | SourceImage


@dataclass(frozen=True, eq=False)
class Options:
    """What `Editor.run` takes by name beside pictures, instructions and settings.

    variations: results of each picture, one behind the other, of as many seeds. mask: where the pictures may change
    (white), one for all or one each; elsewhere they stay as they are. regions: in place of instructions, several of
    them with masks. given: the first scales of this edit, or of the edit this one branches off from. steer: functions
    of a `Scale`, called behind the controls. seam: the feather, pixels from a mask's edge inwards over which the edit
    fades in. explain: whether to find out, too, what changed and how sure the model was. features: of the pictures, by
    `encode_source`, where they are known.
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

    def __post_init__(self) -> None:
        for name in ("regions", "steer"):  # gone through more than once
            object.__setattr__(self, name, tuple(getattr(self, name)))


class Editor:
    """A transformer, its VAE and (unless text features are given) a text encoder, on one device.

    Threads may share it: their edits run one after the other. workspace: where edits keep their KV cache. It is chosen
    by the memory that is free, unless another is set. drafter: a second transformer for `Shortcuts.drafted`. exact:
    whether the KV cache must never be in 8 bits, however little is free.
    """

    def __init__(
        self, transformer: Transformer, autoencoder: Autoencoder, text: TextEncoder | None = None, device="cpu"
    ) -> None:
        patch_size(transformer.config, autoencoder.config)
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.device, self._lock = torch.device(device), RLock()
        self._last: tuple[list[Tensor], list[str | Tensor]] = [], []
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        most, stride = RECORDED_SIDE**2, autoencoder.config.stride
        self._encoder = Recorder(autoencoder, autoencoder.encode, 3 * most)
        self._decoder = Recorder(autoencoder, autoencoder.decode, autoencoder.config.bits * most // stride**2)
        self.memory = TorchMemory(transformer, self.device)
        self.memory.recordings = (self._encoder, self._decoder, *([text] if text else []))

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
        (an approximation, see `fp8`). kind: what the transformer was trained for (see `load_transformer`).
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

    @property
    def workspace(self) -> Workspace:
        return self.memory.workspace

    @workspace.setter
    def workspace(self, workspace: Workspace) -> None:
        self.memory.use(workspace)

    @property
    def drafter(self) -> Transformer | None:
        return self.memory.drafter

    @drafter.setter
    def drafter(self, drafter: Transformer | None) -> None:
        self.memory.drafter = drafter

    @property
    def exact(self) -> bool:
        return self.memory.exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        self.memory.exact = exact

    def forget(self) -> None:
        """Give back all memory that is kept from edit to edit."""
        with self._lock:
            self._last = [], []
            for kept in (self.memory, *self.memory.recordings):
                kept.forget()

    def fit(self, image: Picture, size: str = SIZE, method: str = FIT) -> FittedImage:
        """Bring a picture to a size the model runs at (see `images.fit`)."""
        return fit(image if isinstance(image, SourceImage) else load_image(image), size, method)

    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text features [L_i, channels] of the prompts. ValueError without a text encoder."""
        if self.text is None:
            raise ValueError("no text encoder is loaded; give one, or give text features instead of an instruction")
        with self._lock:
            if self._beside is not None:  # where it may be at work
                torch.cuda.current_stream(self.device).wait_stream(self._beside)
            return self.text.encode(prompts)

    def _texts(self, prompts: Sequence[str | Tensor]) -> list[Tensor]:
        return [prompt if isinstance(prompt, Tensor) else self.encode_text([prompt])[0] for prompt in prompts]

    @torch.no_grad()
    def encode_source(self, images: Sequence[FittedImage]) -> Tensor:
        """Unquantised features [P, d, H, W] of fitted pictures, each encoded alone; zeros of those of
        `images.empty`."""
        bits, stride = self.autoencoder.config.bits, self.autoencoder.config.stride
        found = []
        with self._lock:
            for image in images:
                sides = [side // stride for side in image.schedule.pixels]
                if image.pixels.numel():
                    found.append(self._encoder(image.pixels.to(self.device)))
                else:
                    found.append(torch.zeros(1, bits, *sides, device=self.device))
        return torch.cat(found)

    def encode(self, images: Sequence[FittedImage], prompts: Sequence[str | Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`encode_source` of pictures and the text features of prompts, side by side where the device can."""
        features, texts, hints = self.begin(images, prompts)
        if hints["stream"] is not None:
            torch.cuda.current_stream(self.device).wait_stream(hints["stream"])
        return features, texts

    def begin(
        self, images: Sequence[FittedImage], prompts: Sequence[str | Tensor]
    ) -> tuple[Tensor, list[Tensor], dict]:
        """`encode` for an edit that follows at once, and what saves it time: the fields `fresh` and `stream` of
        `EditBatch`. The device works on the texts while it still encodes the pictures."""
        given = [image.pixels for image in images], list(prompts)
        fresh, self._last = not _alike(given, self._last), given
        if self._beside is None:
            return self.encode_source(images), self._texts(prompts), {"fresh": fresh, "stream": None}
        here, beside = torch.cuda.current_stream(self.device), self._beside
        beside.wait_stream(here)
        with torch.cuda.stream(beside):  # the text's kernels are too small to keep the device busy
            texts = self._texts(prompts)
        features = self.encode_source(images)
        for text in texts:
            text.record_stream(here)
        return features, texts, {"fresh": fresh, "stream": beside}

    @torch.no_grad()
    def decode(self, latents_PdHW: Tensor, images: Sequence[FittedImage]) -> list[Image.Image]:
        """Pictures of a running sum, each of exactly its input's size, alpha kept."""
        return [
            restore(self.decode_pixels(latent[None])[0].cpu(), image) for latent, image in zip(latents_PdHW, images)
        ]

    @torch.no_grad()
    def decode_pixels(self, latent_1dHW: Tensor) -> Tensor:
        """Pixels [1, 3, y, x] in [-1, 1] of one running sum."""
        with self._lock:
            return self._decoder(latent_1dHW)

    def sample(
        self,
        features: Tensor,
        texts: Sequence[Tensor],
        schedule: Schedule,
        settings: SamplingSettings = DEFAULT_SETTINGS,
        negatives: Sequence[Tensor | None] | None = None,
        variations: int = 1,
        steer: Sequence[Callable[[Scale], None]] = (),
        **more,
    ) -> Iterator[Scale]:
        """The loop with the editor's transformer and workspace. more: further fields of `EditBatch`, such as controls,
        shortcuts and mask. ValueError where there is no drafter. Several may run in turns: one that finds the workspace
        taken has one of its own."""
        batch = EditBatch.of(features, texts, schedule, settings, negatives, variations, **more)
        yield from checked(self.scales(batch, steer))

    def scales(self, batch: EditBatch, steer: Sequence[Callable[[Scale], None]] = ()) -> Iterator[Scale]:
        """`sample` for a batch; whether the logits were numbers is left to `Scale.check`, which waits for the
        device."""
        check(batch, self.drafter is not None)
        check_alone(batch, self.drafter is not None)
        networks = self.memory.networks[: 1 + (batch.shortcuts.drafted > 0)]
        return sample(engine_of(networks, [self.workspace, self.memory.drafts]), batch, steer)

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
        **options,
    ) -> Edited:
        """Edit pictures, each by its own instruction, in one batch.

        images: pictures, or edits to go on from: their tokens are read, nothing is decoded and encoded in between; what
        a mask leaves is that of the edit's pictures, for tokens alone what they decode to. instructions: prompts, or
        their text features [L_i, channels]; one serves every picture. negatives: the same, "" for none. on_scale:
        called with every `Scale` before its bits are drawn, and the fitted pictures of its results; raise in it to
        cancel. options: see `Options`. ValueError where pictures, instructions, masks and model do not belong together.
        """
        wanted = Options(**options)
        if not self.transformer.config.source:
            raise ValueError(
                "this transformer makes pictures of text alone; use `generate`, or load it as the kind edit if it "
                "learned to edit"
            )
        single = (str, Path, Image.Image, SourceImage, Tokens, Edited)
        pictures = [images] if isinstance(images, single) else list(images)
        if not pictures:
            raise ValueError("there is no picture to edit; pass at least one")
        if wanted.features is not None and any(isinstance(picture, (Tokens, Edited)) for picture in pictures):
            raise ValueError("features are of pictures, and tokens have their own; leave out features")
        with self._lock:
            fitted, source = self._sources(pictures, size, method)
            if wanted.given is not None:
                _check_begun(wanted.given, fitted)
            if len({image.schedule for image in fitted}) > 1:
                raise ValueError(
                    "the pictures of a batch need different aspect tables; edit them one by one or fit them to squares"
                )
            return self._edited(fitted, instructions, negatives, settings, on_scale, wanted, source)

    def generate(self, *args, **more) -> list[Image.Image]:
        """The pictures of `make`."""
        return self.make(*args, **more).pictures

    def make(
        self,
        prompts: Sequence[str | Tensor] | str | Tensor,
        size: str = SIZE,
        ratio: float = 1.0,
        settings: SamplingSettings = TEXT_SETTINGS,
        negatives: Sequence[str | Tensor] | str | None = None,
        picture: Picture | None = None,
        on_scale: Callable[[Scale, list[FittedImage]], None] | None = None,
        **options,
    ) -> Edited:
        """Pictures of texts alone, in one batch, by a transformer that reads no source; of the model's size and the
        nearest table to `ratio` (height / width).

        picture, with the option mask: instead, repaint a picture where the mask is white: the rest stays as it is, and
        the results have its size and shape. prompts, negatives, on_scale, options: as instructions and the like of
        `run`. ValueError for a transformer that edits, for a picture without a mask or the other way round, and for
        controls that hold to a source where there is none.
        """
        wanted = Options(**options)
        if self.transformer.config.source:
            raise ValueError(
                "this transformer edits pictures; use `edit`, or load it as the kind text-to-image if it is an "
                "Infinity checkpoint"
            )
        if (picture is None) != (wanted.mask is None):
            raise ValueError(
                "to repaint a picture give both: the picture, which is read only outside the mask, and the mask"
            )
        texts = [prompts] if isinstance(prompts, (str, Tensor)) else list(prompts)
        if not (texts or wanted.regions):
            raise ValueError("there is nothing to make; give at least one prompt")
        if picture is None:
            wanted.controls.check_source()
            check_rest(wanted.regions)
        elif ratio != 1:
            raise ValueError("the picture gives the shape; leave out ratio")
        with self._lock:
            if picture is None:
                made = empty(schedule_for(size, nearest_ratio(ratio)))
            else:
                made = self.fit(picture, size, FITS[1])
            return self._edited([made] * max(1, len(texts)), texts, negatives, settings, on_scale, wanted)

    def _sources(self, pictures: Sequence, size: str, method: str) -> tuple[list[FittedImage], Tokens | None]:
        """Pictures as the model sees them; of tokens, which are decoded for this alone, with the tokens."""
        known = [picture.tokens if isinstance(picture, Edited) else picture for picture in pictures]
        if not any(isinstance(picture, Tokens) for picture in known):
            return [self.fit(picture, size, method) for picture in pictures], None
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
            tokens.check_vae(self.autoencoder.config.bits, self.autoencoder.config.stride)
            asked = (size, method) != (SIZE, FIT)
            if asked and fitting_for(tokens.shown.size, size, method).schedule != tokens.schedule:
                raise ValueError("tokens have the size and fit they were made with; leave out size and method")
        source, shown = joined(known).to(self.device), []
        for picture, tokens in zip(pictures, known):
            seen = picture.pictures if isinstance(picture, Edited) else self._shown(tokens.to(self.device))
            shown += [FittedImage(torch.empty(0), tokens.shown, load_image(one)) for one in seen]
        return shown, source

    def _shown(self, tokens: Tokens) -> list[Image.Image]:
        return [unfit(to_uint8(self.decode_pixels(total[None])[0]), tokens.shown) for total in tokens.total()]

    def _edited(
        self, fitted: list[FittedImage], instructions, negatives, settings: SamplingSettings, on_scale, wanted: Options,
        source: Tokens | None = None,
    ) -> Edited:  # fmt: skip
        """What `run` and `generate` share: from fitted pictures to results. source: tokens of the sources."""
        controls, copies = wanted.controls, wanted.variations
        self._make_room(fitted[0], 2)
        batch, layers = self._batch(fitted, instructions, negatives, settings, wanted, source)
        check(batch, self.drafter is not None)
        complaints = problems(replace(facts(batch), seam=wanted.seam))
        if complaints:
            raise ValueError("; ".join(complaints))
        # Who watches may decode, so that the VAE stays; the text encoder is done.
        self.memory.others = [*([self.text.model] if self.text else []), *([] if on_scale else [self.autoencoder])]
        before = bool(controls.auto_mask or wanted.explain)
        watch = on_scale and (lambda scale, results, of: on_scale(scale, [fitted[p] for p in of]))
        result = run(batch, self.memory, watch, wanted.steer, source, Wanted(False, before, wanted.explain))
        self._make_room(fitted[0])
        shown = [image for image in fitted for _ in range(copies)]
        fitting = fitted[0].fitting if len({image.fitting for image in fitted}) == 1 else None
        tokens = replace(result.tokens, fitting=fitting, auto_mask=controls.auto_mask)
        decoded = Decoded(self.decode_pixels, result.total, shown, result.before)
        found = decoded.found(tokens) if controls.auto_mask else None
        result.check()
        drawn = layers and [mask for mask in layers for _ in range(copies)]
        pictures = decoded.composited((drawn, found), wanted.seam)
        return Edited(pictures, tokens, found, *(decoded.maps(result.confidence) if wanted.explain else ()))

    def _batch(self, fitted, instructions, negatives, settings, wanted: Options, source: Tokens | None):
        """The batch of edits, and the masks of its pictures."""
        regions, count = wanted.regions, len(fitted)
        prompts = instructions if isinstance(instructions, (str, Tensor)) else list(instructions)
        if source is not None and isinstance(prompts, list) and len(prompts) == 1:
            (prompts,) = prompts  # an edit of several results is one thing to go on from
        check_regions(regions, len(prompts) > 0)
        rows = [region.instruction for _ in fitted for region in regions] or each(prompts, count, "instruction")
        unwanted = each("" if negatives is None else negatives, count, "negative prompt")
        unwanted = [None if isinstance(n, str) and not n else self._texts([n])[0] for n in unwanted]
        places, layers, mask = areas(regions, fitted, drawn_masks(wanted.mask, count))
        total = source and source.total()
        features, hints = wanted.features if source is None else total, {}
        if features is None:
            features, texts, hints = self.begin(fitted, rows)
        else:
            texts = self._texts(rows)
        each_row = len(rows) // count
        batch = EditBatch.of(
            features, [texts[n : n + each_row] for n in range(0, len(texts), each_row)], fitted[0].schedule, settings,
            unwanted, wanted.variations, controls=wanted.controls, shortcuts=wanted.shortcuts, mask=mask, areas=places,
            prefix=wanted.given.to(self.device).bits if wanted.given else (), source_total=total, **hints,
        )  # fmt: skip
        return batch, layers

    def _make_room(self, image: FittedImage, times: float = 1) -> None:
        """Forget what is kept between edits where it leaves too little to decode a picture, or that several times."""
        tokens = image.schedule.tokens[-1] * patch_size(self.transformer.config, self.autoencoder.config) ** 2
        make_room(self.workspace, self.device, times * tokens * bytes_to_decode(self.autoencoder))


def each(given, count: int, name: str) -> list:
    """One of something for every picture, where one is given for all. ValueError for another number of them."""
    if isinstance(given, (str, Tensor)):
        return [given] * count
    listed = list(given)
    if len(listed) != count:
        pictures = f"{count} picture" + "s" * (count != 1)
        what = f"{len(listed)} {name}" + "s" * (len(listed) != 1)
        raise ValueError(f"there are {pictures} but {what} in the list; give one each, or a single one for all")
    return listed


def _alike(given: tuple[list, list], last: tuple[list, list]) -> bool:
    """Whether pictures and prompts may be the last ones: pictures by some of their pixels."""
    if any(len(a) != len(b) for a, b in zip(given, last)):
        return False
    (pictures, prompts), (last_pictures, last_prompts) = given, last
    for a, b in zip(pictures, last_pictures):
        if a.shape != b.shape or not torch.equal(a[..., ::31, ::31], b[..., ::31, ::31]):
            return False
    return all(a is b or (isinstance(a, str) and a == b) for a, b in zip(prompts, last_prompts))


def _check_begun(given: Tokens, fitted: list[FittedImage]) -> None:
    """ValueError for tokens that leave nothing to draw, or are of another picture's shape."""
    if given.complete:
        raise ValueError(
            f"these tokens are of all {len(given)} scales, so that nothing is left to draw; keep fewer of them"
        )
    sizes = {image.fitting.size for image in fitted}
    if given.fitting is not None and sizes != {given.fitting.size}:
        raise ValueError(
            f"the tokens are of a {given.fitting.size[0]}x{given.fitting.size[1]} picture, not of this one; go on with "
            "theirs"
        )


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
