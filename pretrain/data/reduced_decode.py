"""Decoding a large JPEG at a half, a quarter or an eighth of its size, when every crop of it still has pixels to spare.

A JPEG holds 8 × 8 cosine coefficients, so libjpeg can leave the fine ones out and never make the pixels. torchvision
offers no such decode, Pillow does (`draft`). It pays only for images of several megapixels: at 500 × 375 the crops
allow no reduction (and entropy decoding, which stays, is most of the cost). The rule is Pillow's own `reducing_gap`
of 2: at least two decoded pixels for each pixel of the view, in both directions, so that the antialiased resize that
follows still does the visible filtering; crop edges move by at most a quarter of a view's pixel.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow's recommendation for `reducing_gap`, the pixels kept for each that is wanted.
GAP = 2
# Below this many bytes a JPEG is hardly ever large enough; its header is then not read twice.
PROBE_FROM_BYTES = 150_000
_ORIENTATION = 0x0112
_JPEG = b"\xff\xd8\xff"


def upright_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) as shown of a JPEG worth a closer look, from its header; None for everything else."""
    if len(data) < PROBE_FROM_BYTES or not data.startswith(_JPEG):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "RGB":
                return None
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception:  # odd metadata, a bomb, a header that promises too much: Pillow raises whatever it meets
        # Not for this path: the full decode says what is wrong with the file.
        return None
    return (width, height) if turned else (height, width)


def divisor(boxes: np.ndarray, sizes: np.ndarray) -> int:
    """The largest of 8, 4, 2 that leaves `GAP` pixels a view pixel for all boxes (V, 4) and view sides (V,), else 1."""
    spare = (boxes[:, 2:].min(axis=1) / (GAP * sizes)).min()
    return next((reduction for reduction in (8, 4, 2) if spare >= reduction), 1)


def decode_reduced(data: bytes, reduction: int) -> Tensor | None:
    """uint8 RGB (3, ⌈H/reduction⌉, ⌈W/reduction⌉), upright; None when Pillow cannot, and the full decode decides."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (image.width // reduction, image.height // reduction))
            pixels = np.array(ImageOps.exif_transpose(image))
    except Exception:  # see `upright_size`
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)  # channels stay last in memory, as `cut` wants them


def shrink_boxes(boxes: np.ndarray, full: tuple[int, int], reduced: tuple[int, int]) -> np.ndarray:
    """The boxes (V, 4) of an image of size `full` in its decode of size `reduced`, edges rounded to whole pixels."""
    ratio = np.array(reduced) / np.array(full)  # (2,): height, width
    begin = np.rint(boxes[:, :2] * ratio).astype(np.int32)
    end = np.minimum(np.rint((boxes[:, :2] + boxes[:, 2:]) * ratio), reduced).astype(np.int32)
    return np.concatenate([begin, end - begin], axis=1)
