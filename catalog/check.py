"""`twist data check`: everything that is missing or wrong in a data set, at once, with the remedy. It changes nothing.

Lists, counts and file names are looked at completely; pictures and label maps by a sample of `SAMPLED` spread evenly
over each set, which is enough for mistakes of conversion, since those hit every file. Expected counts are those of the
published data sets; a sample tree is checked against its own sample.json, and class folders of one's own, whose every
image is decoded, against none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from twist.catalog.check_cityscapes import check_cityscapes
from twist.catalog.check_folders import check_folders
from twist.catalog.check_imagenet import check_imagenet
from twist.catalog.coco_file import CocoFile, check_same_categories, read_coco
from twist.catalog.findings import SEVERITIES, Finding, Report, has_errors, render
from twist.catalog.masks import voc_palette
from twist.catalog.roots import voc_folder
from twist.catalog.sample.layouts import sets
from twist.catalog.sample.looks import (
    VOID,
    check_maps,
    check_pictures,
    expect,
    expect_files,
    file_names,
    is_there,
    origin,
    read_list,
)
from twist.catalog.sample.make import SAMPLE_JSON, SIZES, read_sample_json
from twist.catalog.voc_boxes import check_voc_boxes
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.progress import Progress

__all__ = ["Finding", "check", "has_errors", "render"]

# (width, height) of pictures by file name, None where nothing says it.
Sizes = dict[str, tuple[int, int] | None]

# VOC's classes in palette order (VOC development kit), background first.
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

# Published counts. COCO: cocodataset.org, 2017 splits. VOC: the pages "Database Statistics" of 2007 and 2012; trainaug:
# VOC 2012 segmentation train united with SBD without VOC val.
COCO_IMAGES = {"train2017": 118_287, "val2017": 5_000}
VOC_MAIN = {
    "VOC2007": {"train": 2_501, "val": 2_510, "trainval": 5_011, "test": 4_952},
    "VOC2012": {"train": 5_717, "val": 5_823, "trainval": 11_540},
}
VOC_SEGMENTATION = {"train": 1_464, "val": 1_449, "trainaug": 10_582}


def check(dataset: str, root: str | os.PathLike[str], *, progress: bool = True) -> list[Finding]:
    """Look at a data set below `root` and report everything: errors, warnings, and what is fine.

    Args:
        dataset: "coco", "voc" (2007, 2012 and trainaug), "cityscapes", "imagenet", "folders" (class folders of one's
            own), or "sample" for all of a sample.
        root: the folder that holds `coco/`, `VOC2007/`, …, or for ImageNet also its own folder.

    Raises:
        UsageError: no such data set. UserError: there is no folder `root`.
    """
    if dataset not in CHECKS:
        raise UsageError(f'There is no data set "{dataset}" to check.{did_you_mean(dataset, CHECKS)}')
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: check the path. {origin(dataset)}".rstrip())
    with Progress(f"check {dataset}", total=None, unit="file", quiet=not progress) as bar:
        report = Report(bar)
        # A sample is checked against itself, also when its imagenet/ is named and not its root.
        home = next((place for place in (root, root.parent) if (place / SAMPLE_JSON).exists()), None)
        info = read_sample_json(home or root) if home or dataset == "sample" else None
        lacking = _lacking_counts(info)
        if lacking:
            # Without them nothing says how much the sample must hold.
            report.error((home or root) / SAMPLE_JSON, lacking, remedy=origin("sample"))
        else:
            CHECKS[dataset](root, info, report)
    return sorted(report.findings, key=lambda finding: SEVERITIES.index(finding.severity))


def check_coco(root: Path, info: dict[str, Any] | None, report: Report) -> None:
    folder = root / "coco"
    if not is_there(folder, "coco", report):
        return
    read: dict[str, CocoFile] = {}
    files = {split: folder / "annotations" / f"instances_{split}.json" for split in COCO_IMAGES}
    for split, published in COCO_IMAGES.items():
        expected = published if info is None else info["counts"][f"coco/{split}"]
        names = file_names(folder / split, (".jpg",), "coco", report)
        classes = 80 if info is None else len(info["classes"])
        content = read_coco(files[split], report, images=expected, categories=classes)
        if content is not None:
            read[split] = content
        if names is None or content is None:
            continue
        expect(folder / split, f"{split} images", len(names), expected, "coco", report)
        missing = sorted(set(content.sizes) - names)
        if missing:
            report.error(
                folder / split,
                f"{len(missing)} images that {files[split].name} lists are not there, {missing[0]} the first",
                count=len(missing),
                remedy=f"the archive was unpacked in part: unpack {split}.zip again",
            )

        def has_listed_size(path: Path, image: Image.Image, sizes: Sizes = content.sizes) -> str | None:
            return None if sizes[path.name] in (None, image.size) else "are of another size than the annotations say"

        paths = [folder / split / name for name in sorted(names & set(content.sizes))]
        check_pictures(folder / split, paths, has_listed_size, "coco", report)
    if len(read) == 2:
        (first, one), (second, other) = ((files[split], content) for split, content in read.items())
        check_same_categories(first, second, one, other, report)


def check_voc(root: Path, info: dict[str, Any] | None, report: Report) -> None:
    classes = VOC_CLASSES if info is None else ("background", *info["classes"])
    for year in ("VOC2007", "VOC2012"):
        folder = voc_folder(root, int(year.removeprefix("VOC")))
        if not is_there(folder, "voc", report):
            continue
        images = file_names(folder / "JPEGImages", (".jpg",), "voc", report)
        boxes = file_names(folder / "Annotations", (".xml",), "voc", report)
        if images is None or boxes is None:
            continue
        listed: dict[str, list[str]] = {}
        for part, published in VOC_MAIN[year].items():
            expected = published if info is None else _sample_voc_count(info, year, part)
            names = read_list(folder / "ImageSets" / "Main" / f"{part}.txt", expected, "voc", report)
            listed[part] = names
        every = sorted({name for names in listed.values() for name in names})
        expect_files(folder / "JPEGImages", images, every, ".jpg", "voc", report)
        expect_files(folder / "Annotations", boxes, every, ".xml", "voc", report)
        for first, second in (("trainval", "test"), ("train", "val")):
            _check_apart(folder / "ImageSets" / "Main", first, second, listed, report)
        annotated = [name for name in every if f"{name}.xml" in boxes]
        sizes = check_voc_boxes(folder / "Annotations", annotated, listed, set(classes[1:]), report)
        pictures = [folder / "JPEGImages" / f"{name}.jpg" for name in every if f"{name}.jpg" in images]

        def has_annotated_size(path: Path, image: Image.Image, sizes: Sizes = sizes) -> str | None:
            same = sizes.get(path.stem) in (None, image.size)
            return None if same else "are of another size than their file in Annotations says"

        check_pictures(folder / "JPEGImages", pictures, has_annotated_size, "voc", report)
    _check_voc_segmentation(voc_folder(root, 2012), info, len(classes), report)


def _check_voc_segmentation(folder: Path, info: dict[str, Any] | None, classes: int, report: Report) -> None:
    if not folder.is_dir():
        return
    lists: dict[str, list[str]] = {}
    for part, published in VOC_SEGMENTATION.items():
        path = folder / "ImageSets" / "Segmentation" / f"{part}.txt"
        if part == "trainaug" and not path.exists():
            report.error(
                path,
                "is missing: the 10,582 images that segmentation on VOC is trained with",
                remedy=f"`twist data prepare voc ROOT sbd=FOLDER` makes it from SBD. {origin('sbd')}",
            )
            continue
        expected: int | None = published
        if info is not None:
            kind = {"train": "VOC2012/train", "val": "VOC2012/val", "trainaug": "VOC2012/train"}[part]
            expected = info["counts"][kind] if part != "train" else None
        lists[part] = read_list(path, expected, "voc", report)
    _check_apart(path.parent, "train", "val", lists, report)
    _check_apart(path.parent, "trainaug", "val", lists, report)
    for part, maps in (
        ("train", "SegmentationClass"),
        ("val", "SegmentationClass"),
        ("trainaug", "SegmentationClassAug"),
    ):
        if not lists.get(part):
            continue
        names = file_names(folder / maps, (".png",), "sbd" if maps.endswith("Aug") else "voc", report)
        if names is None:
            continue
        expect_files(folder / maps, names, lists[part], ".png", "sbd" if maps.endswith("Aug") else "voc", report)
        paths = [folder / maps / f"{name}.png" for name in lists[part] if f"{name}.png" in names]
        histogram = check_maps(
            paths,
            allowed={*range(classes), VOID},
            picture_of=lambda path: folder / "JPEGImages" / f"{path.stem}.jpg",
            remedy="take the original palette PNGs again (do not open and save them with a picture program)",
            where=f"{folder / maps} ({part})",
            report=report,
            empty={0, VOID},
            palette=voc_palette(),
        )
        if paths and histogram is not None and maps == "SegmentationClass" and not histogram[VOID]:
            report.warning(
                f"{folder / maps} ({part})",
                "no pixel of the void border (255) in what was sampled: VOC's own maps have one around every object",
                remedy="take the original SegmentationClass again: border pixels may have become a class",
            )


def _check_apart(folder: Path, first: str, second: str, lists: dict[str, list[str]], report: Report) -> None:
    """No image may be both trained on and measured with."""
    shared = sorted(set(lists.get(first, ())) & set(lists.get(second, ())))
    if shared:
        report.error(
            folder / f"{first}.txt",
            f"{len(shared)} images of {second} are in it, {shared[0]} the first: every number measured with it is too "
            "high",
            count=len(shared),
            remedy="remove trainaug.txt and aug.txt, and make them again with `twist data prepare voc`"
            if first == "trainaug"
            else f"take both lists from the originals again. {origin('voc')}",
        )


def check_sample(root: Path, info: dict[str, Any] | None, report: Report) -> None:
    assert info is not None
    names = file_names(root / "unlabelled", (".jpg",), "sample", report)
    if names is not None:
        expect(root / "unlabelled", "unlabelled images", len(names), info["counts"]["unlabelled"], "sample", report)
        check_pictures(
            root / "unlabelled", [root / "unlabelled" / name for name in sorted(names)], None, "sample", report
        )
    for part in (check_coco, check_voc, check_cityscapes, check_imagenet):
        part(root, info, report)


CHECKS: dict[str, Callable[[Path, dict[str, Any] | None, Report], None]] = {
    "coco": check_coco,
    "voc": check_voc,
    "cityscapes": check_cityscapes,
    "imagenet": check_imagenet,
    "folders": check_folders,
    "sample": check_sample,
}


def _lacking_counts(info: dict[str, Any] | None) -> str | None:
    """What the content of a sample.json lacks to check the sample by it."""
    if info is None:
        return None
    counts = info.get("counts")
    lacking = [
        name for name in sets(SIZES["tiny"]) if not isinstance(counts, dict) or type(counts.get(name)) is not int
    ]
    return f"says no number of images (counts) for {lacking[0]}" if lacking else None


def _sample_voc_count(info: dict[str, Any], year: str, part: str) -> int:
    parts = ("train", "val") if part == "trainval" else (part,)
    return sum(info["counts"][f"{year}/{one}"] for one in parts)
