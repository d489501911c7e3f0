"""What must be right in a COCO `instances_*.json`: every entry is looked at, and nothing in it can stop the check."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.catalog.findings import Report
from twist.catalog.sample.looks import expect, origin

# By how many pixels a box may reach out of its image: outlines are rounded.
TOLERANCE = 1.0
IDS = (int, str)
NUMBERS = (int, float)


@dataclass(frozen=True)
class CocoFile:
    """What other looks need of a file: (width, height) of the images, None where it is not said, and the categories."""

    sizes: dict[str, tuple[int, int] | None]
    categories: dict[int | str, str]


def read_coco(file: Path, report: Report, *, images: int, categories: int) -> CocoFile | None:
    """Read a file and report what is wrong in it; None when it is none. `images`, `categories`: how many there are."""
    content = _read(file, report)
    if content is None:
        return None
    entries = [entry for entry in content["images"] if isinstance(entry, dict)]
    unfit = len(content["images"]) - sum(
        type(entry.get("id")) in IDS and isinstance(entry.get("file_name"), str) and _size(entry) is not None
        for entry in entries
    )
    if unfit:
        report.error(
            file,
            f"{unfit} of {len(content['images'])} images have no id, file_name, width or height",
            count=unfit,
            remedy=origin("coco"),
        )
    sizes = {entry["file_name"]: _size(entry) for entry in entries if isinstance(entry.get("file_name"), str)}
    expect(file, f"{file.stem.removeprefix('instances_')} images listed", len(sizes), images, "coco", report)
    named = {
        entry["id"]: entry["name"]
        for entry in content["categories"]
        if isinstance(entry, dict) and type(entry.get("id")) in IDS and isinstance(entry.get("name"), str)
    }
    expect(file, "categories", len(named), categories, "coco", report)
    by_number = {entry["id"]: _size(entry) for entry in entries if type(entry.get("id")) in IDS}
    _check_annotations(file, content["annotations"], by_number, set(named), report)
    return CocoFile(sizes, named)


def check_same_categories(first: Path, second: Path, one: CocoFile, other: CocoFile, report: Report) -> None:
    """The categories of training and validation must be the same, or classes are measured as others."""
    differing = [
        number
        for number in {**one.categories, **other.categories}
        if one.categories.get(number) != other.categories.get(number)
    ]
    if differing:
        number = differing[0]
        here, there = (f"{file.categories[number]!r}" if number in file.categories else "none" for file in (other, one))
        report.error(
            second,
            f"{len(differing)} categories are not those of {first.name}: {number} is {here} here and {there} there",
            count=len(differing),
            remedy=f"take both files from the same archive. {origin('coco')}",
        )


def _read(file: Path, report: Report) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        report.error(file, "is missing", remedy=origin("coco"))
        return None
    except (OSError, ValueError) as error:
        report.error(file, f"is no complete JSON ({error})", remedy="unpack annotations_trainval2017.zip again")
        return None
    parts = ("images", "annotations", "categories")
    absent = [part for part in parts if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if absent:
        report.error(file, f"has no list of {absent[0]}", remedy="take instances_*.json, not captions or keypoints")
        return None
    report.bar.advance()
    return content


def _check_annotations(
    file: Path,
    annotations: list[Any],
    sizes: dict[int | str, tuple[int, int] | None],
    categories: set[int | str],
    report: Report,
) -> None:
    if not annotations:
        report.error(file, "has no annotation", remedy=f"take instances_*.json, not image_info. {origin('coco')}")
        return
    wrong: Counter[str] = Counter()
    numbers: list[int | str] = []
    outside = 0
    for entry in annotations:
        if not isinstance(entry, dict):
            wrong["are no JSON objects"] += 1
            continue
        number, image, category = entry.get("id"), entry.get("image_id"), entry.get("category_id")
        if type(number) in IDS:
            numbers.append(number)  # type: ignore[arg-type]
        else:
            wrong["have no id"] += 1
        if type(image) not in IDS:
            wrong["have no image_id"] += 1
        elif image not in sizes:
            wrong["belong to an image that is not listed"] += 1
        if type(category) not in IDS:
            wrong["have no category_id"] += 1
        elif category not in categories:
            wrong["have a category that is not listed"] += 1
        if not entry.get("segmentation"):
            wrong["have no outline"] += 1
        if type(entry.get("area")) not in NUMBERS:
            wrong["have no area"] += 1
        if entry.get("iscrowd") not in (0, 1):
            wrong["have no iscrowd, 0 or 1"] += 1
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(type(side) in NUMBERS for side in box):
            wrong["have no bbox of four numbers"] += 1
            continue
        left, top, width, height = box
        # The originals have a few of width or height 0; the engines leave them out.
        if not (width >= 0 and height >= 0):
            wrong["have a bbox of negative width or height"] += 1
            continue
        size = sizes.get(image) if type(image) in IDS else None  # type: ignore[arg-type]
        if size is not None:
            outside += (
                left < -TOLERANCE
                or top < -TOLERANCE
                or left + width > size[0] + TOLERANCE
                or top + height > size[1] + TOLERANCE
            )
    doubled = len(numbers) - len(set(numbers))
    if doubled:
        wrong["have the id of another one"] = doubled
    for message, count in wrong.items():
        report.error(file, f"{count} annotations {message}", count=count, remedy=origin("coco"))
    if outside:
        # A single one harms nobody; a conversion to another convention hits many.
        (report.error if outside * 100 > len(annotations) else report.warning)(
            file,
            f"{outside} of {len(annotations)} annotations have a bbox that reaches outside its image",
            count=outside,
            remedy="bbox is left, top, width, height in pixels: many mean corners (x1, y1, x2, y2) in their place",
        )
    report.fine(file, f"{len(annotations)} annotations", count=len(annotations))


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if type(width) is int and type(height) is int and width > 0 and height > 0 else None
