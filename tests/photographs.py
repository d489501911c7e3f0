"""Pictures for the input pipeline's tests and benchmarks: the spectrum and the file sizes of photographs, made here."""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int, *, height: int = 375, width: int = 500) -> np.ndarray:
    """uint8 (H, W, 3): amplitudes fall as 1/f, as in natural images (Field 1987), mostly in brightness."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    noise = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    light, warm, green = np.fft.irfft2(noise / frequency**1.1, s=(height, width))
    light, warm, green = (plane / plane.std() for plane in (light, warm, green))
    rgb = np.stack([light + 0.25 * warm, light - 0.1 * warm + 0.1 * green, light - 0.25 * green], axis=-1)
    return np.clip(118 + 55 * rgb, 0, 255).astype(np.uint8)


@functools.cache
def jpeg(seed: int, *, height: int = 375, width: int = 500, quality: int = 90) -> bytes:
    """`photograph` as a JPEG file; about 105 kB at 500 × 375, as ImageNet's average."""
    file = io.BytesIO()
    Image.fromarray(photograph(seed, height=height, width=width)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_folder(root: Path, count: int, *, height: int = 375, width: int = 500, classes: int = 1) -> Path:
    """`count` JPEGs as root/<class>/<number>.jpg."""
    for number in range(count):
        path = root / f"class{number % classes}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, height=height, width=width))
    return root
