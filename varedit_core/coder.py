"""Pictures and words to what the transformer reads, and back: the VAE and the text encoder at work.

Shape suffixes: P pictures, d bits a latent position, (H, W) latent grid, L text tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import RLock
from weakref import WeakSet

import torch
from PIL import Image
from torch import Tensor

from .defaults import FIT, TEXT_TOKENS
from .made_for import UNKNOWN
from .pictures.images import FittedImage, Readable, SourceImage, fit, load_image, restore
from .runtime.graphs import Recorder
from .text.cache import CachedText
from .text.encoder import TextEncoder
from .tokenizer.vae import Autoencoder

RECORDED_SIDE = 640
"""Squares of up to so many pixels a side are encoded and decoded by recorded graphs: smaller ones wait for launches."""

Picture = Readable | SourceImage


class Coder:
    """A VAE and, unless text features are given, a text encoder, on one device. Threads may share it."""

    def __init__(
        self, autoencoder: Autoencoder, text: TextEncoder | CachedText | None, device: torch.device | str
    ) -> None:
        self.autoencoder, self.text = autoencoder, text
        self.device, self._lock = torch.device(device), RLock()
        _living.add(self)
        self.made_for = UNKNOWN
        self.text_length = TEXT_TOKENS
        """Tokens of a text that the transformer takes."""
        self._last: tuple[list[Tensor], list[str | Tensor]] = [], []
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        most, stride = RECORDED_SIDE**2, autoencoder.config.stride
        self._encoder = Recorder(autoencoder, autoencoder.encode, 3 * most)
        self._decoder = Recorder(autoencoder, autoencoder.decode, autoencoder.config.bits * most // stride**2)
        self.recordings = (self._encoder, self._decoder, *([text] if text else []))
        """What keeps memory for the next picture or text."""

    def __getstate__(self) -> dict:
        """TypeError: it is not pickled nor copied."""
        raise TypeError(f"an {type(self).__name__} belongs to its process; load one in each, or share it by threads")

    def forget(self) -> None:
        """Give back all memory that is kept from edit to edit."""
        with self._lock:
            self._last = [], []
            for kept in self.recordings:
                kept.forget()
            if isinstance(self.text, CachedText):
                self.text.let_go()

    def fit(self, image: Picture, size: str | None = None, method: str = FIT) -> FittedImage:
        """Bring a picture to a size the model runs at (see `images.fit`), by default what the weights were made for."""
        source = image if isinstance(image, SourceImage) else load_image(image)
        return fit(source, size or self.made_for.size, method)

    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text features [L_i, channels] of the prompts, a list. ValueError without a text encoder."""
        if isinstance(prompts, str):
            raise ValueError(f"encode_text takes a list of prompts; write [{prompts!r}]")
        if self.text is None:
            raise ValueError("no text encoder is loaded; give one, or give text features instead of an instruction")
        with self._lock:
            if self._beside is not None:  # where it may be at work
                torch.cuda.current_stream(self.device).wait_stream(self._beside)
            return [features.to(self.device) for features in self.text.encode(prompts, self.text_length)]

    def features_of(self, prompts: Sequence[str | Tensor]) -> list[Tensor]:
        """`encode_text` of those prompts that are not text features already."""
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
            return self.encode_source(images), self.features_of(prompts), {"fresh": fresh, "stream": None}
        here, beside = torch.cuda.current_stream(self.device), self._beside
        beside.wait_stream(here)
        with torch.cuda.stream(beside):  # the text's kernels are too small to keep the device busy
            texts = self.features_of(prompts)
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


def _alike(given: tuple[list, list], last: tuple[list, list]) -> bool:
    """Whether pictures and prompts may be the last ones: pictures by some of their pixels."""
    if any(len(a) != len(b) for a, b in zip(given, last)):
        return False
    (pictures, prompts), (last_pictures, last_prompts) = given, last
    for a, b in zip(pictures, last_pictures):
        if a.shape != b.shape or not torch.equal(a[..., ::31, ::31], b[..., ::31, ::31]):
            return False
    return all(a is b or (isinstance(a, str) and a == b) for a, b in zip(prompts, last_prompts))


_living: WeakSet[Coder] = WeakSet()


def _after_fork() -> None:
    """A lock that another thread held when the process was forked would be held for ever."""
    for coder in _living:
        coder._lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
