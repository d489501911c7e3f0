"""The published input pipeline, one view at a time with Pillow: what the fast one is measured and compared against.

torchvision's functional transforms on PIL images, in the published order (TWIST repository, commit 796d36e), driven by
the same records (`views.VIEW`) as the fast pipeline. Each operation is a function of its own, so the tests
can bound the difference operation by operation. Not used in training.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD
from twist.pretrain.data.views import NO_OPERATION

SOLARISE_THRESHOLD = 128

# By the operation's number: brightness, contrast, saturation, hue.
_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def decode(data: bytes) -> Image.Image:
    """RGB, upright."""
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def crop(image: Image.Image, box: Sequence[int], size: int) -> Image.Image:
    """The box (top, left, height, width) resized bicubically to `size` × `size`."""
    top, left, height, width = (int(n) for n in box)
    return F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)


def jitter(image: Image.Image, operation: int, factor: float) -> Image.Image:
    """One of the four jitter operations."""
    return _JITTER[operation](image, float(factor))


def grey(image: Image.Image) -> Image.Image:
    return F.rgb_to_grayscale(image, num_output_channels=3)


def blur(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(sigma)))


def solarise(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image, SOLARISE_THRESHOLD)


def photometric(image: Image.Image, view: np.void) -> Image.Image:
    """Flip, jitter, greyscale, blur and solarise as the record says."""
    if view["flip"]:
        image = F.hflip(image)
    for operation in view["order"]:
        if operation != NO_OPERATION:
            image = jitter(image, operation, view["factors"][operation])
    if view["grey"]:
        image = grey(image)
    if view["sigma"] > 0:
        image = blur(image, view["sigma"])
    if view["solarise"]:
        image = solarise(image)
    return image


def normalise(image: Image.Image) -> Tensor:
    """float32 (3, S, S), ImageNet mean and standard deviation."""
    return F.normalize(F.to_tensor(image), list(IMAGENET_MEAN), list(IMAGENET_STD))


def views_of(image: Image.Image, views: np.ndarray, sizes: Sequence[int]) -> list[Tensor]:
    """The whole published chain after the decode: V finished views, with `views` (V,) and their sides (V,)."""
    return [normalise(photometric(crop(image, view["box"], size), view)) for view, size in zip(views, sizes)]
