"""Which files below a folder are images, and decoding one; no torch at import.

Names that begin with a dot are none: `.ipynb_checkpoints`, `._photo.jpg` and their like are other programs' notes.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from twist.contracts import files
from twist.contracts.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
# Pixels of the largest picture that is decoded: a larger one is a mistake, or the memory of a whole machine.
MAX_PIXELS = 100_000_000
# What is decoded, by Pillow's names (a JPEG may turn out as an MPO, as cameras write it).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB")
# What torchvision does not decode and Pillow does, by Pillow's names.
_BY_PILLOW = ("TIFF", "BMP", "DIB")
# What Pillow raises for files that are no pictures or are damaged.
_PILLOW_RAISES = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, MemoryError, ArithmeticError, LookupError, TypeError,
)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF's tag
# Bits that cameras and microscopes put into values of 16.
_DEPTHS = (8, 10, 12, 14, 16)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def file_entries(
    root: str | os.PathLike[str], wanted: Callable[[str], bool] = is_image
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(path below `root`, entry) of every file at any depth whose name is `wanted` (default: images), in no order.

    Links are followed, but not in a circle. Files are known from folders without a stat for each, which on a network
    file system is most of the time.
    """
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [("", os.fspath(root), (_identity(root),))]
    while pending:
        prefix, folder, above = pending.pop()
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError as error:  # left out in silence, nobody would miss its images
            raise UserError(f"Cannot look into the folder {folder}: {error.strerror or error}.") from None
        for entry in entries:
            if not is_folder(entry):
                if wanted(entry.name):
                    yield prefix + entry.name, entry
            elif (identity := _identity(entry.path)) not in above:
                pending.append((f"{prefix}{entry.name}/", entry.path, (*above, identity)))


def image_names(root: str | os.PathLike[str]) -> list[str]:
    """The path below `root` of every image at any depth, sorted."""
    return sorted(name for name, _ in file_entries(root))


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class UnreadableImage(UserError):
    """An image file that is missing, empty, truncated or no image; the message names the file."""


class TooManyPixels(UnreadableImage):
    """An image that is larger than any that is decoded."""


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Decode one file to uint8 RGB (3, H, W), EXIF orientation applied.

    `UnreadableImage`: the file is missing, empty, truncated, of no known format or too large.
    """
    return decode(image_bytes(path), name=str(path))


def image_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file; `UnreadableImage` where there are none."""
    try:
        return files.read_bytes(path, remedy="replace or remove it")
    except UserError as error:
        raise UnreadableImage(f"Cannot read the image {error}") from None


@contextlib.contextmanager
def open_picture(source: Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image file, or its bytes, as Pillow opens it: nothing is decoded yet, and at most `max_pixels` will be.

    Raises, for what is done with the image inside as well:
        UnreadableImage: no regular file, none that Pillow knows, or damaged. TooManyPixels: a larger one.
    """
    from PIL import Image

    name = name or str(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else files.require_regular(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            opened = Image.open(file, formats=FORMATS)
        with opened as image:
            count = image.width * image.height
            if count > max_pixels:
                said = f"its {count:,} pixels are more than data.max_pixels, {max_pixels:,}"
                raise TooManyPixels(f"Cannot read the image {name}: {said}")
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise TooManyPixels(f"Cannot read the image {name}: it has far more than {max_pixels:,} pixels") from None
    except _PILLOW_RAISES as error:
        raise UnreadableImage(f"Cannot read the image {name}: {error}") from None


def upright(image: Image.Image) -> tuple[int, int]:
    """(width, height) once EXIF's orientation is applied: 5 to 8 lie on their side."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def picture_size(path: Path) -> tuple[int, int] | None:
    """(width, height), seen upright as the engines read pictures; None when it cannot be read."""
    try:
        with open_picture(path) as image:
            return upright(image)
    except UnreadableImage:
        return None


def decode(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file's bytes to uint8 RGB (3, H, W), EXIF orientation applied; of a moving GIF the first frame.

    Values of 16 bits are scaled by the bits in use (8, 10, 12, 14 or 16): 12-bit pictures are not almost black.

    `UnreadableImage`: the bytes are empty, truncated, of no known format or of more than `max_pixels`; the message says
    `name`.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_image

    if not data:
        raise UnreadableImage(f"Cannot read the image {name}: the file is empty")
    kind = _look_at_header(data, name=name, max_pixels=max_pixels)
    if kind in _BY_PILLOW:
        return _decode_by_pillow(data, name=name, max_pixels=max_pixels)
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
        image = (image.to(torch.int32) >> _surplus_bits(int(image.to(torch.int32).max()))).to(torch.uint8)
    return image


def _look_at_header(data: bytes, *, name: str, max_pixels: int) -> str | None:
    """The format by Pillow's name, None where Pillow knows none; `UnreadableImage` for more than `max_pixels`."""
    try:
        with open_picture(data, name=name, max_pixels=max_pixels) as image:
            return image.format
    except TooManyPixels:
        raise
    except UnreadableImage:
        return None  # the decoder says what is wrong


def _decode_by_pillow(data: bytes, *, name: str, max_pixels: int) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    with open_picture(data, name=name, max_pixels=max_pixels) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # one channel of 16 bits
            values = np.asarray(image).astype(np.int32).clip(0)
            grey = (values >> _surplus_bits(int(values.max()))).astype(np.uint8)
            image = Image.fromarray(grey)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _surplus_bits(largest: int) -> int:
    """By how many bits values up to `largest` are shifted to fit 8."""
    return next((bits for bits in _DEPTHS if largest < 1 << bits), _DEPTHS[-1]) - 8
