"""The embedded source of the sample: solid-looking objects of ten classes, told apart by form and, mostly, by material.

Colour, light, size, turn and surroundings are drawn from the same distributions for every class. Four objects in five
wear their class's typical pattern (in any colours, at any angle), the fifth any pattern: as with animals and things,
the material is a strong hint and the form is the truth. Without the hint a network needs more pictures than a few
minutes on a CPU can show it. An object is an outline (polygons, each class with its own varying proportions), a signed
distance field of it, and from that an anti-aliased edge and a rounded relief that catches the light.

Legend: outlines live in a square of about [-1, 1]², y downwards; N points, S segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twist.catalog.sample.scene import DISTRACTOR, Cutout, Split
from twist.catalog.sample.textures import (
    Array,
    Material,
    bricks,
    checks,
    dots,
    draw_material,
    smooth_noise,
    stripes,
    surface,
    waves,
    wood,
)

Points = NDArray[np.floating[Any]]
Outline = list[Points]

# Different proportions of one class that exist; an object is one of them, then turned, stretched and tilted.
VARIANTS = 6
GRID = 80
REACH = 1.3  # half side of the square that the distance field covers


def butterfly(rng: np.random.Generator) -> Outline:
    # Upper wings wide and high, lower wings shorter, a deep notch between them and a thin body.
    angle = _turn(120)
    upper, lower = rng.uniform(1.0, 1.15), rng.uniform(0.62, 0.78)
    high, low = rng.uniform(0.5, 0.65), rng.uniform(0.8, 0.95)
    side = np.abs(np.arctan2(np.sin(angle), np.abs(np.cos(angle))))  # 0 at the notch, π/2 at head and tail
    above = np.sin(angle) < 0
    lobe = np.where(above, _lobe(side, high, 0.5), _lobe(side, low, 0.52))
    return [_polar(angle, np.maximum(lobe * np.where(above, upper, lower), 0.15))]


def crescent(rng: np.random.Generator) -> Outline:
    depth = rng.uniform(0.35, 0.6)
    outer = np.linspace(0.22 * np.pi, 1.78 * np.pi, 56)
    arc = _polar(outer, np.ones_like(outer))
    tip = arc[-1]
    # The inner arc goes back through both tips, its centre moved towards the opening.
    centre = np.array([depth, 0.0])
    start = np.arctan2(tip[1] - centre[1], tip[0] - centre[0]) % (2 * np.pi)
    inner = np.linspace(start, 2 * np.pi - start, 40)
    return [np.concatenate([arc, centre + np.hypot(*(tip - centre)) * _polar(inner, np.ones_like(inner))[1:-1]])]


def cross(rng: np.random.Generator) -> Outline:
    a, b = rng.uniform(0.24, 0.4), 1.0
    corner = [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]
    return [np.array(corner)]


def fish(rng: np.random.Generator) -> Outline:
    fat, tail = rng.uniform(0.42, 0.56), rng.uniform(0.42, 0.6)
    angle = np.linspace(0.16 * np.pi, 1.84 * np.pi, 48)
    body = np.stack([-0.2 + 0.8 * np.cos(angle + np.pi), fat * np.sin(angle + np.pi)], axis=1)
    body[:, 0] *= -1
    body[:, 0] -= 0.4
    fin = np.array([(0.98, -tail), (0.8, 0.0), (0.98, tail)])
    flipped = body * np.array([-1.0, 1.0]) if body[0, 0] < body[len(body) // 2, 0] else body
    return [np.concatenate([flipped, fin if flipped[-1, 1] < 0 else fin[::-1]])]


def flower(rng: np.random.Generator) -> Outline:
    petals, waist = rng.integers(5, 8), rng.uniform(0.42, 0.55)
    angle = _turn(112)
    return [_polar(angle, waist + (1 - waist) * np.abs(np.cos(petals * angle / 2)) ** 0.8)]


def gear(rng: np.random.Generator) -> Outline:
    teeth, depth = int(rng.integers(8, 12)), rng.uniform(0.2, 0.3)
    steps = np.arange(teeth)[:, None] + np.array([0.0, 0.42, 0.5, 0.92])[None]
    radius = np.tile([1.0, 1.0, 1 - depth, 1 - depth], teeth)
    hole = _polar(_turn(28), np.full(28, rng.uniform(0.2, 0.32)))
    return [_polar((steps * 2 * np.pi / teeth).ravel(), radius), hole]


def heart(rng: np.random.Generator) -> Outline:
    t = _turn(72)
    notch = rng.uniform(4.0, 6.0)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - notch * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [np.stack([x / 16.5, (y - 2.5) / 15.5], axis=1)]


def mushroom(rng: np.random.Generator) -> Outline:
    stem, brim = rng.uniform(0.24, 0.36), rng.uniform(0.05, 0.2)
    angle = np.linspace(np.pi, 2 * np.pi, 40)
    cap = np.stack([np.cos(angle), brim + 0.95 * np.sin(angle)], axis=1)
    foot = [(stem, brim + 0.12), (stem * 0.85, 0.6), (stem * 1.2, 0.95), (-stem * 1.2, 0.95), (-stem * 0.85, 0.6)]
    return [np.concatenate([cap, [(0.9, brim + 0.12)], foot, [(-stem, brim + 0.12), (-0.9, brim + 0.12)]])]


def ring(rng: np.random.Generator) -> Outline:
    angle = _turn(64)
    return [_polar(angle, np.ones(64)), _polar(angle, np.full(64, rng.uniform(0.45, 0.62)))]


def star(rng: np.random.Generator) -> Outline:
    points = int(rng.choice([5, 5, 5, 6]))
    radius = np.tile([1.0, rng.uniform(0.36, 0.5)], points)
    return [_polar(np.arange(2 * points) * np.pi / points - np.pi / 2, radius)]


def pebble(rng: np.random.Generator) -> Outline:
    """The distractor: a roundish stone of no class."""
    angle = _turn(40)
    radius = 0.85 + sum(rng.uniform(-0.12, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 4))
    return [_polar(angle, radius) * np.array([1.0, rng.uniform(0.5, 0.9)])]


OUTLINES: dict[str, Callable[[np.random.Generator], Outline]] = {
    outline.__name__: outline
    for outline in (butterfly, crescent, cross, fish, flower, gear, heart, mushroom, ring, star)
}


# The material that a class wears most often: six patterns, fine or coarse.
FINE, COARSE = 0.13, 0.3
MATERIALS: dict[str, Material] = {
    "butterfly": Material(dots, COARSE),
    "crescent": Material(waves, COARSE),
    "cross": Material(bricks, COARSE),
    "fish": Material(dots, FINE),
    "flower": Material(wood, COARSE),
    "gear": Material(stripes, FINE),
    "heart": Material(checks, COARSE),
    "mushroom": Material(checks, FINE),
    "ring": Material(stripes, COARSE),
    "star": Material(bricks, FINE),
}
TYPICAL = 0.8


class Shapes:
    """The `shapes` source: see the module's text. It holds no state; split makes no difference to it."""

    classes = tuple(OUTLINES)

    def background(self, rng: np.random.Generator, height: int, width: int, split: Split) -> Array:  # noqa: ARG002
        # Muted: with vivid backgrounds, two crops of a picture are matched by those, and objects are not learned.
        materials = draw_material(rng, contrast=(0.1, 0.4)), draw_material(rng, contrast=(0.1, 0.4))
        return surface(rng, height, width, brightness=(0.4, 0.65), saturation=(0.0, 0.25), materials=materials)

    def cutout(self, rng: np.random.Generator, class_index: int, size: int, light: tuple[float, float]) -> Cutout:
        name = "" if class_index == DISTRACTOR else self.classes[class_index]
        field = distance_field(name, int(rng.integers(VARIANTS)))
        canvas = round(size * REACH)
        # Distance to the edge in pixels, cut to the object, (h, w).
        inside = _cropped(_posed(rng, field, canvas) * np.float32(canvas / (2 * REACH)))
        alpha = np.clip(inside + np.float32(0.5), 0, 1)
        bright = (0.7, 1.0) if rng.random() < 0.6 else (0.35, 0.8)
        worn = MATERIALS.get(name) if rng.random() < TYPICAL else None
        material = worn or draw_material(rng, contrast=(0.6, 1.0))
        albedo = surface(rng, *inside.shape, brightness=bright, saturation=(0.3, 0.9), materials=(material, material))
        return Cutout(np.clip(albedo * _relief(rng, inside, size, light)[..., None], 0, 1), alpha)

    def provenance(self) -> dict[str, Any]:
        return {"licence": "drawn by this program: no rights of others"}


