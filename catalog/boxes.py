"""Boxes and masks of objects, read from COCO's JSON, VOC's XML or YOLO's text files into one form, COCO's own.

The checks, the engines and the evaluators read through here, so what passes one is what the others get.
COCO: cocodataset.org/#format-data. VOC: the development kit's annotations (pixels from 1, both corners inside). YOLO:
one line an object, `class x y width height` (centre, shares of the image) or `class x1 y1 x2 y2 …` (an outline).
"""

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from twist.catalog.card import BoxSplit, Card, Detection, Role, chosen
from twist.catalog.data_sets import named
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import image_names, picture_size

# Flags that VOC's evaluation reads of every object; many tools leave them out, and 0 is what they then mean.
VOC_FLAGS = ("truncated", "difficult")
# Numbers of the shortest outline, a triangle; Detectron2 leaves out shorter ones.
SHORTEST_OUTLINE = 6
# By how many pixels a box may reach out of its image: outlines are rounded.
TOLERANCE = 1.0
EMPTY = "have a box without area, which training leaves out"
OUTSIDE = "have a box that reaches outside its image"


@dataclass
class BoxSet:
    """One split. `images` {file, width, height, objects}; an object {category, bbox (x, y, w, h), …} as COCO has it.

    `found` counts what is unusual and does no harm, by a sentence's end.
    """

    images: list[dict[str, Any]]
    classes: tuple[str, ...]
    found: Counter[str] = field(default_factory=Counter)

    @property
    def objects(self) -> Iterator[dict[str, Any]]:
        return (one for image in self.images for one in image["objects"])

    @property
    def has_masks(self) -> bool:
        return any("segmentation" in one for one in self.objects)

    @property
    def mask_format(self) -> str:
        """Detectron2's INPUT.MASK_FORMAT that all masks fit: run lengths of single objects do not fit "polygon"."""
        masks = (one.get("segmentation") for one in self.objects if not one["iscrowd"])
        return "bitmask" if any(isinstance(mask, dict) for mask in masks) else "polygon"

    def as_coco(self, *, masks: bool) -> dict[str, Any]:
        """The content of a COCO file. With `masks` objects that have none are left out: nothing can be learnt there."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, image in enumerate(self.images, start=1):
            names = {"file_name": str(image["file"]), "width": image["width"], "height": image["height"]}
            images.append({"id": number, **names})
            for one in image["objects"]:
                if masks and "segmentation" not in one:
                    continue
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": one["category"] + 1, **one}
                del entry["category"]
                annotations.append(entry)
        categories = [{"id": index, "name": name} for index, name in enumerate(self.classes, start=1)]
        return {"images": images, "annotations": annotations, "categories": categories}


def read_boxes(card: Card) -> dict[Role, BoxSet]:
    """Both splits of a card's [detection]; a card without `val` gives `train` alone.

    `UserError`: a file is missing, is of another format, or says what cannot be.
    """
    section = card.detection
    assert section is not None
    sets: dict[Role, BoxSet] = {}
    for role, split in card.splits("detection", section.train, section.val).items():
        classes = sets["train"].classes if "train" in sets else section.classes
        sets[role] = _read(card, section, split, classes)
    if section.format == "voc" and not section.classes and "val" in sets:
        _join_classes(sets)
    for role, one in sets.items():
        if not any(not entry["iscrowd"] for entry in one.objects):
            raise UserError(
                f"The {len(one.images)} images of {role} in {card.path} have no annotated object, so there is nothing "
                "to learn or to measure: check images and annotations of the section."
            )
    return sets


def mask_format(file: Path) -> str:
    """Detectron2's INPUT.MASK_FORMAT for a file in COCO's own layout, whose run lengths are its crowds.

    The published file of 450 MB is searched and not parsed.
    """
    data = files.read_bytes(file, remedy="check the data root", most=files.MOST_DATA)
    run_lengths, crowds = (
        sum(1 for _ in re.finditer(what, data)) for what in (rb'"segmentation"\s*:\s*\{', rb'"iscrowd"\s*:\s*1')
    )
    return "bitmask" if run_lengths > crowds else "polygon"


def _read(card: Card, section: Detection, split: BoxSplit, classes: Sequence[str]) -> BoxSet:
    folder, truth = card.place(split.images), card.place(split.annotations)
    if section.format == "coco":
        boxes = coco_boxes(truth, folder, classes or section.classes, remedy=f"export it again, or correct {card.path}")
        by_name = {os.path.relpath(image["file"], folder): image for image in boxes.images}
        boxes.images = [by_name[name] for name in chosen(list(by_name), split.list, card)]
        return _checked(boxes, card, split)
    if section.format == "yolo" and not split.annotations:
        truth = card.place(re.sub(r"(^|/)images(?=/|$)", r"\1labels", split.images))
    if not truth.is_dir():
        raise UserError(f"There is no folder {truth} with annotations: correct annotations in {card.path}.")
    names = image_names(folder)
    if section.format == "voc":
        names = sorted({Path(name).stem: name for name in names}.values())
        pairs = [(folder / name, truth / f"{Path(name).stem}.xml") for name in chosen(names, split.list, card)]
        present = [(image, path) for image, path in pairs if path.is_file()]
        # Without classes in the card those of both splits are joined: `_join_classes`.
        boxes = voc_boxes(present, section.classes)
        boxes.found["have no .xml, and are left out"] = len(pairs) - len(present)
    else:
        pairs = [(folder / name, (truth / name).with_suffix(".txt")) for name in chosen(names, split.list, card)]
        boxes = _yolo_boxes(pairs, tuple(classes) or yolo_names(card.place(section.data or "data.yaml")))
    return _checked(boxes, card, split)


def _checked(boxes: BoxSet, card: Card, split: BoxSplit) -> BoxSet:
    """`boxes`, once its images are on disk and as large, seen upright, as the annotations say."""
    if not boxes.images:
        raise UserError(f"{card.place(split.images)} has no images with annotations: correct images in {card.path}.")
    if absent := [image["file"] for image in boxes.images if not image["file"].is_file()]:
        raise UserError(
            f"{len(absent)} of the {len(boxes.images)} images of {card.place(split.annotations or split.images)} are "
            f"not on disk (first: {absent[0]}): correct images in {card.path}."
        )
    sizes = [(image, picture_size(image["file"])) for image in boxes.images]
    if other := [image["file"] for image, size in sizes if size not in (None, (image["width"], image["height"]))]:
        raise UserError(
            f"{len(other)} images are, seen upright, of another size than their annotations say (first: {other[0]}): a "
            "photograph's orientation (EXIF) may have been ignored; turn the pixels, or annotate the upright picture."
        )
    return boxes


def _boxes(images: list[dict[str, Any]], classes: Iterable[str], found: Counter[str]) -> BoxSet:
    """The set, with counts of what is unusual in any format; sizes that are not given are the pictures'."""
    for image in images:
        if not (image["width"] and image["height"]):
            image["width"], image["height"] = picture_size(image["file"]) or (0, 0)
        found["images have no object, and are measured but not learnt from"] += not image["objects"]
        for one in image["objects"]:
            left, top, width, height = one["bbox"]
            found[EMPTY] += width <= 0 or height <= 0
            over = max(-left, -top, left + width - image["width"], top + height - image["height"])
            found[OUTSIDE] += over > TOLERANCE
    return BoxSet(images, tuple(classes), found)


