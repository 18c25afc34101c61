"""ShapeEdit's metrics: was the edit done, and was the rest left alone.

Knows pixels; knows nothing of networks or files. Pixels are [B, 3, H, W] in [-1, 1] and are not clamped
here; regions are boolean [B, H, W]. The numbers:

- *success* (yes or no), *S* (0 to 1): whether and how far the region of the edit became the target's.
- *background PSNR* and *SSIM*: the edited picture against the source outside the region, as PIE-Bench defines them
  (arXiv 2310.01506, `evaluation/matrics_calculator.py` of its code): both pictures, in [0, 1], are multiplied by the
  mask of the part that is not to be edited, and the figures are those of the whole frame with a data range of 1.
- *O* (0 to 1): background SSIM, negative values as 0.
- *balance*: 2SO / (S + O) of a sample, as VAREdit reports it (arXiv 2508.15772, section 4), with S and O measured on
  pixels here where the paper asks a language model (there, after EMU-Edit, arXiv 2311.10089, from 0 to 10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 8
"""Pixels that differ by no more than this, of 255 levels, count as equal."""
CLOSING = 9
HALF = 0.5
"""An edit must come closer to the target than this share of the source's distance."""
KEEP_DB = 3.0
"""What an unchanged picture may lose against the VAE's own reconstruction."""
LEAST_ERROR = 1e-10
"""Squared errors are at least this, so that PSNR is at most 100 dB."""


@dataclass(frozen=True)
class Score:
    """One edit's figures. psnr, ssim: of the background, None where there is none."""

    success: bool
    s: float
    o: float
    psnr: float | None
    ssim: float | None

    @property
    def balance(self) -> float:
        """2SO / (S + O), 0 where both are 0."""
        return 2 * self.s * self.o / (self.s + self.o) if self.s + self.o else 0.0


def changed(source: Tensor, target: Tensor) -> Tensor:
    """Boolean [B, H, W]: where pixels [B, 3, H, W] differ by more than 8 of 255 levels in any channel."""
    return ((source - target).abs() > 2 * LEVELS / 255).any(1)


def regions(source: Tensor, target: Tensor, families: Sequence[str] = ()) -> Tensor:
    """Regions [B, H, W] of the edits that lead from source to target [B, 3, H, W].

    The changed pixels, closed (maximum, then minimum over 9 x 9 pixels) so that textures leave no holes. families:
    of every row; the region of a style is the whole picture, that of `keep` is empty. A style that changes nothing
    (greyscale on a grey scene) has an empty region too.
    """
    different = changed(source, target)
    closed = -_dilated(-_dilated(different.float())) > 0
    for row, family in enumerate(families):
        if family == "style":
            closed[row] = different[row].any()
        elif family == "keep":
            closed[row] = False
    return closed


def _dilated(mask_BHW: Tensor) -> Tensor:
    """Maximum over 9 x 9 pixels, columns and rows one after the other."""
    reach = CLOSING // 2
    columns = F.max_pool2d(mask_BHW[:, None], (CLOSING, 1), 1, (reach, 0))
    return F.max_pool2d(columns, (1, CLOSING), 1, (0, reach))[:, 0]


def distance(a: Tensor, b: Tensor, region: Tensor) -> Tensor:
    """Root mean squared difference [B] of pixels inside the regions [B, H, W]; 0 where a region is empty."""
    squared = (a - b).square().mean(1) * region
    return (squared.sum((1, 2)) / region.sum((1, 2)).clamp_min(1)).sqrt()


