"""What a run shows: truth and prediction side by side, sheets of small images, and the losses over the iterations."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from twist.catalog.class_folders import LabelledImages
from twist.contracts import files
from twist.contracts.curves import Panel, draw, read_rows

PICTURES = 4
# Longest side of one panel: two of them stay below 200 KB as a 256-colour PNG.
PANEL_PIXELS = 352
_LINE, _GAP, _FONT = 18, 4, 13
_SIDE, _FRAME = 64, 3
# Okabe and Ito's blue and vermilion; a query. Broken frames, so that neither colour sight nor print is needed.
RIGHT, WRONG, PLAIN = "#0072B2", "#D55E00", "#555555"
_FRAMES = "blue frame {}, broken orange frame {}"


def sheet(rows: Sequence[Sequence[Image.Image]], *, titles: Sequence[str] = (), heading: str = "") -> Image.Image:
    """Rows of pictures of any size in columns, below the `titles` of the columns or a `heading`."""
    font = ImageFont.load_default(_FONT)
    widths = [max(one.width for one in column if one) for column in itertools.zip_longest(*rows)]
    lefts, tops = [0], [_LINE]
    for place, sizes in ((lefts, widths), (tops, [max(one.height for one in row) for row in rows])):
        for size in sizes:
            place.append(place[-1] + size + _GAP)
    width = max(lefts[-1] - _GAP, round(font.getlength(heading)) + 4 * _GAP if heading else 0)
    canvas = Image.new("RGB", (width, tops[-1] - _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for left, text in zip(lefts, titles or (heading,)):
        pen.text((left + 2, 1), text, fill="black", font=font)
    for row, top in zip(rows, tops):
        for picture, left in zip(row, lefts):
            canvas.paste(picture, (left, top))
    return canvas


def save_pairs(folder: Path, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """The first pairs of drawn images (H, W, 3), uint8 RGB: truth and prediction in one PNG; the files' names."""
    names = []
    for number, pair in enumerate(itertools.islice(pairs, PICTURES), start=1):
        panels = [Image.fromarray(image) for image in pair]
        for panel in panels:
            panel.thumbnail((PANEL_PIXELS, PANEL_PIXELS), Image.Resampling.LANCZOS)
        names.append(f"prediction-{number}.png")
        _save(sheet([panels], titles=("truth", "prediction")), folder / names[-1])
    return names


def _save(canvas: Image.Image, path: Path) -> Path:
    """In 256 colours, which at these sizes look like all."""
    with files.atomic_path(path) as temporary:
        # An octree takes a hundredth of the time of a median cut, half a second of which is a quarter of a k-NN run.
        canvas.quantize(256, Image.Quantize.FASTOCTREE).save(temporary, format="PNG", optimize=True)
    return path


def plot_losses(curves: Path, path: Path, *, title: str) -> Path:
    """The losses of a `metrics.jsonl` over its steps, one line each, as a PNG at `path`."""
    rows = read_rows(curves)
    names = sorted({name for row in rows for name in row if "loss" in name}, key=lambda name: (name != "loss", name))
    settings = {"xlabel": "iteration", "ylabel": "loss", "ylim": (0, None)}
    return draw(rows, [Panel(title, {name: name for name in names}, settings, smooth=False)], path)


# ── Sheets of small images, each with a frame that says right or wrong ────────────────────────────────────────────────


def tile(image: Tensor, captions: Sequence[str], right: bool | None = None) -> Image.Image:
    """The central square of an image (3, H, W) in its frame, with captions below it; `right` None is a query."""
    colour = {True: RIGHT, False: WRONG, None: PLAIN}[right]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    framed = ImageOps.expand(ImageOps.fit(picture, (_SIDE, _SIDE), Image.Resampling.LANCZOS), _FRAME, colour)
    edge = framed.width
    canvas = Image.new("RGB", (edge, edge + _LINE * len(captions)), "white")
    pen = ImageDraw.Draw(framed)
    for gap in range(7, edge, 10) if right is False else ():
        for side in (0, edge - _FRAME):
            pen.rectangle((gap, side, gap + 2, side + _FRAME), fill="white")
            pen.rectangle((side, gap, side + _FRAME, gap + 2), fill="white")
    canvas.paste(framed)
    for number, (text, fill) in enumerate(zip(captions, ("black", colour))):
        short = text if len(text) <= 10 else text[:9] + "…"
        ImageDraw.Draw(canvas).text((0, edge + number * _LINE), short, fill=fill, font=ImageFont.load_default(11))
    return canvas


def _tiles(images: LabelledImages, shown: np.ndarray, *, right: int) -> list[Image.Image]:
    """The images `shown`, framed by whether their class is `right`."""
    labels = images.labels[shown]
    return [tile(images.read(i), (images.classes[k],), bool(k == right)) for i, k in zip(shown, labels, strict=True)]


def prediction_sheet(path: Path, shown: LabelledImages, predicted: Sequence[int]) -> Path:
    """Validation images with the truth and, below it, the prediction; the frame says whether they agree."""
    tiles = [
        tile(shown.read(index), (shown.classes[label], shown.classes[found]), found == label)
        for index, (label, found) in enumerate(zip(shown.labels.tolist(), predicted, strict=True))
    ]
    legend = f"truth, below it the prediction: {_FRAMES.format('right', 'wrong')}"
    return _save(sheet([tiles[start : start + 6] for start in range(0, len(tiles), 6)], heading=legend), path)


def neighbour_sheet(path: Path, train: LabelledImages, val: LabelledImages, index: Tensor) -> Path:
    """Six validation images, spread over the classes, each with its six nearest training images (Q, k)."""
    rows = []
    for query in np.linspace(0, len(val) - 1, num=min(6, len(val)), dtype=int):
        label = val.labels[query]
        first = tile(val.read(query), (val.classes[label],))
        rows.append([first, *_tiles(train, index[query, :6].numpy(), right=label)])
    legend = f"left the query, then its nearest: {_FRAMES.format('of its class', 'of another')}"
    return _save(sheet(rows, heading=legend), path)


def cluster_sheet(path: Path, val: LabelledImages, assignment: np.ndarray) -> Path:
    """The six largest clusters, seven images each, framed by whether an image is of its cluster's commonest class."""
    names, counts = np.unique(assignment, return_counts=True)
    rows = []
    for cluster in names[np.argsort(-counts, kind="stable")][:6]:
        members = np.flatnonzero(assignment == cluster)
        shown = members[np.linspace(0, len(members) - 1, num=min(7, len(members)), dtype=int)]
        rows.append(_tiles(val, shown, right=int(np.bincount(val.labels[members]).argmax())))
    return _save(sheet(rows, heading=f"a row a cluster: {_FRAMES.format('its commonest class', 'another')}"), path)
