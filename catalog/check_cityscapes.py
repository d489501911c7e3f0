"""Cityscapes: pictures, maps and polygons of each city, and train ids that are those of the labels."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twist.catalog.findings import Report
from twist.catalog.polygons import polygons_fault
from twist.catalog.sample.looks import (
    SAMPLED,
    VOID,
    check_maps,
    check_pictures,
    each,
    expect,
    is_there,
    origin,
    report_hollow,
    size_of,
    spread,
)

# cityscapes-dataset.com, fine annotations.
CITYSCAPES_IMAGES = {"train": 2_975, "val": 500}
# Bytes of the shortest polygons.json with an object in it, and some fewer.
SHORTEST = 64


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
        report.count(pictures, len(stems))
        report.count(truth, len(annotated))
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


def _check_train_ids(
    truth: Path, stems: list[str], annotated: Container[str], to_train_id: NDArray[np.uint8], report: Report
) -> None:
    """trainIds must be what the official table makes of the labelIds beside them, pixel by pixel."""
    kinds = ("labelIds", "labelTrainIds")
    both = [stem for stem in stems if all(f"{stem}_gtFine_{kind}.png" in annotated for kind in kinds)]
    differing = []
    chosen = spread(both, SAMPLED // 4)
    for stem in chosen:
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