@functools.cache
def distance_field(name: str, variant: int) -> Array:
    """Signed distance to the outline (positive inside, in outline units) of a class's variant, (GRID, GRID)."""
    number = list(OUTLINES).index(name) if name else len(OUTLINES)
    outline = OUTLINES.get(name, pebble)(np.random.default_rng([number, variant]))
    axis = np.linspace(-REACH, REACH, GRID, dtype=np.float32)
    px, py = (plane.reshape(-1, 1) for plane in np.meshgrid(axis, axis))  # (N, 1)
    start = np.concatenate(outline).astype(np.float32)
    along = np.concatenate([np.roll(loop, -1, axis=0) for loop in outline]).astype(np.float32) - start
    x, y, dx, dy = start[:, 0], start[:, 1], along[:, 0], along[:, 1]  # (S,)
    share = np.clip(((px - x) * dx + (py - y) * dy) / np.maximum(dx * dx + dy * dy, 1e-12), 0, 1)  # (N, S)
    distance = np.sqrt(((px - x - share * dx) ** 2 + (py - y - share * dy) ** 2).min(1))
    # Even-odd rule, so that a second polygon is a hole.
    straddles = (y > py) != (y + dy > py)
    left = px < x + (py - y) / np.where(dy == 0, 1, dy) * dx
    inside = (straddles & left).sum(1) % 2 == 1
    return np.where(inside, distance, -distance).reshape(GRID, GRID)