# ── COCO ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

Id = int | float | str
Number = Annotated[float, Field(allow_inf_nan=False)]
Side = Annotated[int, Field(ge=0, le=2**31)]


class _Image(TypedDict):
    id: Id
    file_name: str
    width: NotRequired[Side | None]
    height: NotRequired[Side | None]


class _Annotation(TypedDict):
    image_id: Id
    category_id: Id
    bbox: tuple[Number, Number, Number, Number]
    iscrowd: NotRequired[int | None]
    area: NotRequired[Number | None]
    segmentation: NotRequired[list[list[Any]] | dict[str, Any] | None]


class _Category(TypedDict):
    id: Id
    name: str | int


class _CocoFile(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: NotRequired[list[_Category]]


def coco_boxes(file: Path, folder: Path, classes: Sequence[str] = (), *, remedy: str = "export it again") -> BoxSet:
    """The objects of a COCO file whose images lie in `folder`, sorted by name.

    `classes` are those of training, which `file` may have in another order, or of a file without categories.
    `UserError`: no such file, none of COCO's, or one that contradicts itself or `classes`.
    """
    try:
        content: _CocoFile = TypeAdapter(_CocoFile).validate_json(
            files.read_bytes(file, remedy=remedy, most=files.MOST_DATA)
        )
    except ValidationError as error:
        fault, count = error.errors(include_url=False)[0], error.error_count()
        place = ".".join(map(str, fault["loc"]))
        raise UserError(f"{file} is no COCO file ({count} faults; {place}: {fault['msg']}): {remedy}.") from None
    categories = sorted(content.get("categories", []), key=lambda one: (isinstance(one["id"], str), one["id"]))
    names = tuple(str(one["name"]) for one in categories) or tuple(classes)
    if not names:
        raise UserError(f"{file} has no categories: write their names as classes in [detection] of a data card.")
    if classes and (other := sorted(set(names) - set(classes))):
        raise UserError(
            f"{file} has {len(other)} categories that training does not have ({named(other)}): the classes of both "
            "splits must be the same."
        )
    order = list(classes or names)
    index: dict[Any, int] = {one["id"]: order.index(str(one["name"])) for one in categories} or dict(
        enumerate(range(len(order)), 1)
    )
    by_image: dict[Any, list[_Annotation]] = {one["id"]: [] for one in content["images"]}
    strange = [
        one for one in content["annotations"] if one["image_id"] not in by_image or one["category_id"] not in index
    ]
    if strange:
        raise UserError(
            f"{file}: {len(strange)} annotations have an image or a category that is not listed (the first image_id "
            f"{strange[0]['image_id']}, category_id {strange[0]['category_id']}): {remedy}."
        )
    for one in content["annotations"]:
        by_image[one["image_id"]].append(one)
    found: Counter[str] = Counter()
    images = []
    for entry in sorted(
        {one["file_name"]: one for one in content["images"]}.values(), key=lambda one: one["file_name"]
    ):
        name, size = entry["file_name"], {side: entry.get(side) or 0 for side in ("width", "height")}
        path = folder / name
        path = path if path.exists() else folder / Path(name).name
        objects = [_coco_object(one, index, found) for one in by_image[entry["id"]]]
        images.append({"file": path, **size, "objects": objects})
    return _boxes(images, order, found)


def _coco_object(one: _Annotation, index: dict[Any, int], found: Counter[str]) -> dict[str, Any]:
    outline, box = one.get("segmentation"), list(one["bbox"])
    entry: dict[str, Any] = {
        "category": index[one["category_id"]],
        "bbox": box,
        "iscrowd": int(one.get("iscrowd") or 0),
    }
    entry["area"] = one.get("area") or box[2] * box[3]
    if isinstance(outline, list):
        outline = [part for part in outline if len(part) >= SHORTEST_OUTLINE and len(part) % 2 == 0]
    if outline:
        entry["segmentation"] = outline
    else:
        found["have no mask, and count in boxes alone"] += 1
    return entry


# ── Pascal VOC ────────────────────────────────────────────────────────────────────────────────────────────────────────


def voc_boxes(pairs: Iterable[tuple[Path, Path]], classes: Sequence[str]) -> BoxSet:
    """The objects of pictures by their .xml; without `classes` these are the names that occur, sorted.

    `UserError`: a file that is no annotation, or an object of another class.
    """
    read = [(image, path, *read_voc_xml(path)) for image, path in pairs]
    names = list(classes) or sorted({one["name"] for *_, objects in read for one in objects})
    found: Counter[str] = Counter()
    images = []
    for image, path, (width, height), objects in read:
        entries = []
        for one in objects:
            if one["name"] not in names:
                raise UserError(
                    f"{path} has an object of the unknown class {one['name']!r}: correct it, or the classes."
                )
            found["lack truncated or difficult, which count as 0"] += one["lacks flags"]
            x0, y0, x1, y1 = one["bbox"]
            # VOC counts pixels from 1, and the corner is inside the box (Detectron2's own loader does the same).
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            flags = {key: one[key] for key in VOC_FLAGS}
            area = box[2] * box[3]
            entries.append({"category": names.index(one["name"]), "bbox": box, "iscrowd": 0, "area": area, **flags})
        images.append({"file": image, "width": width, "height": height, "objects": entries})
    return _boxes(images, names, found)


def read_voc_xml(path: Path) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """(width, height) and the objects {name, bbox (xmin, ymin, xmax, ymax), pose, truncated, difficult, lacks flags}.

    Flags that are not there count as 0, as in VOC's own tools. `UserError` for a file that is no annotation.
    """
    try:
        tree = ElementTree.ElementTree(ElementTree.fromstring(files.read_bytes(path, remedy="export it again")))
        width, height = (int(float(tree.findtext(f"size/{side}") or "")) for side in ("width", "height"))
        objects = []
        for node in tree.iter("object"):
            flags = {key: node.findtext(key) for key in VOC_FLAGS}
            corners = [float(node.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
            objects.append(
                {
                    "name": (node.findtext("name") or "").strip(),
                    "bbox": corners,
                    "pose": node.findtext("pose") or "Unspecified",
                    "lacks flags": None in flags.values(),
                    **{key: int(value or 0) for key, value in flags.items()},
                }
            )
    except UserError:
        raise
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError) as error:  # LookupError: its encoding
        raise UserError(f"{path} is no VOC annotation ({error}): export it again.") from None
    return (width, height), objects


def _join_classes(sets: dict[Role, BoxSet]) -> None:
    """VOC's files name no list of classes: those that either split has, sorted, are the classes of both."""
    names = sorted({name for one in sets.values() for name in one.classes})
    for one in sets.values():
        for entry in one.objects:
            entry["category"] = names.index(one.classes[entry["category"]])
        one.classes = tuple(names)


# ── YOLO ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def yolo_names(file: Path) -> tuple[str, ...]:
    """The class names of a `data.yaml`, a list or a table of number → name."""
    import yaml

    try:
        names = yaml.safe_load(files.read_yaml(file))["names"]
        return tuple(str(names[key]) for key in sorted(names)) if isinstance(names, dict) else tuple(map(str, names))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} has no names of classes ({error}): correct data in the card, or add classes."
        ) from None


