"""What the built-in sample draws: solid-looking objects of ten classes, told apart by form and, mostly, by material.

Colour, light, size, turn and surroundings are drawn from the same distributions for every class. Four objects in five
wear their class's typical pattern, the fifth any: without the hint a network needs more pictures than a few minutes on
a CPU can show it. Outlines live in a square of about [-1, 1]², y downwards; N points, S segments; colours in [0, 1].
"""

import colorsys
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating[Any]]
Points = NDArray[np.floating[Any]]
Outline = list[Points]

# Different proportions of one class that exist; an object is one of them, then turned, stretched and tilted.
VARIANTS = 6
GRID = 80
REACH = 1.3  # half side of the square that the distance field covers
# A distractor belongs to no class; it occludes, and is background to every annotation.
DISTRACTOR = -1


class Cutout(NamedTuple):
    """An object without its surroundings: `rgb` (h, w, 3) and `alpha` (h, w)."""

    rgb: Array
    alpha: Array


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
    # One arm after the other: its two outer corners and the inner one behind it.
    arms = [[(-a, -b), (a, -b), (a, -a)], [(b, -a), (b, a), (a, a)], [(a, b), (-a, b), (-a, a)], [(-b, a), (-b, -a)]]
    return [np.array([corner for arm in arms for corner in arm] + [(-a, -a)])]


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
CLASSES = tuple(OUTLINES)


# Surfaces: patterns and colours in [0, 1]; a pattern is (H, W), a surface (H, W, 3).

Range = tuple[float, float]


def smooth_noise(rng: np.random.Generator, height: int, width: int, *, cells: float) -> Array:
    """Random values on a coarse grid (`cells` across the longer side), interpolated smoothly to (H, W)."""
    longer = max(height, width)
    rows, columns = (max(2, round(cells * side / longer) + 1) for side in (height, width))
    grid = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def fractal_noise(rng: np.random.Generator, height: int, width: int, *, cells: float) -> Array:
    """Two octaves of `smooth_noise`, the finer of half the weight, stretched to [0, 1]."""
    coarse = smooth_noise(rng, height, width, cells=cells)
    total = coarse + np.float32(0.5) * smooth_noise(rng, height, width, cells=2.5 * cells)
    low, high = total.min(), total.max()
    return (total - low) / max(high - low, np.float32(1e-6))


def _bricks(rng: np.random.Generator, u: Array, v: Array) -> Array:
    row = np.floor(v / np.float32(np.pi))
    along = np.abs(np.sin(u / 2 + row * np.float32(np.pi / 2)))
    across = np.abs(np.sin(v))
    return np.minimum(_soft_step(along * 6 - 1), _soft_step(across * 4 - float(rng.uniform(0.8, 1.4))))


Pattern = Callable[[np.random.Generator, Array, Array], Array]
# Python's floats do not widen float32 arrays, so these stay float32; `uniform` is float() for that reason.
PATTERNS: dict[str, Pattern] = {
    "stripes": lambda rng, u, v: _soft_step(np.sin(u + 0.6 * np.sin(v * float(rng.uniform(0.1, 0.5))))),
    "checks": lambda rng, u, v: _soft_step(np.sin(u) * np.sin(v * float(rng.uniform(0.7, 1.3))) * 2),
    "dots": lambda rng, u, v: _soft_step(np.cos(u) + np.cos(v) - float(rng.uniform(0.2, 0.9))),
    "bricks": _bricks,
    "waves": lambda rng, u, v: 0.5 + 0.5 * np.sin(u + float(rng.uniform(1.0, 2.5)) * np.sin(v / 2)),
    "wood": lambda rng, u, v: 0.5 + 0.5 * np.sin(u * 0.5 + 5 * fractal_noise(rng, *u.shape, cells=4) + 0.1 * v),
}


class Material(NamedTuple):
    """A pattern, its repeat as a share of the surface's longer side, and its contrast; colours are drawn anew."""

    pattern: str
    period: float
    contrast: Range = (0.6, 1.0)


def draw_material(rng: np.random.Generator, *, contrast: Range) -> Material:
    """Any pattern at any period."""
    period = float(np.exp(rng.uniform(np.log(0.07), np.log(0.3))))
    return Material([*PATTERNS][rng.integers(len(PATTERNS))], period, contrast)


def _pattern(rng: np.random.Generator, kind: Pattern, period: float, bend: Array) -> Array:
    """A pattern at a random angle, about `period` pixels a repeat, its lines bent by noise, (H, W) as `bend`."""
    angle, phase_u, phase_v, strength = rng.random(4).tolist()
    scale = 2 * np.pi / period
    along, across = np.float32(np.cos(2 * np.pi * angle) * scale), np.float32(np.sin(2 * np.pi * angle) * scale)
    y, x = (np.arange(side, dtype=np.float32) for side in bend.shape)
    y = y[:, None]
    bent = (bend - np.float32(0.5)) * np.float32(4 * np.pi * strength)
    u = along * x + (across * y + np.float32(2 * np.pi * phase_u)) + bent
    v = (along * y + np.float32(2 * np.pi * phase_v)) - across * x + bent
    return kind(rng, u, v)


