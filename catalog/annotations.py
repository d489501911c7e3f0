"""What must be right inside annotation files: COCO's JSON, VOC's XML, masks, Cityscapes' polygons.

Each function adds what it finds to a `Report`. Nothing in a file can stop a check.
"""

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, StrictInt, StrictStr, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from twist.catalog.boxes import read_voc_xml
from twist.catalog.data_sets import VOID
from twist.catalog.report import Report, picture_size, size_of, spread
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import MAX_PIXELS, UnreadableImage, open_picture

# Name of an image → its file of one kind; → (width, height) as an annotation says it.
Paths = dict[str, Path]
PictureSizes = dict[str, tuple[int, int]]
# By how many pixels a box of COCO may reach out of its image: outlines are rounded.
TOLERANCE = 1.0
# Bytes below which a polygons.json of Cityscapes hardly has an object in it.
SHORTEST = 64
BLANK = "mark no object, all is background or void"

Id = StrictInt | StrictStr
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Length = Annotated[Number, Field(ge=0)]  # the originals have a few of 0; the engines leave them out
Side = Annotated[StrictInt, Field(gt=0)]


class _Image(TypedDict):
    id: Id
    file_name: str
    width: Side
    height: Side


class _Annotation(TypedDict):
    id: Id
    image_id: Id
    category_id: Id
    segmentation: list[Any] | dict[str, Any]
    area: Number
    iscrowd: Literal[0, 1]
    bbox: tuple[Number, Number, Length, Length]


class _Category(TypedDict):
    id: Id
    name: str


class CocoFile(TypedDict):
    """An instances_*.json (cocodataset.org/#format-data), as far as an engine reads it."""

    images: list[_Image]
    annotations: Annotated[list[_Annotation], Field(min_length=1)]
    categories: list[_Category]