def background(a: Tensor, b: Tensor, region: Tensor) -> list[tuple[float, float] | tuple[None, None]]:
    """PIE-Bench's background PSNR in dB (at most 100) and SSIM of every row, None where the region is the whole
    picture: pixels in [0, 1], zeros inside the region, figures of the whole frame.

    SSIM: Gaussian windows of 11 x 11 pixels with sigma 1.5, population covariances, mean over the channels (Wang et
    al. 2004; PIE-Bench takes torchmetrics'). ValueError where scikit-image is missing.
    """
    structural_similarity = ssim_function()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    first, second = (((x + 1) / 2 * ~region[:, None]).permute(0, 2, 3, 1).cpu().double().numpy() for x in (a, b))
    some = (~region).any(2).any(1).tolist()

    def figures(row: int) -> tuple[float, float] | tuple[None, None]:
        if not some[row]:
            return None, None
        ssim = structural_similarity(first[row], second[row], channel_axis=2, **options)
        return decibels[row], float(ssim)

    decibels = _background_psnr(a, b, region).tolist()
    with ThreadPoolExecutor() as threads:
        return list(threads.map(figures, range(len(a))))


def ssim_function() -> Callable:
    """scikit-image's SSIM. ValueError where scikit-image is missing."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise ValueError("SSIM needs scikit-image; install it: pip install scikit-image") from None
    return structural_similarity


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB, at most 100, of whole pictures [B, 3, H, W]."""
    return _background_psnr(a, b, torch.zeros_like(a[:, 0], dtype=torch.bool))


def _background_psnr(a: Tensor, b: Tensor, region: Tensor) -> Tensor:
    error = ((a - b) / 2 * ~region[:, None]).square().mean((1, 2, 3))
    return -10 * error.clamp_min(LEAST_ERROR).log10()


def succeeds(
    edited: Tensor,
    source: Tensor,
    target: Tensor,
    region: Tensor,
    distractors: Sequence[Tensor],
    reconstruction: Tensor,
) -> Tensor:
    """Whether edited pictures [B, 3, H, W] are what was asked for, boolean [B]; regions as `regions` gives them.

    Inside the region, the edit's distance to the target must be below half the source's (three quarters of the
    squared error are gone). And it must be closer to the target than to every distractor (a row's pictures
    [n, 3, H, W]: near misses, and what other instructions would have made of the source), each compared where target
    and distractor differ.

    Where the region is empty (`keep`), the PSNR against the source must be at most 3 dB below that of
    `reconstruction` [B, 3, H, W], the source through the VAE.
    """
    done = distance(edited, target, region) < HALF * distance(source, target, region)
    kept = _background_psnr(edited, source, region) >= _background_psnr(reconstruction, source, region) - KEEP_DB
    confused = [_confused(*row) for row in zip(edited, target, distractors)]
    return torch.where(region.any(2).any(1), done, kept) & ~torch.tensor(confused, device=done.device)


def judge(
    edited: Tensor,
    source: Tensor,
    target: Tensor,
    region: Tensor,
    distractors: Sequence[Tensor],
    reconstruction: Tensor,
) -> list[Score]:
    """Scores of edited pictures; everything as for `succeeds`.

    S: 1 - distance(edit, target) / distance(source, target) inside the region, at least 0. O: background SSIM, at
    least 0. Where the region is empty, S is O, the whole picture's SSIM against the source; where it is the whole
    picture (styles), there is no background and O is S. Either way the balance is that one number.
    """
    successes = succeeds(edited, source, target, region, distractors, reconstruction).tolist()
    before, after = distance(source, target, region), distance(edited, target, region)
    closer = (1 - after / before.clamp_min(1e-9)).clamp(0, 1).tolist()
    scores = []
    for row, (decibels, ssim) in enumerate(background(edited, source, region)):
        o = closer[row] if ssim is None else min(max(ssim, 0.0), 1.0)
        scores.append(Score(successes[row], closer[row] if region[row].any() else o, o, decibels, ssim))
    return scores


def _confused(edited: Tensor, target: Tensor, others: Tensor) -> bool:
    """Whether a picture [3, H, W] is as close to one of the others [n, 3, H, W] as to the target, or closer.

    An other that looks like the target does not count.
    """
    if not len(others):
        return False
    wanted, found = target.expand_as(others), edited.expand_as(others)
    where = changed(wanted, others)
    closer = distance(found, others, where) <= distance(found, wanted, where)
    return bool((closer & where.any(2).any(1)).any())
