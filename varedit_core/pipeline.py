"""Pictures and instructions in, edited pictures out: the networks, the loop and the image handling put together.

With a transformer that reads no source (Infinity) it is text in, pictures out: `Editor.generate` in place of `edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .autoencoder import Autoencoder
from .capture import Recorder
from .checkpoints import load_autoencoder, load_transformer
from .config import patch_size
from .defaults import DEFAULT_SETTINGS, FIT, FITS, KINDS, NO_SHORTCUTS, SIZE, TEXT_SETTINGS, SamplingSettings, Shortcuts
from .drafting import draft_and_refine
from .eight_bit import LINEARS
from .images import FittedImage, SourceImage, empty, fit, fit_mask, load_image, restore
from .memory import Elsewhere, make_room, planned
from .planning import Job, Plan
from .sampling import Promises, Scale, sample
from .schedule import Schedule, nearest_ratio, schedule_for
from .text import TextEncoder, load_text_encoder
from .transformer import Transformer
from .workspace import Workspace

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
    ) -> Iterator[Scale]:
        """`sampling.sample` with the editor's transformer and workspace; `drafting` where scales are drafted.

        variations: edits of each image with one seed after the other. ValueError where there is no drafter.
        """
        args, more = (features_BdHW, texts, schedule), dict(copies=variations, mask=mask, promises=promises)
        if not shortcuts.drafted:
            more |= dict(workspace=self.workspace, shortcuts=shortcuts)
            return sample(self.transformer, *args, settings, negatives, **more)
        if self.drafter is None:
            raise ValueError("drafted scales need a second transformer; name a drafter, or leave drafted at 0")
        workspaces = (self._drafts, self.workspace)
        return draft_and_refine(
            self.drafter, self.transformer, *args, shortcuts, settings, negatives, workspaces, **more
        )

    def edit(
        self,
        images: Sequence[Picture] | Picture,
        instructions: Sequence[str | Tensor] | str | Tensor,
        negatives: Sequence[str | Tensor] | str | None = None,
        size: str = SIZE,
        method: str = FIT,
        settings: SamplingSettings = DEFAULT_SETTINGS,
        on_scale: Callable[[Scale, list[FittedImage]], None] | None = None,
        variations: int = 1,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        mask: Image.Image | None = None,
    ) -> list[Image.Image]:
        """Edit pictures, each by its own instruction, in one batch; the results have the inputs' sizes.

        instructions: prompts, or their text features [L_i, channels]. negatives: the same, "" for none; one string
        serves every picture. variations: results of each picture, one behind the other, of as many seeds. mask: where
        the pictures may change (white); elsewhere they stay as they are.
        on_scale: called with every `Scale` before its bits are drawn, and the fitted pictures; raise in it to
        cancel. ValueError where pictures, instructions and model do not belong together.
        """
        if not self.transformer.config.source:
            raise ValueError(
                "this transformer makes pictures of text alone; use `generate`, or load it as the kind edit if it learned to edit"
            )
        pictures = [images] if isinstance(images, (str, Path, Image.Image, SourceImage)) else list(images)
        prompts = [instructions] if isinstance(instructions, (str, Tensor)) else list(instructions)
        if not pictures:
            raise ValueError("there is no picture to edit; pass at least one")
        fitted = [self.fit(picture, size, method) for picture in pictures]
        if len({image.schedule for image in fitted}) > 1:
            raise ValueError(
                "the pictures of a batch need different aspect tables; edit them one by one or fit them to squares"
            )
        return self._run(fitted, prompts, negatives, settings, on_scale, variations, shortcuts, mask)

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
    ) -> list[Image.Image]:
        """Pictures of texts alone, in one batch, by a transformer that reads no source; of the model's size and the
        nearest table to `ratio` (height / width).

        picture, mask: instead, repaint a picture where the mask is white: the rest stays as it is, and the results have
        its size and shape. prompts, negatives, variations, on_scale: as instructions and the like of `edit`. ValueError
        for a transformer that edits, and for a picture without a mask or the other way round.
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
        made = empty(schedule_for(size, nearest_ratio(ratio))) if picture is None else self.fit(picture, size, FITS[1])
        return self._run([made] * len(texts), texts, negatives, settings, on_scale, variations, shortcuts, mask)

    def _run(
        self, fitted: list[FittedImage], prompts: list, negatives, settings, on_scale, variations: int, shortcuts, mask
    ) -> list[Image.Image]:
        """What `edit` and `generate` share: from fitted pictures and prompts to pictures."""
        unwanted = None
        if negatives is not None:
            listed = [negatives] * len(fitted) if isinstance(negatives, str) else negatives
            unwanted = [None if isinstance(n, str) and not n else self._features(n) for n in listed]
        masks = None if mask is None else torch.cat([fit_mask(mask, image.fitting) for image in fitted])
        more = dict(shortcuts=shortcuts, mask=masks)
        self._make_room(fitted[0], 2)
        features, texts, promises = self.begin(fitted, prompts)
        more["promises"] = promises
        latents, last = self._latents(features, texts, unwanted, fitted, settings, on_scale, variations, more)
        self._make_room(fitted[0])
        results = self.decode(latents, repeated(fitted, variations))
        for scale in last:
            scale.check()
        return [masked(*pair, mask) for pair in zip(results, repeated(fitted, variations))] if mask else results

    def _latents(self, features, texts, negatives, fitted, settings, on_scale, variations, more) -> tuple[Tensor, list[Scale]]:
        """Running sums [B, d, H, W] of all pictures, of as many at a time as memory lasts for, and their last scales,
        which are not checked yet."""
        schedule, others = fitted[0].schedule, [self.text.model] if self.text else []
        others += [] if on_scale else [self.autoencoder]  # who watches may decode
        longest = max(len(text) for text in (*texts, *(negatives or ())) if text is not None)
        count = len(fitted) * variations
        job = Job(self.transformer.config, schedule, count, settings.guided, self.transformer.dtype, longest)
        way = Plan(job)
        if self.workspace is self._planned:
            way, self._planned = planned(job, self.transformer, self.device, self.workspace, others, self.exact)
            self.workspace = self._planned
        sums, ends, mask = [], [], more["mask"]
        if way.job.images < count:  # every result a picture of its own; those of one source still share its pass
            features, fitted = features.repeat_interleave(variations, 0), repeated(fitted, variations)
            texts, negatives = repeated(texts, variations), negatives and repeated(negatives, variations)
            mask = mask if mask is None or len(mask) == 1 else mask.repeat_interleave(variations, 0)
            step, copies = way.job.images, 1
        else:
            step, copies = len(fitted), variations
        if way.movable or step < len(features):
            more |= {"promises": more["promises"].settled()}
        for kept in self._recordings if way.movable else ():
            kept.forget()
        with self._elsewhere(others if way.movable else (), self.device):
            for first in range(0, len(features), step):
                part = slice(first, first + step)
                seeded = replace(settings, seed=(settings.seed + first) % 2**64)
                own = more | {"mask": mask if mask is None or len(mask) == 1 else mask[part]}
                args = features[part], texts[part], schedule, seeded, negatives and negatives[part], copies
                run = self.sample(*args, **own)
                with closing(run) as scales:
                    for scale in scales:
                        if on_scale:
                            on_scale(scale, repeated(fitted[part], copies))
                sums.append(scale.running_sum)
                ends.append(scale)
        return torch.cat(sums), ends

    def _make_room(self, image: FittedImage, times: float = 1) -> None:
        """Forget what is kept between edits where it leaves too little to decode a picture, or that several times."""
        tokens = image.schedule.tokens[-1] * patch_size(self.transformer.config, self.autoencoder.config) ** 2
        make_room(self.workspace, self.device, times * tokens * self.autoencoder.bytes_to_decode)


def _alike(given: tuple[list, list], last: tuple[list, list]) -> bool:
    """Whether pictures and prompts may be the last ones: pictures by some of their pixels."""
    counts = (len(a) == len(b) for a, b in zip(given, last))
    pictures = (a.shape == b.shape and torch.equal(a[..., ::31, ::31], b[..., ::31, ::31]) for a, b in zip(given[0], last[0]))
    return all(counts) and all(pictures) and all(a is b or (isinstance(a, str) and a == b) for a, b in zip(given[1], last[1]))


def repeated(items: Sequence, count: int) -> list:
    """Every item `count` times, one behind the other."""
    return [item for item in items for _ in range(count)]


def masked(edited: Image.Image, image: FittedImage, mask: Image.Image) -> Image.Image:
    """The edit where the mask is white, the picture itself where it is black."""
    result = Image.composite(
        edited.convert("RGB"), image.source.rgb, mask.convert("L").resize(edited.size, Image.Resampling.BILINEAR)
    )
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
