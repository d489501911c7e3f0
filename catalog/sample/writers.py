"""The on-disk layouts of the real data sets, written from composed scenes so that the real loaders read them.

Sources of the layouts: the COCO data format page (cocodataset.org/#format-data), the VOC development kits,
cityscapesScripts (`helpers/labels.py`, `preparation/json2labelImg.py`, `json2instanceImg.py`), Detectron2's
`datasets/README.md` for the tree. Every image is a pure function of (seed, set, index), so any order and any number of
processes write the same bytes.
"""

import functools
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from twist.catalog.annotations import voc_palette
from twist.catalog.data_sets import VOID
from twist.catalog.sample.photos import Photos
from twist.catalog.sample.scene import (
    DISTRACTOR,
    Instance,
    Scene,
    Source,
    Split,
    borders,
    bounding_box,
    compose,
    gathering,
    outline,
    polygons,
    portrait,
    run_lengths,
)  # fmt: skip
from twist.catalog.sample.shapes import Shapes


@dataclass(frozen=True)
class Size:
    """How much is written. Sides in pixels; `dense` are the images of COCO, VOC and Cityscapes."""

    unlabelled: int
    unlabelled_side: int
    dense_train: int
    dense_val: int
    dense_side: int
    class_train: int
    class_val: int


@dataclass(frozen=True)
class World:
    """Where a sample is being written, from what and how much."""

    root: Path
    source: str
    seed: int
    size: Size
    classes: tuple[str, ...]

    def file(self, *parts: str) -> Path:
        """A path below the root, its folder made."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


# name → (id, trainId, has instances), the rows of cityscapesScripts' labels.py that a sample uses: what belongs to no
# class, the ground, and the names of the sample's ten classes, two of stuff and eight of things.
CITYSCAPES_LABELS = {
    "static": (4, 255, False),
    "road": (7, 0, False),
    "traffic light": (19, 6, False),
    "traffic sign": (20, 7, False),
    "person": (24, 11, True),
    "rider": (25, 12, True),
    "car": (26, 13, True),
    "truck": (27, 14, True),
    "bus": (28, 15, True),
    "train": (31, 16, True),
    "motorcycle": (32, 17, True),
    "bicycle": (33, 18, True),
}
CITYSCAPES_NAMES = tuple(CITYSCAPES_LABELS)[2:]
SOURCES: dict[str, Callable[[], Source]] = {"shapes": Shapes, "photos": Photos}
CITYSCAPES_KINDS = ("labelIds", "labelTrainIds", "instanceIds")
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}
# Instances with fewer visible pixels are not annotated, those with a smaller visible share are `difficult` in VOC.
SMALLEST_AREA = 16
DIFFICULT_SHARE = 0.4
CROWD_SHARE = 0.15
JPEG_QUALITY = 92


def sets(size: Size) -> dict[str, int]:
    """Every set of images of a sample and how many images it has."""
    dense = dict.fromkeys(("coco/train2017", "VOC2012/train", "cityscapes/train"), size.dense_train)
    dense |= dict.fromkeys(("VOC2007/train", "VOC2007/val"), size.dense_train // 4)
    dense |= dict.fromkeys(("coco/val2017", "VOC2007/test", "VOC2012/val", "cityscapes/val"), size.dense_val)
    dense |= {
        "ADEChallengeData2016/training": size.dense_train // 2,
        "ADEChallengeData2016/validation": size.dense_val // 2,
    }
    classes = {"imagenet/train": size.class_train * 10, "imagenet/val": size.class_val * 10}
    return {"unlabelled": size.unlabelled, **dense, **classes}


def write_image(world: World, item: tuple[str, int]) -> Any:
    """Compose and write one image with its own annotation files; returns what the set's common file needs.

    `item`: the image's set, a key of `sets`, and its number in it.
    """
    set_name, index = item
    rng = np.random.default_rng([world.seed, zlib.crc32(set_name.encode()), index])
    folder, _, part = set_name.partition("/")
    return WRITERS[folder](world, rng, folder, part, index)


def write_common_files(world: World, returned: dict[str, list[Any]]) -> None:
    """The files that belong to a whole set: COCO's JSON, VOC's image sets, ImageNet's subset lists."""
    for part in ("train2017", "val2017"):
        _write_coco_annotations(world, part, returned[f"coco/{part}"])
    for year, parts in (("VOC2007", ("train", "val", "test")), ("VOC2012", ("train", "val"))):
        _write_voc_image_sets(world, year, {part: returned[f"{year}/{part}"] for part in parts})
    for percent in (1, 10):  # as SimCLR's lists: file names of the train set, at least one a class
        count = max(1, round(world.size.class_train * percent / 100))
        chosen = sorted(returned["imagenet/train"][: count * len(world.classes)])
        world.file("imagenet", f"{percent}percent.txt").write_text("".join(f"{name}\n" for name in chosen))


