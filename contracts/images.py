"""Decoding image files, and naming the one that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from twist.contracts.errors import UserError


class UnreadableImage(UserError):
    """An image file that is missing, empty, truncated or no image; the message names the file."""


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Decode one file to uint8 RGB (3, H, W), EXIF orientation applied.

    Raises:
        UnreadableImage: the file is missing, empty, truncated or of no known format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"Cannot read the image {path}: {error.strerror or error}") from None
    return decode(data, name=str(path))


def decode(data: bytes, *, name: str) -> Tensor:
    """Decode an image file's bytes to uint8 RGB (3, H, W), EXIF orientation applied; of a moving GIF the first frame.

    Raises:
        UnreadableImage: the bytes are empty, truncated or of no known format; the message says `name`.
    """
    if not data:
        raise UnreadableImage(f"Cannot read the image {name}: the file is empty")
    try:
        # bytearray, because torch has no read-only tensors and warns of a buffer that it could write to.
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError) as error:
        # Its first sentence: what follows advises other functions of torchvision.
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0].rstrip(".")
        raise UnreadableImage(f"Cannot read the image {name}: {reason}") from None
    if image.ndim == 4:
        image = image[0]
    if image.dtype == torch.uint16:  # a PNG of 16 bits a channel
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def read_images(paths: Sequence[str | os.PathLike[str]]) -> list[Tensor]:
    """`read_image` of each path."""
    return [read_image(path) for path in paths]
