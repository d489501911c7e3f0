"""A picture made of a background and cut-outs, with the mask of what stays visible of each.

Cut-outs are pasted from back to front; each throws a soft shadow on what lies behind. What is visible of an object is
its alpha times what all later cut-outs leave of it, so boxes and masks are those of the picture, not of the drawing.

Legend: H×W the frame, h×w a cut-out; colours are float32 in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from twist.catalog.sample.shapes import DISTRACTOR, Array, Cutout, background, draw_cutout, smooth_noise

Mask = NDArray[np.bool_]
Polygon = NDArray[np.float64]  # (N, 2) as x, y
Corner = tuple[int, int]  # row, column

# How far a polygon may lie from its mask, in pixels.
TOLERANCE = 0.6


class Placement(NamedTuple):
    """What to paste: a class (or `DISTRACTOR`), its longer side, and its centre, in pixels of the frame."""

    class_index: int
    size: int
    centre: tuple[int, int]
    crowd: bool = False


@dataclass(frozen=True)
class Instance:
    """One pasted object: `visible` is what can be seen of it, `whole` all of it inside the frame; both (H, W)."""

    class_index: int
    visible: Mask
    whole: Mask
    truncated: bool
    crowd: bool

    @property
    def visible_share(self) -> float:
        return float(self.visible.sum() / max(self.whole.sum(), 1))


class Scene(NamedTuple):
    """`image` (H, W, 3) uint8 and its instances from back to front, distractors among them."""

    image: NDArray[np.uint8]
    instances: tuple[Instance, ...]


def portrait(class_index: int, rng: np.random.Generator, height: int, width: int) -> list[Placement]:
    """One object that fills most of the frame, up to two distractors behind it and seldom one before it."""
    side = min(height, width)
    main = round(side * rng.uniform(0.7, 1.0))
    slack = 0.12 * side + (side - main) / 4
    centre = (round(height / 2 + rng.uniform(-slack, slack)), round(width / 2 + rng.uniform(-slack, slack)))
    behind = [_anywhere(rng, height, width, (0.15, 0.4)) for _ in range(rng.integers(0, 3))]
    before = [_anywhere(rng, height, width, (0.12, 0.28)) for _ in range(rng.random() < 0.35)]
    return [*behind, Placement(class_index, main, centre), *before]


def gathering(
    classes: int, rng: np.random.Generator, height: int, width: int, *, first: int, crowd_share: float = 0.0
) -> list[Placement]:
    """Three to six objects of any class, small to large, that overlap a little; sometimes a crowd of tiny ones.

    One is of class `first`, so that a set of pictures can be made to hold every class.
    Crowds are of one class and marked, as COCO's are: too many and too small to be told apart.
    """
    side = min(height, width)
    placements: list[Placement] = []
    for _ in range(rng.integers(3, 7)):
        size = round(side * float(np.exp(rng.uniform(np.log(0.14), np.log(0.62)))))
        class_index = int(rng.integers(classes)) if placements else first
        # A few tries for a place that hides little; where the frame is full, the object is left out.
        for _ in range(8):
            centre = (round(rng.uniform(0.1, 0.9) * height), round(rng.uniform(0.08, 0.92) * width))
            candidate = Placement(class_index, size, centre)
            if all(_overlap(candidate, other) < 0.3 for other in placements):
                placements.append(candidate)
                break
    if rng.random() < crowd_share:
        class_index, tiny = int(rng.integers(classes)), max(8, round(0.09 * side))
        row, column = rng.uniform(0.12, 0.88) * height, rng.uniform(0.25, 0.75) * width
        placements += [
            Placement(class_index, tiny, (round(row + rng.normal(0, 0.6 * tiny)), round(column + offset * tiny)), True)
            for offset in np.linspace(-2, 2, int(rng.integers(4, 7)))
        ]
    distractors = [_anywhere(rng, height, width, (0.1, 0.3)) for _ in range(rng.integers(0, 3))]
    return distractors + placements


def compose(rng: np.random.Generator, placements: Sequence[Placement], height: int, width: int) -> Scene:
    """Paint the background and `placements` from back to front, light the whole, and keep the visible masks."""
    angle = rng.uniform(-np.pi, 0)  # light comes from above, so shadows fall downwards
    light = (float(np.cos(angle)), float(np.sin(angle)))
    canvas = background(rng, height, width)
    shadow_strength = float(rng.uniform(0.25, 0.6))
    alphas: list[Array] = []
    truncated: list[bool] = []
    for placement in placements:
        cutout = draw_cutout(rng, placement.class_index, placement.size, light)
        alpha = np.zeros((height, width), dtype=np.float32)
        _paste(canvas, alpha, cutout, placement, light, shadow_strength)
        alphas.append(alpha)
        truncated.append(bool((cutout.alpha > 0.5).sum() > (alpha > 0.5).sum()))
    image = _develop(rng, canvas)
    free = np.ones((height, width), dtype=np.float32)
    instances: list[Instance] = []
    for placement, alpha, cut in reversed(list(zip(placements, alphas, truncated))):
        instances.append(Instance(placement.class_index, alpha * free > 0.5, alpha > 0.5, cut, placement.crowd))
        free *= 1 - alpha
    return Scene(image, tuple(reversed(instances)))


def _anywhere(rng: np.random.Generator, height: int, width: int, sizes: tuple[float, float]) -> Placement:
    centre = (round(rng.uniform(0, 1) * height), round(rng.uniform(0, 1) * width))
    return Placement(DISTRACTOR, max(8, round(min(height, width) * rng.uniform(*sizes))), centre)


def _overlap(a: Placement, b: Placement) -> float:
    """Shared area of the two squares as a share of the smaller one."""
    ends = [min(x + a.size / 2, y + b.size / 2) for x, y in zip(a.centre, b.centre)]
    sides = [end - max(x - a.size / 2, y - b.size / 2) for end, x, y in zip(ends, a.centre, b.centre)]
    return max(sides[0], 0) * max(sides[1], 0) / min(a.size, b.size) ** 2


def _paste(
    canvas: Array, alpha: Array, cutout: Cutout, placement: Placement, light: tuple[float, float], shadow: float
) -> None:
    """Darken `canvas` (H, W, 3) by the cut-out's shadow, paint the cut-out, and note its `alpha` (H, W); in place."""
    margin = round(0.2 * placement.size) + 4  # as far as a shadow reaches
    padded = np.pad(cutout.alpha, margin)
    # Rows and columns of the padded cut-out in the frame, and the part of it that the frame shows.
    start = [centre - side // 2 for centre, side in zip(placement.centre, padded.shape)]
    spans = [(max(a, 0), min(a + side, limit)) for a, side, limit in zip(start, padded.shape, alpha.shape)]
    if any(low >= high for low, high in spans):
        return
    frame = tuple(slice(low, high) for low, high in spans)
    part = tuple(slice(low - a, high - a) for (low, high), a in zip(spans, start))
    seen = padded[part]
    colour = np.pad(cutout.rgb, ((margin, margin), (margin, margin), (0, 0)))[part]
    region = canvas[frame]
    region *= 1 - shadow * _shadow(padded, light, placement.size)[part][..., None]
    region += seen[..., None] * (colour - region)
    alpha[frame] = seen


def _shadow(alpha: Array, light: tuple[float, float], size: int) -> Array:
    """The alpha, blurred and moved away from the light, of the same shape."""
    height, width = alpha.shape
    reach = max(1.0, 0.06 * size)
    moved = Image.fromarray((alpha * 255).astype(np.uint8)).transform(
        (width, height), Image.Transform.AFFINE, (1, 0, light[0] * reach, 0, 1, light[1] * reach)
    )
    blurred = moved.filter(ImageFilter.GaussianBlur(max(1.0, 0.04 * size)))
    return np.asarray(blurred, dtype=np.float32) * np.float32(1 / 255)


def _develop(rng: np.random.Generator, canvas: Array) -> NDArray[np.uint8]:
    """What the camera does: uneven light, exposure, white balance, sensor noise; (H, W, 3) uint8."""
    height, width, _ = canvas.shape
    uneven = 0.8 + 0.4 * smooth_noise(rng, height, width, cells=1.6)
    balance = rng.uniform(0.92, 1.08, 3).astype(np.float32) * np.float32(rng.uniform(0.9, 1.2))
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0.0, 0.02))
    exposed = canvas * uneven[..., None] * balance + noise
    # The response curve as a table of 256 values: a power of every pixel would be the dearest step of all.
    curve = 255 * (np.arange(256) / 255) ** rng.uniform(0.8, 1.25)
    return np.round(curve).astype(np.uint8)[(np.clip(exposed, 0, 1) * 255 + 0.5).astype(np.uint8)]


