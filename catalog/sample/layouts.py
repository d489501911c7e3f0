"""The on-disk layouts of the real data sets, written from composed scenes so that the real loaders read them.

Sources of the layouts: the COCO data format page (cocodataset.org/#format-data), the VOC development kits,
cityscapesScripts (`helpers/labels.py`, `preparation/json2labelImg.py`, `json2instanceImg.py`), Detectron2's
`datasets/README.md` for the tree. Every image is a pure function of (seed, set, index), so any order and any number of
processes write the same bytes.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from twist.catalog import masks
from twist.catalog.sample.scene import DISTRACTOR, Instance, Scene, Source, Split, compose, gathering, portrait


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


@dataclass(frozen=True)
class Item:
    """One image to write: its set (a key of `sets`) and its number in it."""

    set_name: str
    index: int

    @property
    def dataset(self) -> str:
        return self.set_name.partition("/")[0]

    @property
    def part(self) -> str:
        return self.set_name.partition("/")[2]

    @property
    def split(self) -> Split:
        return "val" if self.part.startswith(("val", "test")) else "train"


# Cityscapes names for the ten classes of a sample: two of stuff, then the eight things (cityscapesScripts labels.py).
CITYSCAPES_NAMES = (
    "traffic light",
    "traffic sign",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
# name → (id, trainId, has instances), the rows of labels.py that a sample uses. What belongs to no class is `static`.
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
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}
# Instances with fewer visible pixels are not annotated, those with a smaller visible share are `difficult` in VOC.
SMALLEST_AREA = 16
DIFFICULT_SHARE = 0.4
CROWD_SHARE = 0.15


def sets(size: Size) -> dict[str, int]:
    """Every set of images of a sample and how many images it has."""
    quarter = size.dense_train // 4
    return {
        "unlabelled": size.unlabelled,
        "coco/train2017": size.dense_train,
        "coco/val2017": size.dense_val,
        "VOC2007/train": quarter,
        "VOC2007/val": quarter,
        "VOC2007/test": size.dense_val,
        "VOC2012/train": size.dense_train,
        "VOC2012/val": size.dense_val,
        "cityscapes/train": size.dense_train,
        "cityscapes/val": size.dense_val,
        "imagenet/train": size.class_train * 10,
        "imagenet/val": size.class_val * 10,
    }


def write_item(world: World, item: Item) -> Any:
    """Compose and write one image with its own annotation files; returns what the set's common file needs."""
    rng = np.random.default_rng([world.seed, zlib.crc32(item.set_name.encode()), item.index])
    writer = {
        "unlabelled": _write_unlabelled,
        "coco": _write_coco_image,
        "VOC2007": _write_voc_image,
        "VOC2012": _write_voc_image,
        "cityscapes": _write_cityscapes_image,
        "imagenet": _write_imagenet_image,
    }[item.dataset]
    return writer(world, rng, item)


def write_common_files(world: World, returned: dict[str, list[Any]]) -> None:
    """The files that belong to a whole set: COCO's JSON, VOC's image sets, ImageNet's subset lists."""
    for part in ("train2017", "val2017"):
        _write_coco_annotations(world, part, returned[f"coco/{part}"])
    for year, parts in (("VOC2007", ("train", "val", "test")), ("VOC2012", ("train", "val"))):
        _write_voc_image_sets(world.root / year, {part: returned[f"{year}/{part}"] for part in parts})
    _write_imagenet_subsets(world, returned["imagenet/train"])


@functools.cache
def open_source(name: str) -> Source:
    """The source of a name, opened once a process."""
    if name == "shapes":
        from twist.catalog.sample.shapes import Shapes

        return Shapes()
    from twist.catalog.sample.photos import Photos

    return Photos()


def _write_unlabelled(world: World, rng: np.random.Generator, item: Item) -> None:
    source, side = open_source(world.source), world.size.unlabelled_side
    # Classes in turn, so that they are as balanced as ImageNet's; the name does not tell.
    placements = portrait(item.index % len(source.classes), rng, side, side)
    scene = compose(rng, source, placements, side, side, item.split)
    _save_jpeg(scene.image, world.root / "unlabelled" / f"{item.index:06d}.jpg")


