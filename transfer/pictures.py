"""What a run shows: predictions beside the truth, and the losses over the iterations. Small PNGs, no framework.

Left is the truth, right the prediction. `N` objects, images are uint8 RGB (H, W, 3), masks bool (N, H, W), boxes
(N, 4) as x0, y0, x1, y1 in pixels, class maps (H, W) with 255 for what is ignored.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from twist.contracts import files
from twist.contracts.curves import Panel, draw, read_rows

# Longest side of one panel: two of them stay below 200 KB as a 256-colour PNG.
PANEL_PIXELS = 352
IGNORE = 255
_CAPTION_PIXELS = 18
_GAP_PIXELS = 4
_SWATCH_PIXELS = 10


def colour_of(index: int) -> tuple[int, int, int]:
    """A colour for class `index`: hues a golden angle apart, so neighbours differ; the same in every picture."""
    hue = (index * 0.61803398875) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0 - 0.25 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    names: Sequence[str],
    *,
    scores: Sequence[float] | None = None,
    masks: np.ndarray | None = None,
) -> Image.Image:
    """`image` with boxes, class names, scores and half-transparent masks on it."""
    scale = PANEL_PIXELS / max(image.shape[:2])
    pixels = image.astype(np.float32)
    for mask, index in zip(masks if masks is not None else (), classes, strict=False):
        pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(colour_of(index), dtype=np.float32)
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    panel = Image.fromarray(pixels.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(panel), _font(12)
    for number, (box, index) in enumerate(zip(boxes, classes, strict=True)):
        x0, y0, x1, y1 = (float(value) * scale for value in box)
        colour = colour_of(index)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
        text = names[index] + (f" {scores[number]:.2f}" if scores is not None else "")
        left, top, right, bottom = draw.textbbox((x0 + 2, y0 + 1), text, font=font)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
        draw.text((x0 + 2, y0 + 1), text, fill="black", font=font)
    return panel


# Colour and class name, in the order in which a legend shows them.
Legend = Sequence[tuple[tuple[int, int, int], str]]


def legend_of(class_maps: Sequence[np.ndarray], names: Sequence[str]) -> Legend:
    """The classes that are in any of the maps, in the colours that `draw_classes` lays over them."""
    present = sorted({int(index) for class_map in class_maps for index in np.unique(class_map)} - {IGNORE})
    return [(_laid_over(index), names[index]) for index in present]


def _laid_over(index: int) -> tuple[int, int, int]:
    return colour_of(index) if index else (0, 0, 0)


def draw_classes(image: np.ndarray, class_map: np.ndarray) -> Image.Image:
    """`image` with the class map half-transparent over it; what is ignored stays as it is, class 0 is darkened."""
    scale = PANEL_PIXELS / max(image.shape[:2])
    pixels = image.astype(np.float32)
    for index in np.unique(class_map):
        if index == IGNORE:
            continue
        where = class_map == index
        colour = np.array(_laid_over(int(index)), dtype=np.float32)
        pixels[where] = 0.45 * pixels[where] + 0.55 * colour
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return Image.fromarray(pixels.round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def save_pair(truth: Image.Image, prediction: Image.Image, path: Path, *, legend: Legend = ()) -> Path:
    """Both panels side by side with captions, and below them the `legend`, as a 256-colour PNG at `path`."""
    width = truth.width + prediction.width + _GAP_PIXELS
    below = max(truth.height, prediction.height) + _CAPTION_PIXELS
    rows = _rows_of(legend, width)
    canvas = Image.new("RGB", (width, below + _CAPTION_PIXELS * len(rows)), "white")
    canvas.paste(truth, (0, _CAPTION_PIXELS))
    canvas.paste(prediction, (truth.width + _GAP_PIXELS, _CAPTION_PIXELS))
    draw, font = ImageDraw.Draw(canvas), _font(13)
    draw.text((2, 1), "truth", fill="black", font=font)
    draw.text((truth.width + _GAP_PIXELS + 2, 1), "prediction", fill="black", font=font)
    for number, row in enumerate(rows):
        top = below + number * _CAPTION_PIXELS
        for left, colour, name in row:
            draw.rectangle((left, top + 4, left + _SWATCH_PIXELS, top + 4 + _SWATCH_PIXELS), fill=colour)
            draw.text((left + _SWATCH_PIXELS + 4, top + 2), name, fill="black", font=_font(12))
    with files.atomic_path(path) as temporary:
        canvas.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(temporary, format="PNG", optimize=True)
    return path


def _rows_of(legend: Legend, width: int) -> list[list[tuple[int, tuple[int, int, int], str]]]:
    """The entries with the pixel at which each begins, in as many rows as a picture of `width` needs."""
    rows: list[list[tuple[int, tuple[int, int, int], str]]] = []
    left = width
    for colour, name in legend:
        size = _SWATCH_PIXELS + 4 + round(_font(12).getlength(name)) + 12
        if left + size > width:
            rows.append([])
            left = 2
        rows[-1].append((left, colour, name))
        left += size
    return rows


def plot_losses(curves: Path, path: Path, *, title: str) -> Path:
    """The losses of a `metrics.jsonl` over its steps, one line each, as a PNG at `path`."""
    rows = read_rows(curves)
    names = sorted({name for row in rows for name in row if "loss" in name}, key=lambda name: (name != "loss", name))
    settings = {"xlabel": "iteration", "ylabel": "loss", "ylim": (0, None)}
    return draw(rows, [Panel(title, {name: name for name in names}, settings, smooth=False)], path)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
