"""Class folders, ROOT/[imagenet/]{train,val}/<class>/…, and lists of the images that have labels. No torch.

Paths are kept as one array of bytes: a Python list of 1.28 million strings is copied page by page into every worker.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from twist.catalog.data_sets import DATA_SETS, DataSet, Split, read_names
from twist.catalog.report import Report, named
from twist.contracts.errors import UserError
from twist.contracts.images import EXTENSIONS, image_names, is_folder, is_image, read_image
from twist.contracts.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

# Names of SimCLR's lists (google-research/simclr, imagenet_subsets/) and the share of each class a drawn subset has.
SUBSETS = {"1percent": ("1percent.txt", 0.01), "10percent": ("10percent.txt", 0.10)}
# What `twist.contracts.images` decodes, by Pillow's names; MPO is a JPEG with more behind it, as cameras write it.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB")
ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".7z", ".rar")


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
        for index in range(len(self)):
            status = self.path(index).stat()
            state.update(f"{status.st_size} {status.st_mtime_ns};".encode())
        return state.hexdigest()


def open_tree(root: str | os.PathLike[str]) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images below `root`, which holds train/ and val/ or a folder imagenet/ that does.

    Raises:
        UserError: a folder is missing, a class is empty, or the two splits do not have the same classes.
    """
    folder = DATA_SETS["imagenet"].place(Path(root))
    if not all((folder / split).is_dir() for split in ("train", "val")):
        raise UserError(
            f"There is no ImageNet-like tree at {root}: it needs train/<class>/ and val/<class>/, directly or in "
            f"imagenet/; `twist data check folders {root}` says what is missing."
        )
    train, val = read_split(folder / "train"), read_split(folder / "val")
    refuse_other_classes(folder, train.classes, val.classes)
    return train, val


def read_split(folder: Path, bar: Progress | None = None) -> LabelledImages:
    """Every image of `folder`/<class>/ at any depth, sorted; `bar` advances by one for each class.

    Raises:
        UserError: there is no `folder`, no class in it, or a class without images.
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
    return _labelled(folder, found)


def class_names(root: Path) -> tuple[str, ...]:
    """The folders in `root`, sorted: the classes of one split."""
    with os.scandir(root) as entries:
        return tuple(sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith(".")))


def refuse_other_classes(folder: Path, train: Collection[str], val: Collection[str]) -> None:
    """`UserError` when the two splits below `folder` do not have the same classes: labels would mean others."""
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if only_train or only_val:
        first = f"{only_train[0]} is only in train/" if only_train else f"{only_val[0]} is only in val/"
        raise UserError(
            f"{folder}: train/ and val/ do not have the same classes ({len(only_train)} only in train/, "
            f"{len(only_val)} only in val/; {first}): complete the other one, labels follow the sorted folder names."
        )


def find_subset(tree: Path, name: str) -> Path | None:
    """The list `name` of labelled images of the class folders in `tree`; None when there is none."""
    places = (tree, tree / "imagenet_subsets", tree.parent)
    return next((place / name for place in places if (place / name).is_file()), None)


def read_subset(train: LabelledImages, list_file: Path) -> LabelledImages:
    """The images that a list names, in its order: a file name a line, with or without its class folder before it.

    Raises:
        UserError: the list is empty, names absent images, one that several classes have, or an image twice.
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
    several = [line for line, name in zip(lines, names) if name in ambiguous]
    if several:
        raise UserError(f"{list_file}: several classes hold a file {several[0]}; write the lines as <class>/<file>.")
    absent = [line for line, name in zip(lines, names) if name not in by_name]
    if absent:
        raise UserError(
            f"{list_file} names {len(absent)} files that are not in {train.folder} (first: {absent[0]}): the training "
            "images are incomplete, or the list belongs to another data set."
        )
    chosen = [by_name[name] for name in names]
    doubled = len(chosen) - len(set(chosen))
    if doubled:
        raise UserError(f"{list_file} names {doubled} files twice: each line must be another image.")
    return train.only(np.array(chosen))


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
    return train.only(np.concatenate(chosen))


