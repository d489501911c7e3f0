"""The photometric part of one view on a CPU: the arithmetic of `photometric.py`, compiled, a block at a time.

The arithmetic costs little; forty calls and forty passes through the cache would. So numba compiles one function of
them all: each block of pixels goes through every operation up to the contrast, which needs the mean of the whole
picture, then through the rest. Only a blur needs another two passes.

Shapes: `S` side; colour is the last dimension of pixels and the first of what comes out.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from twist.pretrain.data.photometric import blur_kernels
from twist.pretrain.data.views import VIEW

# Pixels that go through all operations together: three planes of them stay in the first-level cache.
BLOCK = 1024
# Taps that are summed in one pass: with more, the compiler gives up the vector instructions.
TAPS = 7

# Constants of `photometric`, `views` and `contracts.weights` (a test compares them): numba's cache is renewed when this
# file changes, and not when another does. In float32, or everything they meet would become float64.
_BLACK, _ONE, _TWO, _THREE, _SIX, _WHITE = (np.float32(x) for x in (0, 1, 2, 3, 6, 255))
_TINY = np.finfo(np.float32).tiny
_SOLARISE_FROM = np.float32(127.5)
_LUMA = _RED, _GREEN, _BLUE = np.float32(19595 / 65536), np.float32(38470 / 65536), np.float32(7471 / 65536)
_MEAN, _STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
_SCALE, _SHIFT = (1 / (255 * _STD)).astype(np.float32), (-_MEAN / _STD).astype(np.float32)
_OPERATIONS = _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0, 1, 2, 3


# Values are finite, so a comparison is a plain minimum; a product and a sum may be one instruction.
_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # nowhere to keep it: a read-only installation and no home
        return numba.njit(**settings)(function)


def apply_each(crops: Iterable[Tensor], views: np.ndarray, out: Tensor) -> None:
    """`photometric.apply` for a CPU: uint8 crops (3, S, S), channels last, into `out` float32 (N, 3, S, S)."""
    kernels = blur_kernels(views["sigma"].astype(np.float64))
    reach = kernels.shape[1] // 2
    taps = np.pad(kernels, ((0, 0), (0, -kernels.shape[1] % TAPS))).astype(np.float32)
    finished = out.numpy()
    planes = np.zeros((2, (finished.shape[-1] + taps.shape[1]) ** 2), dtype=np.float32)
    for crop, view, kernel, done in zip(crops, views, taps, finished):
        pixels, kernel = crop.permute(1, 2, 0).numpy().reshape(-1), kernel[: len(kernel) if view["sigma"] > 0 else 0]
        drawn = [view[name] for name in ("flip", "order", "factors", "grey", "solarise")]
        _finish(pixels, *drawn, kernel, reach, planes, done)


@functools.cache
def compile_it() -> None:
    """Compile now, or read what an earlier run has compiled: the first call would."""
    crop = torch.zeros(8, 8, 3, dtype=torch.uint8).permute(2, 0, 1)
    apply_each([crop], np.zeros(1, dtype=VIEW), torch.empty(1, 3, 8, 8))


@_compiled
def _finish(
    pixels: np.ndarray,  # (S·S·3,) uint8
    flip: bool,
    order: np.ndarray,  # (4,) int8
    factors: np.ndarray,  # (4,) float32, by operation
    grey: bool,
    solarised: bool,
    taps: np.ndarray,  # (T,) float32 with zeros after them to a multiple of TAPS, or none without a blur
    reach: int,
    planes: np.ndarray,  # (2, at least (S + T − 1)²) float32, for a blur
    out: np.ndarray,  # (3, S, S) float32
) -> None:
    side = out.shape[1]
    count = side * side
    x = out.reshape(3, count)
    block = side * max(1, BLOCK // side)
    until = 0
    while until < 4 and order[until] != _CONTRAST:
        until += 1
    total = 0.0
    for begin in range(0, count, block):
        end = min(begin + block, count)
        red, green, blue = x[0, begin:end], x[1, begin:end], x[2, begin:end]
        _load(pixels[3 * begin : 3 * end], side, flip, red, green, blue)
        for slot in range(until):
            _jitter(order[slot], factors, red, green, blue)
        if until < 4:
            part = _BLACK
            for i in range(len(red)):
                part += red[i] * _RED + green[i] * _GREEN + blue[i] * _BLUE
            total += float(part)
    mean = np.float32(total / count)
    for begin in range(0, count, block):
        end = min(begin + block, count)
        red, green, blue = x[0, begin:end], x[1, begin:end], x[2, begin:end]
        if until < 4:
            _mix(red, green, blue, factors[_CONTRAST], _BLACK, (_ONE - factors[_CONTRAST]) * mean)
            for slot in range(until + 1, 4):
                _jitter(order[slot], factors, red, green, blue)
        if grey:
            for i in range(len(red)):
                red[i] = green[i] = blue[i] = red[i] * _RED + green[i] * _GREEN + blue[i] * _BLUE
        if len(taps) == 0:
            for channel in range(3):
                _end(x[channel, begin:end], solarised, channel)
    if len(taps) > 0:
        for channel in range(3):
            _blur(out[channel], taps, reach, planes[0], planes[1])
            _end(x[channel], solarised, channel)


@_compiled
def _load(pixels: np.ndarray, side: int, flip: bool, red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> None:
    """Whole rows of `side` interleaved pixels into three planes, each row reversed if `flip`."""
    for begin in range(0, len(red), side):
        source = pixels[3 * begin : 3 * (begin + side)]
        r, g, b = red[begin : begin + side], green[begin : begin + side], blue[begin : begin + side]
        if flip:
            for i in range(side):
                j = 3 * (side - 1 - i)
                r[i], g[i], b[i] = source[j], source[j + 1], source[j + 2]
        else:
            for i in range(side):
                r[i], g[i], b[i] = source[3 * i], source[3 * i + 1], source[3 * i + 2]


@_compiled
def _jitter(operation: int, factors: np.ndarray, red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> None:
    """One operation other than contrast on a block."""
    if operation == _BRIGHTNESS:
        _mix(red, green, blue, factors[_BRIGHTNESS], _BLACK, _BLACK)
    elif operation == _SATURATION:
        _mix(red, green, blue, factors[_SATURATION], _ONE - factors[_SATURATION], _BLACK)
    elif operation == _HUE:
        _shift_hue(red, green, blue, _SIX * factors[_HUE])


@_compiled
def _mix(red: np.ndarray, green: np.ndarray, blue: np.ndarray, gain: float, luma_share: float, added: float) -> None:
    """`photometric.mix` with a mean that is known."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        grey = luma_share * (r * _RED + g * _GREEN + b * _BLUE) + added
        red[i] = min(max(r * gain + grey, _BLACK), _WHITE)
        green[i] = min(max(g * gain + grey, _BLACK), _WHITE)
        blue[i] = min(max(b * gain + grey, _BLACK), _WHITE)


