"""`twist data check` and the quick look before a run: a healthy tree is fine, every known damage is found and named."""

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
from tiny_trees import make_cityscapes, make_coco, make_voc_detection

from twist.catalog.check import Finding, check, has_errors, render, require_data
from twist.catalog.class_folders import read_split
from twist.catalog.data_sets import find_data_set, find_root
from twist.catalog.prepare import prepare
from twist.contracts.errors import UsageError, UserError

FINE = "Everything is as it should be."


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


def save(path: Path, image: Image.Image) -> None:
    path.unlink()
    image.save(path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    replace(path, json.dumps(content))


def edit_masks(
    root: Path, pattern: str, change: Callable[[Image.Image], Image.Image], count: int | None = None
) -> None:
    for path in sorted(root.glob(pattern))[:count]:
        with Image.open(path) as image:
            save(path, change(image))


def edit_values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Image.Image], Image.Image]:
    def changed(image: Image.Image) -> Image.Image:
        again = Image.fromarray(change(np.asarray(image)).astype(np.uint8))
        again.putpalette(image.getpalette() or [])
        return again

    return changed


def edit_lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    replace(path, "".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def edit_boxes(root: Path, pattern: str, repl: str, count: int | None = None) -> None:
    for path in sorted((root / "VOC2007/Annotations").glob("*.xml"))[:count]:
        replace(path, re.sub(pattern, repl, path.read_text(), flags=re.DOTALL))


def errors(dataset: str, root: Path) -> list[Finding]:
    return [finding for finding in check(dataset, root, progress=False) if finding.severity == "error"]


def only_error(dataset: str, root: Path) -> Finding:
    found = errors(dataset, root)
    assert len(found) == 1, render(found)
    assert found[0].remedy
    return found[0]


@pytest.mark.parametrize("dataset", ["sample", "coco", "voc", "cityscapes", "ade20k", "imagenet"])
def test_a_healthy_tree_is_fine(healthy: Path, dataset: str) -> None:
    found = check(dataset, healthy, progress=False)
    assert {finding.severity for finding in found} == {"fine"}
    assert len(found) >= 4
    assert render(found).endswith(FINE)


SEGMENTATION = "VOC2012/ImageSets/Segmentation"
DERIVED = "VOC2012/SegmentationClassAug/*"
VAL_POLYGONS = "cityscapes/gtFine/val/*/*_polygons.json"


def first(root: Path, pattern: str) -> Path:
    return min(root.glob(pattern))


def leak_val(root: Path) -> None:
    stranger = (root / SEGMENTATION / "val.txt").read_text().split()[0]
    shutil.copy(root / f"VOC2012/SegmentationClass/{stranger}.png", root / "VOC2012/SegmentationClassAug")
    edit_lines(root / SEGMENTATION / "trainaug.txt", lambda names: [*names[1:], stranger])


def rotate_boxes(root: Path) -> None:
    names = (root / "VOC2007/ImageSets/Main/test.txt").read_text().split()
    paths = [root / f"VOC2007/Annotations/{name}.xml" for name in names]
    texts = [path.read_text() for path in paths]
    for path, text in zip(paths, [*texts[1:], texts[0]], strict=True):
        replace(path, text)


def unknown_class(root: Path) -> None:
    path = first(root, "VOC2012/Annotations/*.xml")
    replace(path, re.sub("<name>[^<]*<", "<name>unicorn<", path.read_text(), count=1))


def smaller_picture(root: Path) -> None:
    path = first(root, "coco/val2017/*.jpg")
    save(path, Image.open(path).resize((50, 50)))


def dangling(root: Path) -> None:
    path = first(root, "coco/val2017/*.jpg")
    path.unlink()
    path.symlink_to(root / "nowhere")


def a_train_image(root: Path) -> Path:
    # Neither the first nor the last of its class.
    return sorted(min((root / "imagenet/train").iterdir()).glob("*.jpg"))[1]


def add_line(root: Path, change: Callable[[str], str]) -> None:
    edit_lines(root / "imagenet/1percent.txt", lambda lines: [*lines, change(lines[0])])


def same_name_twice(root: Path) -> None:
    listed = (root / "imagenet/1percent.txt").read_text().split()
    edit_lines(root / "imagenet/10percent.txt", lambda _: listed[1:2])
    image = max((root / "imagenet/train").iterdir()) / "kept.jpg"
    min(image.parent.glob("*.jpg")).rename(image)
    edit_lines(root / "imagenet/1percent.txt", lambda _: [listed[0]])
    image.rename(image.with_name(listed[0]))


def damage(pattern: str, content: Callable[[bytes], bytes | str]) -> Callable[[Path], None]:
    return lambda root: replace(path := first(root, pattern), content(path.read_bytes()))


BREAKS: list[tuple[str, Callable[[Path], object], str]] = [
    ("voc", leak_val, "1 images of val are in it"),
    ("voc", rotate_boxes, r"(?:[6-9]|1\d) of 16 pictures .* of another size than its annotation"),
    ("voc", unknown_class, "the unknown class 'unicorn'"),
    ("voc", damage("VOC2012/Annotations/*.xml", lambda text: text[:90]), "is no VOC annotation"),
    ("voc", lambda root: (root / SEGMENTATION / "trainaug.txt").unlink(), "is missing"),
    ("voc", lambda root: edit_lines(root / SEGMENTATION / "val.txt", lambda n: [*n[1:], n[1]]), "1 names .* twice"),
    ("voc", lambda root: edit_masks(root, DERIVED, edit_values(lambda v: np.where(v, 77, v)), 1),
     "1 of 24 masks .* holds the value 77: classes are 0 to 10"),
    ("voc", lambda root: edit_masks(root, DERIVED, lambda i: i.resize((20, 20), 0)),
     "24 of 24 masks .* its picture of another size"),
    ("voc", lambda root: edit_masks(root, DERIVED, edit_values(lambda v: np.full_like(v, 255))), "no class at all"),
    # Every number is still a label, and none is the right one; the colours tell.
    ("voc", lambda root: edit_masks(root, DERIVED, lambda i: i.remap_palette(
        [3, 1, 2, 0, *range(4, 256)]), 1), "1 of 24 masks .* was numbered anew"),
    ("coco", damage("coco/val2017/*.jpg", lambda data: data[:400]), "1 of 16 pictures looked at are damaged"),
    ("coco", damage("coco/annotations/*val*", lambda text: text[:1000]), "is no COCO file"),
    ("coco", smaller_picture, "1 of 16 pictures .* of another size than its annotation"),
    ("cityscapes", lambda root: [path.unlink() for path in root.glob("cityscapes/gtFine/train/*/*_labelTrainIds.png")],
     r"lacks 24 of the 24 \*_gtFine_labelTrainIds.png of train"),
    ("ade20k", lambda root: edit_masks(root, "ADEChallengeData2016/annotations/validation/*", lambda i:
        i.point(lambda v: 77 if v else 0)), "holds the value 77: classes are 0 to 10"),
    ("imagenet", lambda root: (root / "imagenet/train/n01440764.tar").write_text("x"), "1 files .*n01440764.tar"),
    ("imagenet", lambda root: replace(a_train_image(root), b""), "1 files are empty .*/.*_00001.jpg"),
    ("coco", dangling, "1 files are empty or links to nothing: .*jpg$"),
    ("imagenet", lambda root: a_train_image(root).rename(root / "kept"), "39 train images, 40 expected"),
    ("imagenet", lambda root: add_line(root, lambda _: "n99_1.JPEG"), "names 1 files that are not in .*n99_1"),
    ("imagenet", lambda root: add_line(root, lambda n: f"{n.rpartition('_')[0]}/{n}"), "names 1 files twice"),
    ("imagenet", same_name_twice, "several classes hold a file"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "break_it", "message"), BREAKS, ids=[entry[2][:40] for entry in BREAKS])
def test_each_break_is_the_one_error(tree: Path, dataset: str, break_it: Callable[[Path], None], message: str) -> None:
    break_it(tree)
    assert re.search(message, only_error(dataset, tree).message)


@pytest.mark.parametrize(
    ("dataset", "folder", "names", "message"),
    [
        ("coco", "coco/val2017", None, r"seen upright \(EXIF\)"),
        ("voc", "VOC2007/JPEGImages", "VOC2007/ImageSets/Main/test.txt", r"seen upright \(EXIF\)"),
        ("voc", "VOC2012/JPEGImages", f"{SEGMENTATION}/val.txt", "its picture of another size"),
    ],
)
def test_pictures_lying_on_their_side_by_exif_are_errors_of_each_layout(
    tree: Path, dataset: str, folder: str, names: str | None, message: str
) -> None:
    path = first(tree, f"{folder}/{(tree / names).read_text().split()[0] if names else '*'}.jpg")
    wide = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    path.unlink()  # a link into the healthy tree
    wide.save(path, exif=exif)
    assert any(re.search(message, finding.message) for finding in errors(dataset, tree))


def test_images_in_folders_of_a_class_are_images(tree: Path) -> None:
    """The engine reads any depth and these endings."""
    path = a_train_image(tree)
    (path.parent / "deep/deeper").mkdir(parents=True)
    path.rename(path.parent / "deep/deeper" / path.name)
    assert render(check("imagenet", tree, progress=False)).endswith(FINE)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda c: c["annotations"][0].pop("image_id"), r"annotations\.0\.image_id"),
        (lambda c: c["annotations"][0].update(category_id=99), "1 annotations .* category_id 99"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, None, 4]), r"1 faults; annotations\.0\.bbox\.2"),
        (lambda c: c["images"].append(None), r"1 faults; images\.16"),
        (lambda c: c["categories"][2].update(name="unicorn"), "categories are not those of training"),
    ],
)
def test_each_break_of_coco_is_the_one_error(tree: Path, break_it: Callable[..., object], message: str) -> None:
    edit_json(tree / "coco/annotations/instances_val2017.json", break_it)
    assert re.search(message, only_error("coco", tree).message)


