"""The photometric part on a GPU in a few passes: the arithmetic of `pretrain/photometric.py` as Triton kernels.

Called operation by operation, a batch of 14 views goes some fifty times through the GPU's memory. Here its bytes are
read twice: once up to the contrast, for the mean that it needs, and once through everything. Only blurs need two passes
more. Sums are of blocks in a fixed order, so a batch comes out the same to the bit each time.

Shapes: `N` views, `S` side, `P` = S·S pixels; a program has one view's BLOCK pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contracts.weights import IMAGENET_MEAN, IMAGENET_STD
from pretrain.photometric import BLURRED, LUMA, SOLARISE_FROM, TAPS_FROM, WHITE, Photometric

BLOCK = 1024

_RED, _GREEN, _BLUE = (tl.constexpr(share) for share in LUMA)
_WHITE, _SOLARISE_FROM = tl.constexpr(WHITE), tl.constexpr(SOLARISE_FROM)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_TAPS_FROM = tl.constexpr(TAPS_FROM)
_HUE = tl.constexpr(TAPS_FROM - 1)
# Columns of `Photometric.flags`.
_FLIP, _HUE_SLOT, _CONTRAST_SLOT, _GREY, _BLURRED, _SOLARISED = (tl.constexpr(column) for column in range(6))
_SCALE_R, _SCALE_G, _SCALE_B = (tl.constexpr(1 / (WHITE * std)) for std in IMAGENET_STD)
_SHIFT_R, _SHIFT_G, _SHIFT_B = (tl.constexpr(-mean / std) for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD))


def apply(crops: Tensor, parameters: Photometric) -> Tensor:
    """`photometric.apply` on a GPU: uint8 crops (N, 3, S, S) → float32 (N, 3, S, S), normalised."""
    count, _, height, width = crops.shape
    pixels = height * width
    blocks = triton.cdiv(pixels, BLOCK)
    numbers, flags = parameters.numbers, parameters.flags
    out = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    sums = torch.empty(count, blocks, dtype=torch.float32, device=crops.device)
    size: dict[str, Any] = {"pixels": pixels, "width": width, "columns": numbers.shape[1], "BLOCK": BLOCK}
    # Several kernels of one view lie beside each other, so that the second finds its neighbour's bytes in the cache.
    _sum_luma[blocks, count](crops, numbers, flags, sums, *crops.stride(), blocks=blocks, **size)
    _colour[blocks, count](
        crops, numbers, flags, sums, out, *crops.stride(), blocks=blocks, SUMS=triton.next_power_of_2(blocks), **size
    )
    blurred = parameters.rows.split(parameters.splits)[BLURRED]
    if len(blurred):
        between = torch.empty(len(blurred), 3, pixels, dtype=torch.float32, device=crops.device)
        size["TAPS"] = numbers.shape[1] - TAPS_FROM
        _blur_columns[blocks, len(blurred)](out, numbers, blurred, between, **size)
        _blur_rows[blocks, len(blurred)](between, numbers, flags, blurred, out, **size)
    return out


@triton.jit
def _sum_luma(  # type: ignore[no-untyped-def]
    crops, numbers, flags, sums, of_view, of_channel, of_row, of_column, pixels, width, columns, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(N, blocks): the sum of each block's luma as it is when the contrast's turn comes; 0 for views without."""
    view, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    until = tl.load(flags + 6 * view + _CONTRAST_SLOT)
    total = 0.0
    if until < 4:
        at = block * BLOCK + tl.arange(0, BLOCK)
        red, green, blue = _load(crops, flags, view, at, of_view, of_channel, of_row, of_column, pixels, width)
        for slot in tl.static_range(4):
            if slot < until:
                red, green, blue = _slot(red, green, blue, numbers, flags, view, slot, 0.0, columns)
        total = tl.sum(tl.where(at < pixels, _luma(red, green, blue), 0.0))
    tl.store(sums + view * blocks + block, total)