@_compiled
def _shift_hue(red: np.ndarray, green: np.ndarray, blue: np.ndarray, shift: float) -> None:
    """`photometric.shift_hue`, which has the derivation."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        least = min(r, g, b)
        chroma = max(r, g, b) - least
        distance = (g + b - r - least) / max(chroma, _TINY) + _ONE
        hue = (-distance if g < b else distance) + shift
        base = least - chroma
        red[i] = base + chroma * min(max(abs(abs(hue) - _THREE), _ONE), _TWO)
        green[i] = base + chroma * min(max(abs(abs(hue - _TWO) - _THREE), _ONE), _TWO)
        blue[i] = base + chroma * min(max(abs(abs(hue + _TWO) - _THREE), _ONE), _TWO)


@_compiled
def _blur(x: np.ndarray, taps: np.ndarray, reach: int, wide: np.ndarray, between: np.ndarray) -> None:
    """(S, S) in place; the edge pixel continues outwards. On a copy with margins, so that both directions are sums over
    a flat array at fixed distances, margins and all."""
    side = len(x)
    width = side + len(taps) - 1
    for y in range(width):
        row = wide[y * width : (y + 1) * width]
        source = x[min(max(y - reach, 0), side - 1)]
        row[:reach] = source[0]
        row[reach : reach + side] = source
        row[reach + side :] = source[side - 1]
    count = side * width
    for first in range(0, len(taps), TAPS):
        _weigh(taps[first : first + TAPS], wide[first * width :], width, first == 0, between[:count])
    count -= len(taps) - 1
    for first in range(0, len(taps), TAPS):
        _weigh(taps[first : first + TAPS], between[first:], 1, first == 0, wide[:count])
    for y in range(side):
        x[y] = wide[y * width : y * width + side]


@_compiled
def _weigh(taps: np.ndarray, source: np.ndarray, step: int, first: bool, out: np.ndarray) -> None:
    """Add (or at first: put) the sum of taps · source at TAPS places, `step` apart, to each of `out`."""
    t0, t1, t2, t3, t4, t5, t6 = taps[0], taps[1], taps[2], taps[3], taps[4], taps[5], taps[6]
    s0, s1, s2, s3 = source, source[step:], source[2 * step :], source[3 * step :]
    s4, s5, s6 = source[4 * step :], source[5 * step :], source[6 * step :]
    if first:
        out[:] = _BLACK
    for i in range(len(out)):
        out[i] += t0 * s0[i] + t1 * s1[i] + t2 * s2[i] + t3 * s3[i] + t4 * s4[i] + t5 * s5[i] + t6 * s6[i]


@_compiled
def _end(x: np.ndarray, solarised: bool, channel: int) -> None:
    """Solarise and normalise."""
    scale, shift = _SCALE[channel], _SHIFT[channel]
    if solarised:
        for i in range(len(x)):
            x[i] = _WHITE - x[i] if x[i] >= _SOLARISE_FROM else x[i]
    for i in range(len(x)):
        x[i] = x[i] * scale + shift
