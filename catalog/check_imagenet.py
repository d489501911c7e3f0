"""ImageNet: class folders of both splits, and the lists of the subsets with labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from twist.catalog.class_folders import check_same_classes, find_listed, images_by_class
from twist.catalog.findings import Report
from twist.catalog.sample.looks import SAMPLED, check_pictures, expect, is_there, origin, read_list, spread
from twist.contracts.images import folder_names, is_image

# ILSVRC 2012; lines of SimCLR's lists.
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = 1_000
SUBSET_LINES = {"1percent.txt": 12_811, "10percent.txt": 128_116}


def check_imagenet(root: Path, info: dict[str, Any] | None, report: Report) -> None:
    folder = root / "imagenet" if (root / "imagenet").is_dir() else root
    classes: dict[str, dict[str, list[str]]] = {}
    for split, published in IMAGENET_IMAGES.items():
        expected = published if info is None else info["counts"][f"imagenet/{split}"]
        place = folder / split
        if not is_there(place, "imagenet", report):
            continue
        images, archives, loose = _class_folders(place, report)
        classes[split] = images
        if archives:
            report.error(
                place,
                f"{len(archives)} class archives are not unpacked, {archives[0]} the first",
                count=len(archives),
                remedy="unpack each n….tar of ILSVRC2012_img_train.tar into a folder of its name, and remove it",
            )
        if loose:
            report.error(
                place,
                f"{loose} images lie in no class folder",
                count=loose,
                remedy="sort them into class folders by the ground truth of the development kit (its valprep list)",
            )
        expect(place, f"{split} classes", len(images), IMAGENET_CLASSES if info is None else 10, "imagenet", report)
        every = [image for name in sorted(images) for image in images[name]]
        expect(place, f"{split} images", len(every), expected, "imagenet", report)
        empty = sorted(name for name in images if not images[name])
        if empty:
            report.error(
                place,
                f"{len(empty)} class folders are empty, {empty[0]} the first",
                count=len(empty),
                remedy=f"unpack them again. {origin('imagenet')}",
            )
        pictures = [place / image for image in spread(every, SAMPLED)]
        check_pictures(place, pictures, None, "imagenet", report)
    if len(classes) == 2:
        check_same_classes(folder, classes["train"], classes["val"], report)
    train = [image for found in classes.get("train", {}).values() for image in found]
    for name, lines in SUBSET_LINES.items():
        _check_subset(folder, name, lines if info is None else None, train, report)


def _class_folders(place: Path, report: Report) -> tuple[dict[str, list[str]], list[str], int]:
    """Images of each class, archives that were not unpacked, and how many images lie in no class."""
    with os.scandir(place) as entries:
        files = sorted(entry.name for entry in entries if not entry.is_dir())
    archives = [name for name in files if name.endswith(".tar")]
    return images_by_class(place, folder_names(place), report), archives, sum(map(is_image, files))


def _check_subset(folder: Path, name: str, lines: int | None, train: list[str], report: Report) -> None:
    # The places where a run looks, in its order.
    places = (folder, folder / "imagenet_subsets", folder.parent)
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        report.warning(
            folder / name,
            "is missing: semi-supervised runs need it",
            remedy=f"`twist data prepare imagenet ROOT lists=FOLDER` takes it. {origin('imagenet-subsets')}",
        )
        return
    names = read_list(path, lines, "imagenet-subsets", report, whole_lines=True)
    if not train:
        return
    listed = find_listed(train, names)
    if listed.absent:
        report.error(
            path,
            f"{len(listed.absent)} of its images are not in train, {listed.absent[0]} the first",
            count=len(listed.absent),
            remedy=f"write each line as <file> or <class>/<file>, and complete train. {origin('imagenet')}",
        )
    if listed.ambiguous:
        report.error(
            path,
            f"{len(listed.ambiguous)} of its lines name files of several classes, {listed.ambiguous[0]} the first",
            count=len(listed.ambiguous),
            remedy="write them as <class>/<file>",
        )
    # Equal lines are reported with the list itself.
    if listed.doubled > len(names) - len(set(names)):
        report.error(
            path,
            f"{listed.doubled} of its lines name an image again, once with and once without its class folder",
            count=listed.doubled,
            remedy=f"keep one line of each image. {origin('imagenet-subsets')}",
        )
