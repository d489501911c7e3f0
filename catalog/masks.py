"""Binary masks as COCO, VOC and Cityscapes write them: boxes, polygons, run lengths, palettes, borders. numpy only.

A polygon's coordinates are pixel corners: the pixel in column 0 reaches from x = 0 to x = 1. Legend: H×W the frame.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Polygon = NDArray[np.float64]  # (N, 2) as x, y


def bounding_box(mask: Mask) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a mask that is not empty, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def run_lengths(mask: Mask) -> dict[str, list[int]]:
    """COCO's uncompressed run-length form: lengths of runs in column order, the first of zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def outlines(mask: Mask) -> list[Polygon]:
    """The outer outline of every 4-connected part, along pixel edges, largest first; holes are not kept.

    Every edge between a pixel inside and one outside is directed so that the inside lies to its right; following the
    edges gives closed loops, clockwise on the screen around parts and the other way around holes.
    """
    return sorted((loop for loop in _loops(mask) if _area(loop) > 0), key=_area, reverse=True)


def polygons(mask: Mask, *, tolerance: float = 0.6) -> list[Polygon]:
    """Polygons whose union is the mask up to `tolerance` pixels. COCO's have no holes: a part with one is cut in two.

    Parts of fewer than four pixels are dropped: they are grains of an anti-aliased edge.
    """
    loops = _loops(mask)
    hole = min(loops, key=_area, default=None)
    if hole is not None and _area(hole) <= -1:
        column = int(np.clip(round(hole[:, 0].mean()), hole[:, 0].min() + 1, hole[:, 0].max()))
        if column < mask.shape[1]:
            left, right = mask.copy(), mask.copy()
            left[:, column:], right[:, :column] = False, False
            return polygons(left, tolerance=tolerance) + polygons(right, tolerance=tolerance)
    return [simplify(loop, tolerance=tolerance) for loop in loops if _area(loop) >= 4]


def simplify(loop: Polygon, *, tolerance: float) -> Polygon:
    """Ramer-Douglas-Peucker on a closed loop: no dropped point is farther than `tolerance` from what stays."""
    # Plain numbers: loops have some dozens of points, too few for arrays to pay.
    points: list[tuple[float, float]] = [(x, y) for x, y in loop.tolist()]
    points.append(points[0])
    far = int(((loop - loop[0]) ** 2).sum(1).argmax())
    keep = {0, far}
    stack = [(0, far), (far, len(loop))]
    while stack:
        first, last = stack.pop()
        (x0, y0), (x1, y1) = points[first], points[last]
        dx, dy = x1 - x0, y1 - y0
        limit = tolerance * max(math.hypot(dx, dy), 1e-9)
        distances = [abs((x - x0) * dy - (y - y0) * dx) for x, y in points[first + 1 : last]]
        worst = max(distances, default=0.0)
        if worst > limit:
            middle = first + 1 + distances.index(worst)
            keep.add(middle)
            stack += [(first, middle), (middle, last)]
    # A sliver can shrink to a line; then the loop itself is the polygon.
    return loop[sorted(keep)] if len(keep) >= 3 else loop


def borders(labels: NDArray[np.uint8], *, width: int = 1) -> Mask:
    """Pixels within `width` of a change of label: the band that VOC marks 255, (H, W)."""
    band = np.zeros(labels.shape, dtype=bool)
    for step in range(1, width + 1):
        down, right = labels[step:] != labels[:-step], labels[:, step:] != labels[:, :-step]
        band[step:] |= down
        band[:-step] |= down
        band[:, step:] |= right
        band[:, :-step] |= right
    return band


def voc_palette() -> list[int]:
    """VOC's 256 colours as Pillow takes them: the bits of the index dealt out to red, green and blue in turn.

    Source: the VOC development kit's colour map (VOCcode/VOClabelcolormap).
    """
    colours = []
    for index in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours += channels
    return colours


def _loops(mask: Mask) -> list[Polygon]:
    if not mask.any():
        return []
    left, top, right, bottom = bounding_box(mask)
    padded = np.pad(mask[top:bottom, left:right], 1)
    inside = padded[1:-1, 1:-1]
    successors: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Top edges go right, right edges down, bottom edges left, left edges up: (missing neighbour, start, end).
    for neighbour, start, end in (
        (padded[:-2, 1:-1], (0, 0), (0, 1)),
        (padded[1:-1, 2:], (0, 1), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (1, 0)),
        (padded[1:-1, :-2], (1, 0), (0, 0)),
    ):
        for row, column in np.argwhere(inside & ~neighbour).tolist():
            successors.setdefault((row + start[0], column + start[1]), []).append((row + end[0], column + end[1]))
    loops = []
    while successors:
        first = next(iter(successors))
        corner, before = first, first
        path = [first]
        while True:
            choices = successors[corner]
            # Where two parts touch at a corner, turning right keeps each loop around its own part.
            following = choices[0] if len(choices) == 1 else min(choices, key=lambda c: _turn(before, corner, c))
            choices.remove(following)
            if not choices:
                del successors[corner]
            if following == first:
                break
            before, corner = corner, following
            path.append(corner)
        points = np.array(path, dtype=np.float64)
        # Only corners: a point between two edges of the same direction says nothing.
        straight = (points - np.roll(points, 1, axis=0) == np.roll(points, -1, axis=0) - points).all(1)
        loops.append(points[~straight][:, ::-1] + (left, top))
    return loops


def _turn(before: tuple[int, int], corner: tuple[int, int], after: tuple[int, int]) -> int:
    """-1 for a right turn on the screen, 1 for a left turn."""
    a = (corner[0] - before[0], corner[1] - before[1])
    b = (after[0] - corner[0], after[1] - corner[1])
    return -int(np.sign(a[1] * b[0] - a[0] * b[1]))


def _area(loop: Polygon) -> float:
    """Signed area, positive for a loop that runs clockwise on the screen."""
    x, y = loop[:, 0], loop[:, 1]
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
