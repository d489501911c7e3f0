"""The name of the data under a root: the same wherever they lie, another one for other data, none for half of them."""

from __future__ import annotations

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

from twist.transfer.identity import data_of, identify_data
from twist.transfer.protocols import PROTOCOLS, find_protocol

FULL = [row for row in PROTOCOLS.values() if row.scale == "full"]


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


def name(protocol: str, root: Path) -> str | None:
    return identify_data(find_protocol(protocol), root)


@pytest.mark.parametrize("row", FULL, ids=lambda row: row.name)
def test_copies_elsewhere_are_the_same_data(row, made: Path, tree: Path) -> None:
    for folder, _, files in os.walk(tree):
        for file in files:
            os.utime(Path(folder, file), (0, time.time() - 1000))
        Path(folder, ".DS_Store").touch()
    (tree / "imagenet" / "train" / ".ipynb_checkpoints").mkdir()
    found = identify_data(row, tree)
    assert found is not None
    assert found.startswith(" + ".join(row.data) + " ")
    assert found == identify_data(row, made)


def test_voc_in_vocdevkit_is_the_same_voc(made: Path, tree: Path) -> None:
    (tree / "VOCdevkit").mkdir()
    for year in ("VOC2007", "VOC2012"):
        (tree / year).rename(tree / "VOCdevkit" / year)
    for protocol in ("voc-frcnn-c4-24k", "voc12aug-fcn-d8-20k"):
        assert name(protocol, tree) == name(protocol, made)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def first(folder: Path, pattern: str) -> Path:
    return min(folder.glob(pattern))


CHANGES: list[tuple[str, Callable[[Path], None]]] = [
    ("coco-mrcnn-fpn-1x", lambda root: grow(root / "coco" / "annotations" / "instances_train2017.json")),
    ("coco-mrcnn-fpn-1x", lambda root: grow(root / "coco" / "annotations" / "instances_val2017.json")),
    ("coco-mrcnn-fpn-1x", lambda root: grow(first(root / "coco" / "val2017", "*.jpg"))),
    ("voc-frcnn-c4-24k", lambda root: grow(first(root / "VOC2007" / "Annotations", "*.xml"))),
    ("voc-frcnn-c4-24k", lambda root: grow(first(root / "VOC2012" / "JPEGImages", "2008*.jpg"))),
    ("voc12aug-fcn-d8-20k", lambda root: drop_last(root / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt")),
    ("cityscapes-fcn-d8-40k", lambda root: grow(first(root / "cityscapes" / "leftImg8bit" / "val", "*/*.png"))),
    ("cityscapes-fcn-d8-40k", lambda root: first(root / "cityscapes" / "leftImg8bit" / "train", "*/*.png").unlink()),
    ("knn", lambda root: grow(first(root / "imagenet" / "train" / "class_1", "*.png"))),
    ("knn", lambda root: first(root / "imagenet" / "val" / "class_2", "*.png").unlink()),
    ("knn", lambda root: (root / "imagenet" / "val" / "class_2").rename(root / "imagenet" / "val" / "class_9")),
    ("semi-1pct", lambda root: (root / "imagenet" / "1percent.txt").touch()),
]


def drop_last(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(("protocol", "change"), CHANGES)
def test_other_data_have_another_name(protocol: str, change: Callable[[Path], None], tree: Path) -> None:
    before = {row.name: identify_data(row, tree) for row in FULL}
    change(tree)
    after = {row.name: identify_data(row, tree) for row in FULL}
    assert after[protocol] not in (None, before[protocol])
    # And those that read none of it keep theirs.
    others = [row.name for row in FULL if not set(row.data) & set(find_protocol(protocol).data)]
    assert others
    assert all(after[other] == before[other] for other in others)


def test_a_list_of_labels_is_of_the_protocol_that_reads_it(tree: Path) -> None:
    before = [name(protocol, tree) for protocol in ("knn", "finetune-100pct", "semi-10pct")]
    (tree / "imagenet" / "1percent.txt").write_text("train_0_000.png\n")
    assert [name(protocol, tree) for protocol in ("knn", "finetune-100pct", "semi-10pct")] == before
    listed = name("semi-1pct", tree)
    (tree / "imagenet" / "1percent.txt").write_text("train_0_001.png\n")
    assert name("semi-1pct", tree) != listed


@pytest.mark.parametrize("row", FULL, ids=lambda row: row.name)
def test_half_a_tree_has_no_name(row, tree: Path) -> None:
    assert identify_data(row, tree) is not None
    for folder in ("coco/val2017", "VOC2012/JPEGImages", "cityscapes", "imagenet/val"):
        shutil.rmtree(tree / folder)
    assert identify_data(row, tree) is None


def test_a_sample_is_what_it_was_made_of(tmp_path: Path) -> None:
    settings = {"source": "photos", "size": "small", "seed": 1, "format_version": 2}
    (tmp_path / "sample.json").write_text(json.dumps({**settings, "classes": ["a"], "counts": {}}))
    found = name("sample-coco-mrcnn-fpn", tmp_path)
    assert found == name("sample-knn", tmp_path) == "sample of photos, small, seed 1, format 2"
    assert data_of(make_record(recipe={"sample": settings})) == found, "as records kept it all along"
    assert data_of(make_record(recipe={"sample": {**settings, "seed": 0}})) != found
    assert data_of(make_record(data="coco 0123456789ab")) == "coco 0123456789ab"
    assert data_of(make_record()) is None
