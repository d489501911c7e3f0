"""The name of the data under a root: the same wherever they lie, another one for other data, none for half of them."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from imagenet_tree import write_tree
from made_records import make_record
from tiny_trees import make_cityscapes, make_coco, make_voc_detection, make_voc_segmentation

from twist.catalog.check import data_of, identify_data

SETS = [("coco",), ("voc2007", "voc2012"), ("voc2012-aug",), ("cityscapes",), ("imagenet",)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "root"
    make_coco(root)
    make_voc_detection(root)
    make_voc_segmentation(root)
    make_cityscapes(root)
    write_tree(root / "imagenet")
    return root


@pytest.fixture
def tree(made: Path, tmp_path: Path) -> Path:
    """A copy to change; files are of now, not of when they were made."""
    return shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copyfile)


def test_names_are_those_that_records_hold(tmp_path: Path) -> None:
    """Golden: made by the version before data sets were rows of a table, on files of these names and sizes."""
    names = {
        "coco/annotations": ["instances_train2017.json", "instances_val2017.json"],
        "coco/val2017": [f"{number:012d}.jpg" for number in range(40)],
        "VOC2007/JPEGImages": [f"{number:06d}.jpg" for number in range(40)],
        "VOC2007/Annotations": [f"{number:06d}.xml" for number in range(40)],
        "VOC2012/JPEGImages": [f"2008_{number:06d}.jpg" for number in range(40)],
        "VOC2012/Annotations": [f"2008_{number:06d}.xml" for number in range(40)],
        **{
            f"cityscapes/leftImg8bit/{split}/{city}": [f"{city}_{n:06d}_000019_leftImg8bit.png" for n in range(20)]
            for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau"))
        },
        **{f"imagenet/{s}/n{c:02d}": [f"{c}_{n}.JPEG" for n in range(3)] for s in ("train", "val") for c in range(20)},
    }
    for folder, files in names.items():
        (tmp_path / folder).mkdir(parents=True)
        for number, file in enumerate(files):
            (tmp_path / folder / file).write_bytes(b"x" * (7 * number % 11 + 1))
    lists = {
        "VOC2007/ImageSets/Main/trainval": ("", 0, 24), "VOC2007/ImageSets/Main/test": ("", 24, 40),
        "VOC2012/ImageSets/Main/trainval": ("2008_", 0, 40),
        "VOC2012/ImageSets/Segmentation/trainaug": ("2008_", 0, 30),
        "VOC2012/ImageSets/Segmentation/val": ("2008_", 30, 40),
    }  # fmt: skip
    for file, (prefix, start, end) in lists.items():
        path = tmp_path / f"{file}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{prefix}{number:06d}\n" for number in range(start, end)))
    (tmp_path / "imagenet" / "1percent.txt").write_text("0_0.JPEG\n")
    found = [identify_data(names, tmp_path) for names in SETS]
    assert [*found, identify_data(("imagenet",), tmp_path, subset="1percent.txt")] == GOLDEN


GOLDEN = [
    *("coco 1c1c6f7e072c", "voc2007 + voc2012 f79f8a6579d8", "voc2012-aug 6fd7a9ba6363", "cityscapes cdddd68c12ae"),
    *("imagenet bd2ce4246f5a", "imagenet 79be9fe3013f"),
]


@pytest.mark.parametrize("names", SETS)
def test_copies_elsewhere_are_the_same_data(names: tuple[str, ...], made: Path, tree: Path) -> None:
    for folder, _, files in os.walk(tree):
        for file in files:
            os.utime(Path(folder, file), (0, time.time() - 1000))
        Path(folder, ".DS_Store").touch()
    (tree / "imagenet" / "train" / ".ipynb_checkpoints").mkdir()
    (tree / "VOCdevkit").mkdir()
    for year in ("VOC2007", "VOC2012"):
        (tree / year).rename(tree / "VOCdevkit" / year)
    found = identify_data(names, tree)
    assert found is not None
    assert found.startswith(" + ".join(names) + " ")
    assert found == identify_data(names, made)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def first(folder: Path, pattern: str) -> Path:
    return min(folder.glob(pattern))


def drop_last(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("coco", lambda root: grow(root / "coco" / "annotations" / "instances_train2017.json")),
    ("coco", lambda root: grow(first(root / "coco" / "val2017", "*.jpg"))),
    ("voc2007", lambda root: grow(first(root / "VOC2007" / "Annotations", "*.xml"))),
    ("voc2012", lambda root: grow(first(root / "VOC2012" / "JPEGImages", "2008*.jpg"))),
    ("voc2012-aug", lambda root: drop_last(root / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt")),
    ("cityscapes", lambda root: grow(first(root / "cityscapes" / "leftImg8bit" / "val", "*/*.png"))),
    ("imagenet", lambda root: first(root / "imagenet" / "val" / "class_2", "*.png").unlink()),
    ("imagenet", lambda root: (root / "imagenet" / "val" / "class_2").rename(root / "imagenet" / "val" / "class_9")),
]


@pytest.mark.parametrize(("changed", "change"), CHANGES)
def test_other_data_have_another_name(changed: str, change: Callable[[Path], None], tree: Path) -> None:
    before = {names: identify_data(names, tree) for names in SETS}
    change(tree)
    for names, name in before.items():
        after = identify_data(names, tree)
        assert after is not None
        assert (after != name) == (changed in names)


@pytest.mark.parametrize("names", SETS)
def test_half_a_tree_has_no_name(names: tuple[str, ...], tree: Path) -> None:
    for folder in ("coco/val2017", "VOC2012/JPEGImages", "cityscapes", "imagenet/val"):
        shutil.rmtree(tree / folder)
    assert identify_data(names, tree) is None


def test_a_sample_is_what_it_was_made_of(tmp_path: Path) -> None:
    settings = {"source": "photos", "size": "small", "seed": 1, "format_version": 2}
    (tmp_path / "sample.json").write_text(json.dumps({**settings, "classes": ["a"], "counts": {}}))
    found = identify_data(("coco",), tmp_path)
    assert found == identify_data(("imagenet",), tmp_path) == "sample of photos, small, seed 1, format 2"
    assert data_of(make_record(recipe={"sample": settings})) == found, "as records kept it all along"
    assert data_of(make_record(recipe={"sample": {**settings, "seed": 0}})) != found
    assert data_of(make_record(data="coco 0123456789ab")) == "coco 0123456789ab"
    assert data_of(make_record()) is None
