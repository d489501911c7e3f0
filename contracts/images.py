"""Image files: finding them, decoding them, and naming the one that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from contracts.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})


class UnreadableImage(UserError):
    """An image file that is missing, empty, truncated or no image; the message names the file."""


def find_images(root: str | os.PathLike[str]) -> list[Path]:
    """Every image below `root`, at any depth, sorted by path; `UserError` when the folder is absent or holds none."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"There is no image folder at {root}: check the path, or make a sample with `twist data sample`."
        )
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise UserError(f"{root} holds no images ({', '.join(sorted(EXTENSIONS))} are looked for, at any depth).")
    return found


def find_classes(root: str | os.PathLike[str]) -> tuple[list[str], list[tuple[Path, int]]]:
    """A folder a class, as ImageNet lies on disk: class names (sorted) and (image, class index) pairs."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"There is no class folder at {root}: an ImageNet-like tree has train/<class>/ and val/<class>/."
        )
    names = sorted(p.name for p in root.iterdir() if p.is_dir())
    if not names:
        raise UserError(f"{root} holds no class folders: put each class's images into a folder of its name.")
    return names, [(image, index) for index, name in enumerate(names) for image in find_images(root / name)]


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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImage(f"Cannot read the image {name}: {reason}") from None
    if image.ndim == 4:
        image = image[0]
    if image.dtype == torch.uint16:  # a PNG of 16 bits a channel
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def read_images(paths: Sequence[str | os.PathLike[str]]) -> list[Tensor]:
    """`read_image` of each path."""
    return [read_image(path) for path in paths]
