"""Which views of an image are made: the numbers of each kind, the random draw of one view, and the cutting of its crop.

From the paper's Section 4 and the published transforms (TWIST repository, commit 796d36e); boxes as torchvision's
RandomResizedCrop draws them. A view is one small record (`VIEW`), drawn from (seed, epoch, image index, view) by a
counter-based generator, so it does not depend on workers, ranks, batch or order.

Shapes: `B` images a rank, `V` views of an image (globals first), `S` side of a view; `H W` the image's own size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from twist.pretrain.config import ViewsConfig

Stage = Literal["mutual_information", "self_label"]
STAGES: tuple[Stage, ...] = ("mutual_information", "self_label")

# The four operations of the colour jitter, in torchvision's numbering.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_OPERATION = -1

# One view. `box` is top, left, height, width in pixels of the upright image; `order[k]` is the jitter operation done
# as number k, NO_OPERATION everywhere when the view is not jittered; `factors` belong to the operations, hue in turns;
# `sigma` in pixels of the view, 0 when it is not blurred.
VIEW = np.dtype(
    [
        ("box", np.int32, 4),
        ("flip", np.bool_),
        ("order", np.int8, 4),
        ("factors", np.float32, 4),
        ("grey", np.bool_),
        ("sigma", np.float32),
        ("solarise", np.bool_),
    ]
)

ASPECT, CROP_TRIES = (3 / 4, 4 / 3), 10  # torchvision RandomResizedCrop


@dataclass(frozen=True)
class View:
    """One of the V views: its side in pixels, its share of the image's area, and the probabilities and ranges of its
    photometric part; what is not listed is the same everywhere."""

    blur_probability: float
    solarise_probability: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    flip_probability: float = 0.5
    grey_probability: float = 0.2
    sigma: tuple[float, float] = (0.1, 2.0)
    size: int = 0
    scale: tuple[float, float] = (0.0, 0.0)


# kind → the two global views, and the local one where it has such. Source: bytedance/TWIST, commit 796d36e.
_GLOBAL_1 = View(blur_probability=1.0)
_GLOBAL_2 = View(blur_probability=0.1, solarise_probability=0.2)
_MOCO = View(blur_probability=0.5, jitter=(0.4, 0.4, 0.4, 0.1))
KINDS: dict[str, tuple[View, ...]] = {
    "multicrop": (_GLOBAL_1, _GLOBAL_2, View(blur_probability=0.5)),
    "barlow": (_GLOBAL_1, _GLOBAL_2),
    "moco": (_MOCO, _MOCO),
}


def plan_views(config: ViewsConfig, stage: Stage = "mutual_information") -> tuple[View, ...]:
    """The V views of an image, globals first; the self-labelling stage has its own, harder scales."""
    assert stage in STAGES, stage
    given = {"sigma": config.blur_sigma, "grey_probability": config.grey_probability}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    global_scale, local_scale = config.global_scale, config.local_scale
    if stage == "self_label":
        global_scale, local_scale = config.self_label_global_scale, config.self_label_local_scale
    kind = KINDS[config.kind]
    globals_ = [replace(view, size=config.global_size, scale=global_scale, **changes) for view in kind[:2]]
    locals_ = [replace(view, size=config.local_size, scale=local_scale, **changes) for view in kind[2:]]
    return (*globals_, *locals_ * config.local_count)


def resolutions(views: tuple[View, ...]) -> list[tuple[int, int]]:
    """(number of views, side) of each group that goes through the backbone as one batch: globals, then locals."""
    locals_ = views[2:]
    return [(2, views[0].size)] + ([(len(locals_), locals_[0].size)] if locals_ else [])


# Uniform numbers a view draws, by position. The count is fixed and a view never draws fewer, so view v's numbers are
# the v-th stretch of the image's stream whatever the other views do.
_AREA = slice(0, CROP_TRIES)
_RATIO = slice(CROP_TRIES, 2 * CROP_TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _GREY, _BLUR, _SIGMA, _SOLARISE = range(2 * CROP_TRIES, 2 * CROP_TRIES + 8)
_FACTORS = slice(_SOLARISE + 1, _SOLARISE + 5)
_ORDER = slice(_SOLARISE + 5, _SOLARISE + 9)
UNIFORMS = _SOLARISE + 9
_CHOICES = {"flip": _FLIP, "jitter": _JITTER, "grey": _GREY, "blur": _BLUR, "solarise": _SOLARISE}

# Second word of the generator's key: what the numbers are for, so that no two uses share a stream.
VIEW_STREAM, REPLACEMENT_STREAM, ORDER_STREAM = range(3)


class Philox:
    """numpy's Philox 4×64, set to any place of its stream at once. One generator is kept and moved: for a new one numpy
    asks the operating system for entropy, which takes longer than the numbers of a whole image."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(0)
        self._generator = np.random.Generator(self._bits)
        self._state: dict[str, Any] = dict(self._bits.state)

    def at(self, seed: int, stream: int, *, epoch: int, index: int = 0) -> np.random.Generator:
        """The generator at the place that (seed, stream, epoch, index) names; valid until the next call."""
        # Word 0 of the counter counts the blocks drawn from here, the other words are the place.
        self._state["state"]["key"][:] = seed % 2**64, stream
        self._state["state"]["counter"][:] = 0, index, epoch, 0
        self._state.update(buffer_pos=4, has_uint32=0, uinteger=0)
        self._bits.state = self._state  # type: ignore[assignment]
        return self._generator