def _write_imagenet_image(world: World, rng: np.random.Generator, item: Item) -> str:
    source, side = open_source(world.source), world.size.unlabelled_side
    class_index = item.index % len(source.classes)
    height, width = _frame(rng, side)
    scene = compose(rng, source, portrait(class_index, rng, height, width), height, width, item.split)
    name = source.classes[class_index]
    file_name = f"{name}_{item.index // len(source.classes):05d}.jpg"
    _save_jpeg(scene.image, world.root / "imagenet" / item.part / name / file_name)
    return file_name


def _write_imagenet_subsets(world: World, names: list[str]) -> None:
    """`1percent.txt` and `10percent.txt` as SimCLR's lists are: file names of the train set, at least one a class."""
    for percent in (1, 10):
        count = max(1, round(world.size.class_train * percent / 100))
        chosen = sorted(names[: count * len(world.classes)])
        (world.root / "imagenet" / f"{percent}percent.txt").write_text("".join(f"{name}\n" for name in chosen))


def _write_coco_image(world: World, rng: np.random.Generator, item: Item) -> dict[str, Any]:
    scene = _dense_scene(world, rng, _frame(rng, world.size.dense_side), item, crowd_share=CROWD_SHARE)
    height, width, _channels = scene.image.shape
    # COCO's numbers are sparse; val begins where no train number can be.
    image_id = 7 + 3 * item.index + (0 if item.part == "train2017" else 500_000)
    file_name = f"{image_id:012d}.jpg"
    _save_jpeg(scene.image, world.root / "coco" / item.part / file_name)
    annotations = []
    crowds: dict[int, NDArray[np.bool_]] = {}
    for instance in _annotated(scene.instances):
        if instance.crowd:
            crowds[instance.class_index] = crowds.get(instance.class_index, False) | instance.visible
        else:
            shapes = [polygon.ravel().tolist() for polygon in masks.polygons(instance.visible)]
            if shapes:
                annotations.append(_coco_annotation(instance.class_index, instance.visible, shapes, iscrowd=0))
    for class_index, crowd in crowds.items():
        annotations.append(_coco_annotation(class_index, crowd, masks.run_lengths(crowd), iscrowd=1))
    image = {"id": image_id, "file_name": file_name, "height": height, "width": width, "license": 1}
    return {"image": image, "annotations": annotations}


def _coco_annotation(class_index: int, mask: NDArray[np.bool_], segmentation: Any, *, iscrowd: int) -> dict[str, Any]:
    left, top, right, bottom = masks.bounding_box(mask)
    return {
        "category_id": class_index + 1,
        "segmentation": segmentation,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()),
        "iscrowd": iscrowd,
    }


def _write_coco_annotations(world: World, part: str, items: list[dict[str, Any]]) -> None:
    annotations: list[dict[str, Any]] = []
    for item in items:
        for annotation in item["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": item["image"]["id"], **annotation})
    content = {
        "info": {"description": f"built-in sample of the TWIST suite, {world.source}, {part}", "version": "1.0"},
        "licenses": [{"id": 1, "name": "see sample.json", "url": ""}],
        "images": [item["image"] for item in items],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": world.source} for number, name in enumerate(world.classes, 1)
        ],
    }
    target = world.root / "coco" / "annotations" / f"instances_{part}.json"
    target.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True))


