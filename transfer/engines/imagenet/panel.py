"""Pictures for the report: rows of small images, each with a frame that says right or wrong.

Blue and orange with solid and broken frames, so that neither colour sight nor print is needed to tell them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from twist.catalog.class_folders import LabelledImages
from twist.contracts import files

RIGHT, WRONG, PLAIN = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's blue and vermilion; a query
_TEXT = "#222222"
_SIDE, _FRAME, _GAP, _LINE, _FONT = 64, 3, 6, 14, 11


@dataclass(frozen=True)
class Tile:
    """One image with captions below it, the second in the frame's colour; `right` None is a query's plain frame."""

    image: Tensor
    captions: tuple[str, ...]
    right: bool | None = None


def prediction_panel(path: Path, shown: LabelledImages, predicted: Sequence[int]) -> Path:
    """Validation images with the truth and, below it, the prediction; the frame says whether they agree."""
    tiles = [
        Tile(shown.read(index), (shown.classes[label], shown.classes[found]), right=found == label)
        for index, (label, found) in enumerate(zip(shown.labels.tolist(), predicted, strict=True))
    ]
    rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
    return write_panel(path, rows, legend="truth, below it the prediction: blue frame right, broken orange frame wrong")


def neighbour_panel(path: Path, train: LabelledImages, val: LabelledImages, index: Tensor) -> Path:
    """Six validation images, spread over the classes, each with its six nearest training images."""
    rows = []
    for query in np.linspace(0, len(val) - 1, num=min(6, len(val)), dtype=int):
        label = val.labels[query]
        first = Tile(val.read(query), (val.classes[label],))
        rows.append([first, *_tiles(train, index[query, :6].numpy(), right=label)])
    legend = "left the query, then its nearest: blue frame of its class, broken orange frame of another"
    return write_panel(path, rows, legend=legend)


def cluster_panel(path: Path, val: LabelledImages, assignment: np.ndarray) -> Path:
    """The six largest clusters, seven images each, framed by whether an image is of its cluster's commonest class."""
    names, counts = np.unique(assignment, return_counts=True)
    rows = []
    for cluster in names[np.argsort(-counts, kind="stable")][:6]:
        members = np.flatnonzero(assignment == cluster)
        shown = members[np.linspace(0, len(members) - 1, num=min(7, len(members)), dtype=int)]
        rows.append(_tiles(val, shown, right=int(np.bincount(val.labels[members]).argmax())))
    legend = "a row a cluster: blue frame its commonest class, broken orange frame another"
    return write_panel(path, rows, legend=legend)


def _tiles(images: LabelledImages, shown: np.ndarray, *, right: int) -> list[Tile]:
    """The images `shown`, framed by whether their class is `right`."""
    labels = images.labels[shown]
    return [Tile(images.read(i), (images.classes[k],), bool(k == right)) for i, k in zip(shown, labels, strict=True)]


def write_panel(path: Path, rows: Sequence[Sequence[Tile]], *, legend: str) -> Path:
    """Rows of tiles below a legend as one PNG; rows may differ in length."""
    font = ImageFont.load_default(_FONT)
    lines = max(len(tile.captions) for row in rows for tile in row)
    across, down = _SIDE + 2 * _FRAME + _GAP, _SIDE + 2 * _FRAME + lines * _LINE + _GAP
    width = max(max(map(len, rows)) * across, round(font.getlength(legend)) + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * down + _LINE + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2), legend, fill=_TEXT, font=font)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            left, top = _GAP + x * across, _LINE + _GAP + y * down
            sheet.paste(_framed(tile), (left, top))
            colours = (_TEXT, RIGHT if tile.right else WRONG)
            for number, (caption, colour) in enumerate(zip(tile.captions, colours, strict=False)):
                text = caption if len(caption) <= 12 else caption[:11] + "…"
                draw.text((left, top + _SIDE + 2 * _FRAME + number * _LINE), text, fill=colour, font=font)
    with files.atomic_path(path) as temporary:
        # At this scale 256 colours look like all.
        sheet.quantize(256, method=Image.Quantize.MEDIANCUT).save(temporary, format="PNG", optimize=True)
    return path


def _framed(tile: Tile) -> Image.Image:
    """The central square of the tile's image in its frame."""
    edge = _SIDE + 2 * _FRAME
    framed = Image.new("RGB", (edge, edge), {True: RIGHT, False: WRONG, None: PLAIN}[tile.right])
    if tile.right is False:
        draw = ImageDraw.Draw(framed)
        for gap in range(7, edge, 10):
            draw.rectangle((gap, 0, gap + 2, edge), fill="white")
            draw.rectangle((0, gap, edge, gap + 2), fill="white")
    picture = Image.fromarray(tile.image.permute(1, 2, 0).numpy())
    framed.paste(ImageOps.fit(picture, (_SIDE, _SIDE), Image.Resampling.LANCZOS), (_FRAME, _FRAME))
    return framed
