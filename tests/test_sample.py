"""The built-in sample: deterministic, complete or absent, and read unmodified by the real loaders."""

import hashlib
import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_sample import tiny_sample

from twist.catalog.data_sets import read_sample
from twist.catalog.masks import voc_palette
from twist.catalog.sample import scene, shapes
from twist.catalog.sample.make import Sample, make_sample
from twist.contracts.errors import UserError


@pytest.fixture(scope="module")
def sample() -> Sample:
    return tiny_sample()


def digest(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_equal_settings_give_equal_bytes_in_any_number_of_processes(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twist.catalog.sample.make.ALONE_BELOW", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2}, raising=False)
    again = make_sample(tmp_path / "again", size="tiny", seed=0, progress=False)
    assert digest(again.root) == digest(sample.root)


def test_a_sample_is_reused_and_another_refused(sample: Sample, tmp_path: Path) -> None:
    before = (sample.root / "sample.json").stat().st_mtime_ns
    assert make_sample(sample.root, size="tiny", seed=0, progress=False).info == sample.info
    assert (sample.root / "sample.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another sample, of seed 0 and not 4: choose"):
        make_sample(sample.root, size="tiny", seed=4, progress=False)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is no sample"):
        make_sample(tmp_path, size="tiny", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_nothing_is_left_of_a_sample_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twist.catalog.sample.make.write_image", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_sample(tmp_path / "root", size="tiny", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_sample_json_is_one_sentence(tmp_path: Path) -> None:
    assert read_sample(tmp_path) is None
    (tmp_path / "sample.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_sample(tmp_path)
    (tmp_path / "sample.json").write_text('{"format_version": 99, "classes": []}')
    with pytest.raises(UserError, match=r"classes = .*make it again"):
        read_sample(tmp_path)
    (tmp_path / "sample.json").write_text('{"format_version": 99, "classes": ["a"]}')
    with pytest.raises(UserError, match="format_version 99 and not 2"):
        make_sample(tmp_path, progress=False)


def test_visible_masks_are_disjoint_and_follow_the_painting_order() -> None:
    placements = [
        scene.Placement(2, 60, (40, 40)),
        scene.Placement(8, 50, (40, 48)),
        scene.Placement(9, 200, (40, 300)),
    ]
    drawn = scene.compose(np.random.default_rng(0), placements, 80, 96).instances
    assert not (drawn[0].visible & drawn[1].visible).any()
    assert (drawn[0].whole & drawn[1].whole).any()
    assert drawn[0].visible_share < 1
    assert drawn[1].visible_share == 1  # in front
    assert not drawn[2].visible.any()  # outside the frame
    assert drawn[2].truncated
    assert not drawn[1].truncated


def test_colours_do_not_tell_the_classes_apart() -> None:
    """Colour statistics of the ten classes are drawn from one distribution: a nearest-mean classifier is at chance."""

    def colours(number: int, class_index: int) -> np.ndarray:
        cutout = shapes.draw_cutout(np.random.default_rng([number, class_index]), class_index, 40, (0.0, -1.0))
        pixels = cutout.rgb[cutout.alpha > 0.5]
        return np.concatenate([pixels.mean(0), pixels.std(0)])

    values = np.array([[colours(number, k) for k in range(10)] for number in range(40)])  # (40, 10, 6)
    means = values[:20].mean(0)
    nearest = ((values[20:, :, None] - means) ** 2).sum(-1).argmin(-1)
    accuracy = (nearest == np.arange(10)).mean()
    assert accuracy < 0.22  # chance is 0.10, and 200 draws have a standard deviation of 0.02


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.2, 0.5, 0.8]))
def test_run_lengths_and_outlines_describe_any_mask(seed: int, height: int, width: int, density: float) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(seed).random((height, width)) < density
    decoded = coco.decode(coco.frPyObjects(scene.run_lengths(mask), height, width))
    assert (decoded.astype(bool) == mask).all()
    # Outer outlines enclose every pixel of the mask: their areas add up to at least it, with holes filled.
    loops = [area for area in map(scene._area, scene._loops(mask)) if area > 0]
    assert sum(loops) >= mask.sum()
    assert bool(loops) == bool(mask.any())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_polygons_cover_their_mask_holes_included(seed: int) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    from twist.catalog.sample.shapes import fractal_noise

    mask = fractal_noise(np.random.default_rng(seed), 60, 70, cells=5) > 0.5
    found = [polygon.ravel().tolist() for polygon in scene.polygons(mask)]
    decoded = coco.decode(coco.merge(coco.frPyObjects(found, 60, 70))).astype(bool)
    assert (decoded & mask).sum() / (decoded | mask).sum() > 0.97


def test_voc_palette_is_the_development_kits() -> None:
    palette = np.array(voc_palette()).reshape(256, 3)
    # aeroplane, bicycle, tvmonitor, and the cream of the void border.
    assert palette[[1, 2, 20, 255]].tolist() == [[128, 0, 0], [0, 128, 0], [0, 64, 128], [224, 224, 192]]


def test_coco_annotations_agree_with_themselves(sample: Sample) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    content = json.loads((sample.root / "coco/annotations/instances_train2017.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    assert [category["name"] for category in content["categories"]] == list(sample.info["classes"])
    crowds = [annotation for annotation in content["annotations"] if annotation["iscrowd"]]
    assert crowds
    assert all(isinstance(annotation["segmentation"], dict) for annotation in crowds)
    assert any(annotation["area"] < 32**2 for annotation in content["annotations"])
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        height, width = image["height"], image["width"]
        found = annotation["segmentation"]
        decoded = coco.decode(
            coco.merge(coco.frPyObjects([found] if isinstance(found, dict) else found, height, width))
        )
        assert abs(int(decoded.sum()) - annotation["area"]) <= max(6, 0.15 * annotation["area"])
        x, y, w, h = annotation["bbox"]
        rows, columns = np.flatnonzero(decoded.any(1)), np.flatnonzero(decoded.any(0))
        # Grains that polygons drop may belong to the box.
        assert x <= columns[0] + 1
        assert columns[-1] <= x + w
        assert y <= rows[0] + 1
        assert rows[-1] <= y + h


def test_voc_boxes_and_maps_agree(sample: Sample) -> None:
    root = sample.root / "VOC2012"
    names = (root / "ImageSets/Segmentation/trainval.txt").read_text().split()
    difficult = 0
    for path in (root / "Annotations").glob("*.xml"):
        difficult += sum(int(node.text or 0) for node in ElementTree.parse(path).iter("difficult"))
    assert difficult > 0
    for name in names:
        labels = Image.open(root / "SegmentationClass" / f"{name}.png")
        objects = np.asarray(Image.open(root / "SegmentationObject" / f"{name}.png"))
        assert labels.mode == "P"
        assert labels.getpalette()[:768] == voc_palette()
        values = np.asarray(labels)
        assert set(np.unique(values)) <= {*range(11), 255}
        assert ((values == 255) == (objects == 255)).all()
        for number, node in enumerate(ElementTree.parse(root / "Annotations" / f"{name}.xml").iter("object"), 1):
            box = [int(node.findtext(f"bndbox/{side}") or 0) for side in ("xmin", "ymin", "xmax", "ymax")]
            pixels = np.argwhere(objects == number)
            if len(pixels):
                assert box[1] - 1 <= pixels[:, 0].min()
                assert pixels[:, 0].max() <= box[3] - 1
                assert box[0] - 1 <= pixels[:, 1].min()
                assert pixels[:, 1].max() <= box[2] - 1
    train = set((root / "ImageSets/Segmentation/train.txt").read_text().split())
    aug = set((root / "ImageSets/Segmentation/aug.txt").read_text().split())
    assert not train & aug
    assert train | aug == set((root / "ImageSets/Segmentation/trainaug.txt").read_text().split())


@pytest.mark.slow
def test_detectron2_reads_coco_voc_and_cityscapes(sample: Sample) -> None:
    from detectron2.data.datasets import load_coco_json
    from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
    from detectron2.data.datasets.pascal_voc import load_voc_instances

    counts = sample.info["counts"]
    found = load_coco_json(
        str(sample.root / "coco/annotations/instances_train2017.json"),
        str(sample.root / "coco/train2017"),
        "sample_coco_train",
    )
    assert len(found) == counts["coco/train2017"]
    assert {a["category_id"] for item in found for a in item["annotations"]} <= set(range(10))
    assert any(a["iscrowd"] for item in found for a in item["annotations"])
    for year, split, expected in (
        (sample.root / "VOC2007", "trainval", counts["VOC2007/train"] + counts["VOC2007/val"]),
        (sample.root / "VOC2007", "test", counts["VOC2007/test"]),
        (sample.root / "VOC2012", "trainval", counts["VOC2012/train"] + counts["VOC2012/val"]),
    ):
        found = load_voc_instances(str(year), split, list(sample.info["classes"]))
        assert len(found) == expected
        for item in found:
            with Image.open(item["file_name"]) as image:
                assert image.size == (item["width"], item["height"])
    images, truth = (str(sample.root / "cityscapes" / kind / "val") for kind in ("leftImg8bit", "gtFine"))
    # From JSON, Detectron2 needs shapely, which it does not ask for itself.
    for from_json in (True, False) if importlib.util.find_spec("shapely") else (False,):
        found = load_cityscapes_instances(images, truth, from_json=from_json, to_polygons=True)
        assert len(found) == counts["cityscapes/val"]
        assert len({a["category_id"] for item in found for a in item["annotations"]}) == 8
    assert len(load_cityscapes_semantic(images, truth)) == counts["cityscapes/val"]


@pytest.mark.slow
def test_mmsegmentation_reads_voc_cityscapes_and_ade20k(sample: Sample) -> None:
    from mmseg.datasets import ADE20KDataset, CityscapesDataset, PascalVOCDataset
    from mmseg.datasets.transforms import LoadAnnotations

    counts = sample.info["counts"]
    load = LoadAnnotations()
    for part, prefix, expected in (
        ("train", "SegmentationClass", counts["VOC2012/train"] // 2),
        ("aug", "SegmentationClassAug", counts["VOC2012/train"] // 2),
        ("trainaug", "SegmentationClassAug", counts["VOC2012/train"]),
        ("val", "SegmentationClass", counts["VOC2012/val"]),
    ):
        dataset = PascalVOCDataset(
            data_root=str(sample.root / "VOC2012"),
            ann_file=f"ImageSets/Segmentation/{part}.txt",
            data_prefix={"img_path": "JPEGImages", "seg_map_path": prefix},
            pipeline=[],
        )
        assert len(dataset) == expected
        seen: set[int] = set()
        for index in range(len(dataset)):
            seen |= set(np.unique(load(dataset.get_data_info(index))["gt_seg_map"]).tolist())
        # Every class is the chosen one of some picture; occlusion may leave too little of it in a small set.
        assert len(seen - {255}) >= 10
        assert seen - {255} <= set(range(11))
        assert (255 in seen) == (part != "aug")  # SBD's maps have no void border
    dataset = CityscapesDataset(
        data_root=str(sample.root / "cityscapes"),
        data_prefix={"img_path": "leftImg8bit/train", "seg_map_path": "gtFine/train"},
        pipeline=[],
    )
    assert len(dataset) == counts["cityscapes/train"]
    seen = set()
    for index in range(len(dataset)):
        seen |= set(np.unique(load(dataset.get_data_info(index))["gt_seg_map"]).tolist())
    assert seen == {0, *range(6, 8), *range(11, 19), 255}
    folders = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    ade = ADE20KDataset(data_root=str(sample.root / "ADEChallengeData2016"), data_prefix=folders, pipeline=[])
    assert len(ade) == counts["ADEChallengeData2016/training"]
    maps = [LoadAnnotations(reduce_zero_label=True)(ade.get_data_info(index))["gt_seg_map"] for index in range(10)]
    assert {int(value) for one in maps for value in np.unique(one)} == {*range(10), 255}  # 0 in the file is no class