def _yolo_boxes(pairs: Iterable[tuple[Path, Path]], names: tuple[str, ...]) -> BoxSet:
    found: Counter[str] = Counter()
    images = []
    for image, path in pairs:
        size = picture_size(image)
        if size is None:
            raise UserError(f"{image} cannot be read as an image: replace it.")
        found["have no .txt, which means no object"] += not path.is_file()
        lines = files.read_text(path, remedy="export it again").splitlines() if path.is_file() else []
        objects = [_yolo_object(line, path, names, size) for line in lines if line.strip()]
        images.append({"file": image, "width": size[0], "height": size[1], "objects": objects})
    return _boxes(images, names, found)


def _yolo_object(line: str, path: Path, names: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
    try:
        values = [float(word) for word in line.split()]
        if not all(map(math.isfinite, values)):
            raise ValueError("a number is not finite")
        category = int(values[0])
        if category != values[0] or not 0 <= category < len(names) or len(values) < 5:
            raise ValueError(f"classes are 0 to {len(names) - 1}, and 4 or more numbers follow")
    except ValueError as error:
        raise UserError(f'{path} has a line "{line}" that is no object of YOLO ({error}): export it again.') from None
    scaled = [value * size[place % 2] for place, value in enumerate(values[1:])]
    entry: dict[str, Any] = {"category": category, "iscrowd": 0}
    if len(values) > SHORTEST_OUTLINE and len(values) % 2:  # an outline
        xs, ys = scaled[0::2], scaled[1::2]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        area = abs(sum(x0 * y1 - x1 * y0 for x0, x1, y0, y1 in zip(xs, xs[1:] + xs[:1], ys, ys[1:] + ys[:1]))) / 2
        return {**entry, "bbox": box, "area": area, "segmentation": [scaled]}
    x, y, width, height = scaled[:4]
    return {**entry, "bbox": [x - width / 2, y - height / 2, width, height], "area": width * height}
