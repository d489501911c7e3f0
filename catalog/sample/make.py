"""The built-in sample: a small drawn world in the on-disk layouts of the real data sets, made from a seed.

Every image is a pure function of (seed, set, index): any number of processes writes the same bytes. Layouts:
cocodataset.org/#format-data, the VOC development kits, cityscapesScripts, Detectron2's `datasets/README.md`.
"""

import functools
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import name2label
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from numpy.typing import NDArray
from PIL import Image

from twist.catalog.data_sets import SAMPLE_JSON, VOID, read_sample
from twist.catalog.masks import voc_palette
from twist.catalog.sample.scene import (
    Instance,
    Scene,
    borders,
    bounding_box,
    compose,
    gathering,
    outline,
    polygons,
    portrait,
    run_lengths,
)  # fmt: skip
from twist.catalog.sample.shapes import CLASSES, DISTRACTOR
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.machine import cores
from twist.contracts.progress import Progress
from twist.contracts.run_folder import LOCK, temporary_folder

FORMAT_VERSION = 2
SOURCE = "shapes"
# Below this many images a second process costs more than it saves.
ALONE_BELOW = 400


class Size(NamedTuple):
    """How much is written. Sides in pixels; `dense` are the images of COCO, VOC and Cityscapes."""

    unlabelled: int
    unlabelled_side: int
    dense_train: int
    dense_val: int
    dense_side: int
    class_train: int
    class_val: int


SIZES = {
    "tiny": Size(40, 64, 24, 16, 96, 4, 2),
    "small": Size(2000, 128, 240, 80, 192, 60, 30),
    "medium": Size(10000, 128, 1200, 400, 192, 300, 100),
}
# Cityscapes' names of the sample's ten classes, two of stuff and eight of things.
CITYSCAPES_NAMES = (
    "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}
# Instances with fewer visible pixels are not annotated, those with a smaller visible share are `difficult` in VOC.
SMALLEST_AREA = 16
DIFFICULT_SHARE = 0.4
CROWD_SHARE = 0.15
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Sample:
    """A complete sample on disk. `info` is the content of its sample.json: settings, classes, counts."""

    root: Path
    info: dict[str, Any]

    def summary(self) -> str:
        """One line: what was made, of how many images, where."""
        total = sum(self.info["counts"].values())
        return (
            f"Sample of {self.info['source']} ({self.info['size']}, seed {self.info['seed']}): {total} images of "
            f"{', '.join(self.info['classes'])} in {self.root}"
        )


def make_sample(root: str | os.PathLike[str], *, size: str = "small", seed: int = 0, progress: bool = True) -> Sample:
    """Write a sample to `root`, or return the one that is there if it was made with the same settings.

    `size` is a key of `SIZES`. It is written beside `root` and moved there when it is whole; an empty folder is filled,
    its sample.json last. `UsageError`: no such size. `UserError`: `root` holds something else.
    """
    if size not in SIZES:
        raise UsageError(f'There is no sample size "{size}".{did_you_mean(size, SIZES)}')
    root = Path(root)
    settings = {"format_version": FORMAT_VERSION, "source": SOURCE, "size": size, "seed": seed}
    info = read_sample(root) if root.is_dir() else None
    if info is not None:
        differing = [key for key in settings if info.get(key) != settings[key]]
        if differing:
            what = ", ".join(f"{key} {info.get(key)} and not {settings[key]}" for key in differing)
            raise UserError(f"{root} holds another sample, of {what}: choose another folder, or remove that one.")
        return Sample(root, info)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists and is no sample: choose an empty or new folder, nothing is overwritten.")
    with temporary_folder(root.resolve()) as temporary:
        world = World(temporary, seed, SIZES[size])
        counts = sets(world.size)
        returned: dict[str, list[Any]] = {name: [] for name in counts}
        items = [(name, index) for name, count in counts.items() for index in range(count)]
        with Progress(f"sample of {SOURCE}", total=len(items), unit="image", quiet=not progress) as bar:
            for (name, _), value in zip(items, _write_images(world, items), strict=True):
                returned[name].append(value)
                bar.advance()
        _write_common_files(world, returned)
        licence = "drawn by this program: no rights of others"
        info = {**settings, "classes": list(CLASSES), "counts": counts, "licence": licence}
        files.write_json(temporary / SAMPLE_JSON, info)
        (temporary / LOCK).unlink()
        if root.exists():  # empty; a working directory or a mounted one cannot be replaced, so this is not at once
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == SAMPLE_JSON):
                shutil.move(path, root)
        else:
            temporary.replace(root)
    return Sample(root, info)


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