def read_coco(file: Path, report: Report) -> CocoFile | None:
    """Read an instances_*.json and report what is wrong in it; None when an engine cannot read it."""
    try:
        if not file.exists():
            report.error(file, "is missing")
            return None
        content: CocoFile = TypeAdapter(CocoFile).validate_json(files.read_bytes(file, most=files.MOST_DATA))
    except UserError as error:
        report.error(file, str(error))
        return None
    except ValidationError as error:
        faults: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False):
            # The place of a fault is, for example, ("annotations", 17, "bbox", 2).
            what = " have no valid ".join(str(part) for part in fault["loc"][:3:2])
            faults.setdefault(what, []).append(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")
        for what, places in faults.items():
            said = f"{len(places)} {what} ({places[0]})" if what else f"is no instances_*.json ({places[0]})"
            report.error(file, said, f"take instances_*.json from its archive again. {report.origin}")
        return None
    report.bar.advance()
    annotations = content["annotations"]
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for count, message in (
        (len(annotations) - len({one["id"] for one in annotations}), "have the id of another one"),
        (sum(one["image_id"] not in sizes for one in annotations), "belong to an image that is not listed"),
        (sum(one["category_id"] not in categories for one in annotations), "have a category that is not listed"),
    ):
        if count:
            report.error(file, f"{count} annotations {message}")
    outside = sum(_reaches_out(one["bbox"], sizes[one["image_id"]]) for one in annotations if one["image_id"] in sizes)
    if outside:
        # A single one harms nobody; a conversion to another convention hits many.
        (report.error if outside * 100 > len(annotations) else report.warning)(
            file,
            f"{outside} of {len(annotations)} annotations have a bbox that reaches outside its image",
            "bbox is left, top, width, height in pixels: many mean corners (x1, y1, x2, y2) in their place",
        )
    report.fine(file, f"{len(annotations)} annotations")
    return content


def _reaches_out(box: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    left, top, width, height = box
    return max(-left, -top, left + width - size[0], top + height - size[1]) > TOLERANCE


def check_same_categories(file: Path, train: CocoFile, other: CocoFile, report: Report) -> None:
    """The categories of all splits must be the same, or classes are measured as others."""
    one, two = ({entry["id"]: entry["name"] for entry in content["categories"]} for content in (train, other))
    differing = [key for key in {**one, **two} if one.get(key) != two.get(key)]
    if differing:
        first = f"{differing[0]} is {two.get(differing[0])!r} here and {one.get(differing[0])!r} there"
        said = f"{len(differing)} categories are not those of training: {first}"
        report.error(file, said, f"take both files from the same archive. {report.origin}")


def check_voc_boxes(
    where: Path, files: Paths, split: str, classes: tuple[str, ...] | int | None, report: Report
) -> PictureSizes:
    """Read the XML of every image of a split and report what is wrong; gives the pictures' sizes by name."""
    sizes: PictureSizes = {}
    unreadable, bare = [], []
    flagless = 0
    unknown: Counter[str] = Counter()
    total = outside = 0
    for name, path in files.items():
        report.bar.advance(0)
        try:
            (width, height), objects = read_voc_xml(path)
        except UserError:
            unreadable.append(path.name)
            continue
        boxes = [one["bbox"] for one in objects]
        flagless += sum(one["lacks flags"] for one in objects)
        sizes[name] = (width, height)
        bare += [] if objects else [path.name]
        total += len(objects)
        labels = [one["name"] for one in objects]
        unknown.update(label for label in labels if isinstance(classes, tuple) and label not in classes)
        outside += sum(not (1 <= x0 < x1 <= width and 1 <= y0 < y1 <= height) for x0, y0, x1, y1 in boxes)
    for bad, message in ((unreadable, "are no VOC annotation"), (bare, "have no object")):
        if bad:
            report.error(where, f"{len(bad)} of {len(files)} files of {split} {message}, {bad[0]} the first")
    if unknown:
        label, count = unknown.most_common(1)[0]
        report.error(where, f"{unknown.total()} objects have an unknown class, most often {label!r} ({count})")
    if outside:
        said = f"{outside} of {total} boxes are empty or reach outside their image (pixels are counted from 1)"
        report.warning(where, said, "a few are in the originals; many mean boxes of another convention")
    if flagless:
        report.fine(where, f"{flagless} objects of {split} have no truncated or difficult, which count as 0")
    report.fine(where, f"{total} objects in {split}")
    return sizes


def check_masks(
    where: str, masks: Paths, images: Paths, report: Report, remedy: str, *, classes: int, empty: set[int],
    palette: list[int] | None,
) -> None:  # fmt: skip
    """Look at mode, size, values and palette of some masks: values are 0 … `classes` - 1 and VOID.

    A picture program that saves a mask numbers its colours anew, and every number it then holds is still a label: only
    the `palette` tells. `empty` are the values that mark no object.
    """

    def fault(name: str) -> tuple[str, list[int]]:
        """What is wrong with one mask, "" for nothing, and how many pixels have each value."""
        try:
            with open_picture(masks[name]) as image:
                mode, counts, size, colours = image.mode, image.histogram(), image.size, image.getpalette() or []
        except UnreadableImage:
            return "cannot be read", []
        present = [value for value, count in enumerate(counts[:256]) if count]
        strange = [value for value in present if value >= classes and value != VOID]
        if mode not in ("P", "L"):
            return "are colour pictures, not maps of class numbers", []
        if strange:
            return f"hold {strange[0]}, where 0–{classes - 1} and {VOID} are allowed", counts
        if name in images and picture_size(images[name]) not in (size, None):
            return "are of another size than their picture", counts
        if not set(present) - empty:
            return BLANK, counts
        if mode == "P" and palette and any(colours[3 * v : 3 * v + 3] != palette[3 * v : 3 * v + 3] for v in present):
            return "were numbered anew: their colours are not those of their numbers", counts
        return "", counts

    histogram = np.zeros(256, dtype=np.int64)
    bad: dict[str, list[str]] = {}
    chosen = spread(list(masks), report.sampled)
    for name, (message, counts) in report.each(fault, chosen):
        histogram += counts or 0
        if message:
            bad.setdefault(message, []).append(masks[name].name)
    if len(bad.get(BLANK, ())) * 10 <= len(chosen):
        bad.pop(BLANK, None)  # a picture may be without an object; a conversion that lost them hits many
    for message, names in bad.items():
        report.error(where, f"{len(names)} of {len(chosen)} sampled masks {message}, {names[0]} the first", remedy)
    if chosen and not bad:
        labels = ", ".join(map(str, np.flatnonzero(histogram).tolist()))
        report.fine(where, f"labels {labels} in {len(chosen)} sampled masks")


def check_polygons(where: Path, files: Paths, images: Paths, report: Report) -> None:
    """Cityscapes' polygons: a few files, as they are slow to paint, and all that are too short to hold an object."""

    short = [name for name, path in files.items() if (size_of(path) or 0) < SHORTEST]
    chosen = sorted({*spread(list(files), report.sampled // 4), *short})
    faults = []
    for name in chosen:
        report.bar.advance(0)
        try:
            size = paint_train_ids(files[name]).size
            if name in images and picture_size(images[name]) not in (size, None):
                faults.append(f"{files[name]} is for a picture of another size.")
        except UserError as error:
            faults.append(str(error))
    if faults:
        report.error(where, f"{len(faults)} of {len(chosen)} sampled polygons.json are no annotation: {faults[0]}")


def paint_train_ids(polygons: Path) -> Image.Image:
    """The train ids of a *_gtFine_polygons.json, painted by cityscapesScripts; `UserError` when they cannot.

    Not from several threads: standard output is redirected meanwhile.
    """
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    annotation = Annotation()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # they print how they are used
            files.read_json(polygons, remedy="unpack gtFine again")  # within bounds that theirs does not have
            annotation.fromJsonFile(str(polygons))
            if not annotation.objects:
                raise ValueError("it has no objects")
            if not 0 < annotation.imgWidth * annotation.imgHeight <= MAX_PIXELS:
                raise ValueError(f"its picture is {annotation.imgWidth} × {annotation.imgHeight}")
            return createLabelImage(annotation, "trainIds")
    except UserError:
        raise
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, SystemExit) as error:
        reason = "a label that Cityscapes does not have" if isinstance(error, SystemExit) else repr(error)
        raise UserError(f"{polygons} is no Cityscapes annotation ({reason}): unpack gtFine again.") from None


def voc_palette() -> list[int]:
    """VOC's 256 colours as Pillow takes them: the bits of the index dealt out to red, green and blue in turn.

    Source: the VOC development kit's colour map (VOCcode/VOClabelcolormap).
    """
    colours = []
    for index in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours += channels
    return colours
