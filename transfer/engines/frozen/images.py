"""Images and their annotations of the frozen protocols, by the catalog's rows or a data card: label maps and boxes.

`N` images, `S` the input's side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from twist.catalog.boxes import VOC_FLAGS, read_voc_xml
from twist.catalog.card import Role
from twist.catalog.card_data import CardData
from twist.catalog.data_sets import DataSet, Split, read_names
from twist.catalog.masks import read_mask
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.images import UnreadableImage, file_entries, open_picture, read_image
from twist.measure.segmentation import VOID
from twist.transfer.engines.plain import loaded, ordered_batches


@dataclass(frozen=True)
class Pictures:
    """The images of one split, in the order of its list, and where their annotations are."""

    row: DataSet
    split: Split
    place: Path
    names: tuple[str, ...]
    classes: tuple[str, ...] | int | None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        files = self.split.images
        return self.place / files.folder / f"{self.names[index]}{files.suffix}"

    def truth(self, kind: str, index: int) -> Path:
        files = self.split.truth[kind]  # type: ignore[index]
        return self.place / files.folder / f"{self.names[index]}{files.suffix}"

    def read(self, index: int) -> Tensor:
        return read_image(self.path(index))

    @property
    def title(self) -> str:
        """What messages call the data."""
        return f"{self.row.name} below {self.place}"

    @property
    def labels(self) -> np.ndarray:
        """Of a feature file, which has a number an image: these have label maps or boxes instead."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def class_count(self) -> int:
        return len(self.classes) if isinstance(self.classes, tuple) else int(self.classes or 0)

    def stamp(self) -> str:
        """Digest of names, sizes and times of the image files: changes when a picture may have."""
        status = [self.path(index).stat() for index in range(len(self))]
        return sha256_json([list(self.names), [(one.st_size, one.st_mtime_ns) for one in status]])

    def digest(self) -> str:
        """Digest of the names: which images, wherever they lie."""
        return sha256_json(list(self.names))[:16]

    def label_map(self, index: int, *, size: int) -> Tensor:
        """(H, W) int64 class numbers and VOID, reduced to `size` × `size` (nearest) where it is not 0.

        `UserError` where the file is no map of class numbers, or holds a class that the data set does not have.
        """
        path = self.truth("masks", index)
        try:
            with open_picture(path) as image:
                if image.mode not in ("L", "P"):
                    raise UserError(f"{path} is a colour picture ({image.mode}), not a map of class numbers.")
                reduced = image.resize((size, size), Image.Resampling.NEAREST) if size else image
                labels = torch.from_numpy(np.array(reduced, dtype=np.int64))
        except UnreadableImage as error:
            raise UserError(f"{error}: copy or unpack the label map again.") from None
        if self.row.reduce_zero_label:
            labels = torch.where((labels == 0) | (labels == VOID), VOID, labels - 1)
        strange = labels[(labels >= self.class_count) & (labels != VOID)]
        if len(strange):
            raise UserError(
                f"{path} holds {int(strange[0])}, where 0–{self.class_count - 1} and {VOID} are allowed: `twist data "
                f"check {self.row.group}` says what is wrong."
            )
        return labels

    def objects(self, index: int) -> list[dict[str, Any]]:
        """An image's objects but crowds: name, bbox (x0, y0, x1, y1, right and lower edge outside), VOC's flags."""
        _, found = read_voc_xml(self.truth("boxes", index))
        return [  # pixels are counted from 1, inclusive
            {**one, "bbox": [x0 - 1, y0 - 1, x1, y1]} for one in found for x0, y0, x1, y1 in [one["bbox"]]
        ]

    def boxes(self, index: int, *, hard_objects: bool = True) -> np.ndarray:
        """(n, 4) boxes of an image's objects, as `objects` gives them."""
        found = self.objects(index)
        kept = [one["bbox"] for one in found if hard_objects or not any(one.get(flag) for flag in VOC_FLAGS)]
        return np.array(kept, dtype=np.float64).reshape(-1, 4)


@dataclass(frozen=True)
class OwnPictures(Pictures):
    """One split of a data card, read as the other engines read it. `row`, `split` and `place` are not used."""

    own: CardData
    role: Role

    @classmethod
    def of(cls, own: CardData, role: Role) -> OwnPictures:
        unused: Any = None
        names = tuple(path.name for path in own.images(role))
        return cls(unused, unused, own.card.folder, names, own.classes, own, role)

    @property
    def title(self) -> str:
        return f"{self.own.card.name} below {self.place}"

    def path(self, index: int) -> Path:
        return self.own.images(self.role)[index]

    def label_map(self, index: int, *, size: int) -> Tensor:
        assert self.own.pairs is not None
        assert self.own.card.segmentation is not None
        labels = read_mask(self.own.pairs[self.role][index].mask, self.own.card.segmentation)
        if size:
            labels = np.array(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))
        return torch.from_numpy(labels.astype(np.int64))

    def objects(self, index: int) -> list[dict[str, Any]]:
        assert self.own.boxes is not None
        found = []
        for one in self.own.boxes[self.role].images[index]["objects"]:
            x, y, width, height = one["bbox"]
            if not one["iscrowd"]:
                found.append({**one, "name": self.own.classes[one["category"]], "bbox": [x, y, x + width, y + height]})
        return found


def open_split(row: DataSet, root: Path, role: str, sample: dict[str, Any] | None) -> Pictures:
    """The split of `row` below `root` that runs train on (`role` "train") or measure on ("val")."""
    split, place = next(split for split in row.run_splits().values() if split.role == role), row.place(root)
    suffix, folder = split.images.suffix, place / split.images.folder
    if split.names:
        names = read_names(place / split.names)
    else:
        names = sorted(
            name.removesuffix(suffix) for name, _ in file_entries(folder, lambda name: name.endswith(suffix))
        )
    if not names:
        raise UserError(f"{folder} holds no image that ends in {suffix}.")
    return Pictures(row, split, place, tuple(names), row.label_names(sample))


def squashed(pictures: Pictures, size: int, batch_size: int, workers: int, start: int) -> Iterator[Tensor]:
    """(B, 3, size, size) uint8 RGB of the images from `start` on, both sides scaled to `size` (antialiased)."""
    batches = ordered_batches(len(pictures), batch_size=batch_size, start=start)
    return loaded(_Squashed(pictures, size), batches, workers=workers)


class _Squashed:
    def __init__(self, pictures: Pictures, size: int) -> None:
        self.pictures, self.resize = pictures, v2.Resize([size, size], antialias=True)

    def __call__(self, index: int) -> Tensor:
        return self.resize(self.pictures.read(index))