def test_coco_boxes_given_as_corners(tree: Path) -> None:
    def to_corners(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            left, top, width, height = entry["bbox"]
            entry["bbox"] = [left, top, left + width, top + height]

    edit_json(tree / "coco/annotations/instances_train2017.json", to_corners)
    found = only_error("coco", tree)
    assert "reaches outside its image" in found.message
    assert "corners" in found.remedy


def test_everything_wrong_is_said_at_once(tree: Path) -> None:
    edit_masks(tree, "VOC2012/SegmentationClass/*.png", lambda image: image.convert("RGB"))
    damage("coco/annotations/*val*", lambda text: text[:1000])(tree)
    for path in tree.glob("cityscapes/gtFine/train/*/*_labelTrainIds.png"):
        path.unlink()
    (tree / "imagenet/train/n01440764.tar").touch()
    shutil.rmtree(tree / "VOC2007/JPEGImages")
    (tree / "unlabelled/000000.jpg").unlink()
    found = check("sample", tree, progress=False)
    text = render(found)
    for part in (
        "holds colours",
        "no COCO file",
        "TrainIds",
        "tar",
        "JPEGImages: is missing",
        "39 unlabelled images, 40",
    ):
        assert part in text
    assert [f.severity for f in found] == sorted((f.severity for f in found), key=["error", "warning", "fine"].index)


def test_a_half_extracted_real_tree_names_counts_and_origin(tree: Path) -> None:
    """Without its sample.json the tree counts as the real data, of which nearly everything is missing."""
    (tree / "sample.json").unlink()
    for dataset, counts in {
        "coco": ["24 train2017 images, 118287 expected", "16 val2017 images, 5000 expected", "10 categories, 80"],
        "voc": [*("12 trainval images, 5011", "16 test images, 4952", "40 trainval images, 11540"),
                *("24 trainaug images, 10582", "16 val images, 1449")],
        "cityscapes": ["24 train images, 2975", "16 val images, 500"],
        "ade20k": ["12 training images, 20210", "8 validation images, 2000"],
        "imagenet": ["40 train images, 1281167", "10 train classes, 1000", "10 lines, 12811", "10 lines, 128116"],
    }.items():  # fmt: skip
        text = render(check(dataset, tree, progress=False))
        for count in counts:
            assert count in text
        assert " comes from " in text


def test_wrong_names_and_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'no data set "cocoo" to check\. Did you mean "coco"'):
        check("cocoo", tmp_path)
    with pytest.raises(UserError, match=r'There is no data set "voc2008".* "voc2007"'):
        find_data_set("voc2008")
    with pytest.raises(UserError, match=r"There is no folder .*cityscapes-dataset.com"):
        check("cityscapes", tmp_path / "absent")
    with pytest.raises(UserError, match="make one with `twist data sample"):
        check("sample", tmp_path)
    for dataset in ("coco", "voc", "cityscapes", "imagenet", "folders"):
        assert has_errors(check(dataset, tmp_path, progress=False))


