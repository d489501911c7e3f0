"""`twist data check`: a healthy tree is fine, and every known way of breaking one is found and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagenet_tree import write_tree
from PIL import Image
from tiny_sample import tiny_sample

from twist.catalog import check as module
from twist.catalog.check import check, has_errors, render
from twist.catalog.check_imagenet import IMAGENET_IMAGES, SUBSET_LINES
from twist.catalog.findings import Finding
from twist.catalog.labelled import read_split, read_subset
from twist.contracts.errors import UsageError, UserError


@pytest.fixture(scope="module")
def healthy() -> Path:
    return tiny_sample().root


@pytest.fixture
def tree(healthy: Path, tmp_path: Path) -> Path:
    """A copy to break; hard links, so a test must replace a file and not write into it."""
    root = tmp_path / "root"
    shutil.copytree(healthy, root, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return root


def replace(path: Path, content: bytes | str) -> None:
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def errors(dataset: str, root: Path) -> list[Finding]:
    return [finding for finding in check(dataset, root, progress=False) if finding.severity == "error"]


def only_error(dataset: str, root: Path) -> Finding:
    found = errors(dataset, root)
    assert len(found) == 1, render(found)
    assert found[0].remedy
    return found[0]


@pytest.mark.parametrize("dataset", ["sample", "coco", "voc", "cityscapes", "imagenet"])
def test_a_healthy_tree_is_fine(healthy: Path, dataset: str) -> None:
    found = check(dataset, healthy, progress=False)
    assert {finding.severity for finding in found} == {"fine"}
    assert len(found) >= 6
    assert render(found).endswith("Everything is as it should be.")
    assert not has_errors(found)


def test_an_imagenet_folder_may_be_named_itself(healthy: Path) -> None:
    assert not has_errors(check("imagenet", healthy / "imagenet", progress=False))


def to_rgb(root: Path) -> None:
    for path in (root / "VOC2012/SegmentationClass").glob("*.png"):
        image = Image.open(path).convert("RGB")
        path.unlink()
        image.save(path)


def label_ids_as_train_ids(root: Path) -> None:
    for path in root.glob("cityscapes/gtFine/val/*/*_labelTrainIds.png"):
        path.unlink()
        shutil.copy(str(path).replace("labelTrainIds", "labelIds"), path)


def swap_two_train_ids(root: Path) -> None:
    """Values stay legal: only the comparison with the labelIds can see it."""
    for path in root.glob("cityscapes/gtFine/val/*/*_labelTrainIds.png"):
        values = np.asarray(Image.open(path))
        path.unlink()
        Image.fromarray(np.where(values == 0, 1, values).astype(np.uint8)).save(path)


def smaller_maps(root: Path) -> None:
    for path in (root / "VOC2012/SegmentationClassAug").glob("*.png"):
        image = Image.open(path).resize((20, 20), Image.Resampling.NEAREST)
        path.unlink()
        image.save(path)


def numbers_beyond_the_classes(root: Path) -> None:
    path = min((root / "VOC2012/SegmentationClassAug").glob("*.png"))
    values = np.asarray(Image.open(path)).copy()
    values[:3] = 77
    path.unlink()
    Image.fromarray(values).save(path)


def drop_images(root: Path) -> None:
    for path in sorted((root / "VOC2007/JPEGImages").glob("*.jpg"))[:2]:
        path.unlink()


def leak_val(root: Path) -> None:
    lists = root / "VOC2012/ImageSets/Segmentation"
    names = (lists / "trainaug.txt").read_text().split()
    stranger = (lists / "val.txt").read_text().split()[0]
    shutil.copy(root / f"VOC2012/SegmentationClass/{stranger}.png", root / "VOC2012/SegmentationClassAug")
    replace(lists / "trainaug.txt", "\n".join([*names[1:], stranger]) + "\n")


def truncate_picture(root: Path) -> None:
    path = min((root / "coco/val2017").glob("*.jpg"))
    replace(path, path.read_bytes()[:400])


def empty_picture(root: Path) -> None:
    replace(min((root / "VOC2012/Annotations").glob("*.xml")), b"")


def unknown_class(root: Path) -> None:
    path = min((root / "VOC2012/Annotations").glob("*.xml"))
    text = path.read_text()
    name = text.partition("<name>")[2].partition("<")[0]
    replace(path, text.replace(f"<name>{name}<", "<name>unicorn<"))


def annotation_of_no_image(root: Path) -> None:
    path = root / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["image_id"] = 1
    replace(path, json.dumps(content))


def torn_json(root: Path) -> None:
    path = root / "coco/annotations/instances_val2017.json"
    replace(path, path.read_text()[:1000])


def other_size(root: Path) -> None:
    path = min((root / "coco/val2017").glob("*.jpg"))
    image = Image.open(path).resize((50, 50))
    path.unlink()
    image.save(path)


def missing_train_ids(root: Path) -> None:
    for path in root.glob("cityscapes/gtFine/train/*/*_labelTrainIds.png"):
        path.unlink()


def archive_left(root: Path) -> None:
    (root / "imagenet/train/n01440764.tar").write_bytes(b"")


def flat_val(root: Path) -> None:
    source = min((root / "imagenet/val").glob("*/*.jpg"))
    shutil.copy(source, root / "imagenet/val/ILSVRC2012_val_00000001.JPEG")


def stranger_in_subset(root: Path) -> None:
    path = root / "imagenet/1percent.txt"
    replace(path, path.read_text() + "n99999999_1.JPEG\n")


def no_trainaug(root: Path) -> None:
    (root / "VOC2012/ImageSets/Segmentation/trainaug.txt").unlink()


def listed_twice(root: Path) -> None:
    path = root / "VOC2012/ImageSets/Segmentation/val.txt"
    names = path.read_text().split()
    replace(path, "\n".join([*names[1:], names[1]]))


@pytest.mark.parametrize(
    ("dataset", "break_it", "message", "count"),
    [
        ("voc", drop_images, "2 of 28 listed files are not there", 2),
        ("voc", numbers_beyond_the_classes, "1 of 24 sampled maps hold numbers that are no label .77.", 1),
        ("voc", smaller_maps, "24 of 24 sampled maps are of another size", 24),
        ("voc", leak_val, "1 images of val are in it", 1),
        ("voc", unknown_class, "'unicorn'", None),
        ("voc", no_trainaug, "is missing: the 10,582 images", 1),
        ("voc", listed_twice, "1 names are in it twice", 1),
        ("coco", truncate_picture, "1 of 16 sampled pictures cannot be decoded", 1),
        ("coco", annotation_of_no_image, "1 annotations belong to an image that is not listed", 1),
        ("coco", torn_json, "no complete JSON", 1),
        ("coco", other_size, "of another size than the annotations say", 1),
        ("cityscapes", missing_train_ids, "24 of 24 .*labelTrainIds.png are missing", 24),
        ("cityscapes", swap_two_train_ids, "16 of 16 sampled labelTrainIds are not the train ids", 16),
        ("imagenet", archive_left, "1 class archives are not unpacked, n01440764.tar", 1),
        ("imagenet", flat_val, "1 images lie in no class folder", 1),
        ("imagenet", stranger_in_subset, "1 of its images are not in train, n99999999_1", 1),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_each_break_is_the_one_error(
    tree: Path, dataset: str, break_it: Callable[[Path], None], message: str, count: int | None
) -> None:
    break_it(tree)
    found = only_error(dataset, tree)
    assert re.search(message, found.message), found.message
    assert count is None or found.count == count
    assert "error" in render([found])


def test_palette_turned_to_colours(tree: Path) -> None:
    to_rgb(tree)
    found = errors("voc", tree)
    assert [finding.count for finding in found] == [12, 16]  # train and val
    assert all("palette was turned to RGB" in finding.message for finding in found)


def test_maps_that_a_picture_program_numbered_anew(tree: Path) -> None:
    """Every number is still a label, and none is the right one; the colours tell."""
    (path, *_) = sorted((tree / "VOC2012" / "SegmentationClass").glob("*.png"))
    with Image.open(path) as image:
        image.load()
    path.unlink()  # the tree is made of links
    image.remap_palette([3, 1, 2, 0, *range(4, 256)]).save(path)
    assert "numbered them anew" in only_error("voc", tree).message


def test_label_ids_given_as_train_ids(tree: Path) -> None:
    label_ids_as_train_ids(tree)
    found = errors("cityscapes", tree)
    assert any("hold numbers that are no label" in finding.message for finding in found)
    assert any("look like labelIds given as trainIds" in finding.remedy for finding in found)


def test_empty_and_unreadable_annotations_are_both_said(tree: Path) -> None:
    empty_picture(tree)
    messages = [finding.message for finding in errors("voc", tree)]
    assert any("1 files are empty" in message for message in messages)
    assert any("1 files are no VOC annotation" in message for message in messages)


def test_a_link_to_nothing_is_one_finding_and_no_crash(tree: Path) -> None:
    for dataset, pictures in (
        ("coco", "coco/val2017/*.jpg"),
        ("voc", "VOC2012/JPEGImages/*.jpg"),
        ("voc", "VOC2012/SegmentationClassAug/*.png"),
        ("cityscapes", "cityscapes/leftImg8bit/val/*/*.png"),
        ("imagenet", "imagenet/train/*/*.jpg"),
        ("sample", "unlabelled/*.jpg"),
    ):
        path = min(tree.glob(pictures))
        kept = path.rename(tree / "kept")
        path.symlink_to(tree / "nowhere")
        found = only_error(dataset, tree)
        assert re.search(f"1 files are links to nothing: .*{path.name}$", found.message)
        path.unlink()
        kept.rename(path)
        assert errors(dataset, tree) == []
        # Negative control: a link to the picture is as good as the picture.
        path.rename(kept)
        path.symlink_to(kept)
        assert errors(dataset, tree) == []
        path.unlink()
        kept.rename(path)


@pytest.mark.parametrize("counts", [None, [], {}, {"unlabelled": "40"}])
def test_a_sample_json_without_counts_is_one_finding(tree: Path, counts: object) -> None:
    path = tree / "sample.json"
    content = json.loads(path.read_text())
    replace(path, json.dumps({**content, "counts": counts}))
    for dataset in ("sample", "coco", "imagenet"):
        found = only_error(dataset, tree)
        assert "says no number of images (counts) for unlabelled" in found.message


def rotate_annotations(root: Path) -> None:
    paths = sorted((root / "VOC2007/Annotations").glob("*.xml"))
    texts = [path.read_text() for path in paths]
    for path, text in zip(paths, [*texts[1:], texts[0]], strict=True):
        replace(path, text)


def edit_annotations(root: Path, pattern: str, repl: str, count: int | None = None) -> None:
    for path in sorted((root / "VOC2007/Annotations").glob("*.xml"))[:count]:
        replace(path, re.sub(pattern, repl, path.read_text(), flags=re.DOTALL))


def leak_test(root: Path) -> None:
    lists = root / "VOC2007/ImageSets/Main"
    names = (lists / "test.txt").read_text().split()
    replace(lists / "test.txt", "\n".join([*names[1:], (lists / "trainval.txt").read_text().split()[0]]))


def blank_maps(root: Path) -> None:
    for path in (root / "VOC2012/SegmentationClassAug").glob("*.png"):
        image = Image.open(path)
        again = Image.new("P", image.size)
        again.putpalette(image.getpalette() or [])
        path.unlink()
        again.save(path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: edit_annotations(root, "<object>.*</object>", "", 1), "1 of 28 files have no object"),
        (lambda root: edit_annotations(root, "<object>.*</object>", ""), "28 of 28 files have no object"),
        (leak_test, "1 images of test are in it, .*too high"),
        (blank_maps, "24 of 24 sampled maps mark no object"),
    ],
)
def test_each_break_of_voc_is_the_one_error(tree: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(tree)
    found = only_error("voc", tree)
    assert re.search(message, found.message), found.message


def test_voc_annotations_of_the_wrong_pictures(tree: Path) -> None:
    rotate_annotations(tree)
    found = only_error("voc", tree)
    assert "are of another size than their file in Annotations says" in found.message
    # Two neighbours of one size hide a swap, three shapes do not hide them all.
    assert found.count > 5


def test_voc_objects_that_are_all_difficult(tree: Path) -> None:
    edit_annotations(tree, "<difficult>0<", "<difficult>1<")
    messages = [finding.message for finding in errors("voc", tree)]
    assert messages == [f"every object of {part} is marked difficult: none of them counts in an AP" for part in (
        "trainval",
        "test",
    )]  # fmt: skip


def test_voc_segmentation_lists_that_share_an_image(tree: Path) -> None:
    lists = tree / "VOC2012/ImageSets/Segmentation"
    names = (lists / "val.txt").read_text().split()
    stranger = (lists / "train.txt").read_text().split()[0]
    replace(lists / "val.txt", "\n".join([*names[1:], stranger]))
    found = errors("voc", tree)
    assert [Path(finding.where).name for finding in found] == ["train.txt", "trainaug.txt"]
    assert all("1 images of val are in it" in finding.message for finding in found)


def other_width(path: Path) -> None:
    replace(path, json.dumps({**json.loads(path.read_text()), "imgWidth": 7}))


def of_cityscapes(root: Path, kind: str) -> Path:
    return min(root.glob(f"cityscapes/gtFine/val/*/*_{kind}"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: replace(of_cityscapes(root, "instanceIds.png"), b""), "1 files are empty: .*instanceIds"),
        (lambda root: replace(of_cityscapes(root, "labelIds.png"), b""), "1 files are empty: .*labelIds"),
        (lambda root: replace(of_cityscapes(root, "polygons.json"), b""), "1 files are empty: .*polygons"),
        (
            lambda root: replace(path := of_cityscapes(root, "instanceIds.png"), path.read_bytes()[:60]),
            "1 of 16 sampled pictures cannot be decoded",
        ),
        (lambda root: replace(of_cityscapes(root, "polygons.json"), "{}"), "1 of 16 sampled .*: it has no imgWidth"),
        (lambda root: replace(of_cityscapes(root, "polygons.json"), "[]"), "1 of 16 sampled .*: it is no JSON object"),
        (lambda root: other_width(of_cityscapes(root, "polygons.json")), "1 of 16 sampled .* picture of another size"),
    ],
)
def test_each_break_of_cityscapes_is_the_one_error(tree: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(tree)
    found = only_error("cityscapes", tree)
    assert re.search(message, found.message), found.message


def a_train_image(root: Path) -> Path:
    # Neither the first nor the last of its class.
    return sorted(min((root / "imagenet/train").iterdir()).glob("*.jpg"))[1]


def same_name_twice(root: Path) -> None:
    listed = (root / "imagenet/1percent.txt").read_text().split()[0]
    other = max((root / "imagenet/train").iterdir())
    min(other.glob("*.jpg")).rename(other / listed)


def add_line(root: Path, change: Callable[[str], str]) -> None:
    path = root / "imagenet/1percent.txt"
    replace(path, path.read_text() + change(path.read_text().split()[0]) + "\n")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: replace(a_train_image(root), b""), "1 files are empty: .*/.*_00001.jpg"),
        (lambda root: a_train_image(root).rename(root / "kept"), "39 train images, 40 expected"),
        (lambda root: add_line(root, lambda name: f"x/{name}"), "1 of its images are not in train, x/"),
        (lambda root: add_line(root, lambda name: f"{name} 7"), "1 of its images are not in train, .*jpg 7 the first"),
        (lambda root: add_line(root, lambda name: f"{name.rpartition('_')[0]}/{name}"), "1 .* name an image again"),
    ],
)
def test_each_break_of_imagenet_is_the_one_error(tree: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(tree)
    found = only_error("imagenet", tree)
    assert re.search(message, found.message), found.message


def test_a_name_of_several_classes_is_said_of_every_list(tree: Path) -> None:
    same_name_twice(tree)
    messages = [finding.message for finding in errors("imagenet", tree)]
    assert any("1 of its lines name files of several classes" in message for message in messages)


def test_images_in_folders_of_a_class_are_images(tree: Path) -> None:
    """The engine reads any depth and these endings."""
    path = a_train_image(tree)
    (path.parent / "deep/deeper").mkdir(parents=True)
    path.rename(path.parent / "deep/deeper" / path.name)
    assert render(check("imagenet", tree, progress=False)).endswith("Everything is as it should be.")


@pytest.mark.parametrize(
    "change",
    [
        *(lambda name: f"x/{name}", lambda name: f"{name} 7", lambda name: f"{name.rpartition('_')[0]}/{name}"),
        *(lambda name: name, lambda name: name.replace("00000", "00001"), lambda name: f"other_{name}"),
    ],
)
def test_a_list_is_fine_where_a_run_takes_it(tree: Path, change: Callable[[str], str]) -> None:
    add_line(tree, change)
    train = read_split(tree / "imagenet/train")
    try:
        read_subset(train, tree / "imagenet/1percent.txt")
        taken = True
    except UserError:
        taken = False
    assert taken == (not errors("imagenet", tree))


def test_a_polygon_file_without_content_is_found_beside_the_sample(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twist.catalog.check_cityscapes.SAMPLED", 4)  # a fourth of it is read: the first
    replace(max(tree.glob("cityscapes/gtFine/val/*/*_polygons.json")), "{}")
    assert "1 of 2 sampled polygons.json are no annotation" in only_error("cityscapes", tree).message


CocoBreak = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda c: c["annotations"][0].pop("image_id"), "1 annotations have no image_id"),
        (lambda c: c["annotations"][0].update(image_id=[1]), "1 annotations have no image_id"),
        (lambda c: c["annotations"][0].pop("category_id"), "1 annotations have no category_id"),
        (lambda c: c["annotations"][0].pop("id"), "1 annotations have no id"),
        (lambda c: c["annotations"][0].pop("bbox"), "1 annotations have no bbox of four numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, None, 4]), "1 annotations have no bbox of four numbers"),
        (lambda c: c["annotations"][0].pop("area"), "1 annotations have no area"),
        (lambda c: c["annotations"][0].pop("iscrowd"), "1 annotations have no iscrowd"),
        (lambda c: c["annotations"].append(None), "1 annotations are no JSON objects"),
        (lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]), "1 annotations have the id of another"),
        (lambda c: c["annotations"][0].update(bbox=[9, 9, -4, 4]), "1 annotations have a bbox of negative"),
        (lambda c: c["annotations"][0].update(bbox=[9, 9, float("nan"), 4]), "1 annotations have a bbox of negative"),
        (lambda c: c["annotations"][0].update(bbox=[50, 50, 4, 900]), "1 of .* a bbox that reaches outside its image"),
        (lambda c: c["annotations"].clear(), "has no annotation"),
        (lambda c: c["images"][0].pop("height"), "1 of 16 images have no id, file_name, width or height"),
        (lambda c: c["images"].append(None), "1 of 17 images have no id, file_name, width or height"),
        (lambda c: c["categories"][2].update(name="unicorn"), "1 categories are not those .*: 3 is 'unicorn' here"),
    ],
)
def test_each_break_of_coco_is_the_one_error(tree: Path, break_it: CocoBreak, message: str) -> None:
    path = tree / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    break_it(content)
    replace(path, json.dumps(content))
    found = only_error("coco", tree)
    assert re.search(message, found.message), found.message


def test_coco_boxes_given_as_corners(tree: Path) -> None:
    path = tree / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        left, top, width, height = entry["bbox"]
        entry["bbox"] = [left, top, left + width, top + height]
    replace(path, json.dumps(content))
    found = only_error("coco", tree)
    assert "reaches outside its image" in found.message
    assert "x1, y1, x2, y2" in found.remedy


def test_a_few_odd_boxes_of_coco_are_no_error(tree: Path) -> None:
    """The originals have boxes of height 0, and some that reach out by a part of a pixel."""
    path = tree / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    sizes = {image["id"]: image["width"] for image in content["images"]}
    first, second = content["annotations"][:2]
    first["bbox"] = [5.5, 5.5, 3.2, 0.0]
    second["bbox"] = [0, 0, sizes[second["image_id"]] + 0.5, 3]
    replace(path, json.dumps(content))
    assert render(check("coco", tree, progress=False)).endswith("Everything is as it should be.")


def test_everything_wrong_is_said_at_once(tree: Path) -> None:
    to_rgb(tree)
    torn_json(tree)
    missing_train_ids(tree)
    archive_left(tree)
    shutil.rmtree(tree / "VOC2007/JPEGImages")
    (tree / "unlabelled/000000.jpg").unlink()
    found = check("sample", tree, progress=False)
    text = render(found)
    for word in (
        "RGB",
        "JSON",
        "labelTrainIds",
        "tar",
        "VOC2007/JPEGImages: is missing",
        "39 unlabelled images, 40 expected",
    ):
        assert word in text
    assert [finding.severity for finding in found] == sorted(
        (finding.severity for finding in found), key=["error", "warning", "fine"].index
    )


def test_a_half_extracted_real_tree_names_counts_and_origin(tree: Path) -> None:
    """Without its sample.json the tree counts as the real data, of which nearly everything is missing."""
    (tree / "sample.json").unlink()
    for dataset, counts in {
        "coco": ["24 train2017 images, 118287 expected", "16 val2017 images, 5000 expected", "10 categories, 80"],
        "voc": ["12 names, 5011", "16 names, 4952", "40 names, 11540", "24 names, 10582", "16 names, 1449"],
        "cityscapes": ["24 train images, 2975", "16 val images, 500"],
        "imagenet": ["40 train images, 1281167", "10 train classes, 1000", "10 names, 12811", "10 names, 128116"],
    }.items():
        text = render(check(dataset, tree, progress=False))
        for count in counts:
            assert count in text
        assert " comes from " in text


def test_void_border_that_vanished_is_a_warning(tree: Path) -> None:
    for path in (tree / "VOC2012/SegmentationClass").glob("*.png"):
        image = Image.open(path)
        values = np.asarray(image)
        again = Image.fromarray(np.where(values == 255, 0, values).astype(np.uint8))
        again.putpalette(image.getpalette() or [])
        path.unlink()
        again.save(path)
    found = check("voc", tree, progress=False)
    assert not has_errors(found)
    assert sum("void border" in finding.message for finding in found if finding.severity == "warning") == 2


def test_voc_may_lie_in_its_devkit_folder(tree: Path) -> None:
    (tree / "VOCdevkit").mkdir()
    for year in ("VOC2007", "VOC2012"):
        (tree / year).rename(tree / "VOCdevkit" / year)
    assert not has_errors(check("voc", tree, progress=False))


def test_wrong_names_and_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'no data set "cocoo" to check\. Did you mean "coco"'):
        check("cocoo", tmp_path)
    with pytest.raises(UserError, match=r"There is no folder .*cityscapes-dataset.com"):
        check("cityscapes", tmp_path / "absent")
    with pytest.raises(UserError, match="make one with `twist data sample"):
        check("sample", tmp_path)


def test_missing_folders_are_findings_and_no_crash(tmp_path: Path) -> None:
    for dataset in ("coco", "voc", "cityscapes", "imagenet"):
        assert has_errors(check(dataset, tmp_path, progress=False))


def test_the_published_counts_are_the_known_ones() -> None:
    assert module.VOC_MAIN["VOC2007"]["train"] + module.VOC_MAIN["VOC2007"]["val"] == 5011
    assert module.VOC_MAIN["VOC2012"]["train"] + module.VOC_MAIN["VOC2012"]["val"] == 11540
    assert round(IMAGENET_IMAGES["train"] / 100) == pytest.approx(SUBSET_LINES["1percent.txt"], abs=2)
    assert round(IMAGENET_IMAGES["train"] / 10) == pytest.approx(SUBSET_LINES["10percent.txt"], abs=2)


# ---------------------------------------------------------------------------------------------------------------------
# Class folders of one's own


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "mine", train=8)


def test_class_folders_of_ones_own_are_fine_without_any_count_of_imagenets(folders: Path) -> None:
    for split in ("train", "val"):
        (folders / split / ".DS_Store").write_bytes(b"x")
        (folders / split / ".ipynb_checkpoints").mkdir()
        (folders / split / "class_0" / "._train_0_000.png").write_bytes(b"x")
    text = render(check("folders", folders, progress=False))
    assert "24 images of 3 classes" in text
    assert "9 images of 3 classes" in text
    assert text.endswith("Everything is as it should be.")
    folders.rename(folders.parent / "imagenet")
    assert not has_errors(check("folders", folders.parent, progress=False))


def bad_pictures(root: Path) -> None:
    for path in sorted((root / "train" / "class_1").iterdir())[:7]:
        path.write_bytes(b"no picture")


def bitmap_called_png(root: Path) -> None:
    path = root / "val" / "class_2" / "val_2_000.png"
    with Image.open(path) as image:
        image.save(path, format="BMP")


def hollow_pictures(root: Path) -> None:
    for path in sorted((root / "val" / "class_1").iterdir())[:2]:
        path.write_bytes(b"")


def lost_class(root: Path) -> None:
    shutil.rmtree(root / "val" / "class_1")


def emptied_class(root: Path) -> None:
    for path in (root / "val" / "class_1").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root / "val"), "^is missing$"),
        (lost_class, "^1 classes are in one of train and val only: class_1$"),
        (emptied_class, "^1 class folders hold no images: class_1$"),
        (hollow_pictures, r"^2 files are empty: class_1/val_1_000\.png, class_1/val_1_001\.png$"),
        (bad_pictures, r"^7 of 24 pictures cannot be decoded: class_1/train_1_000\.png, .*_004\.png and 2 more$"),
        (bitmap_called_png, r"^1 of 9 pictures hold BMP, which a run does not read, .*: class_2/val_2_000\.png$"),
    ],
)
def test_each_break_of_class_folders_is_the_one_error(
    folders: Path, break_it: Callable[[Path], None], message: str
) -> None:
    break_it(folders)
    found = only_error("folders", folders)
    assert re.search(message, found.message), found.message
    assert "unpack" not in found.remedy or "torn" in found.remedy
    assert "image-net.org" not in found.remedy


def test_what_a_run_leaves_out_without_a_word_is_a_warning(folders: Path) -> None:
    picture = folders / "train" / "class_0" / "train_0_000.png"
    shutil.copy(picture, folders / "train" / "stray.png")
    (folders / "val.tar.gz").write_bytes(b"x")
    (folders / "val" / "class_0" / "more.zip").write_bytes(b"x")
    (folders / "val" / "class_0" / "photo.tif").write_bytes(b"x")
    found = [finding for finding in check("folders", folders, progress=False) if finding.severity != "fine"]
    assert [(Path(finding.where).name, finding.severity) for finding in found] == [
        *(("mine", "warning"), ("train", "warning"), ("class_0", "warning"), ("class_0", "warning"))
    ]
    said = " | ".join(finding.message for finding in found)
    for part in ("archives are not unpacked: val.tar.gz", "no class folder: stray.png", "a run reads: photo.tif"):
        assert part in said
    read_split(folders / "train")  # it does go


def test_every_bad_picture_of_imagenet_is_named_up_to_five(tree: Path) -> None:
    paths = sorted(min((tree / "imagenet/val").iterdir()).glob("*.jpg"))[:2]
    for path in paths:
        replace(path, b"no picture")
    names = ", ".join(f"{path.parent.name}/{path.name}" for path in paths)
    assert only_error("imagenet", tree).message.endswith(f"sampled pictures cannot be decoded: {names}")


@pytest.mark.parametrize("dataset", ["imagenet", "folders", "voc", "cityscapes"])
def test_each_file_is_counted_once(healthy: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = healthy / "imagenet" if dataset in ("imagenet", "folders") else healthy
    check(dataset, root)
    (counted,) = re.findall(rf"check {dataset}: (\d+) files", capsys.readouterr().err)
    parts = {
        "voc": ("*/JPEGImages/*", "*/Annotations/*", "*/SegmentationClass*/*"),
        "cityscapes": ("cityscapes/**/*.*",),
    }
    files = [path for part in parts.get(dataset, ("*/*/*.jpg",)) for path in root.glob(part) if path.is_file()]
    # Of VOC 2007 the segmentation is not looked at.
    files = [path for path in files if "VOC2007/Segmentation" not in str(path)]
    assert int(counted) == len(files)