class World(NamedTuple):
    """Where a sample is being written, from which seed and how much."""

    root: Path
    seed: int
    size: Size

    def file(self, *parts: str) -> Path:
        """A path below the root, its folder made."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _write_images(world: World, items: list[tuple[str, int]]) -> Iterator[Any]:
    """Write every image, in as many processes as there are cores; what `write_image` returns, in the order of items."""
    write = functools.partial(write_image, world)
    if len(items) < ALONE_BELOW:
        yield from map(write, items)
        return
    # As torch's DataLoader does: fork where it exists, so that a caller needs no `if __name__ == "__main__"`.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(min(cores(), 16), mp_context=multiprocessing.get_context(method))
    try:
        yield from pool.map(write, items, chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def write_image(world: World, item: tuple[str, int]) -> Any:
    """Compose and write one image, (its set, its number), with its own annotations; what the common files need."""
    set_name, index = item
    rng = np.random.default_rng([world.seed, zlib.crc32(set_name.encode()), index])
    folder, _, part = set_name.partition("/")
    return WRITERS[folder](world, rng, folder, part, index)


def _write_common_files(world: World, returned: dict[str, list[Any]]) -> None:
    """The files that belong to a whole set: COCO's JSON, VOC's image sets, ImageNet's subset lists."""
    for part in ("train2017", "val2017"):
        _write_coco_annotations(world, part, returned[f"coco/{part}"])
    for year, parts in (("VOC2007", ("train", "val", "test")), ("VOC2012", ("train", "val"))):
        _write_voc_image_sets(world, year, {part: returned[f"{year}/{part}"] for part in parts})
    for percent in (1, 10):  # as SimCLR's lists: file names of the train set, at least one a class
        count = max(1, round(world.size.class_train * percent / 100))
        _write_lines(world.file("imagenet", f"{percent}percent.txt"), returned["imagenet/train"][: count * 10])


def _write_lines(path: Path, names: Iterable[str]) -> None:
    path.write_text("".join(f"{name}\n" for name in sorted(names)))


def _write_unlabelled(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> None:  # noqa: ARG001
    side = world.size.unlabelled_side
    # Classes in turn, so that they are as balanced as ImageNet's; the name does not tell.
    scene = compose(rng, portrait(index % len(CLASSES), rng, side, side), side, side)
    _save(scene.image, world.file(folder, f"{index:06d}.jpg"))


def _write_imagenet(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> str:
    number, class_index = divmod(index, len(CLASSES))
    frame = _frame(rng, world.size.unlabelled_side)
    scene = compose(rng, portrait(class_index, rng, *frame), *frame)
    file_name = f"{CLASSES[class_index]}_{number:05d}.jpg"
    _save(scene.image, world.file(folder, part, CLASSES[class_index], file_name))
    return file_name


def _write_coco(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> dict[str, Any]:
    scene = _dense_scene(rng, _frame(rng, world.size.dense_side), index, crowd_share=CROWD_SHARE)
    height, width, _channels = scene.image.shape
    # COCO's numbers are sparse; val begins where no train number can be.
    image_id = 7 + 3 * index + (0 if part == "train2017" else 500_000)
    file_name = f"{image_id:012d}.jpg"
    _save(scene.image, world.file(folder, part, file_name))
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
        "info": {"description": f"built-in sample of the TWIST suite, {SOURCE}, {part}", "version": "1.0"},
        "licenses": [{"id": 1, "name": "see sample.json", "url": ""}],
        "images": [item["image"] for item in items],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": name, "supercategory": SOURCE} for number, name in enumerate(CLASSES, 1)],
    }
    target = world.file("coco", "annotations", f"instances_{part}.json")
    target.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True))


def _write_voc(world: World, rng: np.random.Generator, year: str, part: str, index: int) -> dict[str, Any]:
    scene = _dense_scene(rng, _frame(rng, world.size.dense_side), index)
    number = index + 1 + {"train": 0, "val": 300_000, "test": 600_000}[part]
    name = f"{number:06d}" if year == "VOC2007" else f"2008_{number:06d}"
    _save(scene.image, world.file(year, "JPEGImages", f"{name}.jpg"))
    instances = list(_annotated(scene.instances))
    world.file(year, "Annotations", f"{name}.xml").write_text(_voc_xml(year, name, scene.image.shape, instances))
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


def _voc_xml(year: str, name: str, shape: tuple[int, ...], instances: list[Instance]) -> str:
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
            f"\t<object>\n\t\t<name>{escape(CLASSES[instance.class_index])}</name>\n"
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
            _write_lines(world.file(year, "ImageSets", folder, f"{part}.txt"), names)


