"""`twist data check`: everything that is missing or wrong in a data set, at once, with the remedy. It changes nothing.

Lists, counts and file names are looked at completely; pictures and masks by a sample spread evenly over each split,
which is enough for mistakes of conversion, since those hit every file. Expected counts are those of the published data
sets; a built-in sample is checked against its own sample.json. `look_at` is the same reader for the quick check before
a run.
"""

import itertools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

from twist.catalog.annotations import (
    CocoFile,
    Paths,
    PictureSizes,
    check_masks,
    check_polygons,
    check_same_categories,
    check_voc_boxes,
    read_coco,
    voc_palette,
)
from twist.catalog.class_folders import check_class_folders
from twist.catalog.data_sets import DATA_SETS, ORIGINS, SAMPLE_JSON, VOID, DataSet, Files, Split, Truth, read_sample
from twist.catalog.report import SEVERITIES, Finding, Report, upright
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.progress import Progress


def check(group: str, root: str | os.PathLike[str], *, progress: bool = True) -> list[Finding]:
    """Look at the data sets of a group below `root` and report everything: errors, warnings, and what is fine.

    Args:
        group: "coco", "voc" (2007, 2012 and trainaug), "cityscapes", "imagenet", "folders" (a user's own class
            folders), or "sample" for everything in a built-in sample.
        root: the folder that holds `coco/`, `VOC2007/`, …, or for ImageNet also its own folder.

    Raises:
        UsageError: no such data set. UserError: there is no folder `root`, or a damaged sample.json.
    """
    of_sample = [row for row in DATA_SETS.values() if any(split.sample for split in row.splits.values())]
    rows = of_sample if group == "sample" else [row for row in DATA_SETS.values() if row.group == group]
    root = Path(root)
    if not rows:
        raise UsageError(
            f'There is no data set "{group}" to check.{did_you_mean(group, {row.group for row in DATA_SETS.values()})}'
        )
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: check the path. {ORIGINS.get(group, '')}".rstrip())
    # A sample is checked against itself, also when its imagenet/ is named and not its root.
    home = next((place for place in (root, root.parent) if (place / SAMPLE_JSON).exists()), root)
    sample = read_sample(home)
    if group == "sample" and sample is None:
        raise UserError(f"There is no sample at {root}: make one with `twist data sample {root}`.")
    with Progress(f"check {group}", total=None, unit="file", quiet=not progress) as bar:
        report = Report(bar)
        counts = (sample or {}).get("counts")
        keys = [key for row in of_sample for split in row.splits.values() for key in split.sample]
        lacking = [key for key in keys if not isinstance(counts, dict) or type(counts.get(key)) is not int]
        if sample is not None and lacking:
            message = f"says no number of images (counts) for {lacking[0]}"
            report.error(home / SAMPLE_JSON, message, ORIGINS["sample"])
        else:
            for row in rows:
                look_at(row, root, sample, report)
    return sorted(report.findings, key=lambda finding: SEVERITIES.index(finding.severity))


def look_at(
    row: DataSet, root: Path, sample: dict[str, Any] | None, report: Report, truth: Collection[Truth] | None = None
) -> None:
    """Add to `report` what is missing or wrong in one data set below `root`.

    Args:
        sample: the sample.json of `root` where it is a built-in sample: classes and counts are then its own.
        truth: the kinds of annotation that matter; None for all.
    """
    place, report.origin = row.place(root), row.origin()
    if not report.has_folder(place):
        return
    if row.class_folders:
        check_class_folders(row, root, sample, report)
        return
    splits = row.run_splits() if report.quick else row.splits
    looks = [SplitLook(row, name, split, place, sample, report) for name, split in splits.items()]
    for look in looks:
        look.look(truth)
    for one, other in itertools.product(looks, looks):
        if (one.split.role, other.split.role) == ("train", "val"):
            _check_apart(one, other)


