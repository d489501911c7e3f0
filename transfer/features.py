"""Dense features of one's own pictures: as arrays, or drawn as the colours of their principal components."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import image_names, read_image
from twist.contracts.networks import network_of
from twist.contracts.weights import weights_file
from twist.converters.read import load_artefact
from twist.measure.dense import DenseExtractor, Layers
from twist.transfer.pictures import sheet

SIZE = 448  # pixels of the longer side
DRAWN = 8  # pictures on a sheet


def find_images(path: Path) -> list[Path]:
    """One image, or all below a folder, sorted."""
    found = [path / name for name in image_names(path)] if path.is_dir() else [path]
    if not found:
        raise UserError(f"There are no images below {path}: give a picture, or a folder with pictures at any depth.")
    return found


def features(weights: str | Path, images: Sequence[str | Path], *, size: int = SIZE) -> list[Tensor]:
    """(D, h, w) float32 of each image: the last stage of a ResNet with stride 16, the last patch tokens of a ViT.

    `weights` is any checkpoint that `twist inspect` reads. `size` are the pixels of the longer side; both sides are
    rounded to whole patches of the map.
    """
    extractor = _extractor(Path(weights))
    return [extractor.maps(_input(read_image(image), size, extractor))[0].cpu() for image in images]


def _extractor(weights: Path) -> DenseExtractor:
    tensors, header = load_artefact(weights_file(weights))
    dilated = header.stem == "conv7x7" and header.padding != "same"  # dilation is not known for the latter
    layers = Layers(output_stride=16 if dilated else 32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return DenseExtractor(
        network_of(header, tensors, output_stride=layers.output_stride).to(device).eval(), header, device, layers
    )


def _input(image: Tensor, size: int, extractor: DenseExtractor) -> Tensor:
    """(1, 3, H, W) uint8 with the proportions of `image`, as near as the map's stride allows."""
    height, width = image.shape[1:]
    shape = [max(1, round(side * size / max(height, width) / extractor.stride)) * extractor.stride
             for side in (height, width)]  # fmt: skip
    return F.interpolate(image[None].float(), shape, mode="bilinear", antialias=True).round().to(torch.uint8)


def principal_colours(maps: Sequence[Tensor]) -> list[Tensor]:
    """(D, h, w) maps of one network → (3, h, w) in 0…1: their first three principal components as red, green, blue.

    The components are those of the patches of all maps together, so one colour means the same in all of them. Each is
    spread over its 1st to 99th percentile. A component's sign is arbitrary: its largest weight is made positive.
    """
    rows = torch.cat([one.flatten(1).T for one in maps]).double()  # (patches, D)
    centred = rows - rows.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)  # (D, 3), largest first
    directions *= directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    scores = centred @ directions
    part = scores[:: len(scores) // 1_000_000 + 1]  # quantile takes 16 million numbers at most
    low, high = (torch.quantile(part, share, dim=0) for share in (0.01, 0.99))
    scores = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    parts = scores.split([one.shape[1] * one.shape[2] for one in maps])
    return [part.T.reshape(3, *one.shape[1:]) for part, one in zip(parts, maps)]


def draw_features(weights: Sequence[Path], images: Sequence[Path], path: Path, *, size: int = SIZE) -> Path:
    """A PNG at `path`: a row for each image, the picture first, then its principal colours under each of `weights`."""
    images = images[:DRAWN]
    pictures = [read_image(image) for image in images]
    columns = [[picture.float() / 255 for picture in pictures]]
    columns += [principal_colours(features(one, images, size=size)) for one in weights]

    def drawn(tile: Tensor, picture: Tensor) -> Image.Image:
        height, width = (max(1, round(size / 2 * side / max(picture.shape[1:]))) for side in picture.shape[1:])
        pixels = (tile * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels).resize((width, height))

    rows = [[drawn(tile, picture) for tile in row] for *row, picture in zip(*columns, pictures)]
    titles = ["picture", *(one.name if one.is_dir() else one.stem for one in weights)]
    with files.atomic_path(path) as temporary:
        sheet(rows, titles=titles).save(temporary, format="PNG")
    return path


def save_features(weights: Path, images: Sequence[Path], path: Path, *, size: int = SIZE) -> Path:
    """A NumPy archive at `path` with a (D, h, w) float32 array for each image, by its path."""
    found: dict[str, Any] = {
        str(image): one.numpy() for image, one in zip(images, features(weights, images, size=size))
    }
    with files.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **found)
    return path