# ---------------------------------------------------------------------------------------------------------------------
# Masks as annotations write them. A polygon's coordinates are pixel corners: column 0 reaches from x = 0 to x = 1.


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


def borders(labels: NDArray[np.uint8]) -> Mask:
    """Pixels at both sides of a change of label: the band that VOC marks 255, (H, W)."""
    padded = np.pad(labels, 1, mode="edge")
    neighbours = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return np.any([labels != neighbour for neighbour in neighbours], axis=0)


def outline(mask: Mask) -> Polygon:
    """The simplified outer outline of the largest 4-connected part of a mask that is not empty."""
    return _simplified(max(_loops(mask), key=_area))


def polygons(mask: Mask) -> list[Polygon]:
    """Polygons whose union is the mask up to `TOLERANCE`. COCO's have no holes: a part with one is cut in two.

    Parts of fewer than four pixels are dropped: they are grains of an anti-aliased edge.
    """
    loops = _loops(mask)
    hole = min(loops, key=_area, default=None)
    if hole is not None and _area(hole) <= -1:
        column = int(np.clip(round(hole[:, 0].mean()), hole[:, 0].min() + 1, hole[:, 0].max()))
        if column < mask.shape[1]:
            left, right = mask.copy(), mask.copy()
            left[:, column:], right[:, :column] = False, False
            return polygons(left) + polygons(right)
    return [_simplified(loop) for loop in loops if _area(loop) >= 4]