class SplitLook:
    """One split as it is looked at: `names` of its images, `coco` what is in its annotation file if it has one."""

    def __init__(
        self, row: DataSet, name: str, split: Split, place: Path, sample: dict[str, Any] | None, report: Report
    ) -> None:
        self.row, self.name, self.split, self.place, self.sample, self.report = row, name, split, place, sample, report
        self.names: list[str] = []
        self.coco: CocoFile | None = None

    def look(self, truth: Collection[Truth] | None) -> None:
        """Names first, then the files of each kind, then what is in them."""
        split, report = self.split, self.report
        report.origin = self.row.origin(split)
        self.names = self._read_names()
        images = self._present("images", split.images)
        found = {
            kind: self._present(kind, files) for kind, files in split.truth.items() if truth is None or kind in truth
        }
        folders = {kind: self.place / split.truth[kind].folder for kind in found}
        if "masks" in found:
            self._look_at_masks(folders["masks"], found["masks"], images)
        if report.quick:
            return
        sizes: PictureSizes = {}
        if self.coco:
            sizes = {image["file_name"]: (image["width"], image["height"]) for image in self.coco["images"]}
        if "boxes" in found:
            classes = self.row.label_names(self.sample)
            sizes = check_voc_boxes(folders["boxes"], found["boxes"], self.name, classes, report)
        expected = {path: sizes[name] for name, path in images.items() if name in sizes}

        def fault(path: Path, image: Image.Image) -> str | None:
            size = upright(image)
            if expected.get(path, size) == size:
                return None
            return "are, seen upright (EXIF), of another size than their annotation says, and the engine stops there"

        report.pictures(self.place / split.images.folder, [*images.values()], fault)
        if "polygons" in found:
            check_polygons(folders["polygons"], found["polygons"], images, report)
        if "instances" in found:
            report.pictures(folders["instances"], [*found["instances"].values()])

    def _read_names(self) -> list[str]:
        split, report, images = self.split, self.report, self.place / self.split.images.folder
        where = self.place / split.names if split.names else images
        if where.suffix == ".json":
            if report.quick:  # the engine reads the file anyway, which may take a minute
                if not where.is_file():
                    report.error(where, "is missing")
                return []
            self.coco = read_coco(where, report)
            if self.coco is None:
                return []
            found, expected = len(self.coco["categories"]), self.row.label_count(self.sample)
            if expected is not None and found != expected:
                remedy = f"classes of your own go with a data card: `twist data card {self.place}` writes one"
                report.error(where, f"{found} categories, {expected} expected", remedy)
            else:
                report.expect(where, "categories", found, expected)
            names = [image["file_name"] for image in self.coco["images"]]
        elif split.names:
            made = f"`{split.masks_made_by}` makes it. {report.origin}" if split.masks_made_by else ""
            names = report.names(where, made)
        else:
            suffix = split.images.suffix
            names = sorted(name.removesuffix(suffix) for name in report.files(images) if name.endswith(suffix))
        if names or where.exists():
            expected = split.images_expected(self.sample)
            if report.quick:  # any number of images but none
                expected = max(len(names), 1)
            report.expect(where, f"{self.name} images", len(names), expected)
        return names

    def _present(self, kind: str, files: Files) -> Paths:
        """Name → file of a kind; those that are missing are reported, those without content left out."""
        folder = self.place / files.folder
        made = self.split.masks_made_by if kind == "masks" else ""
        remedy = f"`{made}` makes them. {self.report.origin}" if made else ""
        sizes = self.report.files(folder, remedy)
        missing = [name for name in self.names if name + files.suffix not in sizes]
        if missing and folder.is_dir():
            count = f"lacks {len(missing)} of the {len(self.names)} *{files.suffix} of {self.name}"
            self.report.error(folder, f"{count}, {missing[0]} the first", remedy)
        return {name: folder / (name + files.suffix) for name in self.names if sizes.get(name + files.suffix)}

    def _look_at_masks(self, folder: Path, masks: Paths, images: Paths) -> None:
        files, made, row = self.split.truth["masks"], self.split.masks_made_by, self.row
        remedy = f"unpack {files.folder} again, and do not open and save masks with a picture program"
        if made:
            remedy = f"remove {files.folder}/…{files.suffix}, and `{made}` makes them again"
        classes = row.label_count(self.sample)
        assert classes is not None, f"{row.name} has masks and no number of classes"
        check_masks(
            f"{folder} ({self.name})",
            masks,
            images,
            self.report,
            remedy,
            classes=classes + row.reduce_zero_label,
            empty={0, VOID} if row.background or row.reduce_zero_label else {VOID},
            palette=voc_palette() if row.voc_palette and not self.report.quick else None,
        )


def _check_apart(train: SplitLook, val: SplitLook) -> None:
    """No image may be both trained on and measured with, and categories must be the same."""
    if train.coco and val.coco:
        check_same_categories(val.place / val.split.names, train.coco, val.coco, val.report)
    shared = sorted(set(train.names) & set(val.names)) if train.split.images == val.split.images else []
    if shared:
        made = train.split.masks_made_by
        train.report.error(
            train.place / train.split.names,
            f"{len(shared)} images of {val.name} are in it, {shared[0]} the first: numbers with it are too high",
            f"remove the list, and `{made}` makes it again" if made else "",
        )
