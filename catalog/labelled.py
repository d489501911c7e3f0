"""Labelled images on disk: ROOT/[imagenet/]{train,val}/<class>/… and lists of those that have labels. No torch.

Paths are kept as one array of bytes: a Python list of 1.28 million strings is copied page by page into every worker.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from twist.catalog.roots import tree_folder
from twist.contracts.errors import UserError
from twist.contracts.images import images_of_classes, refuse_other_classes

# Names of SimCLR's lists (google-research/simclr, imagenet_subsets/) and the share of each class a drawn subset has.
SUBSETS = {"1percent": ("1percent.txt", 0.01), "10percent": ("10percent.txt", 0.10)}


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split. `paths` (N,) bytes relative to `folder`, sorted by class and name; `labels` (N,) int64."""

    folder: Path
    classes: tuple[str, ...]
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(bytes(self.paths[index]))

    def spread(self, count: int) -> LabelledImages:
        """At most `count` of the images, evenly spread over the classes: those that pictures show."""
        return _select(self, np.linspace(0, len(self) - 1, num=min(count, len(self)), dtype=int))

    def digest(self) -> str:
        """SHA-256 of the relative paths and labels: which images, whatever the folder is called."""
        state = hashlib.sha256(self.paths.astype("S").tobytes())
        state.update(self.labels.tobytes())
        return state.hexdigest()

    def stamp(self) -> str:
        """`digest` together with sizes and modification times: changes when a file's content may have."""
        state = hashlib.sha256(self.digest().encode())
        for index in range(len(self)):
            status = self.path(index).stat()
            state.update(f"{status.st_size} {status.st_mtime_ns};".encode())
        return state.hexdigest()


def open_tree(root: str | os.PathLike[str]) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images below `root`, which holds train/ and val/ or a folder imagenet/ that does.

    Raises:
        UserError: a folder is missing, a class is empty, or the two splits do not have the same classes.
    """
    folder = tree_folder(root)
    train, val = read_split(folder / "train"), read_split(folder / "val")
    refuse_other_classes(folder, train.classes, val.classes)
    return train, val


def read_split(folder: Path) -> LabelledImages:
    """Every image of `folder`/<class>/ at any depth, sorted; `UserError` for a class without images."""
    classes = images_of_classes(folder)
    counts = [len(images) for images in classes.values()]
    paths = [os.fsencode(image) for images in classes.values() for image in images]
    return LabelledImages(folder, tuple(classes), np.array(paths), np.repeat(np.arange(len(classes)), counts))


def read_subset(train: LabelledImages, list_file: Path) -> LabelledImages:
    """The images that a list names, in its order: a file name a line, with or without its class folder before it."""
    lines = [line.strip() for line in list_file.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{list_file} is empty: it must name one training image a line.")
    by_name: dict[bytes, int] = {}
    ambiguous: set[bytes] = set()
    for index, path in enumerate(train.paths):
        short = path.rsplit(b"/", 1)[-1]
        if short in by_name:
            ambiguous.add(short)
        by_name[short] = by_name[path] = index
    chosen: list[int] = []
    absent: list[str] = []
    for line in lines:
        name = os.fsencode(line)
        if name in ambiguous:
            raise UserError(f"{list_file}: several classes hold a file {line}; write the lines as <class>/<file>.")
        if name in by_name:
            chosen.append(by_name[name])
        else:
            absent.append(line)
    if absent:
        raise UserError(
            f"{list_file} names {len(absent)} files that are not in {train.folder} (first: {absent[0]}): the training "
            "images are incomplete, or the list belongs to another data set."
        )
    if len(set(chosen)) != len(chosen):
        raise UserError(
            f"{list_file} names {len(chosen) - len(set(chosen))} files twice: each line must be another image."
        )
    return _select(train, np.array(chosen))


def list_lines(train: LabelledImages, subset: LabelledImages) -> list[str]:
    """The lines by which `read_subset` finds `subset` in `train` again.

    File names, as in SimCLR's lists; with the class folder before them where two classes share a name.
    """
    unique = len({path.rsplit(b"/", 1)[-1] for path in train.paths}) == len(train)
    return [os.fsdecode(path.rsplit(b"/", 1)[-1] if unique else bytes(path)) for path in subset.paths]


def draw_subset(train: LabelledImages, share: float, *, seed: int) -> LabelledImages:
    """A class-balanced draw: of each class the nearest whole number to `share`, at least one image.

    A recipe with `labels_from = "seed"` takes it, and `twist data prepare imagenet seed=N` writes it down. Of one seed
    a smaller share lies within a larger one.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = []
    for label in range(len(train.classes)):
        members = np.flatnonzero(train.labels == label)
        count = max(1, round(share * len(members)))
        chosen.append(np.sort(rng.permutation(members)[:count]))
    return _select(train, np.concatenate(chosen))


def _select(images: LabelledImages, indices: np.ndarray) -> LabelledImages:
    return replace(images, paths=images.paths[indices], labels=images.labels[indices])
