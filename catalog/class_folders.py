"""Labelled images: class folders, ROOT/[imagenet/]{train,val}/<class>/…, tables of them, and lists of some. No torch.

Tables are Parquet files, tar shards, or a data set saved to disk (Arrow), read by Hugging Face's `datasets`. Paths are
kept as one array of bytes: a Python list of 1.28 million strings is copied page by page into every worker.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from twist.catalog.data_sets import DATA_SETS, read_names
from twist.contracts.errors import UserError, require
from twist.contracts.images import UnreadableImage, decode, image_names, is_folder, read_image
from twist.contracts.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

# Names of SimCLR's lists (google-research/simclr, imagenet_subsets/) and the share of each class a drawn subset has.
SUBSETS = {"1percent": ("1percent.txt", 0.01), "10percent": ("10percent.txt", 0.10)}
# Endings of tables → the name of their reader in `datasets`.
READERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
# How folders and files of a split are called, first the usual name.
SPLIT_NAMES = {"train": ("train", "training", "trainval"), "val": ("val", "valid", "validation", "test")}


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

    def lines(self) -> list[str]:
        """A line for every image, by which a written list finds it again."""
        return [os.fsdecode(bytes(path)) for path in self.paths]

    def files(self) -> list[Path]:
        """The files that hold the images."""
        return [self.path(index) for index in range(len(self))]

    def read(self, index: int) -> Tensor:
        """Image `index` decoded, uint8 RGB (3, H, W); `UnreadableImage` when it cannot be."""
        return read_image(self.path(index))

    def only(self, indices: np.ndarray) -> Self:
        """These of the images, in this order."""
        return replace(self, paths=self.paths[indices], labels=self.labels[indices])

    def spread(self, count: int) -> Self:
        """At most `count` of the images, evenly spread over the classes: those that pictures show."""
        return self.only(np.linspace(0, len(self) - 1, num=min(count, len(self)), dtype=int))

    def digest(self) -> str:
        """SHA-256 of the relative paths and labels: which images, whatever the folder is called."""
        state = hashlib.sha256(self.paths.astype("S").tobytes())
        state.update(self.labels.tobytes())
        return state.hexdigest()

    def stamp(self) -> str:
        """`digest` together with sizes and modification times: changes when a file's content may have."""
        state = hashlib.sha256(self.digest().encode())
        for status in map(os.stat, self.files()):
            state.update(f"{status.st_size} {status.st_mtime_ns};".encode())
        return state.hexdigest()


@dataclass(frozen=True)
class TableImages(LabelledImages):
    """Image `b"17"` of `paths` is row 17 of `rows`, a memory-mapped table of `tables`, which lie in `folder`."""

    rows: Any = None
    column: str = "image"
    tables: tuple[Path, ...] = ()

    def files(self) -> list[Path]:
        return list(self.tables)

    def read(self, index: int) -> Tensor:
        row = int(self.paths[index])
        value, name = self.rows[row][self.column], f"row {row} of {self.folder}"
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UnreadableImage(f"Cannot read the image {name}: the row has no bytes")
        return decode(data, name=name)

    def chosen_rows(self) -> Any:
        """The rows alone, in the order of the files."""
        return self.rows.select(sorted(map(int, self.paths)))

    def digest(self) -> str:
        names = b"".join(os.fsencode(file.name) for file in self.tables)
        return hashlib.sha256(names + super().digest().encode()).hexdigest()