# ---------------------------------------------------------------------------------------------------------------------
# A user's own class folders


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "mine", train=8)


def test_own_class_folders_are_fine_without_any_count_of_imagenets(folders: Path) -> None:
    for split in ("train", "val"):
        (folders / split / ".DS_Store").write_bytes(b"x")
        (folders / split / ".ipynb_checkpoints").mkdir()
        (folders / split / "class_0" / "._train_0_000.png").write_bytes(b"x")
    text = render(check("folders", folders, progress=False))
    for part in ("24 train images", "9 val images", "3 train classes"):
        assert part in text
    assert text.endswith(FINE)
    folders.rename(folders.parent / "imagenet")
    assert not has_errors(check("folders", folders.parent, progress=False))


def icon_called_png(root: Path) -> None:
    path = root / "val" / "class_2" / "val_2_000.png"
    with Image.open(path) as image:
        image.save(path, format="ICO")


def overwrite(root: Path, pattern: str, count: int, content: bytes) -> None:
    for path in sorted(root.glob(pattern))[:count]:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root / "val"), "^is missing$"),
        (lambda root: shutil.rmtree(root / "val/class_1"), "class_1 is only in train/"),
        (lambda root: [path.unlink() for path in root.glob("val/class_1/*")],
         "^1 class folders hold no images: class_1$"),
        (lambda root: overwrite(root, "train/class_1/*", 7, b"no picture"),
         r"^7 of 24 pictures .*: class_1/train_1_000\.png, .*_004\.png and 2 more"),
        (icon_called_png, r"^1 of 9 pictures .*: class_2/val_2_000\.png"),
    ],
)  # fmt: skip
def test_each_break_of_class_folders_is_the_one_error(folders: Path, break_it, message: str) -> None:
    break_it(folders)
    found = only_error("folders", folders)
    assert re.search(message, found.message), found.message
    assert "image-net.org" not in found.remedy


