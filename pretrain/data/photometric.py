"""The photometric part of a view, for N views of one size at once, on a GPU: uint8 crops in, normalised float out.

Flip, colour jitter in each view's own order, greyscale, blur, solarise, ImageNet mean and standard deviation, each with
the view's own parameters (`views.VIEW`), in float32 levels without rounding in between. What depends on the parameters
is decided on the host (`prepare`), so nothing here waits for a GPU.

Differences from the PIL chain (levels of 255, checked by `tests/test_photometric.py`): brightness, contrast, saturation
and greyscale at most 1.5; hue, which is whole levels in Pillow's HSV, mean 2 and at most 18 on white noise, mean 0.5 on
photographs; blur at most 3, and within 6 pixels of the edge, which Pillow continues anew at each pass, at most 30.

Shapes: `N` views, `S` side, `P` = S·S pixels; colour is always the last dimension but one.
"""

import functools
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD
from twist.pretrain.data.views import BRIGHTNESS, CONTRAST, HUE, SATURATION

LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601 in Pillow's fixed-point weights (its "L" mode)
SOLARISE_FROM = 127.5  # Pillow's solarise inverts levels of 128 and more
WHITE = 255.0
BLUR_PASSES = 3  # box passes of Pillow's GaussianBlur
MAX_HUE = 1 / 6  # `shift_hue` unwraps the colour circle only this far, in turns; the published range is 0.1


@dataclass(frozen=True)
class Photometric:
    """Parameters of N views for the device.

    `numbers` (N, 13 + taps): for each of the four jitter slots gain, luma share and mean share; the hue shift in
    sixths of a turn; the taps of the blur kernel. `rows` int64: which views flip, shift hue in slot 0 … 3, are grey,
    are blurred, are solarised, one list after the other with `splits` entries each.
    """

    numbers: Tensor
    rows: Tensor
    splits: tuple[int, ...]

    def to(self, device: torch.device) -> Self:
        if device.type == "cpu":
            return self
        numbers, rows = (t.pin_memory().to(device, non_blocking=True) for t in (self.numbers, self.rows))
        return replace(self, numbers=numbers, rows=rows)


def prepare(views: np.ndarray) -> Photometric:
    """Lay out the records `views` (N,) of dtype VIEW; runs on the host, a few microseconds a view."""
    order, factors = views["order"], views["factors"]
    assert np.abs(factors[:, HUE]).max(initial=0) <= MAX_HUE
    # x ← gain·x + luma_share·luma(x) + mean_share·mean(luma): each of the three linear operations is a case of it.
    slots = np.zeros((len(views), 4, 3), dtype=np.float32)
    slots[:, :, 0] = 1
    for operation, share in ((BRIGHTNESS, None), (CONTRAST, 2), (SATURATION, 1)):
        row, slot = np.nonzero(order == operation)
        slots[row, slot, 0] = factors[row, operation]
        if share is not None:
            slots[row, slot, share] = 1 - factors[row, operation]
    kernels = blur_kernels(views["sigma"].astype(np.float64))  # (N, taps)
    parts = [slots.reshape(-1, 12), 6 * factors[:, HUE, None], kernels]
    of_hue = [order[:, slot] == HUE for slot in range(4)]
    chosen = [views["flip"], *of_hue, views["grey"], views["sigma"] > 0, views["solarise"]]
    rows = [np.flatnonzero(which) for which in chosen]
    return Photometric(
        torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32)),
        torch.from_numpy(np.concatenate(rows)),
        tuple(len(part) for part in rows),
    )


def apply(crops: Tensor, parameters: Photometric) -> Tensor:
    """uint8 crops (N, 3, S, S) → float32 (N, 3, S, S), normalised with ImageNet's mean and standard deviation."""
    size = crops.shape[-2:]
    flipped, *hue_shifted, grey, blurred, solarised = parameters.rows.split(parameters.splits)
    slots = parameters.numbers[:, :12].view(-1, 4, 3, 1, 1).unbind(1)  # 4 × (N, 3, 1, 1)
    hue = parameters.numbers[:, 12].view(-1, 1, 1)
    kernels = parameters.numbers[:, 13:]

    x = crops.to(torch.float32, memory_format=torch.contiguous_format)
    if len(flipped):
        x[flipped] = x[flipped].flip(-1)
    x = x.flatten(2)  # (N, 3, P)
    for slot, shifted in zip(slots, hue_shifted):
        x = mix(x, *slot.unbind(1))
        if len(shifted):
            x[shifted] = shift_hue(x[shifted], hue[shifted])
    if len(grey):
        x[grey] = luma(x[grey]).expand(-1, 3, -1)
    if len(blurred):
        x[blurred] = blur(x[blurred].unflatten(2, size), kernels[blurred]).flatten(2)
    if len(solarised):
        x[solarised] = solarise(x[solarised])
    scale, shift = _normalisation(x.device)
    return x.mul_(scale).add_(shift).unflatten(2, size)