@triton.jit
def _colour(  # type: ignore[no-untyped-def]
    crops, numbers, flags, sums, out, of_view, of_channel, of_row, of_column, pixels, width, columns, blocks,
    BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Everything but a blur and what comes after one; of views to be blurred, levels."""
    view, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    each = tl.arange(0, SUMS)
    mean = tl.sum(tl.load(sums + view * blocks + each, mask=each < blocks, other=0.0)) / pixels
    at = block * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = _load(crops, flags, view, at, of_view, of_channel, of_row, of_column, pixels, width)
    for slot in tl.static_range(4):
        red, green, blue = _slot(red, green, blue, numbers, flags, view, slot, mean, columns)
    if tl.load(flags + 6 * view + _GREY) != 0:
        grey = _luma(red, green, blue)
        red, green, blue = grey, grey, grey
    if tl.load(flags + 6 * view + _BLURRED) == 0:
        solarised = tl.load(flags + 6 * view + _SOLARISED) != 0
        red = _end(red, solarised, _SCALE_R, _SHIFT_R)
        green = _end(green, solarised, _SCALE_G, _SHIFT_G)
        blue = _end(blue, solarised, _SCALE_B, _SHIFT_B)
    into = out + 3 * view * pixels + at
    tl.store(into, red, mask=at < pixels)
    tl.store(into + pixels, green, mask=at < pixels)
    tl.store(into + 2 * pixels, blue, mask=at < pixels)


# The list of blurred views begins anywhere in its tensor; a variant for each alignment would be compiled mid-run.
@triton.jit(do_not_specialize_on_alignment=["blurred"])
def _blur_columns(  # type: ignore[no-untyped-def]
    out, numbers, blurred, between, pixels, width, columns, TAPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Down the columns, from `out` (N, 3, P) into `between` (blurred views, 3, P); the edge continues outwards."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    view = tl.load(blurred + row)
    at = block * BLOCK + tl.arange(0, BLOCK)
    y, x = at // width, at % width
    last = pixels // width - 1
    for channel in tl.static_range(3):
        source = out + (3 * view + channel) * pixels + x
        total = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(TAPS):
            weight = tl.load(numbers + columns * view + _TAPS_FROM + tap)
            near = tl.minimum(tl.maximum(y + tap - TAPS // 2, 0), last)
            total += weight * tl.load(source + near * width, mask=at < pixels, other=0.0)
        tl.store(between + (3 * row + channel) * pixels + at, total, mask=at < pixels)


@triton.jit(do_not_specialize_on_alignment=["blurred"])
def _blur_rows(  # type: ignore[no-untyped-def]
    between, numbers, flags, blurred, out, pixels, width, columns, TAPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Along the rows, back into `out`, and to the end."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    view = tl.load(blurred + row)
    solarised = tl.load(flags + 6 * view + _SOLARISED) != 0
    at = block * BLOCK + tl.arange(0, BLOCK)
    y, x = at // width, at % width
    for channel in tl.static_range(3):
        source = between + (3 * row + channel) * pixels + y * width
        total = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(TAPS):
            weight = tl.load(numbers + columns * view + _TAPS_FROM + tap)
            near = tl.minimum(tl.maximum(x + tap - TAPS // 2, 0), width - 1)
            total += weight * tl.load(source + near, mask=at < pixels, other=0.0)
        if channel == 0:
            total = _end(total, solarised, _SCALE_R, _SHIFT_R)
        elif channel == 1:
            total = _end(total, solarised, _SCALE_G, _SHIFT_G)
        else:
            total = _end(total, solarised, _SCALE_B, _SHIFT_B)
        tl.store(out + (3 * view + channel) * pixels + at, total, mask=at < pixels)


@triton.jit
def _load(crops, flags, view, at, of_view, of_channel, of_row, of_column, pixels, width):  # type: ignore[no-untyped-def]
    y, x = at // width, at % width
    x = tl.where(tl.load(flags + 6 * view + _FLIP) != 0, width - 1 - x, x)
    source = crops + view * of_view + y * of_row + x * of_column
    red = tl.load(source, mask=at < pixels, other=0).to(tl.float32)
    green = tl.load(source + of_channel, mask=at < pixels, other=0).to(tl.float32)
    blue = tl.load(source + 2 * of_channel, mask=at < pixels, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _slot(red, green, blue, numbers, flags, view, slot, mean, columns):  # type: ignore[no-untyped-def]
    """One slot of the jitter: `photometric.mix` and, where it is this slot's, `photometric.shift_hue`."""
    of_view = numbers + columns * view
    gain = tl.load(of_view + 3 * slot)
    luma_share = tl.load(of_view + 3 * slot + 1)
    mean_share = tl.load(of_view + 3 * slot + 2)
    added = luma_share * _luma(red, green, blue) + mean_share * mean
    red = tl.minimum(tl.maximum(gain * red + added, 0.0), _WHITE)
    green = tl.minimum(tl.maximum(gain * green + added, 0.0), _WHITE)
    blue = tl.minimum(tl.maximum(gain * blue + added, 0.0), _WHITE)
    if tl.load(flags + 6 * view + _HUE_SLOT) == slot:
        least = tl.minimum(red, tl.minimum(green, blue))
        chroma = tl.maximum(red, tl.maximum(green, blue)) - least
        distance = (green + blue - red - least) / tl.maximum(chroma, _TINY) + 1.0
        hue = tl.where(green < blue, -distance, distance) + tl.load(of_view + _HUE)
        base = least - chroma
        red = base + chroma * _primary(hue)
        green = base + chroma * _primary(hue - 2.0)
        blue = base + chroma * _primary(hue + 2.0)
    return red, green, blue


@triton.jit
def _primary(distance):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(tl.abs(tl.abs(distance) - 3.0), 1.0), 2.0)


@triton.jit
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
def _end(x, solarised, scale, shift):  # type: ignore[no-untyped-def]
    """Solarise and normalise."""
    return tl.where(solarised & (x >= _SOLARISE_FROM), _WHITE - x, x) * scale + shift
