"""Images and their annotations of the frozen protocols, by the catalog's rows or a data card: label maps and boxes.

`N` images, `S` the input's side. Both are read by the catalog's readers of masks and of boxes, as the check reads them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from twist.catalog.boxes import VOC_FLAGS, BoxSet, voc_boxes
from twist.catalog.card import MaskValues, Role
from twist.catalog.card_data import CardData
from twist.catalog.data_sets import DataSet
from twist.catalog.masks import mask_values, read_mask
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.images import read_image
from twist.transfer.engines.plain import loaded, ordered_batches


@dataclass(frozen=True)
class Pictures:
    """The images of one split, in order, with their masks or boxes.

    `data` is what the data are called, `names` which images these are wherever they lie, and `published` how many the
    published split has.
    """

    data: str
    names: Sequence[str]
    images: Sequence[Path]
    classes: Sequence[str]
    masks: Sequence[Path] = ()
    values: MaskValues | None = None
    boxes: BoxSet | None = None
    published: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return read_image(self.images[index])

    @property
    def labels(self) -> np.ndarray:
        """Of a feature file, which has a number an image: these have label maps or boxes instead."""
        return np.zeros(len(self), dtype=np.int64)

    def stamp(self) -> str:
        """Digest of names, sizes and times of the image files: changes when a picture may have."""
        status = [path.stat() for path in self.images]
        return sha256_json([list(self.names), [(one.st_size, one.st_mtime_ns) for one in status]])

    def digest(self) -> str:
        """Digest of the names: which images, wherever they lie."""
        return sha256_json(list(self.names))[:16]

    def label_map(self, index: int, *, size: int) -> Tensor:
        """(H, W) int64 class numbers and VOID, reduced to `size` × `size` (nearest) where it is not 0.

        `UserError` where the file is no mask of the data's classes.
        """
        assert self.values is not None
        labels = read_mask(self.masks[index], self.values)
        if size:
            labels = np.array(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))
        return torch.from_numpy(labels.astype(np.int64))

    def objects(self, index: int, *, hard: bool = True) -> list[dict[str, Any]]:
        """An image's objects but crowds, as in a `BoxSet`; without the `hard` ones, VOC's difficult or truncated."""
        assert self.boxes is not None
        found = [one for one in self.boxes.images[index]["objects"] if not one["iscrowd"]]
        return found if hard else [one for one in found if not any(one.get(flag) for flag in VOC_FLAGS)]


def open_card_split(own: CardData, role: Role) -> Pictures:
    """One split of a data card."""
    images = own.images(role)
    masks = [pair.mask for pair in (own.pairs or {}).get(role, ())]
    boxes = own.boxes[role] if own.boxes else None
    names = [path.name for path in images]
    return Pictures(own.card.name, names, images, own.classes, masks, own.card.segmentation, boxes)


def open_split(row: DataSet, root: Path, role: Role, sample: dict[str, Any] | None) -> Pictures:
    """The split of `row` below `root` that runs train on (`role` "train") or measure on ("val")."""
    split, place = next(split for split in row.run_splits().values() if split.role == role), row.place(root)
    names = split.image_names(place)
    if not names:
        raise UserError(f"{place / split.images.folder} holds no image that ends in {split.images.suffix}.")
    images = [split.images.of(name, place) for name in names]
    files = {kind: [one.of(name, place) for name in names] for kind, one in split.truth.items()}
    values, boxes = mask_values(row, sample), None
    if "boxes" in files:
        boxes = voc_boxes(zip(images, files["boxes"], strict=True), values.names)
    return Pictures(row.name, names, images, values.names, files.get("masks", ()), values, boxes, split.count)


def squashed(pictures: Pictures, size: int, batch_size: int, workers: int, start: int) -> Iterator[Tensor]:
    """(B, 3, size, size) uint8 RGB of the images from `start` on, both sides scaled to `size` (antialiased)."""
    batches = ordered_batches(len(pictures), batch_size=batch_size, start=start)
    return loaded(_Squashed(pictures, size), batches, workers=workers)


class _Squashed:
    def __init__(self, pictures: Pictures, size: int) -> None:
        self.pictures, self.resize = pictures, v2.Resize([size, size], antialias=True)

    def __call__(self, index: int) -> Tensor:
        return self.resize(self.pictures.read(index))
