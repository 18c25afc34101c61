"""IMAGE and MASK to the library's pictures, and back.

Shapes are ComfyUI's: images [B, H, W, C] in 0..1, masks [B, H, W]. A picture is edited in 8 bits, as from a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import comfy.model_management as mm
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...varedit_core.fitting import Fitting
from ...varedit_core.pictures.canvas import blended, faded
from ...varedit_core.pictures.composite import check_seen, found_mask
from ...varedit_core.pictures.contact_sheet import Row, contact_sheet
from ...varedit_core.pictures.images import fit_mask, fitted_levels, load_image, seen_mask, unfit, unfit_mask
from ...varedit_core.pictures.preview import LEAST_DECODED, SIDE, at_own_size, enlarged
from ...varedit_core.sampling.tokens import Tokens
from ...varedit_core.tokenizer.schedule import schedule_for
from .given import tell_of_mask
from .latents import Origin, check_shape, exactly, made, origin_in
from .vae import VAREditVAE, checked_vae


def to_pillow(image_HWC: Tensor) -> Image.Image:
    """One picture of an IMAGE, in 8 bits."""
    levels = (image_HWC.float().cpu() * 255).round_().to(torch.uint8).numpy()
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else np.ascontiguousarray(levels))


def to_image(pictures: list[Image.Image]) -> Tensor:
    """Pictures of one size as an IMAGE, on the device that ComfyUI hands pictures on."""
    arrays = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return (torch.from_numpy(arrays) / 255).to(mm.intermediate_device())


def encode_source(vae, image: Tensor, area: str, method: str, tell: Callable[[str], None]) -> dict:
    """The LATENT of pictures to edit: unquantised features [B, d, h, w], each picture encoded alone. tell: what to do
    with a sentence for the user."""
    vae = checked_vae(vae)
    fitted = [fitted_levels(load_image(to_pillow(one)), area, method) for one in image]
    # One by one, as the library does: convolutions of a batch round differently.
    features = torch.cat([vae.encode_levels(levels) for levels, _ in fitted])
    if not features.isfinite().all():
        raise ValueError(
            "the encoded picture holds undefined numbers; the VAE's weights are damaged; load or convert them again"
        )
    if said := fitted[0][1].told:
        tell(said)
    return made(features, Origin(fitted[0][1], vae.colours))


def empty_source(vae, area: str, ratio: float, count: int) -> dict:
    """The LATENT of no pictures, in place of those to edit: zeros [B, d, h, w] of the size and shape to make."""
    vae, schedule = checked_vae(vae), schedule_for(area, ratio)
    height, width = schedule.pixels
    size = (count, vae.latent_channels, height // vae.stride, width // vae.stride)
    origin = Origin(Fitting.exact(schedule), vae.colours, empty=True)
    return made(torch.zeros(size, device=mm.intermediate_device()), origin)


def decode_edit(
    vae, latent: dict, image: Tensor | None, mask: Tensor | None, tell: Callable[[str], None], seam: int = 0
) -> tuple[Tensor, Tensor]:
    """The edited pictures [B, H, W, 3 or 4] of a LATENT, and where the edit shows in them [B, H, W]. image, mask, seam:
    as of `VAREditDecode`."""
    vae, samples = checked_vae(vae), _samples(vae, latent)
    mask = latent.get("noise_mask") if mask is None else mask
    origin = origin_of(latent, samples, vae)
    fitting = origin.fitting
    if image is not None and tuple(image.shape[2:0:-1]) != fitting.size:
        raise ValueError(
            f"the image is {image.shape[2]}x{image.shape[1]} but the edit is of one of "
            f"{fitting.size[0]}x{fitting.size[1]}; connect the picture that was encoded"
        )
    if image is not None and len(samples) % len(image):
        raise ValueError(
            f"there are {image.shape[0]} images for {len(samples)} edits; connect the same batch, or one image"
        )
    if origin.doubt and not origin.auto_mask:  # see _found
        tell(origin.doubt)
    if fitting.box and image is None:
        tell(
            f"the edit is of a part of its picture, {fitting}; connect the picture that was encoded to image, else all "
            "beside that part is white"
        )
    levels = [_levels(vae, one) for one in samples]
    edited = to_image([unfit(one, fitting) for one in levels])
    image = image if image is None else _for_each(image, edited)
    if mask is not None:
        tell_of_mask(mask, fitting.size, tell)
    shown = None if mask is None else _drawn(mask, len(edited), image, tell)
    if shown is None:
        shown = _found(vae, origin, origin.own(samples.device), levels, image, tell)
    weight = torch.ones(edited.shape[:3], device=edited.device)
    if fitting.box:
        beside = torch.ones_like(edited) if image is None else image
        edited, weight = _composited(edited, beside, [seen_mask(fitting)] * len(edited), 0)
    if shown is not None:
        edited, own = _composited(edited, image, shown, seam)
        weight = weight * own
    if image is not None and image.shape[3] == 4:
        edited = torch.cat([edited[..., :3], image[..., 3:].to(edited)], dim=-1)
    return edited, weight


def scale_pictures(vae, scales: dict, method: str) -> tuple[list[Tensor], Tensor]:
    """A picture (or batch) of every scale, and a contact sheet of the first picture's."""
    vae, samples = checked_vae(vae), _samples(vae, scales)
    origin = origin_of(scales, samples, vae)
    if not origin.scales or origin.changed or len(samples) % origin.scales:
        raise ValueError("these are not the sums of every scale; connect the sampler's scales, unchanged")
    sums = samples.unflatten(0, (origin.scales, -1))
    grids = origin.fitting.schedule.grids[: origin.scales]
    pictures = [
        [scale_picture(vae, one[None], grid, origin, method) for one in batch] for grid, batch in zip(grids, sums)
    ]
    columns = [f"{height}x{width}" for height, width in grids]
    sheet = contact_sheet([Row("", [batch[0] for batch in pictures])], columns)
    return [to_image(batch) for batch in pictures], to_image([sheet])


