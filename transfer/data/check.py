"""`twist data check`: everything that is missing or wrong in a data set, at once, with the remedy. It changes nothing.

Lists, counts and file names are looked at completely; pictures and label maps by a sample of `SAMPLED` spread evenly
over each set, which is enough for mistakes of conversion, since those hit every file. Expected counts are those of the
published data sets; a sample tree is checked against its own sample.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from contracts.errors import UsageError, UserError, did_you_mean
from contracts.image_files import image_entries, is_image
from contracts.progress import Progress
from transfer.data.class_folders import find_listed
from transfer.data.coco_file import CocoFile, check_same_categories, read_coco
from transfer.data.findings import SEVERITIES, Finding, Report, has_errors, render
from transfer.data.layouts import sets
from transfer.data.looks import (
    SAMPLED,
    check_maps,
    check_pictures,
    each,
    expect,
    expect_files,
    file_names,
    is_there,
    origin,
    read_list,
    report_hollow,
    size_of,
    spread,
)
from transfer.data.masks import voc_palette
from transfer.data.polygons import polygons_fault
from transfer.data.sample import SAMPLE_JSON, SIZES, read_sample_json
from transfer.data.voc_boxes import check_voc_boxes

__all__ = ["Finding", "check", "has_errors", "render"]

VOID = 255
# Bytes of the shortest polygons.json with an object in it, and some fewer.
SHORTEST = 64
# (width, height) of pictures by file name, None where nothing says it.
Sizes = dict[str, tuple[int, int] | None]

# VOC's classes in palette order (VOC development kit), background first.
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

# Published counts. COCO: cocodataset.org, 2017 splits. VOC: the pages "Database Statistics" of 2007 and 2012; trainaug:
# VOC 2012 segmentation train united with SBD without VOC val. Cityscapes: cityscapes-dataset.com, fine annotations.
# ImageNet: ILSVRC 2012. 1 % and 10 %: lines of SimCLR's lists.
COCO_IMAGES = {"train2017": 118_287, "val2017": 5_000}
VOC_MAIN = {
    "VOC2007": {"train": 2_501, "val": 2_510, "trainval": 5_011, "test": 4_952},
    "VOC2012": {"train": 5_717, "val": 5_823, "trainval": 11_540},
}
VOC_SEGMENTATION = {"train": 1_464, "val": 1_449, "trainaug": 10_582}
CITYSCAPES_IMAGES = {"train": 2_975, "val": 500}
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = 1_000
SUBSET_LINES = {"1percent.txt": 12_811, "10percent.txt": 128_116}


def check(dataset: str, root: str | os.PathLike[str], *, progress: bool = True) -> list[Finding]:
    """Look at a data set below `root` and report everything: errors, warnings, and what is fine.

    Args:
        dataset: "coco", "voc" (2007, 2012 and trainaug), "cityscapes", "imagenet", or "sample" for all of a sample.
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
        folder = voc_folder(root, year)
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
    _check_voc_segmentation(voc_folder(root, "VOC2012"), info, len(classes), report)


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


def check_cityscapes(root: Path, info: dict[str, Any] | None, report: Report) -> None:
    folder = root / "cityscapes"
    if not is_there(folder, "cityscapes", report):
        return
    from cityscapesscripts.helpers.labels import labels

    to_train_id = np.full(256, VOID, dtype=np.uint8)
    for label in labels:
        if label.id >= 0:
            to_train_id[label.id] = label.trainId if label.trainId >= 0 else VOID
    ids = {label.id for label in labels if label.id >= 0}
    train_ids = {*range(19), VOID}
    for split, published in CITYSCAPES_IMAGES.items():
        expected = published if info is None else info["counts"][f"cityscapes/{split}"]
        pictures, truth = folder / "leftImg8bit" / split, folder / "gtFine" / split
        if not is_there(pictures, "cityscapes", report) or not is_there(truth, "cityscapes", report):
            continue
        suffix = "_leftImg8bit.png"
        photographed = {path.relative_to(pictures).as_posix(): size_of(path) for path in pictures.glob(f"*/*{suffix}")}
        stems = sorted(name.removesuffix(suffix) for name in photographed)
        expect(pictures, f"{split} images", len(stems), expected, "cityscapes", report)
        annotated = {path.relative_to(truth).as_posix(): size_of(path) for path in truth.glob("*/*_gtFine_*")}
        report.bar.advance(len(stems) + len(annotated))
        report_hollow(pictures, photographed, report)
        report_hollow(truth, annotated, report)
        for kind, remedy in (
            ("polygons.json", origin("cityscapes")),
            ("labelIds.png", origin("cityscapes")),
            ("instanceIds.png", origin("cityscapes")),
            ("labelTrainIds.png", f"`twist data prepare cityscapes {root}` makes them"),
        ):
            missing = [stem for stem in stems if f"{stem}_gtFine_{kind}" not in annotated]
            if missing:
                report.error(
                    truth,
                    f"{len(missing)} of {len(stems)} *_gtFine_{kind} are missing, {missing[0]} the first",
                    count=len(missing),
                    remedy=remedy,
                )
        check_pictures(pictures, [pictures / f"{stem}{suffix}" for stem in stems], None, "cityscapes", report)

        def picture_of(path: Path, pictures: Path = pictures) -> Path:
            return pictures / path.parent.name / (path.name.partition("_gtFine_")[0] + "_leftImg8bit.png")

        for kind, allowed, remedy in (
            ("labelIds", ids, origin("cityscapes")),
            (
                "labelTrainIds",
                train_ids,
                "these look like labelIds given as trainIds: remove the *_labelTrainIds.png and make them again with "
                "`twist data prepare cityscapes`",
            ),
        ):
            paths = [truth / f"{stem}_gtFine_{kind}.png" for stem in stems if f"{stem}_gtFine_{kind}.png" in annotated]

            where = f"{truth} ({kind})"
            empty = {number for number in allowed if number == VOID or (kind == "labelIds" and number < 4)}
            check_maps(
                paths,
                allowed=allowed,
                picture_of=picture_of,
                remedy=remedy,
                where=where,
                report=report,
                empty=empty,
            )
        _check_train_ids(truth, stems, annotated, to_train_id, report)

        def has_picture_size(
            path: Path, image: Image.Image, picture_of: Callable[[Path], Path] = picture_of
        ) -> str | None:
            same = _picture_size(picture_of(path)) in (None, image.size)
            return None if same else "are of another size than their picture"

        instances = [truth / f"{stem}_gtFine_instanceIds.png" for stem in stems]
        instances = [path for path in instances if path.relative_to(truth).as_posix() in annotated]
        check_pictures(truth, instances, has_picture_size, "cityscapes", report, SAMPLED // 4)
        outlines = [path.with_name(path.name.replace("instanceIds.png", "polygons.json")) for path in instances]
        _check_polygons(truth, [path for path in outlines if size_of(path)], picture_of, report)


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
    if len(classes) == 2 and classes["train"].keys() != classes["val"].keys():
        differing = sorted(classes["train"].keys() ^ classes["val"].keys())
        report.error(
            folder,
            f"{len(differing)} classes are in one of train and val only, {differing[0]} the first",
            count=len(differing),
            remedy="labels are numbered by sorted folder names, so both must have the same: complete the other one",
        )
    train = [image for found in classes.get("train", {}).values() for image in found]
    for name, lines in SUBSET_LINES.items():
        _check_subset(folder, name, lines if info is None else None, train, report)


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
    "sample": check_sample,
}