def _write_voc_image(world: World, rng: np.random.Generator, item: Item) -> dict[str, Any]:
    scene = _dense_scene(world, rng, _frame(rng, world.size.dense_side), item)
    year = item.dataset
    number = item.index + 1 + {"train": 0, "val": 300_000, "test": 600_000}[item.part]
    name = f"{number:06d}" if year == "VOC2007" else f"2008_{number:06d}"
    root = world.root / year
    _save_jpeg(scene.image, root / "JPEGImages" / f"{name}.jpg")
    instances = list(_annotated(scene.instances))
    (root / "Annotations" / f"{name}.xml").write_text(_voc_xml(world, year, name, scene.image.shape, instances))
    # Half of the train images, of every class, have VOC's own segmentation, the others only SBD's "augmented" one.
    in_voc = item.part != "train" or (item.index + item.index // 10) % 2 == 0
    labels, objects = _voc_maps(scene.image.shape, instances)
    void = masks.borders(objects)
    if in_voc:
        _save_palette(np.where(void, np.uint8(255), labels), root / "SegmentationClass" / f"{name}.png")
        _save_palette(np.where(void, np.uint8(255), objects), root / "SegmentationObject" / f"{name}.png")
    if year == "VOC2012" and item.part == "train":
        # As `twist data prepare voc` does: VOC's own map where there is one, else SBD's, which has no void border.
        values = np.where(void & in_voc, np.uint8(255), labels)
        _save_palette(values, root / "SegmentationClassAug" / f"{name}.png")
    return {"name": name, "in_voc": in_voc}


def _voc_maps(shape: tuple[int, ...], instances: Iterable[Instance]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Class and object numbers, 0 for background, both (H, W) uint8."""
    labels, objects = np.zeros(shape[:2], np.uint8), np.zeros(shape[:2], np.uint8)
    for number, instance in enumerate(instances, 1):
        labels[instance.visible] = instance.class_index + 1
        objects[instance.visible] = number
    return labels, objects


def _voc_xml(world: World, year: str, name: str, shape: tuple[int, ...], instances: list[Instance]) -> str:
    height, width, depth = shape
    lines = [
        "<annotation>",
        f"\t<folder>{year}</folder>",
        f"\t<filename>{name}.jpg</filename>",
        f"\t<source><database>built-in sample of the TWIST suite</database><annotation>{year}</annotation></source>",
        f"\t<size><width>{width}</width><height>{height}</height><depth>{depth}</depth></size>",
        "\t<segmented>1</segmented>",
    ]
    for instance in instances:
        left, top, right, bottom = masks.bounding_box(instance.visible)
        difficult = instance.visible_share < DIFFICULT_SHARE or instance.visible.sum() < 4 * SMALLEST_AREA
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(world.classes[instance.class_index])}</name>",
            "\t\t<pose>Unspecified</pose>",
            f"\t\t<truncated>{int(instance.truncated)}</truncated>",
            f"\t\t<occluded>{int(instance.visible_share < 0.95)}</occluded>",
            f"\t\t<difficult>{int(difficult)}</difficult>",
            # VOC counts pixels from 1 and includes the last one.
            f"\t\t<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
            f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _write_voc_image_sets(root: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    main = {part: [item["name"] for item in items] for part, items in parts.items()}
    main["trainval"] = main["train"] + main["val"]
    segmentation = {part: [item["name"] for item in items if item["in_voc"]] for part, items in parts.items()}
    segmentation["trainval"] = segmentation["train"] + segmentation["val"]
    if root.name == "VOC2012":
        segmentation["aug"] = [item["name"] for item in parts["train"] if not item["in_voc"]]
        segmentation["trainaug"] = main["train"]
    for folder, lists in (("Main", main), ("Segmentation", segmentation)):
        for part, names in lists.items():
            (root / "ImageSets" / folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in sorted(names)))


def _write_cityscapes_image(world: World, rng: np.random.Generator, item: Item) -> None:
    height = world.size.dense_side * 2 // 3
    frame = (height, 2 * height)  # the real frames are 1024×2048
    scene = _dense_scene(world, rng, frame, item, crowd_share=CROWD_SHARE)
    cities = CITIES[item.part]
    city = cities[item.index % len(cities)]
    stem = f"{city}_{item.index // len(cities):06d}_000019"
    Image.fromarray(scene.image).save(
        world.root / "cityscapes" / "leftImg8bit" / item.part / city / f"{stem}_leftImg8bit.png", compress_level=1
    )
    objects = cityscapes_objects(scene)
    annotated = world.root / "cityscapes" / "gtFine" / item.part / city
    content = {"imgHeight": frame[0], "imgWidth": frame[1], "objects": objects}
    (annotated / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
    for kind, values in cityscapes_maps(frame, objects).items():
        Image.fromarray(values).save(annotated / f"{stem}_gtFine_{kind}.png")


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
        outline = masks.simplify(masks.outlines(instance.whole)[0], tolerance=0.6)
        # Their coordinates are pixel centres, ours pixel corners: half a pixel towards the middle.
        inwards = np.clip(outline.mean(0) - outline, -0.5, 0.5)
        points = np.clip(np.floor(outline + inwards), 0, (width - 1, height - 1)).astype(int).tolist()
        objects.append({"label": label, "polygon": points})
    return objects


def cityscapes_maps(frame: tuple[int, int], objects: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """labelIds, labelTrainIds (uint8) and instanceIds (uint16) of (H, W), painted as cityscapesScripts paints them.

    A thing's instance number is id × 1000 + its count in the image; stuff and groups keep the id.
    """
    size = (frame[1], frame[0])
    images = {kind: Image.new("L" if kind != "instanceIds" else "I", size, 0) for kind in CITYSCAPES_KINDS}
    images["labelTrainIds"].paste(255, (0, 0, *size))
    brushes = {kind: ImageDraw.Draw(image) for kind, image in images.items()}
    counts: dict[str, int] = {}
    for item in objects:
        group = item["label"].endswith("group")
        name = item["label"].removesuffix("group")
        label_id, train_id, has_instances = CITYSCAPES_LABELS[name]
        instance_id = label_id
        if has_instances and not group:
            instance_id = label_id * 1000 + counts.get(name, 0)
            counts[name] = counts.get(name, 0) + 1
        points = [tuple(point) for point in item["polygon"]]
        for kind, value in zip(CITYSCAPES_KINDS, (label_id, train_id, instance_id)):
            brushes[kind].polygon(points, fill=value)
    return {
        kind: np.asarray(image).astype(np.uint16 if kind == "instanceIds" else np.uint8)
        for kind, image in images.items()
    }


CITYSCAPES_KINDS = ("labelIds", "labelTrainIds", "instanceIds")


def folders(world: World) -> list[Path]:
    """Every folder of a sample, so that writers need not look."""
    relative = ["unlabelled", "coco/annotations", "coco/train2017", "coco/val2017"]
    for year in ("VOC2007", "VOC2012"):
        kinds = ["Annotations", "JPEGImages", "ImageSets/Main", "ImageSets/Segmentation"]
        kinds += ["SegmentationClass", "SegmentationObject"] + (["SegmentationClassAug"] if year == "VOC2012" else [])
        relative += [f"{year}/{kind}" for kind in kinds]
    for part, cities in CITIES.items():
        relative += [f"cityscapes/{kind}/{part}/{city}" for kind in ("leftImg8bit", "gtFine") for city in cities]
    relative += [f"imagenet/{part}/{name}" for part in ("train", "val") for name in world.classes]
    return [world.root / path for path in relative]


def _dense_scene(
    world: World, rng: np.random.Generator, frame: tuple[int, int], item: Item, *, crowd_share: float = 0.0
) -> Scene:
    source = open_source(world.source)
    classes = len(source.classes)
    placements = gathering(classes, rng, *frame, first=item.index % classes, crowd_share=crowd_share)
    return compose(rng, source, placements, *frame, item.split)


def _annotated(instances: Iterable[Instance]) -> Iterable[Instance]:
    return (
        instance
        for instance in instances
        if instance.class_index != DISTRACTOR and instance.visible.sum() >= SMALLEST_AREA
    )


def _frame(rng: np.random.Generator, side: int) -> tuple[int, int]:
    """A square, a landscape or a portrait frame whose longer side is `side`, as (H, W)."""
    short = side * 3 // 4
    return ((side * 7 // 8, side * 7 // 8), (short, side), (side, short))[int(rng.integers(3))]


def _save_jpeg(image: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(image).save(path, quality=92)


def _save_palette(values: NDArray[np.uint8], path: Path) -> None:
    image = Image.fromarray(values)
    # On a greyscale image this makes it a palette image with the same numbers.
    image.putpalette(masks.voc_palette())
    image.save(path)