def test_what_a_run_leaves_out_without_a_word_is_a_warning(folders: Path) -> None:
    shutil.copy(folders / "train" / "class_0" / "train_0_000.png", folders / "train" / "stray.png")
    for name in ("val/class_0/more.zip", "val/class_0/photo.heic"):
        (folders / name).write_bytes(b"x")
    found = [finding for finding in check("folders", folders, progress=False) if finding.severity != "fine"]
    assert [(Path(one.where).name, one.severity) for one in found] == [("train", "warning"), ("val", "warning")]
    assert "stray.png" in found[0].message
    assert "left out: class_0/more.zip, class_0/photo.heic" in found[1].message
    read_split(folders / "train")  # it does go


# ---------------------------------------------------------------------------------------------------------------------
# Before a run


def require(root: Path, *names: str, task: Any = "segmentation", scale: Any = "full") -> dict[str, Any] | None:
    return require_data(names, root, task=task, scale=scale)


def test_root_comes_from_the_option_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    with pytest.raises(UserError, match="No data root: name it"):
        find_root(None)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert find_root(None) == tmp_path
    with pytest.raises(UserError, match="There is no data root"):
        find_root(tmp_path / "absent")


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    make_voc_detection(tmp_path)
    assert require(tmp_path, "voc2007", "voc2012", task="detection") is None
    first(tmp_path, "VOC2007/JPEGImages/*").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 \*\.jpg of t.*`twist data check voc "):
        require(tmp_path, "voc2007", "voc2012", task="detection")
    (tmp_path / "coco").mkdir()
    with pytest.raises(UserError) as caught:
        require(tmp_path, "coco", task="detection")
    for part in ("instances_train2017.json", "instances_val2017.json", "coco/train2017", "twist data check coco"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"holds no sample\.json"):
        require(tmp_path, "coco", task="detection", scale="sample")


def test_a_sample_is_not_taken_for_real_data(healthy: Path, tmp_path: Path) -> None:
    make_coco(tmp_path)
    assert require(tmp_path, "coco", task="instance-segmentation") is None
    assert require(healthy, "voc2012-aug", scale="sample") == tiny_sample().info
    with pytest.raises(UserError, match="needs the real data"):
        require(healthy, "voc2012-aug")
    assert require(healthy, "imagenet", task="classification") is not None


def test_cityscapes_without_its_derived_masks_and_with_the_wrong_ones(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    path = first(tmp_path, "cityscapes/gtFine/train/*/*_labelTrainIds.png")
    shutil.copy(str(path).replace("labelTrainIds", "labelIds"), path)
    with pytest.raises(UserError, match=r"holds the value 26.*remove gtFine/train.*`twist data prepare cityscapes"):
        require(tmp_path, "cityscapes")
    path.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 2 .* of train.*twist data prepare cityscapes"):
        require(tmp_path, "cityscapes")
    prepare("cityscapes", tmp_path, progress=False)
    assert require(tmp_path, "cityscapes") is None  # the remedy is one
    first(tmp_path, VAL_POLYGONS).unlink()
    assert require(tmp_path, "cityscapes") is None
    with pytest.raises(UserError, match=r"lacks 1 of the 2 .*polygons\.json of val"):
        require(tmp_path, "cityscapes", task="instance-segmentation")