def region_area(mask: Tensor | None, fitting: Fitting, images: int) -> Tensor:
    """A region's MASK at the fitted pictures' size, [images, y, x]; ones for a region without. ValueError for an empty
    one."""
    found = fitted_mask(torch.ones(1, 1) if mask is None else mask, fitting, images)
    if found is None or not found.any():
        raise ValueError("a region's mask is empty; paint where its instruction is to count")
    return found.expand(images, -1, -1)


def unfitted_mask(mask_BHW: Tensor, fitting: Fitting) -> Tensor:
    """A map over the whole canvas, of any size, as a MASK of the pictures that were fitted."""
    height, width = fitting.schedule.pixels
    grown = F.interpolate(mask_BHW[:, None].float().cpu(), (height, width), mode="bilinear", align_corners=False)[:, 0]
    return torch.stack([torch.from_numpy(np.array(unfit_mask(one, fitting), dtype=np.float32) / 255) for one in grown])


def scale_picture(
    vae: VAREditVAE | None, running_sum_BdHW: Tensor, grid, origin: Origin, method: str, side: int = SIDE
) -> Image.Image:
    """What the model sees of a picture, of one running sum [1, d, H, W]: decoded at the final size (full) or its own,
    or as colours (fast)."""
    fitting = origin.fitting.seen
    if method == "full":
        return unfit(_levels(vae, running_sum_BdHW[0]), fitting)
    part = tuple(own / all for own, all in zip(fitting.size, fitting.padded_size))
    patch = running_sum_BdHW.shape[-2] // fitting.schedule.grids[-1][0]
    cells = (grid[0] * patch, grid[1] * patch)
    if method == "fast":
        return enlarged(origin.colours.map()(at_own_size(running_sum_BdHW, cells))[0], part, side)
    decoded = vae.decode(at_own_size(running_sum_BdHW, cells, LEAST_DECODED))
    return enlarged(decoded[0].movedim(-1, 0) * 2 - 1, part, side)


def origin_of(latent: dict, samples: Tensor, vae: VAREditVAE) -> Origin:
    """A latent's own origin; for one of a stock node or file, that of a picture of exactly the latent's size."""
    origin = origin_in(latent) or exactly(samples, vae.stride)
    check_shape(samples, origin, vae.stride)
    return origin if origin.colours is not None else replace(origin, colours=vae.colours)


