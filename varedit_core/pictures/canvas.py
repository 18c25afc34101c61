"""The part of a picture that the model sees: cut out by a mask and put back, or with room added around it.

Knows boxes, masks and colours; knows nothing of weights, tokens or `Editor`. Boxes are (left, top, right, bottom) and
sizes (width, height), in pixels. Tensors of pictures are [B, H, W, C] with floats in any range and C = 1, 3 or 4 (alpha
last), masks [N, H, W] from 0 to 1. `*_pixels` work on such tensors, `crop`, `stitch` and `extend` on one Pillow
picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..defaults import CROP_MARGIN, FEATHER, FILL, FILLS, FIT, LEAST_MARGIN, OVERLAP, SIZE
from ..fitting import FITS, MAX_CANVAS_PIXELS, Box, Size, canvas_size, nearest_ratio
from ..tokenizer.schedule import schedule_for
from .borders import cut, spread
from .images import SourceImage

Sides = Sequence[int | float]
"""(left, top, right, bottom): whole numbers are pixels, floats shares of the picture's width or height."""

LEAST_LEVEL = 0.5 / 255  # blurred masks fade out over a long way; less than this changes no 8-bit mask
MOST_SHARE = 4.0


@dataclass(frozen=True, eq=False)
class Crop:
    """Where pictures of one size are edited.

    boxes: what is cut out, one for all pictures or one for each; of one size, so that the crops are a batch.
    mask: [1 or B, H, W], what may change of the whole pictures.
    """

    boxes: tuple[Box, ...]
    mask: Tensor

    @property
    def size(self) -> Size:
        """Of the whole pictures."""
        return self.mask.shape[2], self.mask.shape[1]

    @property
    def crop_size(self) -> Size:
        left, top, right, bottom = self.boxes[0]
        return right - left, bottom - top


def crop_around(size: Size, mask: Image.Image | Tensor, margin: float = CROP_MARGIN, shape: str = FIT) -> Crop:
    """The region around what a mask marks in pictures of this size.

    mask: a picture's brightness, or [H, W] to [N, 1, H, W], one for all pictures or one for each; stretched over them.
    margin: what is seen around the marked part on every side, as a share of its longer side; at least LEAST_MARGIN
    pixels. shape: one of FITS, as `images.fit` will fit the crop. A picture's edge takes from margin and shape.
    Raises ValueError for an empty mask, a negative margin and another shape.
    """
    if shape not in FITS:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(FITS)}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"the margin must be at least 0, got {margin}; 0.25 is a quarter of the masked part's side")
    mask_NHW = _stretched(mask, size)
    marked = [_bounds(one) for one in mask_NHW]
    if None in marked:
        which = f"mask {marked.index(None) + 1} of {len(marked)}" if len(marked) > 1 else "the mask"
        raise ValueError(f"{which} is empty; paint where the picture may change")
    largest = max(right - left for left, _, right, _ in marked), max(bottom - top for _, top, _, bottom in marked)
    wanted = _crop_size(largest, size, margin, shape)
    return Crop(tuple(_box_around(one, wanted, size) for one in marked), mask_NHW)


