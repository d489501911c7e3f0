"""Which data lie under a root, as one short name: so that no number is shown or continued for other data.

Of a sample its settings, as records keep them; of the public sets a digest of their lists, of names, and of the sizes
of annotation files and of some images. Neither places nor times, so data that were moved or copied are the same. Quick
on purpose: no image is read, a few hundred files are looked at; a change of a few images keeps the name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twist.catalog.roots import read_sample, tree_folder, voc_folder
from twist.catalog.sample.looks import spread
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file, sha256_json
from twist.contracts.images import folder_names
from twist.contracts.record import RunRecord
from twist.transfer.protocols import DataSet, Protocol

# Files of a folder whose sizes are looked at, and classes of an ImageNet-like tree that are listed.
SIZED, LISTED = 16, 16
# Of each set of VOC, its lists (under ImageSets) and the folder and ending of its annotations. Only what is unpacked
# from the archives: derived label maps may differ in size and hold the same.
_VOC: dict[DataSet, tuple[int, tuple[str, ...], str, str]] = {
    "voc2007": (2007, ("Main/trainval.txt", "Main/test.txt"), "Annotations", ".xml"),
    "voc2012": (2012, ("Main/trainval.txt",), "Annotations", ".xml"),
    "voc2012-aug": (2012, ("Segmentation/trainaug.txt", "Segmentation/val.txt"), "", ""),
}
# Which images have labels is a part of these protocols' data.
_LABELLED = {"semi-1pct": "1percent.txt", "semi-10pct": "10percent.txt"}


def identify_data(protocol: Protocol, root: Path) -> str | None:
    """What `protocol` would read under `root`; None where a part is missing or unreadable, which a run refuses.

    Raises:
        UserError: a damaged sample.json.
    """
    sample = read_sample(root)
    if sample is not None:
        return _name_sample(sample)
    try:
        facts = [list(_facts(name, root, protocol)) for name in protocol.data]
    except (OSError, UserError):
        return None
    return f"{' + '.join(protocol.data)} {sha256_json(facts)[:12]}"


def data_of(record: RunRecord) -> str | None:
    """What `record` was measured on, None where it does not say: earlier versions kept this of samples alone."""
    sample = record.recipe.get("sample")
    return record.data or (_name_sample(sample) if sample else None)


def _name_sample(settings: Mapping[str, Any]) -> str:
    source, size, seed, version = (settings.get(key) for key in ("source", "size", "seed", "format_version"))
    return f"sample of {source}, {size}, seed {seed}, format {version}"


def _facts(name: DataSet, root: Path, protocol: Protocol) -> Iterator[Any]:
    if name == "coco":
        for split in ("train", "val"):
            yield (root / "coco" / "annotations" / f"instances_{split}2017.json").stat().st_size
        # The smaller split stands for both: the annotation files name all images.
        images = root / "coco" / "val2017"
        yield _names_and_sizes(images, _files_in(images))
    elif name in _VOC:
        year, lists, annotations, ending = _VOC[name]
        folder = voc_folder(root, year)
        for file in lists:
            ids = [line.split()[0] for line in (folder / "ImageSets" / file).read_text().splitlines() if line.strip()]
            yield _names_and_sizes(folder / "JPEGImages", [f"{i}.jpg" for i in ids])
            if annotations:
                yield _names_and_sizes(folder / annotations, [f"{i}{ending}" for i in ids])
    elif name == "cityscapes":
        for split in ("train", "val"):
            images = root / "cityscapes" / "leftImg8bit" / split
            found = sorted(images.glob("*/*_leftImg8bit.png"))
            yield _names_and_sizes(images, [str(path.relative_to(images)) for path in found])
    else:
        yield from _imagenet_facts(root, protocol)


def _imagenet_facts(root: Path, protocol: Protocol) -> Iterator[Any]:
    tree = tree_folder(root)
    for split in ("train", "val"):
        classes = list(folder_names(tree / split))
        yield classes
        for label in spread(classes, LISTED):
            yield _names_and_sizes(tree / split / label, _files_in(tree / split / label))
    if (name := _LABELLED.get(protocol.name)) is not None:
        # Where the engine looks for it, in this order (`labelled_subset`).
        lists = (folder / name for folder in (tree, tree / "imagenet_subsets", tree.parent))
        yield next((sha256_file(file) for file in lists if file.is_file()), None)


def _files_in(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _names_and_sizes(folder: Path, names: Sequence[str]) -> list[Any]:
    if not names:
        raise FileNotFoundError(folder)
    return [sha256_json(list(names)), [(folder / name).stat().st_size for name in spread(names, SIZED)]]