def _simplified(loop: Polygon) -> Polygon:
    """Ramer-Douglas-Peucker on a closed loop: no dropped point is farther than `TOLERANCE` from what stays."""
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
        limit = TOLERANCE * max(math.hypot(dx, dy), 1e-9)
        distances = [abs((x - x0) * dy - (y - y0) * dx) for x, y in points[first + 1 : last]]
        worst = max(distances, default=0.0)
        if worst > limit:
            middle = first + 1 + distances.index(worst)
            keep.add(middle)
            stack += [(first, middle), (middle, last)]
    # A sliver can shrink to a line; then the loop itself is the polygon.
    return loop[sorted(keep)] if len(keep) >= 3 else loop


def _loops(mask: Mask) -> list[Polygon]:
    """Closed loops along pixel edges, clockwise on the screen around 4-connected parts and the other way around holes.

    Every edge between a pixel inside and one outside is directed so that the inside lies to its right.
    """
    if not mask.any():
        return []
    left, top, right, bottom = bounding_box(mask)
    padded = np.pad(mask[top:bottom, left:right], 1)
    inside = padded[1:-1, 1:-1]
    successors: dict[Corner, list[Corner]] = {}
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


def _turn(before: Corner, corner: Corner, after: Corner) -> int:
    """Negative for a right turn on the screen, positive for a left turn."""
    rows, columns = (corner[0] - before[0], after[0] - corner[0]), (corner[1] - before[1], after[1] - corner[1])
    return rows[0] * columns[1] - columns[0] * rows[1]


def _area(loop: Polygon) -> float:
    """Signed area, positive for a loop that runs clockwise on the screen."""
    x, y = loop[:, 0], loop[:, 1]
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
