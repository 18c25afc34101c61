"""A contact sheet: rows of pictures with their labels, drawn as one picture.

Knows Pillow images and words; knows nothing of models. All lengths are pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 128
"""Largest side of a picture on the sheet."""
LETTERS = 14
"""Size of the labels."""
_GAP, _LEADING = 6, 8


@dataclass(frozen=True)
class Row:
    """A label and the pictures under it, from left to right."""

    label: str
    pictures: Sequence[Image.Image]


def contact_sheet(rows: Sequence[Row], columns: Sequence[str], cell: int = CELL, letters: int = LETTERS) -> Image.Image:
    """An RGB picture of all rows, one under the other, with the columns' labels on top.

    Pictures of any sizes and modes are made to fit `cell` x `cell`, their transparent parts white. Labels, as large as
    `letters`, are cut where there is no room; Pillow's own font has Latin letters only.
    Raises ValueError without rows or columns, and where a row has not one picture for every column.
    """
    if not rows or not columns:
        raise ValueError("a contact sheet needs at least one row and one column")
    for row in rows:
        if len(row.pictures) != len(columns):
            raise ValueError(f"the row {row.label!r} has {len(row.pictures)} pictures for {len(columns)} columns")
    shrunk = [[_shrunk(picture, cell) for picture in row.pictures] for row in rows]
    heights = [max(picture.height for picture in pictures) for pictures in shrunk]
    line, width = letters + _LEADING, _GAP + len(columns) * (cell + _GAP)
    sheet = Image.new("RGB", (width, _GAP + line + sum(line + height + _GAP for height in heights)), "white")
    font = _font(letters)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.text((_left(column, cell), _GAP), _cut(label, cell, font), "grey", font)
    top = _GAP + line
    for row, pictures, height in zip(rows, shrunk, heights):
        draw.text((_GAP, top), _cut(row.label, width - 2 * _GAP, font), "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (_left(column, cell), top + line))
        top += line + height + _GAP
    return sheet


def _left(column: int, cell: int) -> int:
    return _GAP + column * (cell + _GAP)


def _shrunk(picture: Image.Image, cell: int) -> Image.Image:
    """The picture on white in RGB, its longer side `cell`."""
    colours = picture.convert("RGBA")
    opaque = Image.new("RGB", picture.size, "white")
    opaque.paste(colours, mask=colours)
    scale = cell / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return opaque.resize(size, Image.Resampling.LANCZOS)


def _font(letters: int):
    """Pillow's own, of a size; its only size before Pillow 10.1."""
    try:
        return ImageFont.load_default(size=letters)
    except TypeError:
        return ImageFont.load_default()


def _cut(text: str, width: int, font) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