def surface(
    rng: np.random.Generator,
    height: int,
    width: int,
    materials: Sequence[Material],
    brightness: Range,
    saturation: Range,
) -> Array:
    """A patchwork of two materials, each in two related colours of the given ranges, (H, W, 3)."""
    size = max(height, width)
    bend = smooth_noise(rng, height, width, cells=3)
    coloured = []
    for kind, share, contrast in materials:
        first, second = _related_colours(rng, brightness, saturation)
        period = size * share * float(rng.uniform(0.85, 1.18))
        weight = _pattern(rng, PATTERNS[kind], max(period, 4.0), bend)
        coloured.append(first + (weight * np.float32(rng.uniform(*contrast)))[..., None] * (second - first))
    patch = _soft_step((fractal_noise(rng, height, width, cells=2.5) - np.float32(0.5)) * np.float32(24))
    grain = np.float32(0.86) + np.float32(0.28) * smooth_noise(rng, height, width, cells=size / 3)
    mixed = coloured[0] + patch[..., None] * (coloured[1] - coloured[0])
    mixed *= grain[..., None]
    return np.clip(mixed, 0, 1, out=mixed)


def _related_colours(rng: np.random.Generator, brightness: Range, saturation: Range) -> tuple[Array, Array]:
    hue = rng.random()
    other = hue + rng.choice([-1, 1]) * rng.uniform(0.03, 0.3)
    pair = []
    for one, change in ((hue, 0.0), (other, rng.uniform(-0.25, 0.25))):
        value = min(max(rng.uniform(*brightness) + change, 0.08), 1.0)
        pair.append(np.array(colorsys.hsv_to_rgb(one % 1, rng.uniform(*saturation), value), dtype=np.float32))
    return pair[0], pair[1]


def _soft_step(x: Array) -> Array:
    # A step with a slope of a few pixels: patterns stay free of jagged edges without supersampling.
    return np.clip(x * np.float32(1.5) + np.float32(0.5), 0, 1)


# The material that a class wears most often: six patterns, fine or coarse.
FINE, COARSE = 0.13, 0.3
MATERIALS: dict[str, Material] = {
    "butterfly": Material("dots", COARSE),
    "crescent": Material("waves", COARSE),
    "cross": Material("bricks", COARSE),
    "fish": Material("dots", FINE),
    "flower": Material("wood", COARSE),
    "gear": Material("stripes", FINE),
    "heart": Material("checks", COARSE),
    "mushroom": Material("checks", FINE),
    "ring": Material("stripes", COARSE),
    "star": Material("bricks", FINE),
}
TYPICAL = 0.8


def background(rng: np.random.Generator, height: int, width: int) -> Array:
    """(H, W, 3), muted: with vivid ones two crops are matched by the background, and objects are not learned."""
    materials = draw_material(rng, contrast=(0.1, 0.4)), draw_material(rng, contrast=(0.1, 0.4))
    return surface(rng, height, width, materials, brightness=(0.4, 0.65), saturation=(0.0, 0.25))


def draw_cutout(rng: np.random.Generator, class_index: int, size: int, light: tuple[float, float]) -> Cutout:
    """An object of a class (or `DISTRACTOR`), its longer side about `size` pixels, lit from `light` (unit x, y)."""
    name = "" if class_index == DISTRACTOR else CLASSES[class_index]
    field = distance_field(name, int(rng.integers(VARIANTS)))
    canvas = round(size * REACH)
    # Distance to the edge in pixels, cut to the object, (h, w).
    inside = _posed(rng, field, canvas) * np.float32(canvas / (2 * REACH))
    rows, columns = np.flatnonzero((inside > -1).any(1)), np.flatnonzero((inside > -1).any(0))
    inside = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    alpha = np.clip(inside + np.float32(0.5), 0, 1)
    bright = (0.7, 1.0) if rng.random() < 0.6 else (0.35, 0.8)
    worn = MATERIALS.get(name) if rng.random() < TYPICAL else None
    material = worn or draw_material(rng, contrast=(0.6, 1.0))
    height, width = inside.shape
    albedo = surface(rng, height, width, [material, material], bright, saturation=(0.3, 0.9))
    return Cutout(np.clip(albedo * _relief(rng, inside, size, light)[..., None], 0, 1), alpha)


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
    shear = np.array([[1.0, rng.uniform(-0.15, 0.15)], [0.0, 1.0]])
    linear = rotation @ np.diag([flip * max(stretch, 1.0), max(1 / stretch, 1.0)]) @ shear
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


def _relief(rng: np.random.Generator, inside: Array, size: int, light: tuple[float, float]) -> Array:
    """Brightness of a rounded, slightly uneven surface under the scene's light, (h, w)."""
    width = np.float32(size * rng.uniform(0.1, 0.3))
    rise = np.clip(inside / width, 0, 1)
    uneven = np.float32(0.05 * size) * smooth_noise(rng, *inside.shape, cells=6)
    height = width * np.sqrt(np.maximum(1 - (1 - rise) ** 2, 0)) + uneven
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