@functools.cache
def open_source(name: str) -> Source:
    """The source of a name, a key of `SOURCES`, opened once a process."""
    return SOURCES[name]()


def _split(part: str) -> Split:
    return "val" if part.startswith(("val", "test")) else "train"


def _write_unlabelled(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> None:
    source, side = open_source(world.source), world.size.unlabelled_side
    # Classes in turn, so that they are as balanced as ImageNet's; the name does not tell.
    placements = portrait(index % len(source.classes), rng, side, side)
    scene = compose(rng, source, placements, side, side, _split(part))
    Image.fromarray(scene.image).save(world.file(folder, f"{index:06d}.jpg"), quality=JPEG_QUALITY)


def _write_imagenet(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> str:
    source = open_source(world.source)
    class_index = index % len(source.classes)
    height, width = _frame(rng, world.size.unlabelled_side)
    scene = compose(rng, source, portrait(class_index, rng, height, width), height, width, _split(part))
    name = source.classes[class_index]
    file_name = f"{name}_{index // len(source.classes):05d}.jpg"
    Image.fromarray(scene.image).save(world.file(folder, part, name, file_name), quality=JPEG_QUALITY)
    return file_name


def _write_coco(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> dict[str, Any]:
    scene = _dense_scene(world, rng, _frame(rng, world.size.dense_side), part, index, crowd_share=CROWD_SHARE)
    height, width, _channels = scene.image.shape
    # COCO's numbers are sparse; val begins where no train number can be.
    image_id = 7 + 3 * index + (0 if part == "train2017" else 500_000)
    file_name = f"{image_id:012d}.jpg"
    Image.fromarray(scene.image).save(world.file(folder, part, file_name), quality=JPEG_QUALITY)
    parts: list[tuple[int, NDArray[np.bool_], Any]] = []  # class, mask, segmentation
    crowds: dict[int, NDArray[np.bool_]] = {}
    for instance in _annotated(scene.instances):
        if instance.crowd:
            crowds[instance.class_index] = crowds.get(instance.class_index, False) | instance.visible
        elif found := [polygon.ravel().tolist() for polygon in polygons(instance.visible)]:
            parts.append((instance.class_index, instance.visible, found))
    parts += [(class_index, crowd, run_lengths(crowd)) for class_index, crowd in crowds.items()]
    annotations = []
    for class_index, mask, segmentation in parts:
        left, top, right, bottom = bounding_box(mask)
        box, crowd = [left, top, right - left, bottom - top], int(isinstance(segmentation, dict))
        numbers = {"category_id": class_index + 1, "bbox": box, "area": int(mask.sum()), "iscrowd": crowd}
        annotations.append({**numbers, "segmentation": segmentation})
    image = {"id": image_id, "file_name": file_name, "height": height, "width": width, "license": 1}
    return {"image": image, "annotations": annotations}


def _write_coco_annotations(world: World, part: str, items: list[dict[str, Any]]) -> None:
    annotations = [
        {"image_id": item["image"]["id"], **annotation} for item in items for annotation in item["annotations"]
    ]
    content = {
        "info": {"description": f"built-in sample of the TWIST suite, {world.source}, {part}", "version": "1.0"},
        "licenses": [{"id": 1, "name": "see sample.json", "url": ""}],
        "images": [item["image"] for item in items],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)],
        "categories": [
            {"id": number, "name": name, "supercategory": world.source} for number, name in enumerate(world.classes, 1)
        ],
    }
    target = world.file("coco", "annotations", f"instances_{part}.json")
    target.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True))


