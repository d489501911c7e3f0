"""Class folders of one's own: what an ImageNet-style run needs, `train/<class>/` and `val/<class>/`, and nothing more.

What a run refuses is an error; what it leaves out without a word (images outside classes, archives, other files) is a
warning. Every image is decoded, as a run does: one that cannot be ends it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from twist.catalog.class_folders import check_same_classes, images_by_class
from twist.catalog.findings import Report, named
from twist.catalog.sample.looks import check_pictures, origin
from twist.contracts.images import EXTENSIONS, folder_names, is_image

SPLITS = ("train", "val")
# What `twist.contracts.images` decodes, by Pillow's names; MPO is a JPEG with more behind it, as cameras write it.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF")
ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".7z", ".rar")


def check_folders(root: Path, _info: dict[str, Any] | None, report: Report) -> None:
    """Look at the class folders below `root`, or below `root`/imagenet where both splits are there, as a run does."""
    inner = root / "imagenet"
    folder = inner if all((inner / split).is_dir() for split in SPLITS) else root
    if folder == root:
        _check_left_out(root, report)
    classes = {}
    for split in SPLITS:
        if (folder / split).is_dir():
            classes[split] = _check_split(folder / split, report)
        else:
            report.error(folder / split, "is missing", remedy=origin("folders"))
    if len(classes) == 2:
        check_same_classes(folder, classes["train"], classes["val"], report)


def _check_split(place: Path, report: Report) -> set[str]:
    """The classes of one split, its images looked at."""
    names = folder_names(place)
    if not names:
        report.error(place, "holds no class folders", remedy=origin("folders"))
    _check_left_out(place, report)
    for name in names:
        _check_left_out(place / name, report, images=False)
    classes = images_by_class(place, names, report, counted=False)
    images = [image for found in classes.values() for image in found]
    report.fine(place, f"{len(images)} images of {len(names)} classes", count=len(images))
    empty = [name for name, found in classes.items() if not found]
    if empty:
        report.error(
            place,
            f"{len(empty)} class folders hold no images: {named(empty)}",
            count=len(empty),
            remedy="remove them in both splits, or fill them",
        )
    check_pictures(place, [place / image for image in images], _unread_format, "folders", report, sampled=None)
    return set(names)


def _unread_format(_path: Path, image: Image.Image) -> str | None:
    said = f"hold {image.format}, which a run does not read, whatever their names say"
    return None if image.format in FORMATS else said


def _check_left_out(folder: Path, report: Report, *, images: bool = True) -> None:
    """Warn of files directly in `folder` that a run passes over: archives, and `images` or else what is none."""
    files = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir() and not entry.name.startswith("."))
    archives = [name for name in files if name.lower().endswith(ARCHIVES)]
    if archives:
        report.warning(
            folder,
            f"{len(archives)} archives are not unpacked: {named(archives)}",
            count=len(archives),
            remedy="a run does not look into them: unpack them into class folders, and remove them",
        )
    if images:
        loose = [name for name in files if is_image(name)]
        if loose:
            report.warning(
                folder,
                f"{len(loose)} images lie in no class folder: {named(loose)}",
                count=len(loose),
                remedy="a run leaves them out: move each into the folder of its class",
            )
    else:
        others = [name for name in files if not is_image(name) and name not in archives]
        if others:
            report.warning(
                folder,
                f"{len(others)} files are none that a run reads: {named(others)}",
                count=len(others),
                remedy=f"it reads {', '.join(sorted(EXTENSIONS))} and leaves the rest out: convert or remove them",
            )
