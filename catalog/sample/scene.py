"""A picture made of a background and cut-outs, with the mask of what stays visible of each.

Cut-outs are pasted from back to front; each throws a soft shadow on what lies behind. What is visible of an object is
its alpha times what all later cut-outs leave of it, so boxes and masks are those of the picture, not of the drawing.

Legend: H×W the frame, h×w a cut-out; colours are float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from twist.catalog.sample.textures import Array, smooth_noise

Split = Literal["train", "val"]
Mask = NDArray[np.bool_]

# A distractor belongs to no class; it occludes, and is background to every annotation.
DISTRACTOR = -1


@dataclass(frozen=True)
class Cutout:
    """An object without its surroundings: `rgb` (h, w, 3) and `alpha` (h, w)."""

    rgb: Array
    alpha: Array


class Source(Protocol):
    """Where backgrounds and objects come from. `light` is the direction of the scene's light (unit x, y)."""

    classes: tuple[str, ...]

    def background(self, rng: np.random.Generator, height: int, width: int, split: Split) -> Array:
        """A background, (H, W, 3)."""
        ...

    def cutout(self, rng: np.random.Generator, class_index: int, size: int, light: tuple[float, float]) -> Cutout:
        """An object of class `class_index` (`DISTRACTOR`: of none), its longer side `size` pixels."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What sample.json says of where the pictures come from."""
        ...


@dataclass(frozen=True)
class Placement:
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


@dataclass(frozen=True)
class Scene:
    """`image` (H, W, 3) uint8 and its instances from back to front, distractors among them."""

    image: NDArray[np.uint8]
    instances: tuple[Instance, ...]


def portrait(class_index: int, rng: np.random.Generator, height: int, width: int) -> list[Placement]:
    """One object that fills most of the frame, up to two distractors behind it and seldom one before it."""
    side = min(height, width)
    main = round(side * rng.uniform(0.7, 1.0))
    slack = 0.12 * side + (side - main) / 4
    centre = (
        round(height / 2 + rng.uniform(-slack, slack)),
        round(width / 2 + rng.uniform(-slack, slack)),
    )
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


def compose(
    rng: np.random.Generator, source: Source, placements: Sequence[Placement], height: int, width: int, split: Split
) -> Scene:
    """Paint the background and `placements` from back to front, light the whole, and keep the visible masks."""
    angle = rng.uniform(-np.pi, 0)  # light comes from above, so shadows fall downwards
    light = (float(np.cos(angle)), float(np.sin(angle)))
    canvas = source.background(rng, height, width, split).copy()
    shadow_strength = float(rng.uniform(0.25, 0.6))
    alphas: list[Array] = []
    truncated: list[bool] = []
    for placement in placements:
        cutout = source.cutout(rng, placement.class_index, placement.size, light)
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
    sides = [
        min(a.centre[k] + a.size / 2, b.centre[k] + b.size / 2)
        - max(a.centre[k] - a.size / 2, b.centre[k] - b.size / 2)
        for k in (0, 1)
    ]
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