def voc_folder(root: Path, year: str) -> Path:
    """ROOT/VOC2012, or ROOT/VOCdevkit/VOC2012 where the archive was unpacked there."""
    nested = root / "VOCdevkit" / year
    return nested if nested.is_dir() and not (root / year).is_dir() else root / year


def _check_train_ids(
    truth: Path, stems: list[str], annotated: Container[str], to_train_id: NDArray[np.uint8], report: Report
) -> None:
    """trainIds must be what the official table makes of the labelIds beside them, pixel by pixel."""
    kinds = ("labelIds", "labelTrainIds")
    both = [stem for stem in stems if all(f"{stem}_gtFine_{kind}.png" in annotated for kind in kinds)]
    differing = []
    chosen = spread(both, SAMPLED // 4)
    for stem in chosen:
        report.bar.advance()
        try:
            maps = []
            for kind in kinds:
                with Image.open(truth / f"{stem}_gtFine_{kind}.png") as image:
                    maps.append(np.asarray(image))
        except (OSError, SyntaxError):
            continue  # reported with the maps themselves
        if any(values.ndim != 2 for values in maps) or maps[0].shape != maps[1].shape:
            continue  # reported with the maps themselves
        if (to_train_id[maps[0]] != maps[1]).any():
            differing.append(stem)
    if differing:
        report.error(
            truth,
            f"{len(differing)} of {len(chosen)} sampled labelTrainIds are not the train ids of the labelIds beside "
            f"them, {differing[0]} the first",
            count=len(differing),
            remedy="remove the *_labelTrainIds.png and make them again with `twist data prepare cityscapes`",
        )


def _picture_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError):
        return None  # reported with the pictures themselves


def _check_polygons(truth: Path, paths: list[Path], picture_of: Callable[[Path], Path], report: Report) -> None:
    def look(path: Path) -> str | None:
        return polygons_fault(path, _picture_size(picture_of(path)))

    # Few, as they are slow to read; and all that are too short to hold an object.
    chosen = sorted({*spread(paths, SAMPLED // 4), *(path for path in paths if (size_of(path) or 0) < SHORTEST)})
    faults = [(path, fault) for path, fault in each(look, chosen, report) if fault]
    if faults:
        path, fault = faults[0]
        report.error(
            truth,
            f"{len(faults)} of {len(chosen)} sampled polygons.json are no annotation, {path.name} the first: {fault}",
            count=len(faults),
            remedy=f"unpack gtFine again. {origin('cityscapes')}",
        )


def _class_folders(place: Path, report: Report) -> tuple[dict[str, list[str]], list[str], int]:
    """Images of each class, archives that were not unpacked, and how many images lie in no class."""
    folders: list[Path] = []
    archives: list[str] = []
    loose = 0
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    folders.append(place / entry.name)
            elif entry.name.endswith(".tar"):
                archives.append(entry.name)
            else:
                loose += is_image(entry.name)
    classes: dict[str, list[str]] = {}
    hollow: dict[str, int | None] = {}

    def images_of(folder: Path) -> list[str]:
        found = [(f"{folder.name}/{name}", entry) for name, entry in image_entries(folder)]
        hollow.update({name: size for name, entry in found if not (size := size_of(entry))})
        return sorted(name for name, _ in found)

    for folder, images in each(images_of, sorted(folders), report):
        classes[folder.name] = images
        report.bar.advance(len(images))
    report_hollow(place, hollow, report)
    return classes, sorted(archives), loose


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
