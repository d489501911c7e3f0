"""Time of `twist data check` on healthy trees with every file of the real data sets.

    python -m benchmarks.data_check [--dataset coco voc cityscapes imagenet] [--repeats 5] [--folder DISK] [--json FILE]

The trees have the real names, counts and layouts: 123,287 images and 450 MB of annotations for COCO, 1,331,167 images
for ImageNet. Every file is there by itself for the file system; its content is that of a few made ones, of the real
sizes in pixels, by hard links (a disk with hard links, 3 GB and 1.6 million files free). Each check is a process of
its own, start included. What was just written lies in the page cache, so a disk's own speed is not in the figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from cityscapesscripts.helpers.labels import labels as cityscapes_labels
from numpy.typing import NDArray
from PIL import Image

from benchmarks.side_by_side import Times, heading, write
from twist.catalog.data_sets import DATA_SETS
from twist.catalog.masks import voc_palette

# Annotations of the published files, and numbers in an outline such that train's has the published 450 MB.
COCO_ANNOTATIONS = {"train2017": 860_001, "val2017": 36_781}
OUTLINE = 56
# ext4 takes 65,000 names of one file.
NAMES_A_FILE = 50_000


class Twins:
    """One content under many names, as hard links: for the file system each is a file."""

    def __init__(self, folder: Path, name: str, write: Callable[[Path], Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._first = folder / name
        write(self._first)
        self._content, self._named = self._first.read_bytes(), 0

    def name(self, path: Path) -> None:
        if self._named == NAMES_A_FILE:
            self._first.unlink()
            self._first.write_bytes(self._content)
            self._named = 0
        os.link(self._first, path)
        self._named += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", choices=sorted(TREES), default=list(TREES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the trees are made, and removed again")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Times] = {}
    print(heading("Seconds of `twist data check`"))
    for dataset in given.dataset:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            root = Path(folder) / "data"
            TREES[dataset](root, Path(folder) / "first")
            seconds = [_check(dataset, root) for _ in range(given.repeats)]
        times = Times(statistics.median(seconds), min(seconds), max(seconds), len(seconds))
        found[dataset] = times
        print(f"{dataset:12} {times.median_s:.1f} s ({times.least_s:.1f}–{times.most_s:.1f} s, n = {times.n})")
    write(given.json, {"times": found})


def _check(dataset: str, root: Path) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "twist", "data", "check", dataset, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    # A tree with a mistake in it would be timed on another path than a user's.
    if done.returncode != 0:
        sys.exit(f"The made tree is not healthy:\n{done.stdout}{done.stderr}")
    return took


# ---------------------------------------------------------------------------------------------------------------------
# Contents


def photograph(width: int, height: int) -> Image.Image:
    """Smooth noise with grain: about as hard to compress as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.normal(0, 1, smooth.shape).round().astype(np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def _jpeg(width: int, height: int) -> Callable[[Path], Any]:
    return lambda path: photograph(width, height).save(path, quality=92)


def _stripes(values: Iterable[int], width: int, height: int) -> NDArray[np.uint8]:
    """(height, width) uint8: one stripe for each value."""
    chosen = np.array([*values], dtype=np.uint8)
    return np.broadcast_to(chosen[np.arange(width) * len(chosen) // width], (height, width)).copy()


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def counts_of(data_set: str) -> dict[str, int]:
    """Images of each published split."""
    return {name: split.count or 0 for name, split in DATA_SETS[data_set].splits.items()}


def make_coco(root: Path, first: Path) -> None:
    picture = Twins(first, "picture.jpg", _jpeg(640, 480))
    rng = np.random.default_rng(0)
    for split, count in counts_of("coco").items():
        folder = root / "coco" / split
        folder.mkdir(parents=True)
        images = []
        for number in range(1, count + 1):
            name = f"{number:012d}.jpg"
            picture.name(folder / name)
            images.append({"license": 3, "file_name": name, "height": 480, "width": 640, "id": number})
        annotations = []
        for number in range(COCO_ANNOTATIONS[split]):
            outline = rng.uniform(0, 480, OUTLINE).round(2).tolist()
            annotations.append(
                {
                    "segmentation": [outline],
                    "area": 702.1,
                    "iscrowd": 0,
                    "image_id": 1 + number % count,
                    "bbox": [473.07, 395.93, 38.65, 28.67],
                    "category_id": 1 + number % 80,
                    "id": number + 1,
                }
            )
        categories = [{"supercategory": "thing", "id": number, "name": f"thing {number}"} for number in range(1, 81)]
        file = root / "coco" / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def make_voc(root: Path, first: Path) -> None:
    picture = Twins(first, "picture.jpg", _jpeg(500, 375))
    boxes = Twins(first, "boxes.xml", lambda path: path.write_text(_voc_boxes()))

    def save_map(path: Path) -> None:
        image = Image.fromarray(_stripes((*range(21), 255), 500, 375), "P")
        image.putpalette(voc_palette())
        image.save(path)

    label_map = Twins(first, "map.png", save_map)
    lists: dict[str, list[str]] = {}
    for year, parts in (("VOC2007", counts_of("voc2007")), ("VOC2012", counts_of("voc2012"))):
        folder = root / year
        for part in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation"):
            (folder / part).mkdir(parents=True)
        prefix = "" if year == "VOC2007" else "2008_"
        lists, total = {}, 0
        for part, count in parts.items():
            lists[part] = [f"{prefix}{total + number:06d}" for number in range(1, count + 1)]
            total += count
        _write_lists(folder / "ImageSets" / "Main", lists)
        # VOC 2012 has images without boxes, for its other tasks; SBD's list names some of them.
        more = [f"{prefix}{total + number:06d}" for number in range(1, 5_586)] if year == "VOC2012" else []
        names = sorted({name for part in lists.values() for name in part})
        for name in [*names, *more]:
            picture.name(folder / "JPEGImages" / f"{name}.jpg")
        for name in names:
            boxes.name(folder / "Annotations" / f"{name}.xml")
    counts = counts_of("voc2012-aug")
    train, val = counts["train"], counts["val"]
    segmented = {"train": names[:train], "val": names[train : train + val]}
    others = [name for name in [*names, *more] if name not in set(segmented["val"])]
    segmented["trainaug"] = others[: counts["trainaug"]]
    _write_lists(folder / "ImageSets" / "Segmentation", segmented)
    for maps, parts_of in (("SegmentationClass", ("train", "val")), ("SegmentationClassAug", ("trainaug",))):
        (folder / maps).mkdir()
        for part in parts_of:
            for name in segmented[part]:
                label_map.name(folder / maps / f"{name}.png")


def _write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    for part, names in lists.items():
        (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in sorted(names)))


def _voc_boxes() -> str:
    box = "<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>300</xmax><ymax>310</ymax></bndbox>"
    objects = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>{box}</object>"
        for name in ("aeroplane", "bicycle", "bird")
    )
    size = "<size><width>500</width><height>375</height><depth>3</depth></size>"
    return f"<annotation><folder>VOC</folder>{size}<segmented>0</segmented>{objects}</annotation>"


def make_cityscapes(root: Path, first: Path) -> None:
    width, height = 2048, 1024
    to_train_id = np.full(256, 255, dtype=np.uint8)
    for label in cityscapes_labels:
        if label.id >= 0 and 0 <= label.trainId < 255:
            to_train_id[label.id] = label.trainId
    ids = _stripes([label.id for label in cityscapes_labels if label.id >= 0], width, height)
    sides = {"imgHeight": height, "imgWidth": width}
    outlines = [{"label": "road", "polygon": [[x, x % 1024] for x in range(500)]} for _ in range(60)]
    kinds = {
        "polygons.json": lambda path: path.write_text(json.dumps({**sides, "objects": outlines})),
        "labelIds.png": lambda path: Image.fromarray(ids).save(path),
        "instanceIds.png": lambda path: Image.fromarray(ids.astype(np.uint16)).save(path),
        "labelTrainIds.png": lambda path: Image.fromarray(to_train_id[ids]).save(path),
    }
    truths = {kind: Twins(first, kind, write) for kind, write in kinds.items()}
    picture = Twins(first, "picture.png", lambda path: photograph(width, height).save(path))
    for split, count in counts_of("cityscapes").items():
        for number in range(count):
            city = f"city{number % 18:02d}"
            pictures, annotated = (root / "cityscapes" / part / split / city for part in ("leftImg8bit", "gtFine"))
            pictures.mkdir(parents=True, exist_ok=True)
            annotated.mkdir(parents=True, exist_ok=True)
            stem = f"{city}_{number:06d}_000019"
            picture.name(pictures / f"{stem}_leftImg8bit.png")
            for kind, truth in truths.items():
                truth.name(annotated / f"{stem}_gtFine_{kind}")


def make_imagenet(root: Path, first: Path) -> None:
    picture = Twins(first, "picture.JPEG", _jpeg(500, 375))
    names = []
    classes = 1_000
    for split, count in counts_of("imagenet").items():
        for index in range(classes):
            wordnet = f"n{1_440_764 + index:08d}"
            folder = root / "imagenet" / split / wordnet
            folder.mkdir(parents=True)
            # As evenly as the count divides: the first classes have one more.
            for number in range(count // classes + (index < count % classes)):
                stem = wordnet if split == "train" else f"ILSVRC2012_val_{index}"
                name = f"{stem}_{number}.JPEG"
                picture.name(folder / name)
                if split == "train":
                    names.append(name)
    for file, lines in DATA_SETS["imagenet"].subsets.items():
        chosen = names[:: len(names) // lines][:lines]
        (root / "imagenet" / file).write_text("".join(f"{name}\n" for name in chosen))


TREES: dict[str, Callable[[Path, Path], None]] = {
    "coco": make_coco,
    "voc": make_voc,
    "cityscapes": make_cityscapes,
    "imagenet": make_imagenet,
}


if __name__ == "__main__":
    main()
