"""What must lie under ROOT before a run starts: folders, lists, image and annotation pairs, label values.

Quick on purpose (seconds): `twist data check` is the thorough one. Every complaint is one sentence with a remedy.
ROOT is the tree that `DETECTRON2_DATASETS` names (`coco/`, `VOC2007/`, `VOC2012/`, `cityscapes/`); VOC may lie in
`VOCdevkit/` as its archives unpack.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twist.catalog.roots import read_sample, voc_folder
from twist.contracts.errors import UserError
from twist.transfer.protocols import DataSet, Protocol

# Label maps whose values are looked at; spread evenly over the set, so a half-converted tree shows.
LABEL_SAMPLES = 20
IGNORE = 255
VOC_CLASSES = 21
CITYSCAPES_CLASSES = 19


def check_data(protocol: Protocol, root: Path) -> dict[str, Any] | None:
    """Check what `protocol` needs under `root`; the sample's description for sample protocols, None for full ones.

    Raises:
        UserError: something is missing or is not what it should be.
    """
    sample = read_sample(root)
    if protocol.engine == "imagenet":
        return sample  # any folder of classes will do; its engine looks at the tree itself
    if protocol.scale == "sample" and sample is None:
        raise UserError(
            f"{root} holds no sample.json, and {protocol.name} runs on the sample: `twist data sample {root}` makes it."
        )
    if protocol.scale == "full" and sample is not None:
        raise UserError(f"{root} is a sample, and {protocol.name} needs the real data: use a sample-… protocol for it.")
    missing = [path for name in protocol.data for path in _needed(name, root) if not path.exists()]
    if missing:
        names = ", ".join(str(path.relative_to(root)) for path in missing)
        raise UserError(
            f"{root} lacks {names}: `twist data check {_family(protocol.data[0])} {root}` "
            "says what each is and where it comes from."
        )
    for name in protocol.data:
        _check_pairs(name, root, protocol)
    return sample


def _family(name: DataSet) -> str:
    """The name `twist data` knows a set by: voc for its parts."""
    return "voc" if name.startswith("voc") else name


def _needed(name: DataSet, root: Path) -> list[Path]:
    if name == "coco":
        coco = root / "coco"
        return [
            *(coco / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")),
            *(coco / f"{split}2017" for split in ("train", "val")),
        ]
    if name in ("voc2007", "voc2012"):
        folder = voc_folder(root, int(name[3:]))
        lists = ("trainval", "test") if name == "voc2007" else ("trainval",)
        return [
            folder / "Annotations",
            folder / "JPEGImages",
            *(folder / "ImageSets" / "Main" / f"{split}.txt" for split in lists),
        ]
    if name == "voc2012-aug":
        folder = voc_folder(root, 2012)
        return [
            *(folder / part for part in ("JPEGImages", "SegmentationClass", "SegmentationClassAug")),
            *(folder / "ImageSets" / "Segmentation" / f"{split}.txt" for split in ("trainaug", "val")),
        ]
    if name == "cityscapes":
        folder = root / "cityscapes"
        return [folder / part / split for part in ("leftImg8bit", "gtFine") for split in ("train", "val")]
    raise AssertionError(name)


def _check_pairs(name: DataSet, root: Path, protocol: Protocol) -> None:
    """Every listed image with its annotation; COCO's list is its annotation file, which the engine reads anyway."""
    if name in ("voc2007", "voc2012"):
        folder = voc_folder(root, int(name[3:]))
        for split in ("trainval", "test") if name == "voc2007" else ("trainval",):
            ids = _read_list(folder / "ImageSets" / "Main" / f"{split}.txt")
            _all_there(folder / "JPEGImages", (f"{i}.jpg" for i in ids), of=f"VOC{name[3:]} {split}")
            _all_there(folder / "Annotations", (f"{i}.xml" for i in ids), of=f"VOC{name[3:]} {split}")
    elif name == "voc2012-aug":
        folder = voc_folder(root, 2012)
        for split, masks in (("trainaug", "SegmentationClassAug"), ("val", "SegmentationClass")):
            ids = _read_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt")
            _all_there(folder / "JPEGImages", (f"{i}.jpg" for i in ids), of=f"VOC2012 {split}")
            _all_there(folder / masks, (f"{i}.png" for i in ids), of=f"VOC2012 {split}")
            _check_labels([folder / masks / f"{i}.png" for i in ids], classes=VOC_CLASSES, data_set="voc")
    elif name == "cityscapes":
        semantic = protocol.engine == "mmseg"
        endings = ("labelTrainIds.png",) if semantic else ("polygons.json", "instanceIds.png")
        for split in ("train", "val"):
            images = sorted((root / "cityscapes" / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
            if not images:
                raise UserError(
                    f"{root / 'cityscapes' / 'leftImg8bit' / split} holds no *_leftImg8bit.png: unpack it again."
                )
            labels = [root / "cityscapes" / "gtFine" / split / image.parent.name for image in images]
            stems = [image.name.removesuffix("_leftImg8bit.png") for image in images]
            for ending in endings:
                files = [folder / f"{stem}_gtFine_{ending}" for folder, stem in zip(labels, stems, strict=True)]
                absent = [file for file in files if not file.exists()]
                if absent:
                    remedy = "`twist data prepare cityscapes` makes them" if semantic else "unpack gtFine again"
                    raise UserError(
                        f"{len(absent)} of the {len(files)} {split} images of Cityscapes have no *_gtFine_{ending} "
                        f"(first: {absent[0]}): {remedy}."
                    )
                if semantic:
                    _check_labels(files, classes=CITYSCAPES_CLASSES, data_set="cityscapes")


def _read_list(path: Path) -> list[str]:
    ids = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not ids:
        raise UserError(f"{path} is empty: it should name one image a line; unpack or prepare the data set again.")
    return ids


def _all_there(folder: Path, names: Iterable[str], *, of: str) -> None:
    wanted = list(names)
    present = {entry.name for entry in os.scandir(folder)}
    absent = [name for name in wanted if name not in present]
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of the {len(wanted)} files of {of} (first: {absent[0]}): the archive was "
            "unpacked in part; unpack it again."
        )


def _check_labels(files: list[Path], *, classes: int, data_set: str) -> None:
    """Two ways in which label maps go wrong silently: the palette turned to colours, ids that are no train ids."""
    for path in _spread(files, LABEL_SAMPLES):
        try:
            with Image.open(path) as image:
                mode, values = image.mode, np.unique(np.asarray(image))
        except OSError as error:
            raise UserError(f"Cannot read the label map {path} ({error}): copy or unpack it again.") from None
        if mode not in ("L", "P"):
            raise UserError(
                f"{path} is a {mode} picture, not a map of class numbers: something turned the palette into colours; "
                f"{_remedy(path, data_set)}."
            )
        wrong = values[(values >= classes) & (values != IGNORE)]
        if len(wrong):
            hint = (
                "these look like labelIds given as trainIds"
                if data_set == "cityscapes"
                else "255 marks what is ignored"
            )
            raise UserError(
                f"{path} holds the value {wrong[0]}, where 0–{classes - 1} and {IGNORE} are allowed ({hint}): "
                f"{_remedy(path, data_set)}."
            )


def _remedy(path: Path, data_set: str) -> str:
    """How to get sound maps again: derived ones are made anew once the old ones are gone, the others unpacked."""
    if path.parent.name == "SegmentationClass":
        return "unpack SegmentationClass again"
    gone = "the *_labelTrainIds.png" if data_set == "cityscapes" else path.parent.name
    return f"remove {gone}, and `twist data prepare {data_set}` makes the maps again"


def _spread(items: list[Path], count: int) -> Iterator[Path]:
    step = max(1, len(items) // count)
    return iter(items[::step])