def open_tree(root: str | os.PathLike[str]) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images below `root`, which has them for train and val, or a folder imagenet/ that does.

    `UserError`: a split is missing, a class is empty, or the two splits do not have the same classes.
    """
    folder = DATA_SETS["imagenet"].place(Path(root))
    places = {role: split_files(folder, role) for role in SPLIT_NAMES}
    if not all(places.values()):
        raise UserError(
            f"There is no ImageNet-like tree at {root}: it needs train/<class>/ and val/<class>/ (or .parquet or .tar "
            f"files of these names), directly or in imagenet/; `twist data check folders {root}` says what is missing."
        )
    train, val = (read_files(found) for found in places.values())
    refuse_other_classes(folder, train.classes, val.classes)
    return train, val


def split_files(folder: Path, role: str) -> list[Path]:
    """What holds a split of `folder`: the folder of its name, or the tables in it or of one of its names."""
    place = folder / role
    if place.is_dir() and class_names(place):
        return [place]
    for name in SPLIT_NAMES[role]:
        beside = [file for file in table_files(folder) if re.match(rf"{name}(?![a-z])", file.name)]
        if found := table_files(folder / name) or beside:
            return found
    return [place] if place.is_dir() else []


def table_files(folder: Path) -> list[Path]:
    return sorted(file for ending in READERS for file in folder.glob(f"*{ending}")) if folder.is_dir() else []


def read_files(files: list[Path], *, image: str = "", label: str = "") -> LabelledImages:
    """The images of a folder of class folders, or of tables; `image` and `label`: names of their columns."""
    return read_split(files[0]) if files[0].is_dir() else _read_tables(files, image, label)


def read_split(folder: Path, bar: Progress | None = None) -> LabelledImages:
    """Every image of `folder`/<class>/ at any depth, sorted; `bar` advances by one for each class.

    `UserError`: there is no `folder`, no class in it, or a class without images.
    """
    if not folder.is_dir():
        raise UserError(f"There is no class folder at {folder}: a tree has train/<class>/ and val/<class>/.")
    found = {}
    for name in class_names(folder):
        found[name] = [f"{name}/{image}" for image in image_names(folder / name)]
        if not found[name]:
            raise UserError(f"The class folder {folder / name} holds no images: remove it in both splits, or fill it.")
        if bar is not None:
            bar.advance()
    if not found:
        raise UserError(f"{folder} holds no class folders: put each class's images into a folder of its name.")
    return labelled(folder, found)


def labelled(folder: Path, classes: Mapping[str, list[str]]) -> LabelledImages:
    """The images of each class by their paths below `folder`."""
    paths = [os.fsencode(image) for images in classes.values() for image in images]
    counts = [len(images) for images in classes.values()]
    return LabelledImages(folder, tuple(classes), np.array(paths), np.repeat(np.arange(len(classes)), counts))


def class_names(root: Path) -> tuple[str, ...]:
    """The folders in `root`, sorted: the classes of one split."""
    with os.scandir(root) as entries:
        return tuple(sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith(".")))


def _read_tables(files: list[Path], image: str, label: str) -> TableImages:
    rows, image, label = _open(files, image, label)
    values = list(rows[label])
    names = getattr(rows.features[label], "names", None)
    if names is None:
        named_values = sorted(set(values))
        values, names = [named_values.index(value) for value in values], [str(value) for value in named_values]
    labels = np.array(values, dtype=np.int64)
    order = np.argsort(labels, kind="stable")  # by class, as folders are
    paths = np.array([b"%d" % row for row in order])
    return TableImages(files[0].parent, tuple(names), paths, labels[order], rows, image, tuple(files))


def _open(files: list[Path], image: str, label: str) -> tuple[Any, str, str]:
    """The rows and the names of their columns: of the usual name, or the first of its kind."""
    require("hub")
    import datasets

    try:
        paths = [str(file) for file in files]
        rows = datasets.load_dataset(READERS[files[0].suffix], data_files=paths, split="train")
        found: dict[str, list[str]] = {"image": [], "label": []}
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
                found["image"].append(name)
            elif isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "").startswith("int"):
                found["label"].append(name)
        columns = []
        for kind, named in (("image", image), ("label", label)):
            usual = [named] if named else sorted(found[kind], key=lambda name: name != kind)
            if not usual or usual[0] not in rows.column_names:
                raise UserError(
                    f"{files[0]} has no column {named or f'with {kind}s'} (it has {', '.join(rows.column_names)}): set "
                    f"{kind}_column in [classification] of a data card."
                )
            columns.append(usual[0])
        rows = rows.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{files[0]} cannot be opened as a table ({str(error).splitlines()[0]}).") from None
    return rows, columns[0], columns[1]


def refuse_other_classes(folder: Path, train: Collection[str], val: Collection[str]) -> None:
    """`UserError` when the two splits below `folder` do not have the same classes: labels would mean others."""
    for one, other, name in ((train, val, "train/"), (val, train, "val/")):
        if only := sorted(set(one) - set(other)):
            raise UserError(
                f"{folder}: train/ and val/ do not have the same classes ({len(only)} only in {name}; {only[0]} is "
                f"only in {name}): complete the other one, labels follow the sorted folder names."
            )


def find_subset(tree: Path, name: str) -> Path | None:
    """The list `name` of labelled images of the class folders in `tree`; None when there is none."""
    places = (tree, tree / "imagenet_subsets", tree.parent)
    return next((place / name for place in places if (place / name).is_file()), None)


def read_subset(train: LabelledImages, list_file: Path) -> LabelledImages:
    """The images that a list names, in its order: a file name a line, with or without its class folder before it.

    `UserError`: the list is empty, names absent images, one that several classes have, or an image twice.
    """
    lines = read_names(list_file, whole_lines=True)
    by_name: dict[bytes, int] = {}
    ambiguous: set[bytes] = set()
    for index, path in enumerate(train.paths):
        short = path.rsplit(b"/", 1)[-1]
        if short in by_name:
            ambiguous.add(short)
        by_name[short] = by_name[path] = index
    names = [os.fsencode(line) for line in lines]
    if several := [line for line, name in zip(lines, names) if name in ambiguous]:
        raise UserError(f"{list_file}: several classes hold a file {several[0]}; write the lines as <class>/<file>.")
    if absent := [line for line, name in zip(lines, names) if name not in by_name]:
        raise UserError(
            f"{list_file} names {len(absent)} files that are not in {train.folder} (first: {absent[0]}): the training "
            "images are incomplete, or the list belongs to another data set."
        )
    chosen = [by_name[name] for name in names]
    if doubled := len(chosen) - len(set(chosen)):
        raise UserError(f"{list_file} names {doubled} files twice: each line must be another image.")
    return train.only(np.array(chosen))


def draw_subset(train: LabelledImages, share: float, *, seed: int) -> LabelledImages:
    """A class-balanced draw: of each class the nearest whole number to `share`, at least one image.

    A recipe with `labels_from = "seed"` takes it. Of one seed a smaller share lies within a larger one.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = []
    for label in range(len(train.classes)):
        members = np.flatnonzero(train.labels == label)
        count = max(1, round(share * len(members)))
        chosen.append(np.sort(rng.permutation(members)[:count]))
    return train.only(np.concatenate(chosen))