def crop_pixels(images_BHWC: Tensor, region: Crop) -> tuple[Tensor, Tensor]:
    """The pictures' parts [B, h, w, C], and masks [N, h, w] that are 1 wherever these may change, else 0.

    The masks are hard so that a soft one is blended once, by `stitch_pixels`. ValueError for pictures of another size
    or number.
    """
    _check_whole(images_BHWC, region)
    boxes = region.boxes * (len(images_BHWC) // len(region.boxes))
    masks = zip(region.mask, region.boxes)
    return _parts(zip(images_BHWC, boxes)), _parts((mask > 0, box) for mask, box in masks).float()


def stitch_pixels(images_BHWC: Tensor, edited_EhwC: Tensor, region: Crop, feather: int = FEATHER) -> Tensor:
    """The whole pictures [E, H, W, C] with the edit where the mask is 1; where it is 0 they stay as they are, exactly.

    edited: crops after the edit, several of one picture behind each other; of another size they are resized. Their
    alpha is left out, the pictures' own stays. feather: see `feathered`. ValueError for pictures that do not belong
    together.
    """
    _check_whole(images_BHWC, region)
    if not len(edited_EhwC) or len(edited_EhwC) % len(images_BHWC):
        raise ValueError(
            f"there are {len(images_BHWC)} images for {len(edited_EhwC)} edits; connect the same batch, or one image"
        )
    if not edited_EhwC.isfinite().all():
        raise ValueError("the edited crop holds undefined numbers; check the node that made it")
    copies = len(edited_EhwC) // len(images_BHWC)
    result = _coloured(images_BHWC).repeat_interleave(copies, dim=0)
    edited = _resized(_coloured(edited_EhwC)[..., :3].to(result), region.crop_size)
    weights = [_weight(*pair, feather).to(result) for pair in zip(region.mask, region.boxes)]
    for i, (whole, edit) in enumerate(zip(result, edited)):
        k = i // copies % len(region.boxes)
        weight_hw1, part = weights[k][..., None], _part(whole, region.boxes[k])[..., :3]
        part.copy_(blended(edit, part, weight_hw1))
    return result


def blended(edited: Tensor, picture: Tensor, weight: Tensor, eight_bit: bool = False) -> Tensor:
    """The edit by its weight from 0 to 1; where that is 0 exactly the picture. eight_bit: rounded to levels."""
    mixed = edited * weight + picture * (1 - weight)
    return torch.where(weight == 0, picture, (mixed * 255).round() / 255 if eight_bit else mixed)


def feathered(mask_NHW: Tensor, pixels: int) -> Tensor:
    """A mask that rises from its edge inwards over so many pixels: pixel d from the edge has d / (pixels + 1) of it.

    What is 0 stays 0; a picture's border is no edge. ValueError for a negative number.
    """
    if pixels < 0:
        raise ValueError(f"the feather must be at least 0 pixels, got {pixels}; it lies inside the mask")
    if not pixels:
        return mask_NHW
    mask = mask_NHW[:, None].float()
    before, window = pixels // 2, pixels + 1
    after = pixels - before
    for pads, sizes in (((before, after, 0, 0), (1, window)), ((0, 0, before, after), (window, 1))):
        mask = -F.max_pool2d(-F.pad(mask, pads, value=1.0), sizes, stride=1)
    # The window mirrored: no mean reaches beyond where the mask was eroded.
    for pads, sizes in (((after, before, 0, 0), (1, window)), ((0, 0, after, before), (window, 1))):
        mask = F.avg_pool2d(F.pad(mask, pads, mode="replicate"), sizes, stride=1)
    return mask[:, 0]


def faded(mask: Image.Image, size: Size, pixels: int = 0) -> Image.Image:
    """A mask of any size, stretched over a picture of this one, that rises inwards from its edge as in `feathered`."""
    stretched = mask.convert("L").resize(size, Image.Resampling.BILINEAR)
    if not pixels:
        return stretched
    weight = feathered(torch.from_numpy(np.array(stretched))[None] / 255, pixels)[0]
    return Image.fromarray((weight * 255).round().to(torch.uint8).numpy())


def extend_pixels(images_BHWC: Tensor, sides: Sides, fill: str = FILL) -> Tensor:
    """Pictures with room around them, alpha full there; their own part stays as it is, exactly.

    fill: one of FILLS; blur spreads the edges' colours, the softer the further out. ValueError for another fill and
    for sides that are negative, all 0, or make more than MAX_CANVAS_PIXELS.
    """
    if fill not in FILLS:
        raise ValueError(f"unknown fill {fill!r}; choose one of {', '.join(FILLS)}")
    if images_BHWC.ndim != 4 or 0 in images_BHWC.shape:
        raise ValueError("there is no picture to extend; give at least one")
    height, width = images_BHWC.shape[1:3]
    left, top, right, bottom = sides_in_pixels(sides, (width, height))
    rows, columns = torch.arange(-top, height + bottom), torch.arange(-left, width + right)
    if fill == "mirror":
        rows, columns = _mirrored(rows, height), _mirrored(columns, width)
    inner = slice(top, top + height), slice(left, left + width)
    device = images_BHWC.device
    result = images_BHWC[:, rows.clamp(0, height - 1).to(device)][:, :, columns.clamp(0, width - 1).to(device)]
    known = torch.zeros(1, 1, *result.shape[1:3], device=device)
    known[:, :, inner[0], inner[1]] = 1
    white = 255.0 if images_BHWC.max() > 1 else 1.0
    if fill == "white":
        result = torch.where(known[0, 0, :, :, None] > 0, result, white)
    elif fill == "blur":
        result = spread(result.movedim(-1, 1), known).movedim(1, -1)
    if result.shape[3] == 4:
        result[..., 3:] = torch.where(known[0, 0, :, :, None] > 0, result[..., 3:], white)
    return result


def extension_mask(size: Size, sides: Sides, overlap: int = OVERLAP) -> Tensor:
    """[1, H, W] beside a picture of this size once it is extended: 1 where it is new, falling to 0 within the overlap.

    overlap: pixels of the old picture that may be repainted, beside every extended side; less where that would leave
    nothing of the picture as it is. ValueError for sides as `extend_pixels`, and for a negative overlap.
    """
    if overlap < 0:
        raise ValueError(f"the overlap must be at least 0 pixels, got {overlap}; it lies inside the picture")
    left, top, right, bottom = sides_in_pixels(sides, size)
    across, down = _falling(size[0], left, right, overlap), _falling(size[1], top, bottom, overlap)
    return torch.maximum(across[None], down[:, None])[None]


def crop(source: SourceImage, region: Crop) -> tuple[SourceImage, Image.Image]:
    """A picture's part in a region of one box, and the mask [mode L] of what may change there, 0 or 255."""
    _check_whole(_empty(source), region)
    alpha = source.alpha if source.alpha is None else cut(source.alpha, region.boxes[0])
    mask = _part(region.mask[0], region.boxes[0]) > 0
    part = replace(source, rgb=cut(source.rgb, region.boxes[0]), alpha=alpha)
    return part, Image.fromarray(mask.numpy().astype(np.uint8) * 255)


def stitch(source: SourceImage, edited: Image.Image, region: Crop, feather: int = FEATHER) -> Image.Image:
    """The whole picture with the edited part put back (see `stitch_pixels`), RGB or (with the source's alpha) RGBA."""
    result = _pillow(stitch_pixels(_levels(source.rgb), _levels(edited.convert("RGB")), region, feather))
    if source.alpha is not None:
        result.putalpha(source.alpha)
    return result


def extend(
    source: SourceImage, sides: Sides, overlap: int = OVERLAP, fill: str = FILL
) -> tuple[SourceImage, Image.Image]:
    """A picture with room around it, opaque there, and the mask [mode L] of what is new; see `extend_pixels` and
    `extension_mask`."""
    mask = extension_mask(source.size, sides, overlap)
    rgb, alpha = _pillow(extend_pixels(_levels(source.rgb), sides, fill)), None
    if source.alpha is not None:
        left, top, *_ = sides_in_pixels(sides, source.size)
        alpha = Image.new("L", rgb.size, 255)
        alpha.paste(source.alpha, (left, top))
    levels = (mask[0] * 255).ceil()  # the faintest still counts
    return replace(source, rgb=rgb, alpha=alpha), Image.fromarray(levels.to(torch.uint8).numpy())


def sides_from(text: str) -> tuple[int | float, ...]:
    """Sides out of "left,top,right,bottom", or of one number for all: "64" is pixels, "0.25" and "25%" are shares.

    Raises ValueError for anything else.
    """
    try:
        parts = [part.strip() for part in text.split(",")]
        sides = [float(p[:-1]) / 100 if p.endswith("%") else float(p) if "." in p else int(p) for p in parts]
        if len(sides) not in (1, 4):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{text!r} is no extension; give left,top,right,bottom in pixels (64) or shares (0.25 or 25%), or one for "
            "all"
        ) from None
    return tuple(sides * (4 // len(sides)))


def sides_in_pixels(sides: Sides, size: Size) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of a picture of this size. Raises ValueError as `extend_pixels` says."""
    if len(sides) != 4 or not all(0 <= side < math.inf for side in sides):
        raise ValueError(f"left, top, right and bottom must be at least 0, got {tuple(sides)}; to cut off is to crop")
    if any(isinstance(side, float) and side > MOST_SHARE for side in sides):
        raise ValueError(
            f"a share of {max(sides)} is too much; give at most {MOST_SHARE:g}, or pixels as whole numbers"
        )
    lengths = size * 2
    pixels = tuple(round(side * n) if isinstance(side, float) else int(side) for side, n in zip(sides, lengths))
    if not any(pixels):
        raise ValueError("nothing is added; give left, top, right or bottom")
    width, height = size[0] + pixels[0] + pixels[2], size[1] + pixels[1] + pixels[3]
    if width * height > MAX_CANVAS_PIXELS:
        raise ValueError(f"the extended picture would be of {width}x{height}; add less, or make the picture smaller")
    return pixels


def _stretched(mask: Image.Image | Tensor, size: Size) -> Tensor:
    """A mask of any size as [N, H, W] beside pictures of this size, exactly 0 and 1 where it is."""
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.array(mask.convert("L"))) / 255
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    if 0 in mask.shape:
        raise ValueError("the mask has no pixels; paint where the picture may change")
    mask = F.interpolate(mask.clamp(0, 1), size[::-1], mode="bilinear", antialias=True)[:, 0]
    mask = torch.where(mask > 1 - 1e-6, 1.0, mask)  # interpolation of ones gives almost one
    return torch.where(mask < LEAST_LEVEL, 0.0, mask)


def _bounds(mask_HW: Tensor) -> Box | None:
    """The smallest box around all that is not 0."""
    rows, columns = (mask_HW.amax(dim).nonzero().flatten().tolist() for dim in (1, 0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else None


def _crop_size(marked: Size, size: Size, margin: float, shape: str) -> Size:
    """Of the crop around a marked part of this size: in the shape wanted, or as near to it as the picture allows."""
    around = 2 * max(math.ceil(margin * max(marked)), LEAST_MARGIN)
    seen = min(marked[0] + around, size[0]), min(marked[1] + around, size[1])
    ratio = nearest_ratio(seen[1] / seen[0]) if FITS[shape].nearest else 1.0
    grid = schedule_for(SIZE, ratio).pixels
    wide, high = canvas_size(seen, grid)
    if wide <= size[0] and high <= size[1]:
        return wide, high
    # Too large: the largest of this shape, if that holds the marked part, else all that there is on the short side.
    scale = min(size[0] / grid[1], size[1] / grid[0])
    inside = max(1, round(scale * grid[1])), max(1, round(scale * grid[0]))
    if inside[0] >= marked[0] and inside[1] >= marked[1]:
        return inside
    return min(wide, size[0]), min(high, size[1])


def _box_around(marked: Box, wanted: Size, size: Size) -> Box:
    """The box of the wanted size around a marked part's middle, moved into the picture."""
    left, top = (min(max((marked[i] + marked[i + 2] - wanted[i]) // 2, 0), size[i] - wanted[i]) for i in (0, 1))
    return left, top, left + wanted[0], top + wanted[1]


def _check_whole(images_BHWC: Tensor, region: Crop) -> None:
    """ValueError unless these are the pictures that a region is of."""
    if images_BHWC.ndim != 4 or not len(images_BHWC):
        raise ValueError("there is no picture; give at least one")
    height, width, channels = images_BHWC.shape[1:]
    if (width, height) != region.size:
        raise ValueError(
            f"the image is {width}x{height} but the region is of one of {region.size[0]}x{region.size[1]}; give the "
            "picture that was cropped"
        )
    _check_channels(channels)
    if len(region.boxes) not in (1, len(images_BHWC)):
        raise ValueError(
            f"there are {len(region.boxes)} masks for {len(images_BHWC)} pictures; connect one, or one for each"
        )


def _check_channels(channels: int) -> None:
    if channels not in (1, 3, 4):
        raise ValueError(f"the image has {channels} channels; connect one with 1, 3 or 4")


def _coloured(images_BHWC: Tensor) -> Tensor:
    """Grey pictures with three channels, others as they are."""
    _check_channels(images_BHWC.shape[3])
    return images_BHWC.expand(-1, -1, -1, max(3, images_BHWC.shape[3]))


def _resized(edited_EhwC: Tensor, size: Size) -> Tensor:
    """Crops at their region's size. ValueError for those of another shape, beyond what rounding does to one."""
    height, width = edited_EhwC.shape[1:3]
    if (width, height) == size:
        return edited_EhwC
    scale = max(width / size[0], height / size[1])
    if abs(width - scale * size[0]) > max(1, scale) or abs(height - scale * size[1]) > max(1, scale):
        raise ValueError(
            f"the edited crop is {width}x{height} but the region is {size[0]}x{size[1]}; give the edit of that region"
        )
    pixels = edited_EhwC.movedim(-1, 1)
    resized = F.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    return resized.clamp(pixels.min(), pixels.max()).movedim(1, -1)


def _weight(mask_HW: Tensor, box: Box, feather: int) -> Tensor:
    """[h, w]: the feathered mask in a box, read as far around it as its edge is felt."""
    near = max(box[0] - feather, 0), max(box[1] - feather, 0), box[2] + feather, box[3] + feather
    weight = feathered(_part(mask_HW, near)[None], feather)[0]
    return _part(weight, tuple(edge - near[i % 2] for i, edge in enumerate(box)))


def _part(picture_HW: Tensor, box: Box) -> Tensor:
    left, top, right, bottom = box
    return picture_HW[top:bottom, left:right]


def _parts(pairs) -> Tensor:
    return torch.stack([_part(picture, box) for picture, box in pairs])


def _mirrored(places: Tensor, length: int) -> Tensor:
    """Places beyond 0..length - 1, as often as they are, seen in mirrors at both ends."""
    places = places % (2 * length)
    return torch.minimum(places, 2 * length - 1 - places)


def _falling(length: int, before: int, after: int, overlap: int) -> Tensor:
    """1 before and after a picture's side of this length, and within it from its extended ends falling to 0, so that a
    pixel at least stays 0."""
    overlap = min(overlap, (length - 1) // max(1, bool(before) + bool(after)))
    inside = torch.arange(length)
    levels = torch.zeros(length)
    for added, distance in ((before, inside + 1), (after, length - inside)):
        if added:
            levels = torch.maximum(levels, (1 - distance / (overlap + 1)).clamp(min=0))
    return torch.cat([torch.ones(before), levels, torch.ones(after)])


def _empty(source: SourceImage) -> Tensor:
    """What `_check_whole` asks of a picture, without its pixels."""
    return torch.empty(1, source.size[1], source.size[0], 3, device="meta")


def _levels(picture: Image.Image) -> Tensor:
    """[1, H, W, 3] from 0 to 255."""
    return torch.from_numpy(np.array(picture))[None].float()


def _pillow(levels_1HWC: Tensor) -> Image.Image:
    return Image.fromarray(levels_1HWC[0].clamp(0, 255).round().to(torch.uint8).numpy())
