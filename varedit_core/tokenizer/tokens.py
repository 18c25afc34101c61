"""An edit as its tokens: saved in kilobytes, decoded again, cut after any scale, gone on from.

Shape suffixes: B images, d bits a latent position, (H, W) latent grid of the last scale, (h, w) of one scale.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.safe_write import check_free, make_folder
from ..pictures.images import Fitting
from ..sampling.scale import Scale
from .quantizer import codes, linear_resize
from .schedule import TABLES, Grid, Schedule

FORMAT = "varedit.tokens"
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Tokens:
    """Bits of the first scales of an edit: boolean [B, d, h, w] each. grid: (H, W) of the sum.

    fitting: of the pictures, where they are known. free, under: where the edit was locked to its source at the end,
    boolean [B or 1, 1 or d, H, W] and the source's tokens, which stand where it is false.
    """

    schedule: Schedule
    bits: tuple[Tensor, ...]
    grid: Grid
    fitting: Fitting | None = None
    free: Tensor | None = None
    under: Tokens | None = None

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
    def complete(self) -> bool:
        return len(self) == len(self.schedule)

    def total(self) -> Tensor:
        """The running sum [B, d, H, W] after the last scale that is there: bit for bit that of the edit."""
        total = torch.zeros(self.images, self.bits[0].shape[1], *self.grid, device=self.bits[0].device)
        for bits in self.bits:
            total = total + linear_resize(codes(bits), self.grid)
        if self.free is not None and self.complete:
            total = torch.where(self.free, total, self.under.total())
        return total

    def first(self, count: int) -> Tokens:
        """The first `count` scales, to go on from. ValueError where there are not so many."""
        if not 1 <= count <= len(self):
            raise ValueError(f"there are tokens of {len(self)} scales; keep from 1 to {len(self)} of them, not {count}")
        whole = count == len(self.schedule)
        return replace(self, bits=self.bits[:count], free=self.free if whole else None, under=self.under if whole else None)

    def of(self, images: slice | list[int]) -> Tokens:
        """The tokens of some of the images, or of some of them several times."""
        free = self.free if self.free is None or len(self.free) == 1 else self.free[images]
        under = self.under and self.under.of(images)
        return replace(self, bits=tuple(bits[images] for bits in self.bits), free=free, under=under)

    def to(self, device) -> Tokens:
        """The same on a device."""
        free = self.free if self.free is None else self.free.to(device)
        return replace(self, bits=tuple(b.to(device) for b in self.bits), free=free, under=self.under and self.under.to(device))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False, notes: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, a bit a bit. FileExistsError where there is one and overwrite is False.

        notes: texts that lie beside the tokens in the file; see `notes_of`.
        """
        path = Path(path)
        check_target(path, overwrite)
        tensors: dict[str, Tensor] = {}
        facts = self._put(tensors, "")
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(tensors, temporary, {**(notes or {}), "format": FORMAT, "tokens": json.dumps(facts)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _put(self, tensors: dict[str, Tensor], prefix: str) -> dict:
        for k, bits in enumerate(self.bits):
            tensors[f"{prefix}scale.{k:02d}"] = _packed(bits)
        facts = {"ratio": self.schedule.ratio, "scales": len(self.schedule), "grid": self.grid, "fitting": None}
        facts |= {"shapes": [list(bits.shape) for bits in self.bits]}
        if self.fitting is not None:
            facts["fitting"] = {"padded_size": self.fitting.padded_size, "size": self.fitting.size}
        if self.free is not None:
            tensors[f"{prefix}free"] = _packed(self.free)
            facts |= {"free": list(self.free.shape), "under": self.under._put(tensors, f"{prefix}under.")}
        return facts

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokens:
        """Read what `save` wrote. FileNotFoundError where there is nothing, ValueError where it is no file of tokens."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there are no tokens at {path}; check the path")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError("it holds something else")
                return cls._take(file, json.loads(metadata["tokens"]), "")
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a file of tokens ({error}); save one with VAREdit Save Tokens or varedit edit --save-tokens") from None

    @classmethod
    def _take(cls, file, facts: dict, prefix: str) -> Tokens:
        schedule = Schedule(facts["ratio"], TABLES[facts["ratio"]][: facts["scales"]])
        bits = tuple(_unpacked(file.get_tensor(f"{prefix}scale.{k:02d}"), s) for k, s in enumerate(facts["shapes"]))
        own, free, under = facts["fitting"], None, None
        fitting = own and Fitting(schedule, tuple(own["padded_size"]), tuple(own["size"]))
        if "free" in facts:
            free = _unpacked(file.get_tensor(f"{prefix}free"), facts["free"])
            under = cls._take(file, facts["under"], f"{prefix}under.")
        return cls(schedule, bits, tuple(facts["grid"]), fitting, free, under)


def check_target(path: Path, overwrite: bool = False) -> None:
    """Raise what `Tokens.save` would for this path, and make missing folders, before there are tokens."""
    if path.suffix != SUFFIX:
        raise ValueError(f"cannot write tokens to {path.name}; its suffix must be {SUFFIX}")
    check_free(path, overwrite)
    make_folder(path.parent)


def notes_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts that lie beside the tokens in a file that `Tokens.load` reads."""
    with safe_open(path, "pt") as file:
        return {key: text for key, text in file.metadata().items() if key not in ("format", "tokens")}


def tokens_of(
    bits: Sequence[Tensor],
    last: Scale,
    schedule: Schedule,
    fitting: Fitting | None = None,
    source: Tokens | None = None,
    pick: Callable[[Tensor], Tensor] = lambda x_B: x_B,
) -> Tokens:
    """The tokens of a run, by the bits of its scales and the last `Scale`.

    source: the source's tokens, where it is known by them, of every row that is picked. pick: rows that count.
    """
    grid = last.source.grids[-1]
    made = Tokens(schedule, tuple(map(pick, bits)), grid, fitting)
    if last.edited is None or bool(last.edited.all()):
        return made
    free = last.edited if len(last.edited) == 1 else pick(last.edited)
    return replace(made, free=free, under=source or Tokens(schedule, tuple(map(pick, last.source.own[0])), grid))


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of several runs of one kind, their images behind each other."""
    first, *_ = parts
    if len(parts) == 1:
        return first
    bits = tuple(map(torch.cat, zip(*(part.bits for part in parts))))
    if any(part.fitting != first.fitting for part in parts):
        first = replace(first, fitting=None)
    if all(part.free is None for part in parts):
        return replace(first, bits=bits)
    most = [part.free if part.free is not None else torch.ones(1, 1, *part.grid, dtype=torch.bool) for part in parts]
    channels = bits[0].shape[1]
    free = torch.cat([f.expand(part.images, channels, -1, -1).to(bits[0].device) for f, part in zip(most, parts)])
    return replace(first, bits=bits, free=free, under=joined([part.under or replace(part, fitting=None) for part in parts]))


def _packed(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.flatten().cpu().numpy()))


def _unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
    count = int(np.prod(shape))
    if 8 * len(packed) < count:
        raise ValueError("it is cut off")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count)).bool().view(*shape)
