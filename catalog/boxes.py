"""Boxes and masks of objects, read from COCO's JSON, VOC's XML or YOLO's text files into one form, COCO's own.

The check, the engine and the evaluator of a data card read through here, so what passes one is what the others get.
Ids are given anew (images and categories count from 1), so gaps, category 0, numbers with a point and lists out of
order do not matter. Files' own mistakes become `UserError`, or are counted in `BoxSet.found`.

COCO: cocodataset.org/#format-data. VOC: the development kit's annotations (pixels from 1, both corners inside). YOLO:
one line an object, `class x y width height` (centre, shares of the image) or `class x1 y1 x2 y2 …` (an outline).
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twist.catalog.card import BoxSplit, Card, Detection, Role, chosen
from twist.catalog.report import named, picture_size
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import image_names

# Flags that VOC's evaluation reads of every object; many tools leave them out, and 0 is what they then mean.
VOC_FLAGS = ("truncated", "difficult")
# Numbers of the shortest outline, a triangle; Detectron2 leaves out shorter ones.
SHORTEST_OUTLINE = 6


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

    def counts(self) -> dict[str, int]:
        objects = [*self.objects]
        return {
            "images": len(self.images),
            "objects": len(objects),
            "with a mask": sum("segmentation" in one for one in objects),
        }

    @property
    def has_masks(self) -> bool:
        return any("segmentation" in one for one in self.objects)

    @property
    def mask_format(self) -> str:
        """Detectron2's INPUT.MASK_FORMAT that all masks fit: run lengths of single objects do not fit "polygon"."""
        return "bitmask" if any(_is_run_length(one) for one in self.objects) else "polygon"

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

    Raises:
        UserError: a file is missing, is of another format, or says what cannot be.
    """
    section = card.detection
    assert section is not None
    read = {"coco": _read_coco, "voc": _read_voc, "yolo": _read_yolo}[section.format]
    sets: dict[Role, BoxSet] = {}
    for role, split in card.splits("detection", section.train, section.val).items():
        classes = sets["train"].classes if "train" in sets else section.classes
        sets[role] = read(card, section, split, classes)
    if section.format == "voc" and not section.classes and "val" in sets:
        _join_classes(sets)
    for role, one in sets.items():
        if not any(not entry.get("iscrowd") for entry in one.objects):
            raise UserError(
                f"The {len(one.images)} images of {role} in {card.path} have no annotated object, so there is nothing "
                "to learn or to measure: check images and annotations of the section."
            )
    return sets


# ── COCO ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_coco(card: Card, section: Detection, split: BoxSplit, classes: Sequence[str]) -> BoxSet:
    file, folder = card.place(split.annotations), card.place(split.images)
    content = files.read_json(file, remedy="export it again, or correct annotations in the card", most=files.MOST_DATA)
    if not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UserError(f"{file} is no COCO file: it needs lists of images, annotations and categories.")
    categories = sorted(content.get("categories") or [], key=lambda one: one["id"])
    names = tuple(str(one["name"]) for one in categories) or tuple(section.classes)
    if not names:
        raise UserError(f"{file} has no categories: write their names as classes in [detection] of {card.path}.")
    if classes and set(names) - set(classes):
        other = sorted(set(names) - set(classes))
        raise UserError(
            f"{file} has {len(other)} categories that training does not have ({named(other)}): the classes of both "
            "splits must be the same."
        )
    order = list(classes or names)
    index = {one["id"]: order.index(str(one["name"])) for one in categories} or dict(enumerate(range(len(order)), 1))
    found: Counter[str] = Counter()
    by_image: dict[Any, list[dict[str, Any]]] = {}
    try:
        for one in content["annotations"]:
            by_image.setdefault(one["image_id"], []).append(_coco_object(one, index, found))
        present = {one["file_name"]: one for one in content["images"]}
        known = {one["id"] for one in content["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has an entry without a valid {error}: export it again.") from None
    if strange := [image for image in by_image if image not in known]:
        count = sum(len(by_image[image]) for image in strange)
        raise UserError(f"{file}: {count} annotations belong to an image that is not listed: export it again.")
    images = []
    for name in chosen(sorted(present), split.list, card):
        entry = present[name]
        path = folder / name
        path = path if path.exists() else folder / Path(name).name
        size = (entry.get("width"), entry.get("height"))
        images.append(_image(path, None if None in size else size, by_image.get(entry["id"], [])))
    return _checked(BoxSet(images, tuple(order), found), card, split)


def _coco_object(one: dict[str, Any], index: dict[Any, int], found: Counter[str]) -> dict[str, Any]:
    left, top, width, height = (float(value) for value in one["bbox"])
    if width <= 0 or height <= 0:
        found["have a box without area, which training leaves out"] += 1
    outline = one.get("segmentation")
    entry: dict[str, Any] = {"category": index[one["category_id"]], "bbox": [left, top, width, height]}
    entry |= {"iscrowd": int(one.get("iscrowd") or 0), "area": float(one.get("area") or width * height)}
    if isinstance(outline, list):
        outline = [part for part in outline if len(part) >= SHORTEST_OUTLINE and len(part) % 2 == 0]
    if outline:
        entry["segmentation"] = outline
    else:
        found["have no mask, and count in boxes alone"] += 1
    return entry


def _is_run_length(one: dict[str, Any]) -> bool:
    """Whether an object that is learnt from (no crowd) has its mask as run lengths."""
    return isinstance(one.get("segmentation"), dict) and not one.get("iscrowd")


def mask_format(file: Path) -> str:
    """Detectron2's INPUT.MASK_FORMAT for a file in COCO's own layout; `UserError` when it cannot be read.

    The published file of 450 MB is searched for run lengths and not parsed: they are its crowds.
    """
    data = files.read_bytes(file, remedy="check the data root", most=files.MOST_DATA)
    run_lengths = sum(1 for _ in re.finditer(rb'"segmentation"\s*:\s*\{', data))
    if not run_lengths:
        return "polygon"
    if len(data) > 64 << 20:
        return "polygon" if run_lengths == sum(1 for _ in re.finditer(rb'"iscrowd"\s*:\s*1', data)) else "bitmask"
    content = files.parse_json(data, where=file, remedy="export it again")
    return "bitmask" if any(map(_is_run_length, content.get("annotations", ()))) else "polygon"


# ── Pascal VOC ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_voc(card: Card, section: Detection, split: BoxSplit, classes: Sequence[str]) -> BoxSet:
    folder, truth = card.place(split.images), card.place(split.annotations)
    if not truth.is_dir():
        raise UserError(f"There is no folder {truth} with VOC's .xml files: correct annotations in {card.path}.")
    stems = {Path(name).stem: name for name in image_names(folder)}
    found: Counter[str] = Counter()
    read: list[tuple[str, tuple[int, int], list[dict[str, Any]]]] = []
    for name in chosen(sorted(stems.values()), split.list, card):
        path = truth / f"{Path(name).stem}.xml"
        if not path.is_file():
            found["have no .xml, and are left out"] += 1
            continue
        size, objects = read_voc_xml(path)
        read.append((name, size, objects))
    names = list(section.classes or classes)
    if not section.classes:  # those of both splits: `_join_classes`
        names = sorted({*names, *(one["name"] for _, _, objects in read for one in objects)})
    images = []
    for name, size, objects in read:
        entries = []
        for one in objects:
            if one["name"] not in names:
                raise UserError(
                    f"{truth / (Path(name).stem + '.xml')} has an object of class {one['name']!r}, which classes of "
                    f"{card.path} do not have: add it."
                )
            x0, y0, x1, y1 = one["bbox"]
            found["lack truncated or difficult, which count as 0"] += one["lacks flags"]
            if x1 <= x0 or y1 <= y0:
                found["have a box without area, which training leaves out"] += 1
            # VOC counts pixels from 1, and the corner is inside the box (Detectron2's own loader does the same).
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            flags = {key: one[key] for key in VOC_FLAGS}
            entries.append(
                {"category": names.index(one["name"]), "bbox": box, "iscrowd": 0, "area": box[2] * box[3], **flags}
            )
        images.append(_image(folder / name, size, entries))
    return _checked(BoxSet(images, tuple(names), found), card, split)


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
        place = [names.index(name) for name in one.classes]
        for entry in one.objects:
            entry["category"] = place[entry["category"]]
        one.classes = tuple(names)


# ── YOLO ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def yolo_names(file: Path) -> tuple[str, ...]:
    """The class names of a `data.yaml`, a list or a table of number → name."""
    import yaml

    try:
        names = yaml.safe_load(files.read_text(file))["names"]
        return tuple(str(names[key]) for key in sorted(names)) if isinstance(names, dict) else tuple(map(str, names))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} has no names of classes ({error}): correct data in the card, or add classes."
        ) from None


def _read_yolo(card: Card, section: Detection, split: BoxSplit, classes: Sequence[str]) -> BoxSet:
    folder = card.place(split.images)
    where = split.annotations or re.sub(r"(^|/)images(?=/|$)", r"\1labels", split.images)
    names = tuple(classes or section.classes) or yolo_names(card.place(section.data or "data.yaml"))
    truth = card.place(where)
    if not truth.is_dir():
        raise UserError(f"There is no folder {truth} with YOLO's .txt files: write annotations into {card.path}.")
    found: Counter[str] = Counter()
    images = []
    for name in chosen(image_names(folder), split.list, card):
        path, size = (truth / name).with_suffix(".txt"), picture_size(folder / name)
        if size is None:
            raise UserError(f"{folder / name} cannot be read as an image: replace it.")
        if not path.is_file():
            found["have no .txt, which means no object"] += 1
        lines = files.read_text(path, remedy="export it again").splitlines() if path.is_file() else []
        objects = [_yolo_object(line, path, names, size) for line in lines if line.strip()]
        images.append(_image(folder / name, size, objects))
    return _checked(BoxSet(images, names, found), card, split)


def _yolo_object(line: str, path: Path, names: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
    try:
        values = [float(word) for word in line.split()]
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


# ── All ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _image(path: Path, size: tuple[int, int] | None, objects: list[dict[str, Any]]) -> dict[str, Any]:
    size = size or picture_size(path) or (0, 0)
    return {"file": path, "width": int(size[0]), "height": int(size[1]), "objects": objects}


def _checked(found: BoxSet, card: Card, split: BoxSplit) -> BoxSet:
    """`found`, once its images are on disk and as large, seen upright, as the annotations say."""
    if not found.images:
        raise UserError(f"{card.place(split.images)} has no images with annotations: correct images in {card.path}.")
    absent = [image["file"] for image in found.images if not image["file"].is_file()]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(found.images)} images of {card.place(split.annotations or split.images)} are "
            f"not on disk (first: {absent[0]}): correct images in {card.path}."
        )
    other = [
        f"{image['file'].name} is {size[0]} × {size[1]} and its annotation says {image['width']} × {image['height']}"
        for image in found.images
        if (size := picture_size(image["file"])) is not None and size != (image["width"], image["height"])
    ]
    if other:
        raise UserError(
            f"{len(other)} images are, seen upright, of another size than their annotations say (first: {other[0]}): a "
            "photograph's orientation (EXIF) may have been ignored; turn the pixels, or annotate the upright picture."
        )
    if without := sum(not image["objects"] for image in found.images):
        found.found["images have no object, and are measured but not learnt from"] = without
    return found