def _write_voc(world: World, rng: np.random.Generator, year: str, part: str, index: int) -> dict[str, Any]:
    scene = _dense_scene(world, rng, _frame(rng, world.size.dense_side), part, index)
    number = index + 1 + {"train": 0, "val": 300_000, "test": 600_000}[part]
    name = f"{number:06d}" if year == "VOC2007" else f"2008_{number:06d}"
    Image.fromarray(scene.image).save(world.file(year, "JPEGImages", f"{name}.jpg"), quality=JPEG_QUALITY)
    instances = list(_annotated(scene.instances))
    world.file(year, "Annotations", f"{name}.xml").write_text(_voc_xml(world, year, name, scene.image.shape, instances))
    # Half of the train images, of every class, have VOC's own segmentation, the others only SBD's "augmented" one.
    in_voc = part != "train" or (index + index // 10) % 2 == 0
    labels, objects = (np.zeros(scene.image.shape[:2], np.uint8) for _ in range(2))
    for number, instance in enumerate(instances, 1):
        labels[instance.visible] = instance.class_index + 1
        objects[instance.visible] = number
    void = borders(objects)
    if in_voc:
        _save_mask(labels, void, world.file(year, "SegmentationClass", f"{name}.png"))
        _save_mask(objects, void, world.file(year, "SegmentationObject", f"{name}.png"))
    if year == "VOC2012" and part == "train":
        # As `twist data prepare voc` does: VOC's own mask where there is one, else SBD's, which has no void border.
        _save_mask(labels, void & in_voc, world.file(year, "SegmentationClassAug", f"{name}.png"))
    return {"name": name, "in_voc": in_voc}


def _voc_xml(world: World, year: str, name: str, shape: tuple[int, ...], instances: list[Instance]) -> str:
    height, width, depth = shape
    text = (
        f"<annotation>\n\t<folder>{year}</folder>\n\t<filename>{name}.jpg</filename>\n"
        f"\t<source><database>built-in sample of the TWIST suite</database><annotation>{year}</annotation></source>\n"
        f"\t<size><width>{width}</width><height>{height}</height><depth>{depth}</depth></size>\n"
        "\t<segmented>1</segmented>\n"
    )
    for instance in instances:
        left, top, right, bottom = bounding_box(instance.visible)
        difficult = instance.visible_share < DIFFICULT_SHARE or instance.visible.sum() < 4 * SMALLEST_AREA
        text += (
            f"\t<object>\n\t\t<name>{escape(world.classes[instance.class_index])}</name>\n"
            f"\t\t<pose>Unspecified</pose>\n\t\t<truncated>{int(instance.truncated)}</truncated>\n"
            f"\t\t<occluded>{int(instance.visible_share < 0.95)}</occluded>\n"
            f"\t\t<difficult>{int(difficult)}</difficult>\n"
            # VOC counts pixels from 1 and includes the last one.
            f"\t\t<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
            f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>\n\t</object>\n"
        )
    return f"{text}</annotation>\n"


def _write_voc_image_sets(world: World, year: str, parts: dict[str, list[dict[str, Any]]]) -> None:
    main = {part: [item["name"] for item in items] for part, items in parts.items()}
    segmentation = {part: [item["name"] for item in items if item["in_voc"]] for part, items in parts.items()}
    for lists in (main, segmentation):
        lists["trainval"] = lists["train"] + lists["val"]
    if year == "VOC2012":
        segmentation["aug"] = [item["name"] for item in parts["train"] if not item["in_voc"]]
        segmentation["trainaug"] = main["train"]
    for folder, lists in (("Main", main), ("Segmentation", segmentation)):
        for part, names in lists.items():
            world.file(year, "ImageSets", folder, f"{part}.txt").write_text("".join(f"{n}\n" for n in sorted(names)))


def _write_cityscapes(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> None:
    height = world.size.dense_side * 2 // 3
    frame = (height, 2 * height)  # the real frames are 1024×2048
    scene = _dense_scene(world, rng, frame, part, index, crowd_share=CROWD_SHARE)
    cities = CITIES[part]
    city = cities[index % len(cities)]
    stem = f"{city}_{index // len(cities):06d}_000019"
    picture = world.file(folder, "leftImg8bit", part, city, f"{stem}_leftImg8bit.png")
    Image.fromarray(scene.image).save(picture, compress_level=1)
    objects = cityscapes_objects(scene)
    annotated = world.file(folder, "gtFine", part, city, f"{stem}_gtFine_polygons.json")
    annotated.write_text(json.dumps({"imgHeight": frame[0], "imgWidth": frame[1], "objects": objects}))
    for kind, values in cityscapes_masks(frame, objects).items():
        Image.fromarray(values).save(annotated.with_name(f"{stem}_gtFine_{kind}.png"))


def _write_ade20k(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> None:
    scene = _dense_scene(world, rng, _frame(rng, world.size.dense_side), part, index)
    name = f"ADE_{'train' if part == 'training' else 'val'}_{index + 1:08d}"
    picture = world.file(folder, "images", part, f"{name}.jpg")
    Image.fromarray(scene.image).save(picture, quality=JPEG_QUALITY)
    labels = np.zeros(scene.image.shape[:2], np.uint8)
    for instance in _annotated(scene.instances):
        labels[instance.visible] = instance.class_index + 1
    Image.fromarray(labels).save(world.file(folder, "annotations", part, f"{name}.png"))


def cityscapes_objects(scene: Scene) -> list[dict[str, Any]]:
    """`objects` of a polygons.json, back to front: later polygons cover earlier ones, holes are painted over."""
    height, width, _ = scene.image.shape
    frame = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    objects: list[dict[str, Any]] = [{"label": "road", "polygon": frame}]
    for instance in scene.instances:
        if instance.visible.sum() < SMALLEST_AREA:
            continue
        label = "static" if instance.class_index == DISTRACTOR else CITYSCAPES_NAMES[instance.class_index]
        if instance.crowd and CITYSCAPES_LABELS[label][2]:
            label += "group"
        border = outline(instance.whole)
        # Their coordinates are pixel centres, ours pixel corners: half a pixel towards the middle.
        inwards = np.clip(border.mean(0) - border, -0.5, 0.5)
        points = np.clip(np.floor(border + inwards), 0, (width - 1, height - 1)).astype(int).tolist()
        objects.append({"label": label, "polygon": points})
    return objects


def cityscapes_masks(frame: tuple[int, int], objects: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """labelIds, labelTrainIds (uint8) and instanceIds (uint16) of (H, W), painted as cityscapesScripts paints them.

    A thing's instance number is id × 1000 + its count in the image; stuff and groups keep the id.
    """
    size = (frame[1], frame[0])
    images = [Image.new("L", size, 0), Image.new("L", size, 255), Image.new("I", size, 0)]
    counts: dict[str, int] = {}
    for item in objects:
        name = item["label"].removesuffix("group")
        label_id, train_id, has_instances = CITYSCAPES_LABELS[name]
        instance_id = label_id
        if has_instances and name == item["label"]:
            instance_id = label_id * 1000 + counts.get(name, 0)
            counts[name] = counts.get(name, 0) + 1
        points = [tuple(point) for point in item["polygon"]]
        for image, value in zip(images, (label_id, train_id, instance_id)):
            ImageDraw.Draw(image).polygon(points, fill=value)
    types = (np.uint8, np.uint8, np.uint16)
    return {kind: np.asarray(image).astype(dtype) for kind, image, dtype in zip(CITYSCAPES_KINDS, images, types)}


WRITERS = {
    "unlabelled": _write_unlabelled,
    "coco": _write_coco,
    "VOC2007": _write_voc,
    "VOC2012": _write_voc,
    "cityscapes": _write_cityscapes,
    "ADEChallengeData2016": _write_ade20k,
    "imagenet": _write_imagenet,
}


def _dense_scene(
    world: World, rng: np.random.Generator, frame: tuple[int, int], part: str, index: int, *, crowd_share: float = 0.0
) -> Scene:
    source = open_source(world.source)
    classes = len(source.classes)
    placements = gathering(classes, rng, *frame, first=index % classes, crowd_share=crowd_share)
    return compose(rng, source, placements, *frame, _split(part))


def _annotated(instances: Iterable[Instance]) -> Iterable[Instance]:
    return (one for one in instances if one.class_index != DISTRACTOR and one.visible.sum() >= SMALLEST_AREA)


def _frame(rng: np.random.Generator, side: int) -> tuple[int, int]:
    """A square, a landscape or a portrait frame whose longer side is `side`, as (H, W)."""
    short = side * 3 // 4
    return ((side * 7 // 8, side * 7 // 8), (short, side), (side, short))[int(rng.integers(3))]


def _save_mask(values: NDArray[np.uint8], void: NDArray[np.bool_], path: Path) -> None:
    image = Image.fromarray(np.where(void, np.uint8(VOID), values))
    # On a greyscale image this makes it a palette image with the same numbers.
    image.putpalette(voc_palette())
    image.save(path)