def _labelled(folder: Path, classes: Mapping[str, list[str]]) -> LabelledImages:
    paths = [os.fsencode(image) for images in classes.values() for image in images]
    counts = [len(images) for images in classes.values()]
    return LabelledImages(folder, tuple(classes), np.array(paths), np.repeat(np.arange(len(classes)), counts))


# ---------------------------------------------------------------------------------------------------------------------
# `twist data check`


def check_class_folders(row: DataSet, root: Path, sample: dict[str, Any] | None, report: Report) -> None:
    """What a run refuses is an error; what it leaves out is one in ImageNet, a warning among a user's own images."""
    place = row.place(root)
    if row.decode_all:
        _report_left_out(place, [name for name in os.listdir(place) if (place / name).is_file()], row, report)
    found = {
        name: _check_split(row, name, place / split.images.folder, split, sample, report)
        for name, split in row.splits.items()
        if report.has_folder(place / split.images.folder)
    }
    if len(found) == 2:
        try:
            refuse_other_classes(place, *found.values())
        except UserError as error:
            report.error(place, str(error))
    train = _labelled(place / "train", found.get("train", {}))
    for name, count in row.subsets.items() if len(train) else ():
        path = find_subset(place, name)
        if path is None:
            remedy = "`twist data prepare imagenet ROOT lists=FOLDER` takes it from SimCLR's published lists"
            report.warning(place / name, "is missing: semi-supervised runs need it", remedy)
            continue
        try:
            report.expect(path, "lines", len(read_subset(train, path)), None if sample else count)
        except UserError as error:  # what a run would say
            report.error(path, str(error), "write one <file> or <class>/<file> a line, and complete train")


def _check_split(
    row: DataSet, name: str, folder: Path, split: Split, sample: dict[str, Any] | None, report: Report
) -> dict[str, list[str]]:
    """Look at one split; gives <class>/…/<file> of the images of each class."""

    def unread_format(_path: Path, image: Image.Image) -> str | None:
        said = f"hold {image.format}, which a run does not read, whatever their names say"
        return None if image.format in FORMATS else said

    sizes = report.files(folder)
    classes = class_names(folder)
    if not classes:
        report.error(folder, "holds no class folders")
    found: dict[str, list[str]] = {label: [] for label in classes}
    for path in sorted(path for path in sizes if "/" in path and is_image(path.rpartition("/")[2])):
        found[path.partition("/")[0]].append(path)
    images = [image for label in found.values() for image in label]
    _report_left_out(folder, set(sizes) - set(images), row, report)
    report.expect(folder, f"{name} classes", len(classes), row.label_count(sample))
    report.expect(folder, f"{name} images", len(images), split.images_expected(sample))
    empty = [label for label, inside in found.items() if not inside]
    if empty:
        said = f"{len(empty)} class folders hold no images: {named(empty)}"
        report.error(folder, said, "remove them in both splits, or fill them")
    paths = [folder / image for image in images if sizes[image]]
    report.pictures(folder, paths, unread_format, decode_all=row.decode_all)
    return found


def _report_left_out(folder: Path, files: Iterable[str], row: DataSet, report: Report) -> None:
    """Files that a run passes over: archives, images outside of classes, and what is neither but lies in a class."""
    complain = report.warning if row.decode_all else report.error
    names = sorted(name for name in files if not name.startswith("."))
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    loose = [name for name in names if is_image(name)]
    others = [name for name in names if "/" in name and name not in archives]
    reads = f"it reads {', '.join(sorted(EXTENSIONS))} and leaves the rest out: convert or remove them"
    for left_out, complaint, message, remedy in (
        (archives, complain, "archives are not unpacked", "unpack them into class folders, and remove them"),
        (loose, complain, "images lie in no class folder", "a run leaves them out: move each into its class folder"),
        (others, report.warning, "files are none that a run reads", reads),
    ):
        if left_out:
            complaint(folder, f"{len(left_out)} {message}: {named(left_out)}", remedy)