def _write_cityscapes(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> None:
    height = world.size.dense_side * 2 // 3
    frame = (height, 2 * height)  # the real frames are 1024×2048
    scene = _dense_scene(rng, frame, index, crowd_share=CROWD_SHARE)
    cities = CITIES[part]
    city = cities[index % len(cities)]
    stem = f"{city}_{index // len(cities):06d}_000019"
    picture = world.file(folder, "leftImg8bit", part, city, f"{stem}_leftImg8bit.png")
    Image.fromarray(scene.image).save(picture, compress_level=1)
    annotated = world.file(folder, "gtFine", part, city, f"{stem}_gtFine_polygons.json")
    content = {"imgHeight": frame[0], "imgWidth": frame[1], "objects": _cityscapes_objects(scene)}
    annotated.write_text(json.dumps(content))
    annotation = Annotation()
    annotation.fromJsonText(annotated.read_text())
    for kind, paint, names, dtype in (
        ("labelIds", createLabelImage, "ids", np.uint8),
        ("labelTrainIds", createLabelImage, "trainIds", np.uint8),
        ("instanceIds", createInstanceImage, "ids", np.uint16),
    ):
        values = np.asarray(paint(annotation, names)).astype(dtype)
        Image.fromarray(values).save(annotated.with_name(f"{stem}_gtFine_{kind}.png"))


def _write_ade20k(world: World, rng: np.random.Generator, folder: str, part: str, index: int) -> None:
    scene = _dense_scene(rng, _frame(rng, world.size.dense_side), index)
    name = f"ADE_{'train' if part == 'training' else 'val'}_{index + 1:08d}"
    picture = world.file(folder, "images", part, f"{name}.jpg")
    _save(scene.image, picture)
    labels = np.zeros(scene.image.shape[:2], np.uint8)
    for instance in _annotated(scene.instances):
        labels[instance.visible] = instance.class_index + 1
    Image.fromarray(labels).save(world.file(folder, "annotations", part, f"{name}.png"))


def _cityscapes_objects(scene: Scene) -> list[dict[str, Any]]:
    """`objects` of a polygons.json, back to front: later polygons cover earlier ones, holes are painted over."""
    height, width, _ = scene.image.shape
    frame = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    objects: list[dict[str, Any]] = [{"label": "road", "polygon": frame}]
    for instance in scene.instances:
        if instance.visible.sum() < SMALLEST_AREA:
            continue
        label = "static" if instance.class_index == DISTRACTOR else CITYSCAPES_NAMES[instance.class_index]
        if instance.crowd and name2label[label].hasInstances:
            label += "group"
        border = outline(instance.whole)
        # Their coordinates are pixel centres, ours pixel corners: half a pixel towards the middle.
        inwards = np.clip(border.mean(0) - border, -0.5, 0.5)
        points = np.clip(np.floor(border + inwards), 0, (width - 1, height - 1)).astype(int).tolist()
        objects.append({"label": label, "polygon": points})
    return objects


WRITERS = {
    "unlabelled": _write_unlabelled,
    "coco": _write_coco,
    "VOC2007": _write_voc,
    "VOC2012": _write_voc,
    "cityscapes": _write_cityscapes,
    "ADEChallengeData2016": _write_ade20k,
    "imagenet": _write_imagenet,
}


def _dense_scene(rng: np.random.Generator, frame: tuple[int, int], index: int, *, crowd_share: float = 0.0) -> Scene:
    placements = gathering(len(CLASSES), rng, *frame, first=index % len(CLASSES), crowd_share=crowd_share)
    return compose(rng, placements, *frame)


def _annotated(instances: Iterable[Instance]) -> Iterable[Instance]:
    return (one for one in instances if one.class_index != DISTRACTOR and one.visible.sum() >= SMALLEST_AREA)


def _frame(rng: np.random.Generator, side: int) -> tuple[int, int]:
    """A square, a landscape or a portrait frame whose longer side is `side`, as (H, W)."""
    short = side * 3 // 4
    return ((side * 7 // 8, side * 7 // 8), (short, side), (side, short))[int(rng.integers(3))]


def _save(image: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(image).save(path, quality=JPEG_QUALITY)


def _save_mask(values: NDArray[np.uint8], void: NDArray[np.bool_], path: Path) -> None:
    image = Image.fromarray(np.where(void, np.uint8(VOID), values))
    # On a greyscale image this makes it a palette image with the same numbers.
    image.putpalette(voc_palette())
    image.save(path)