@dataclass(frozen=True)
class Draw:
    """The views of B images before their sizes are known: records (B, V) whose boxes `place` fills in."""

    records: np.ndarray
    area: np.ndarray  # (B, V, tries), shares of the image's area
    root_aspect: np.ndarray  # (B, V, tries)
    corner: np.ndarray  # (B, V, 2) in [0, 1): where top and left lie in their range

    def place(self, row: int, *, height: int, width: int) -> np.ndarray:
        """The records (V,) of image `row`, an upright image of `height` × `width` pixels."""
        records = self.records[row]
        records["box"] = [
            crop_box(*tries, height=height, width=width)
            for tries in zip(self.area[row].tolist(), self.root_aspect[row].tolist(), self.corner[row].tolist())
        ]
        return records


class ViewSampler:
    """Draws the records of images' V views; holds the numbers of the plan as arrays, nothing that changes."""

    def __init__(self, views: tuple[View, ...]) -> None:
        self._count, self._philox = len(views), Philox()
        self._area = np.array([view.scale for view in views])  # (V, 2): low, high
        self._sigma = np.array([p.sigma for p in views])
        jitter = np.array([p.jitter for p in views])  # (V, 4)
        # Factors of brightness, contrast and saturation are around 1 and never below 0, hue's around 0.
        low, high = np.maximum(1 - jitter, 0), 1 + jitter
        low[:, HUE], high[:, HUE] = -jitter[:, HUE], jitter[:, HUE]
        self._factor_low, self._factor_span = low, high - low
        self._probability = {
            name: np.array([getattr(p, f"{name}_probability") for p in views])  # (V,)
            for name in ("flip", "jitter", "grey", "blur", "solarise")
        }

    def draw(self, seed: int, *, epoch: int, indices: np.ndarray) -> Draw:
        """Everything about the views of the images `indices` (B,) but the boxes, which need the images' sizes."""
        # Row v is the same for any V > v: the stream is filled view by view.
        u = np.stack(
            [
                self._philox.at(seed, VIEW_STREAM, epoch=epoch, index=int(index)).random((self._count, UNIFORMS))
                for index in indices
            ]
        )  # (B, V, UNIFORMS)
        chosen = {name: u[..., place] < self._probability[name] for name, place in _CHOICES.items()}  # (B, V)
        drawn = np.zeros(u.shape[:2], dtype=VIEW)
        for name in ("flip", "grey", "solarise"):
            drawn[name] = chosen[name]
        # Ranks of four independent uniform numbers: every order has the same probability.
        drawn["order"] = np.where(chosen["jitter"][..., None], u[..., _ORDER].argsort(axis=-1), NO_OPERATION)
        drawn["factors"] = self._factor_low + u[..., _FACTORS] * self._factor_span
        drawn["sigma"] = np.where(chosen["blur"], _between(self._sigma, u[..., _SIGMA]), 0)
        area = _between(self._area[:, :, None], u[..., _AREA])  # (B, V, tries)
        log_low, log_high = math.log(ASPECT[0]), math.log(ASPECT[1])
        root_aspect = np.exp(0.5 * (log_low + u[..., _RATIO] * (log_high - log_low)))  # (B, V, tries)
        return Draw(drawn, area, root_aspect, u[..., [_TOP, _LEFT]])


def _between(bounds: np.ndarray, u: np.ndarray) -> np.ndarray:
    """`u` in [0, 1) scaled to the (low, high) of each view: bounds (V, 2, …)."""
    return bounds[:, 0] + u * (bounds[:, 1] - bounds[:, 0])


def crop_box(
    areas: list[float], root_aspects: list[float], corner: list[float], *, height: int, width: int
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: top, left, height, width.

    Of ten tries of an area share and an aspect, log-uniform in (3/4, 4/3), the first that fits into the image, anywhere
    in it; when none fits, the largest central crop whose aspect is within the bounds.
    """
    for area, root_aspect in zip(areas, root_aspects):
        side = math.sqrt(area * (height * width))
        box_height, box_width = round(side / root_aspect), round(side * root_aspect)
        if 0 < box_height <= height and 0 < box_width <= width:
            top, left = corner
            return int(top * (height - box_height + 1)), int(left * (width - box_width + 1)), box_height, box_width
    box_height, box_width = height, width
    if width / height < ASPECT[0]:
        box_height = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        box_width = round(height * ASPECT[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def cut(image: Tensor, box: Sequence[int], *, out: Tensor) -> Tensor:
    """The crop `box` of `image` uint8 (3, H, W), resized bicubically with antialiasing into `out` (3, S, S).

    Differs from Pillow's resize by at most two levels (fixed-point weights of another width), mostly by none. torch's
    resize is vectorised for channels that are last in memory, as torchvision decodes them and as `out` should have
    them. `F.interpolate` computes the same, but its result would have to be copied.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    torch.ops.aten._upsample_bicubic2d_aa.out(crop, out.shape[1:], False, None, None, out=out[None])
    return out