def _posed(rng: np.random.Generator, field: Array, size: int) -> Array:
    """The field seen turned, stretched, mirrored and tilted away, resampled to (size, size)."""
    turn = rng.uniform(-0.55, 0.55)
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    flip = rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.diag([flip * max(stretch, 1.0), max(1 / stretch, 1.0)]) @ _shear(rng.uniform(-0.15, 0.15))
    tilt = rng.uniform(-0.16, 0.16, 2)
    # Output pixel → [-REACH, REACH] → pose → field pixel, as one projective map with eight numbers (Pillow's order).
    to_plane = np.array([[2 * REACH / size, 0, -REACH], [0, 2 * REACH / size, -REACH], [0, 0, 1.0]])
    pose = np.eye(3)
    pose[:2, :2], pose[2, :2] = linear, tilt
    to_field = np.array([[GRID / (2 * REACH), 0, GRID / 2], [0, GRID / (2 * REACH), GRID / 2], [0, 0, 1.0]])
    matrix = to_field @ pose @ to_plane
    numbers = (matrix / matrix[2, 2]).ravel()[:8]
    posed = Image.fromarray(field).transform(
        (size, size), Image.Transform.PERSPECTIVE, numbers.tolist(), Image.Resampling.BICUBIC, fillcolor=-REACH
    )
    return np.asarray(posed)


def _cropped(inside: Array) -> Array:
    rows, columns = np.flatnonzero((inside > -1).any(1)), np.flatnonzero((inside > -1).any(0))
    return inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _relief(rng: np.random.Generator, inside: Array, size: int, light: tuple[float, float]) -> Array:
    """Brightness of a rounded, slightly uneven surface under the scene's light, (h, w)."""
    width = np.float32(size * rng.uniform(0.1, 0.3))
    rise = np.clip(inside / width, 0, 1)
    height = width * np.sqrt(np.maximum(1 - (1 - rise) ** 2, 0)) + np.float32(0.05 * size) * smooth_noise(
        rng, *inside.shape, cells=6
    )
    down, right = np.gradient(height)
    length = np.sqrt(down**2 + right**2 + 1)
    facing = (0.75 - (right * np.float32(light[0]) + down * np.float32(light[1])) * np.float32(-0.7)) / length
    lit = np.clip(facing, 0, 1.2)
    sharp = lit * lit * lit
    sharp *= sharp
    return 0.5 + 0.8 * lit + float(rng.uniform(0, 0.5)) * sharp * sharp  # the last is the highlight, lit¹²


def _turn(count: int) -> Points:
    return np.arange(count) * (2 * np.pi / count)


def _polar(angle: Points, radius: Points) -> Points:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _lobe(angle: Points, centre: float, half_width: float) -> Points:
    return np.clip(1 - ((angle - centre) / half_width) ** 2, 0, 1) ** 0.5


def _shear(amount: float) -> Points:
    return np.array([[1.0, amount], [0.0, 1.0]])
