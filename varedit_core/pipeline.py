"""Pictures and instructions in, edited pictures out: the networks, the loop and the image handling put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .autoencoder import Autoencoder
from .checkpoints import load_autoencoder, load_transformer
from .config import patch_size
from .defaults import DEFAULT_SETTINGS, FIT, SIZE, SamplingSettings
from .images import FittedImage, SourceImage, fit, load_image, restore
from .kv import KeyValueStore
from .sampling import Scale, sample
from .text import TextEncoder, load_text_encoder
from .transformer import Transformer

Picture = str | Path | Image.Image | SourceImage


class Editor:
    """A transformer, its tokenizer and (unless text features are given) a text encoder, on one device.

    store: how edits keep keys and values; another one of `kv` saves memory.
    """

    def __init__(
        self, transformer: Transformer, autoencoder: Autoencoder, text: TextEncoder | None = None, device="cpu"
    ) -> None:
        patch_size(transformer.config, autoencoder.config)
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.device = torch.device(device)
        self.store: type[KeyValueStore] = KeyValueStore

    @classmethod
    def load(
        cls,
        transformer: str | Path,
        autoencoder: str | Path,
        text_encoder: str | Path | None = None,
        tokenizer=None,
        device=None,
        dtype=None,
    ) -> Editor:
        """Load the parts from files (see `checkpoints` and `text`). Raises WeightError.

        device: CUDA where there is one by default. dtype: of the transformer's blocks; bf16 on CUDA, else fp32.
        The text encoder runs in fp16 on CUDA as published, the autoencoder always in fp32.
        """
        device = device_of(device)
        on_cuda = device.type == "cuda"
        text = text_encoder and load_text_encoder(
            text_encoder, tokenizer, torch.float16 if on_cuda else torch.float32, device
        )
        network = load_transformer(
            transformer, dtype=dtype or (torch.bfloat16 if on_cuda else torch.float32), device=device
        )
        return cls(network, load_autoencoder(autoencoder, device=device), text or None, device)

    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text features [L_i, channels] of the prompts. ValueError without a text encoder."""
        if self.text is None:
            raise ValueError("no text encoder is loaded; give one, or give text features instead of an instruction")
        return self.text.encode(prompts)

    def _features(self, prompt: str | Tensor) -> Tensor:
        return prompt if isinstance(prompt, Tensor) else self.encode_text([prompt])[0]

    def fit(self, image: Picture, size: str = SIZE, method: str = FIT) -> FittedImage:
        """Bring a picture to a size the model runs at (see `images.fit`)."""
        return fit(image if isinstance(image, SourceImage) else load_image(image), size, method)

    @torch.no_grad()
    def encode_source(self, images: Sequence[FittedImage]) -> Tensor:
        """Unquantised features [B, d, H, W] of fitted pictures, each encoded alone."""
        return torch.cat([self.autoencoder.encode(image.pixels.to(self.device)) for image in images])

    @torch.no_grad()
    def decode(self, latents_BdHW: Tensor, images: Sequence[FittedImage]) -> list[Image.Image]:
        """Pictures of a running sum, each of exactly its input's size, alpha kept."""
        return [
            restore(self.autoencoder.decode(latent[None])[0].cpu(), image)
            for latent, image in zip(latents_BdHW, images)
        ]

    def edit(
        self,
        images: Sequence[Picture] | Picture,
        instructions: Sequence[str | Tensor] | str | Tensor,
        negatives: Sequence[str | Tensor] | str | None = None,
        size: str = SIZE,
        method: str = FIT,
        settings: SamplingSettings = DEFAULT_SETTINGS,
        on_scale: Callable[[Scale, list[FittedImage]], None] | None = None,
    ) -> list[Image.Image]:
        """Edit pictures, each by its own instruction, in one batch; the results have the inputs' sizes.

        instructions: prompts, or their text features [L_i, channels]. negatives: the same, "" for none; one string
        serves every picture.
        on_scale: called with every `Scale` before its bits are drawn, and the fitted pictures; raise in it to
        cancel. ValueError where pictures, instructions and model do not belong together.
        """
        pictures = [images] if isinstance(images, (str, Path, Image.Image, SourceImage)) else list(images)
        prompts = [instructions] if isinstance(instructions, (str, Tensor)) else list(instructions)
        if not pictures:
            raise ValueError("there is no picture to edit; pass at least one")
        fitted = [self.fit(picture, size, method) for picture in pictures]
        if len({image.schedule for image in fitted}) > 1:
            raise ValueError(
                "the pictures of a batch need different aspect tables; edit them one by one or fit them to squares"
            )
        texts = [self._features(prompt) for prompt in prompts]
        unwanted = None
        if negatives is not None:
            listed = [negatives] * len(pictures) if isinstance(negatives, str) else negatives
            unwanted = [None if isinstance(n, str) and not n else self._features(n) for n in listed]
        features = self.encode_source(fitted)
        run = sample(self.transformer, features, texts, fitted[0].schedule, settings, unwanted, store=self.store)
        with closing(run) as scales:
            for scale in scales:
                if on_scale:
                    on_scale(scale, fitted)
        return self.decode(scale.running_sum, fitted)


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
