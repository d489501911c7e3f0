"""Procedural surfaces: smooth noise, patterns and colours, as float32 arrays in [0, 1]. numpy and Pillow only.

Legend: H×W pixels; a pattern is (H, W), a surface (H, W, 3). Everything is a pure function of its generator.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating[Any]]
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


# Python's floats do not widen float32 arrays, so these stay float32; `uniform` is float() for that reason.


def stripes(rng: np.random.Generator, u: Array, v: Array) -> Array:
    return _soft_step(np.sin(u + 0.6 * np.sin(v * float(rng.uniform(0.1, 0.5)))))


def checks(rng: np.random.Generator, u: Array, v: Array) -> Array:
    return _soft_step(np.sin(u) * np.sin(v * float(rng.uniform(0.7, 1.3))) * 2)


def dots(rng: np.random.Generator, u: Array, v: Array) -> Array:
    return _soft_step(np.cos(u) + np.cos(v) - float(rng.uniform(0.2, 0.9)))


def bricks(rng: np.random.Generator, u: Array, v: Array) -> Array:
    row = np.floor(v / np.float32(np.pi))
    along = np.abs(np.sin(u / 2 + row * np.float32(np.pi / 2)))
    across = np.abs(np.sin(v))
    return np.minimum(_soft_step(along * 6 - 1), _soft_step(across * 4 - float(rng.uniform(0.8, 1.4))))


def waves(rng: np.random.Generator, u: Array, v: Array) -> Array:
    return 0.5 + 0.5 * np.sin(u + float(rng.uniform(1.0, 2.5)) * np.sin(v / 2))


def wood(rng: np.random.Generator, u: Array, v: Array) -> Array:
    return 0.5 + 0.5 * np.sin(u * 0.5 + 5 * fractal_noise(rng, *u.shape, cells=4) + 0.1 * v)


Pattern = Callable[[np.random.Generator, Array, Array], Array]
PATTERNS: tuple[Pattern, ...] = (stripes, checks, dots, bricks, waves, wood)


class Material(NamedTuple):
    """What a surface is made of: a pattern, its repeat as a share of the surface's longer side, and how it stands out.

    Colours and the angle are not part of it: they are drawn anew for every surface.
    """

    pattern: Pattern
    period: float
    contrast: Range = (0.6, 1.0)


def draw_material(rng: np.random.Generator, *, contrast: Range) -> Material:
    """Any pattern at any period."""
    period = float(np.exp(rng.uniform(np.log(0.07), np.log(0.3))))
    return Material(PATTERNS[rng.integers(len(PATTERNS))], period, contrast)


def pattern(rng: np.random.Generator, height: int, width: int, *, kind: Pattern, period: float, bend: Array) -> Array:
    """A pattern at a random angle, about `period` pixels a repeat, its lines bent by noise, (H, W)."""
    angle, phase_u, phase_v, strength = rng.random(4).tolist()
    scale = 2 * np.pi / period
    along, across = np.float32(np.cos(2 * np.pi * angle) * scale), np.float32(np.sin(2 * np.pi * angle) * scale)
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    bent = (bend - np.float32(0.5)) * np.float32(4 * np.pi * strength)
    u = along * x + (across * y + np.float32(2 * np.pi * phase_u)) + bent
    v = (along * y + np.float32(2 * np.pi * phase_v)) - across * x + bent
    return kind(rng, u, v)


def surface(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    brightness: Range,
    saturation: Range,
    materials: tuple[Material, Material],
) -> Array:
    """A patchwork of two materials, each in two related colours of the given ranges, (H, W, 3)."""
    size = max(height, width)
    bend = smooth_noise(rng, height, width, cells=3)
    coloured = []
    for kind, share, contrast in materials:
        first, second = _related_colours(rng, brightness, saturation)
        period = size * share * float(rng.uniform(0.85, 1.18))
        weight = pattern(rng, height, width, kind=kind, period=max(period, 4.0), bend=bend)
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
