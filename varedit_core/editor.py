"""Pictures and instructions in, edited pictures out: the networks, the driver and the pictures put together.

With a transformer that reads no source (Infinity) it is text in, pictures out: `Editor.generate` in place of `edit`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .coder import Coder, Picture
from .defaults import FIT, KINDS
from .files.checkpoints import load_autoencoder, load_transformer
from .fitting import ASPECT, nearest_ratio
from .made_for import MadeFor
from .model.transformer import Transformer
from .pictures.composite import check_rest
from .pictures.edited import Edited
from .pictures.images import FittedImage, SourceImage, empty
from .pictures.reading import is_picture
from .request import Options, Request, sources
from .runtime.devices import device_of
from .runtime.fp8 import LINEARS
from .runtime.memory import TorchMemory, engine_of, make_room
from .runtime.session import checked, drawn
from .runtime.tiling import bytes_to_decode
from .runtime.workspace import Workspace
from .sampling.batch import EditBatch
from .sampling.checks import patch_size
from .sampling.driver import Wanted, check, run
from .sampling.scale import Scale
from .sampling.settings import DEFAULT_SETTINGS, TEXT_SETTINGS, SamplingSettings
from .sampling.tokens import Tokens
from .text.cache import CachedText, cached_text_encoder
from .text.encoder import TextEncoder, load_text_encoder
from .tokenizer.schedule import Schedule, schedule_for
from .tokenizer.vae import Autoencoder

logger = logging.getLogger(__name__)


class Editor(Coder):
    """A transformer, its VAE and (unless text features are given) a text encoder, on one device.

    Threads may share it: their edits run one after the other. workspace: where edits keep their KV cache. It is chosen
    by the memory that is free, unless another is set. drafter: a second transformer for `Shortcuts.drafted`. exact:
    whether the KV cache must never be in 8 bits, however little is free.
    """

    def __init__(
        self, transformer: Transformer, autoencoder: Autoencoder, text: TextEncoder | CachedText | None = None,
        device="cpu",
    ) -> None:  # fmt: skip
        super().__init__(autoencoder, text, device)
        self.text_length = transformer.config.text_length
        self.patch, self.transformer = patch_size(transformer.config, autoencoder.config), transformer
        self.memory = TorchMemory(transformer, self.device)
        self.memory.recordings = self.recordings
        if isinstance(text, CachedText):  # loaded when a KV cache of the edit before may be there
            text.make_room = lambda needed: make_room(self.workspace, self.device, needed)
        self._told = set()

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
        text_cache: str | Path | None = None,
    ) -> Editor:
        """Load the parts from files (see `checkpoints` and `text`). Raises WeightError.

        device: CUDA where there is one by default. dtype: of the transformer's blocks; bf16 on CUDA, else fp32.
        The text encoder runs in fp16 on CUDA as published, or on the CPU where the device has no room for it. Pictures
        are encoded in fp32, always, and decoded in fp32 too, but on CUDA in bf16 where the blocks run in bf16. linears:
        of the transformer's blocks, "exact" or "8-bit" (an approximation, see `fp8`). kind: what the transformer was
        trained for (see `load_transformer`). text_cache: a folder that keeps text features (see `text.cache`); of a
        text that is in it the text encoder is not loaded.
        """
        device = device_of(device)
        on_cuda = device.type == "cuda"
        dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
        network = load_transformer(transformer, dtype=dtype, device=device, linears=linears, kind=kind, warm=True)
        decode_dtype = torch.bfloat16 if on_cuda and dtype == torch.bfloat16 else torch.float32
        vae = load_autoencoder(autoencoder, device=device, decode_dtype=decode_dtype, warm=True)
        text, text_dtype = None, torch.float16 if on_cuda else torch.float32  # last: it can do without the device
        if text_encoder and text_cache:
            text = cached_text_encoder(text_encoder, text_cache, tokenizer, text_dtype, device)
        elif text_encoder:
            text = load_text_encoder(text_encoder, tokenizer, text_dtype, device)
        editor = cls(network, vae, text, device)
        editor.made_for = MadeFor.of(transformer)
        return editor

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
            super().forget()
            self.memory.forget()

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
        networks = self.memory.networks[: 1 + (batch.shortcuts.drafted > 0)]
        return drawn(engine_of(networks, [self.workspace, self.memory.drafts]), batch, steer)

    def edit(self, *args, **more) -> list[Image.Image]:
        """The pictures of `run`: each edited by its own instruction, in one batch, and of exactly its input's size."""
        return self.run(*args, **more).pictures

    def run(
        self,
        images: Sequence[Picture | Tokens | Edited] | Picture | Tokens | Edited,
        instructions: Sequence[str | Tensor] | str | Tensor = (),
        negatives: Sequence[str | Tensor] | str | None = None,
        size: str | None = None,
        method: str = FIT,
        settings: SamplingSettings | None = None,
        on_scale: Callable[[Scale, list[FittedImage]], None] | None = None,
        **options,
    ) -> Edited:
        """Edit pictures, each by its own instruction, in one batch.

        images: pictures of any kind (see `reading.opened`), or edits to go on from: their tokens are read, nothing is
        decoded and encoded in between; what a mask leaves is that of the edit's pictures, for tokens alone what they
        decode to. instructions: prompts, or their text features [L_i, channels]; one serves every picture. negatives:
        the same, "" for none. size, settings: by default what the weights were made for, as far as their file's name
        says it (see `MadeFor`), else 512 pixels and the defaults; another size than that is told. on_scale: called with
        every `Scale` before its bits are drawn, and the fitted pictures of its results; raise in it to cancel. options:
        see `Options`. ValueError where pictures, instructions, masks and model do not belong together.
        """
        wanted = _options(options, on_scale)
        if not self.transformer.config.source:
            raise ValueError(
                "this transformer makes pictures of text alone; use `generate`, or load it as the kind edit if it "
                "learned to edit"
            )
        single = isinstance(images, (SourceImage, Tokens, Edited)) or is_picture(images)
        pictures = [images] if single or not hasattr(images, "__iter__") else list(images)
        if not pictures:
            raise ValueError("there is no picture to edit; pass at least one")
        if wanted.features is not None and any(isinstance(picture, (Tokens, Edited)) for picture in pictures):
            raise ValueError("features are of pictures, and tokens have their own; leave out features")
        with self._lock:
            fitted, source = sources(self, pictures, size or self.made_for.size, method, size is not None)
            if size is not None:
                self._doubt(fitted[0].schedule)
            for image in fitted:
                self._tell(image.fitting.told)
            settings = self.made_for.settings if settings is None else settings
            return self._edited(Request.of(fitted, instructions, negatives, settings, wanted, source), on_scale)

    def generate(self, *args, **more) -> list[Image.Image]:
        """The pictures of `make`."""
        return self.make(*args, **more).pictures

    def make(
        self,
        prompts: Sequence[str | Tensor] | str | Tensor,
        size: str | None = None,
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
        wanted = _options(options, on_scale)
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
        asked, size = size, size or self.made_for.size
        with self._lock:
            if picture is None:
                made = empty(schedule_for(size, nearest_ratio(ratio)))
            else:
                made = self.fit(picture, size, ASPECT)
            if asked:
                self._doubt(made.schedule)
            return self._edited(Request.of([made] * max(1, len(texts)), texts, negatives, settings, wanted), on_scale)

    def _doubt(self, schedule: Schedule) -> None:
        """Tell, once, that weights were made for another size."""
        self._tell(self.made_for.doubt(schedule))

    def _tell(self, said: str) -> None:
        """Log a sentence, if there is one, once."""
        if said and said not in self._told:
            self._told.add(said)
            logger.warning(said)

    def _edited(self, request: Request, on_scale: Callable[[Scale, list[FittedImage]], None] | None) -> Edited:
        """What `run` and `make` share."""
        options, fitted = request.options, request.fitted
        self._make_room(fitted[0], 2)
        batch, masks = request.batch(self)
        check(batch, self.drafter is not None)
        request.check(batch)
        # Who watches may decode, so that the VAE stays; the text encoder is done.
        others = [*(self.text.networks if self.text else ()), *([] if on_scale else [self.autoencoder])]
        self.memory.others = [one for one in others if next(one.parameters()).device.type == self.device.type]
        watch = on_scale and (lambda scale, results, of: on_scale(scale, [fitted[p] for p in of]))
        before = bool(options.controls.auto_mask or options.explain)
        wanted = Wanted(before=before, confidence=options.explain)
        result = run(batch, self.memory, watch, options.steer, request.source, wanted)
        self._make_room(fitted[0])
        return request.edited(self, result, masks)

    def _make_room(self, image: FittedImage, times: float = 1) -> None:
        """Forget what is kept between edits where it leaves too little to decode a picture, or that several times."""
        latents = image.schedule.tokens[-1] * self.patch**2
        make_room(self.workspace, self.device, times * latents * bytes_to_decode(self.autoencoder))


def _options(given: dict[str, object], on_scale: object) -> Options:
    """Keywords as options. TypeError for ones that there are not, ValueError for an `on_scale` that is no function."""
    known = {field.name for field in fields(Options)}
    drawn = {field.name for field in fields(SamplingSettings)}
    for name in given:
        if name not in known:
            advice = (
                f"write settings=SamplingSettings({name}=...)" if name in drawn else f"choose of {', '.join(known)}"
            )
            raise TypeError(f"there is no option {name!r}; {advice}")
    if on_scale is not None and not callable(on_scale):
        raise ValueError(f"on_scale must be a function of a scale and pictures, got {type(on_scale).__name__}")
    return Options(**given)