def _samples(vae: VAREditVAE, latent: dict) -> Tensor:
    return vae.checked(latent["samples"])


def _levels(vae: VAREditVAE, latent_dHW: Tensor) -> Tensor:
    """8-bit levels [3, y, x] of one latent, truncated as in the published code."""
    levels, defined = vae.decode_levels(latent_dHW)
    if not defined:
        raise ValueError(
            "the decoded picture holds undefined numbers; the VAE's weights are damaged; load or convert them again"
        )
    return levels


def _drawn(mask: Tensor, edits: int, image: Tensor | None, tell: Callable[[str], None]) -> list[Image.Image] | None:
    """A MASK of any size as one of every edit, in 8 bits; None for an empty one."""
    masks = masks_of(mask)
    if not masks.any():
        return None
    if image is None:
        raise ValueError("a mask needs the picture that was edited; connect it to image")
    if edits % len(masks):
        raise ValueError(f"there are {len(masks)} masks for {edits} pictures; connect one, or one for each")
    levels = (masks * 255).round().to(torch.uint8).numpy()
    if not levels.any():
        tell(f"the mask is at most {masks.max():.2g}, so faint that nothing of the edit shows; raise it")
    return [Image.fromarray(one) for one in levels for _ in range(edits // len(levels))]


def _found(
    vae: VAREditVAE,
    origin: Origin,
    tokens: Tokens | None,
    levels: list[Tensor],
    image: Tensor | None,
    tell: Callable[[str], None],
) -> list[Image.Image] | None:
    """Where edits with an auto mask changed their pictures (see `auto_mask.differing`), None where it cannot be shown.
    origin, tokens: of the edits; levels: of them decoded."""
    if not origin.auto_mask:
        return None
    if image is None:
        tell(
            "the edit has found its own mask; connect the picture that was edited to image, and all outside of it "
            "stays as it was"
        )
        return None
    if tokens is None:
        tell(
            "another node has changed the edit, so its own mask is lost and all of it is shown; connect the sampler's "
            "latent"
        )
        return None
    tokens = replace(tokens, fitting=origin.fitting)
    return [found_mask(tokens.of([n]), one, lambda x: _levels(vae, x)) for n, one in enumerate(levels)]


def _composited(edited: Tensor, image: Tensor, masks: list[Image.Image], seam: int) -> tuple[Tensor, Tensor]:
    """The edit where its mask is 1, the image where it is 0, a blend where it lies between, in 8 bits as in the
    library; and the mask."""
    size = tuple(edited.shape[2:0:-1])
    weight = np.stack([np.asarray(faded(mask, size, seam), dtype=np.float32) for mask in masks])
    weight = (torch.from_numpy(weight) / 255).to(edited.device)
    original, share = image[..., :3].to(edited), weight[..., None]
    original = original.expand(*original.shape[:3], 3)  # grey
    return blended(edited, original, share, eight_bit=True), weight


def masks_of(mask: Tensor) -> Tensor:
    """A MASK or noise_mask as [count, y, x]."""
    return mask.reshape(-1, *mask.shape[-2:]).float().cpu()


def fitted_mask(mask: Tensor, fitting: Fitting, images: int) -> Tensor | None:
    """A MASK or noise_mask of any size, brought to the fitted pictures' size: [1 or B, y, x]; None for an empty one.
    ValueError for one that vanishes there."""
    masks = masks_of(mask)
    if not masks.any():
        return None
    if len(masks) not in (1, images):
        raise ValueError(f"there are {len(masks)} masks for {images} pictures; connect one, or one for each")
    levels = (masks * 255).ceil().to(torch.uint8).numpy()
    fitted = torch.cat([fit_mask(Image.fromarray(one), fitting) for one in levels])
    check_seen(fitted[masks.flatten(1).any(1)], "mask", fitting.box is not None)
    return fitted


def _for_each(x: Tensor, edited: Tensor) -> Tensor:
    """One of x for every edit; several edits of one picture follow each other."""
    return x.repeat_interleave(len(edited) // len(x), dim=0)
