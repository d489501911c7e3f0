"""Pictures for the report: rows of small images, each with a frame that says right or wrong.

Blue and orange with solid and broken frames, so that neither colour sight nor print is needed to tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from twist.contracts import files
from twist.contracts.images import read_image

RIGHT, WRONG, PLAIN = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's blue and vermilion
_TEXT = "#222222"
_SIDE, _GAP, _LINE, _FONT = 72, 6, 14, 11
_MOST_BYTES = 200_000


@dataclass(frozen=True)
class Tile:
    """One image with a caption; `right` None draws a plain frame (a query).

    `predicted` is a second line below the caption, in the frame's colour.
    """

    path: Path
    caption: str
    right: bool | None = None
    predicted: str | None = None


def write_panel(
    path: Path, rows: Sequence[Sequence[Tile]], *, first_apart: bool = False, legend: str | None = None
) -> Path:
    """Rows of tiles as one PNG; rows may differ in length.

    `first_apart` leaves a gap after each row's first tile, `legend` is a line above all.
    """
    apart = 2 * _GAP if first_apart else 0
    captions = _LINE * (2 if any(tile.predicted is not None for row in rows for tile in row) else 1) + 2
    above = _LINE + _GAP if legend else _GAP
    width = max(len(row) for row in rows) * (_SIDE + _GAP) + _GAP + apart
    if legend:  # of few images in a row it may be longer than they are
        width = max(width, round(ImageFont.load_default(_FONT).getlength(legend)) + 2 * _GAP)
    height = len(rows) * (_SIDE + captions + _GAP) + above
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    if legend:
        draw.text((_GAP, 2), legend, fill=_TEXT, font_size=_FONT)
    for number, row in enumerate(rows):
        top = above + number * (_SIDE + captions + _GAP)
        for column, tile in enumerate(row):
            left = _GAP + column * (_SIDE + _GAP) + (apart if column else 0)
            _tile(sheet, draw, tile, left, top)
    with files.atomic_path(path) as temporary:
        # A palette; the eye does not see 256 colours from all of them at this scale, and fewer only on noisy images.
        for colours in (256, 64, 16):
            sheet.quantize(colours, method=Image.Quantize.MEDIANCUT).save(temporary, format="PNG")
            if temporary.stat().st_size < _MOST_BYTES:
                break
    return path


def _tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    pixels = read_image(tile.path).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    edge = min(picture.size)
    x, y = (picture.width - edge) // 2, (picture.height - edge) // 2
    picture = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box=(x, y, x + edge, y + edge))
    sheet.paste(picture, (left, top))
    box = (left - 1, top - 1, left + _SIDE, top + _SIDE)
    if tile.right is None:
        draw.rectangle(box, outline=PLAIN, width=1)
    elif tile.right:
        draw.rectangle(box, outline=RIGHT, width=3)
    else:
        _broken_rectangle(draw, box)
    draw.text((left, top + _SIDE + 2), _short(tile.caption), fill=_TEXT, font_size=_FONT)
    if tile.predicted is not None:
        colour = {True: RIGHT, False: WRONG, None: _TEXT}[tile.right]
        draw.text((left, top + _SIDE + 2 + _LINE), _short(tile.predicted), fill=colour, font_size=_FONT)


def _short(text: str) -> str:
    return text if len(text) <= 12 else text[:11] + "…"


def _broken_rectangle(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    for start in range(0, right - left, 10):
        end = min(start + 6, right - left)
        for y in (top, bottom):
            draw.line((left + start, y, left + end, y), fill=WRONG, width=3)
        for x in (left, right):
            draw.line((x, top + start, x, top + end), fill=WRONG, width=3)
