"""What a run shows: truth and prediction side by side, and the losses over the iterations. Small PNGs, no framework."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from twist.contracts import files
from twist.contracts.curves import Panel, draw, read_rows

PICTURES = 4
# Longest side of one panel: two of them stay below 200 KB as a 256-colour PNG.
PANEL_PIXELS = 352
_CAPTION_PIXELS = 18
_GAP_PIXELS = 4


def save_pairs(folder: Path, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """The first pairs of drawn images (H, W, 3), uint8 RGB: truth and prediction in one PNG; the files' names."""
    names = []
    for number, pair in enumerate(itertools.islice(pairs, PICTURES), start=1):
        panels = [Image.fromarray(image) for image in pair]
        for panel in panels:
            panel.thumbnail((PANEL_PIXELS, PANEL_PIXELS), Image.Resampling.LANCZOS)
        width, height = panels[0].size
        canvas = Image.new("RGB", (2 * width + _GAP_PIXELS, height + _CAPTION_PIXELS), "white")
        pen = ImageDraw.Draw(canvas)
        for panel, left, caption in zip(panels, (0, width + _GAP_PIXELS), ("truth", "prediction"), strict=True):
            canvas.paste(panel, (left, _CAPTION_PIXELS))
            pen.text((left + 2, 1), caption, fill="black", font=ImageFont.load_default(13))
        names.append(f"prediction-{number}.png")
        with files.atomic_path(folder / names[-1]) as temporary:
            canvas.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(temporary, format="PNG", optimize=True)
    return names


def plot_losses(curves: Path, path: Path, *, title: str) -> Path:
    """The losses of a `metrics.jsonl` over its steps, one line each, as a PNG at `path`."""
    rows = read_rows(curves)
    names = sorted({name for row in rows for name in row if "loss" in name}, key=lambda name: (name != "loss", name))
    settings = {"xlabel": "iteration", "ylabel": "loss", "ylim": (0, None)}
    return draw(rows, [Panel(title, {name: name for name in names}, settings, smooth=False)], path)
