"""An edit as its tokens: decoded again, cut after any scale, gone on from. `files.tokens` keeps them in files.

Shape suffixes: B images, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of one scale.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..fitting import Fitting
from ..tokenizer.quantizer import codes, linear_resize
from ..tokenizer.schedule import Grid, Schedule
from .checks import published_vae

LOST = ("transparency", "colour profile", "details")
"""What a picture may have that its tokens do not hold."""
VAE_ADVICE = "; load the VAE of the model that made them"


@dataclass(frozen=True, eq=False)
class Tokens:
    """Bits of the first scales of an edit: boolean [B, d, h, w] each. grid: (H, W) of the sum.

    fitting: of the pictures, where they are known. free, under: where the edit was locked to its source at the end,
    boolean [B or 1, 1 or d, H, W] and the source's tokens, which stand where it is false. auto_mask: by how much the
    edit found its own mask (see `Controls`), 0 where it did not. lost: which of `LOST` their pictures had.
    """

    schedule: Schedule
    bits: tuple[Tensor, ...]
    grid: Grid
    fitting: Fitting | None = None
    free: Tensor | None = None
    under: Tokens | None = None
    auto_mask: float = 0.0
    lost: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.bits or len(self.bits) > len(self.schedule):
            raise ValueError(f"tokens are of 1 to {len(self.schedule)} scales here, got {len(self.bits)}")

    def __len__(self) -> int:
        """How many scales there are."""
        return len(self.bits)

    @property
    def images(self) -> int:
        return len(self.bits[0])

    @property
    def shown(self) -> Fitting:
        """How they become a picture: as `fitting` says, else one of exactly the schedule's pixels."""
        return self.fitting or Fitting.exact(self.schedule)

    @property
    def without(self) -> tuple[str, ...]:
        """What their pictures had that they do not hold: of `LOST`, and what the model did not see of the picture."""
        return (*self.lost, "all beside the part that was edited") if self.shown.box else self.lost

    @property
    def complete(self) -> bool:
        return len(self) == len(self.schedule)

    def total(self) -> Tensor:
        """The running sum [B, d, H, W] after the last scale that is there: bit for bit that of the edit."""
        chain = [self]
        while chain[-1].free is not None and chain[-1].complete:
            chain.append(chain[-1].under)
        total = chain.pop()._own_total()
        for tokens in reversed(chain):  # from the first edit on: two sums at a time, however long the chain is
            total = torch.where(tokens.free, tokens._own_total(), total)
        return total

    def _own_total(self) -> Tensor:
        """The sum without what it is held to."""
        total = torch.zeros(self.images, self.bits[0].shape[1], *self.grid, device=self.bits[0].device)
        for bits in self.bits:
            total += linear_resize(codes(bits), self.grid)
        return total

    def first(self, count: int) -> Tokens:
        """The first `count` scales, to go on from. ValueError where there are not so many."""
        if not 1 <= count <= len(self):
            raise ValueError(f"there are tokens of {len(self)} scales; keep from 1 to {len(self)} of them, not {count}")
        if count == len(self.schedule):
            return self
        return replace(self, bits=self.bits[:count], free=None, under=None, auto_mask=0.0)

    def of(self, images: slice | list[int]) -> Tokens:
        """The tokens of some of the images, or of some of them several times."""
        free = self.free if self.free is None or len(self.free) == 1 else self.free[images]
        under = self.under and self.under.of(images)
        return replace(self, bits=tuple(bits[images] for bits in self.bits), free=free, under=under)

    def to(self, device) -> Tokens:
        """The same on a device."""
        free = self.free if self.free is None else self.free.to(device)
        under = self.under and self.under.to(device)
        return replace(self, bits=tuple(b.to(device) for b in self.bits), free=free, under=under)

    def check_vae(self, channels: int, stride: int, name: str = "the tokens", advice: str = VAE_ADVICE) -> None:
        """Raise ValueError where a VAE of so many channels, whose latents cover `stride` pixels, cannot decode them.

        name, advice: of the tokens and of what to do, for the sentence's beginning and end.
        """
        bits, (height, width) = self.bits[0].shape[1], self.schedule.pixels
        if bits != channels or height != self.grid[0] * stride:
            raise ValueError(
                f"{name} are of {bits} bits on a grid of {self.grid[1]}x{self.grid[0]} but the VAE takes {channels} "
                f"channels on {width // stride}x{height // stride}{advice}{published_vae(bits)}"
            )

    def save(
        self, path: str | os.PathLike[str], overwrite: bool = False, notes: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, a bit a bit; see `files.tokens.save_tokens`."""
        from ..files.tokens import save_tokens

        save_tokens(self, path, overwrite, notes=notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokens:
        """Read what `save` wrote; see `files.tokens.load_tokens`."""
        from ..files.tokens import load_tokens

        return load_tokens(path)