def luma(x: Tensor) -> Tensor:
    """Pillow's grey of RGB: (…, 3, P) → (…, 1, P). No matrix product: a GPU's may be set to round to TF32."""
    red, green, blue = x.split(1, -2)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def mix(x: Tensor, gain: Tensor, luma_share: Tensor, mean_share: Tensor) -> Tensor:
    """One slot of the jitter of (N, 3, P), in place: gain·x + luma_share·luma + mean_share·mean(luma), in [0, 255].

    Brightness b is (b, 0, 0), contrast c is (c, 0, 1 − c), saturation s is (s, 1 − s, 0), none is (1, 0, 0); each
    share is (N, 1, 1).
    """
    grey = luma(x)  # (N, 1, P)
    added = grey.mean(dim=-1, keepdim=True).mul_(mean_share)  # (N, 1, 1)
    return x.mul_(gain).add_(grey.mul_(luma_share).add_(added)).clamp_(0, WHITE)


def shift_hue(x: Tensor, shift: Tensor | float) -> Tensor:
    """Turn the hue of (…, 3, P) by `shift`, (…, 1, 1) or a number, in sixths of a turn, |shift| ≤ 1.

    With m the least channel, C the chroma and n = (rgb − m)/C, the hue's distance from red is n_g + n_b − n_r + 1 in
    sixths of a turn, [0, 3], and g − b has its sign. A channel whose primary is d sixths from the hue is
    m − C + C·clamp(| |d| − 3 |, 1, 2).
    """
    red, green, blue = x.split(1, -2)  # 3 × (…, 1, P)
    least, chroma = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    chroma.sub_(least)
    distance = (green + blue).sub_(red).sub_(least).div_(chroma.clamp_min(torch.finfo(x.dtype).tiny)).add_(1)
    hue = distance.copysign_(green - blue).add_(shift)
    share = (hue - _primaries(x.device)).abs_().sub_(3).abs_().clamp_(1, 2)  # (…, 3, P)
    return torch.addcmul(least.sub_(chroma), share, chroma, out=share)


def blur_kernels(sigma: np.ndarray) -> np.ndarray:
    """The taps of Pillow's GaussianBlur: (N,) standard deviations → (N, taps), float64, rows sum to 1.

    Pillow runs three extended boxes whose width gives the variance (Gwosdek et al., "Theoretical foundations of
    Gaussian convolution by extended box filtering", 2011). Together they are one kernel of 6·⌊radius⌋ + 7 taps.
    """
    variance = sigma**2 / BLUR_PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # whole pixels each side that a box covers fully
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    # Never fewer taps than the published sigmas need: a view is then summed alike, to the bit, in any company.
    reach = max(int(whole.max(initial=0)), 1) + 1
    offset = np.abs(np.arange(-reach, reach + 1))
    box = np.where(offset <= whole[:, None], 1.0, np.where(offset == whole[:, None] + 1, edge[:, None], 0.0))
    box /= (2 * (whole + edge) + 1)[:, None]
    kernels = box
    for _ in range(BLUR_PASSES - 1):
        longer = np.zeros((len(sigma), kernels.shape[1] + 2 * reach))
        for tap in range(2 * reach + 1):
            longer[:, tap : tap + kernels.shape[1]] += box[:, tap, None] * kernels
        kernels = longer
    return kernels


def blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Blur each of (N, 3, S, S) with its own separable kernel, (N, taps); the edge pixel continues outwards."""
    count, channels, height, width = x.shape
    taps = kernels.shape[1]
    reach = taps // 2
    weights = kernels.repeat_interleave(channels, 0)
    groups = count * channels
    x = F.pad(x, (reach,) * 4, mode="replicate").view(1, groups, height + 2 * reach, width + 2 * reach)
    x = F.conv2d(x, weights.view(groups, 1, taps, 1), groups=groups)
    x = F.conv2d(x, weights.view(groups, 1, 1, taps), groups=groups)
    return x.view(count, channels, height, width)


def solarise(x: Tensor) -> Tensor:
    """Invert what is as bright as level 128 or brighter."""
    inverted = (x >= SOLARISE_FROM).to(x.dtype)
    return inverted.mul_(WHITE - 2 * x).add_(x)


def denormalise(x: Tensor) -> Tensor:
    """Normalised views (…, 3, S, S) as uint8 levels: what a contact sheet shows."""
    scale, shift = (constant.unsqueeze(-1) for constant in _normalisation(x.device))
    return ((x - shift) / scale).round_().clamp_(0, WHITE).to(torch.uint8)


# Constants on each device, copied there once: a copy from plain host memory makes the host wait for the GPU.
@functools.cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64).view(3, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1)
    return (1 / (WHITE * std)).to(device, torch.float32), (-mean / std).to(device, torch.float32)


@functools.cache
def _primaries(device: torch.device) -> Tensor:
    """The places of red, green and blue on the colour circle, in sixths of a turn."""
    return torch.tensor([0.0, 2.0, -2.0], device=device).view(3, 1)
