"""`twist data prepare` on small trees in the real layouts: right files, originals untouched, nothing overwritten."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from tiny_sample import tiny_sample

from twist.catalog.check import check, has_errors
from twist.catalog.masks import voc_palette
from twist.catalog.prepare import MOST_MAT, prepare
from twist.contracts.errors import UsageError, UserError


def digests(root: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def save_map(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    image.putpalette(voc_palette())
    image.save(path)


def write_list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def voc(tmp_path: Path) -> tuple[Path, Path]:
    """VOC 2012 with train a b, val c; SBD with a c d e, of which a is also VOC's and c is VOC's val."""
    root, sbd = tmp_path / "data", tmp_path / "sbd" / "benchmark_RELEASE" / "dataset"
    folder = root / "VOC2012"
    own = np.arange(12, dtype=np.uint8).reshape(3, 4)
    own[0, 0] = 255
    for name in "abc":
        save_map(folder / "SegmentationClass" / f"{name}.png", own)
    (folder / "JPEGImages").mkdir()
    for name in "abcde":
        Image.new("RGB", (4, 3)).save(folder / "JPEGImages" / f"{name}.jpg")
    write_list(folder / "ImageSets/Segmentation/train.txt", ["a", "b"])
    write_list(folder / "ImageSets/Segmentation/val.txt", ["c"])
    (sbd / "cls").mkdir(parents=True)
    for index, name in enumerate("acde"):
        labels = np.full((3, 4), index, dtype=np.uint8)
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels, "CategoriesPresent": [index]}})
    write_list(sbd / "train.txt", ["a", "d"])
    write_list(sbd / "val.txt", ["c", "e"])
    return root, sbd


def test_trainaug_is_voc_train_and_sbd_without_val(voc: tuple[Path, Path]) -> None:
    root, sbd = voc
    before = digests(root) | digests(sbd)
    written = prepare("voc", root, sbd=str(sbd.parent.parent), expected=4, progress=False)
    folder = root / "VOC2012"
    assert (folder / "ImageSets/Segmentation/trainaug.txt").read_text().split() == ["a", "b", "d", "e"]
    assert (folder / "ImageSets/Segmentation/aug.txt").read_text().split() == ["d", "e"]
    maps = {path.stem: np.asarray(Image.open(path)) for path in (folder / "SegmentationClassAug").glob("*.png")}
    assert sorted(maps) == ["a", "b", "d", "e"]
    assert maps["a"][0, 0] == 255  # VOC's own map, not SBD's
    assert (maps["d"] == 2).all()
    assert (maps["e"] == 3).all()
    assert Image.open(folder / "SegmentationClassAug/d.png").mode == "P"
    assert len(written) == 6
    assert {path: digest for path, digest in digests(root).items() if path in before} | digests(sbd) == before


def test_a_second_call_writes_nothing_and_differences_are_refused(voc: tuple[Path, Path]) -> None:
    root, sbd = voc
    prepare("voc", root, sbd=str(sbd), expected=4, progress=False)
    assert prepare("voc", root, sbd=str(sbd), expected=4, progress=False) == []
    changed = root / "VOC2012/SegmentationClassAug/d.png"
    save_map(changed, np.zeros((3, 4), dtype=np.uint8))
    with pytest.raises(UserError, match=r"d\.png exists and differs"):
        prepare("voc", root, sbd=str(sbd), expected=4, progress=False)
    changed.unlink()
    write_list(root / "VOC2012/ImageSets/Segmentation/aug.txt", ["d"])
    with pytest.raises(UserError, match=r"aug\.txt exists and holds other names"):
        prepare("voc", root, sbd=str(sbd), expected=4, progress=False)


def test_incomplete_originals_are_refused_before_anything_is_written(voc: tuple[Path, Path]) -> None:
    root, sbd = voc
    before = digests(root)
    with pytest.raises(UserError, match="trainaug would have 4 images and not 10582"):
        prepare("voc", root, sbd=str(sbd), progress=False)
    (sbd / "cls/e.mat").unlink()
    with pytest.raises(UserError, match=r"1 originals are missing, .*e\.mat"):
        prepare("voc", root, sbd=str(sbd), expected=4, progress=False)
    with pytest.raises(UserError, match=r"There is no cls/ folder of SBD"):
        prepare("voc", root, sbd=str(root), expected=4, progress=False)
    with pytest.raises(UsageError, match=r"needs sbd=FOLDER.*cls/\*\.mat"):
        prepare("voc", root, progress=False)
    assert digests(root) == before


def _of(labels: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {"GTcls": {"Segmentation": labels}}, do_compression=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"no matlab file at all",
        bytes(MOST_MAT + 1),
        _of(np.array([[{"a": 1}]], dtype=object)),
        _of(np.full((4, 4), np.nan)),
    ],
)
def test_a_damaged_mat_file_is_one_sentence(voc: tuple[Path, Path], content: bytes) -> None:
    root, sbd = voc
    (sbd / "cls/d.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"d\.mat .*unpack SBD again"):
        prepare("voc", root, sbd=str(sbd), expected=4, progress=False)
    assert not (root / "VOC2012/ImageSets/Segmentation/trainaug.txt").exists()


@pytest.fixture(scope="module")
def healthy() -> Path:
    return tiny_sample().root


def test_cityscapes_train_ids_are_made_again_equal(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    before = digests(root / "cityscapes")
    removed = sorted(root.glob("cityscapes/gtFine/*/*/*_labelTrainIds.png"))[::3]
    pixels = {path: np.asarray(Image.open(path)) for path in removed}
    for path in removed:
        path.unlink()
    assert sorted(prepare("cityscapes", root, progress=False)) == removed
    for path, values in pixels.items():
        assert (np.asarray(Image.open(path)) == values).all()
    kept = {path: digest for path, digest in digests(root / "cityscapes").items() if path not in pixels}
    assert kept == {path: digest for path, digest in before.items() if path not in pixels}
    assert prepare("cityscapes", root, progress=False) == []
    assert not has_errors(check("cityscapes", root, progress=False))


def test_a_damaged_polygon_file_leaves_no_half_map(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(healthy / "cityscapes", root / "cityscapes")
    source = min(root.glob("cityscapes/gtFine/train/*/*_polygons.json"))
    target = source.with_name(source.name.replace("polygons.json", "labelTrainIds.png"))
    target.unlink()
    whole = source.read_text()

    def one(label: object, polygon: object) -> str:
        return json.dumps({"imgHeight": 4, "imgWidth": 4, "objects": [{"label": label, "polygon": polygon}]})

    triangle = [[0, 0], [3, 0], [3, 3]]
    for text, why in (
        ('{"imgHeight": 4', "JSON"),
        (one("car", triangle).replace("4", "1000000"), "1000000 × 1000000"),
        (one("car", [[10**400, 0]] * 3), "coordinate"),
        (one("zebra", triangle), "a label that Cityscapes does not have"),
        (one("car", None), "not iterable"),
    ):
        source.write_text(text)
        with pytest.raises(UserError, match=f"{source} (is no|holds|is not) *.*{why}"):
            prepare("cityscapes", root, progress=False)
        assert not target.exists()
    assert not list(source.parent.glob(".*"))
    # Negative controls: what the scripts paint is painted.
    for text in (whole, one("cargroup", triangle), one("car", triangle[:2])):
        source.write_text(text)
        assert prepare("cityscapes", root, progress=False) == [target]
        target.unlink()


def test_imagenet_lists_are_checked_and_copied(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, lists = tmp_path / "root", tmp_path / "lists"
    shutil.copytree(healthy / "imagenet", root / "imagenet")
    lists.mkdir()
    for name in ("1percent.txt", "10percent.txt"):
        (root / "imagenet" / name).rename(lists / name)
    written = prepare("imagenet", root, lists=str(lists), progress=False)
    assert [path.name for path in written] == ["1percent.txt", "10percent.txt"]
    assert (root / "imagenet/1percent.txt").read_text() == (lists / "1percent.txt").read_text()
    assert prepare("imagenet", root, lists=str(lists), progress=False) == []
    (lists / "1percent.txt").write_text("n01440764_10026.JPEG\n")
    with pytest.raises(UserError, match=r"1percent\.txt names 1 files that are not in"):
        prepare("imagenet", root, lists=str(lists), progress=False)
    (root / "imagenet/1percent.txt").unlink()
    image = min((root / "imagenet/train").glob("*/*.jpg"))
    (lists / "1percent.txt").write_text(f"{image.parent.name}/{image.name}\n")  # with its class, as a run takes it
    assert len(prepare("imagenet", root, lists=str(lists))) == 1
    assert "10/10 folders" in capsys.readouterr().err


def test_wrong_names_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r'nothing to prepare for "cityscape".* "cityscapes"'):
        prepare("cityscape", tmp_path)
    with pytest.raises(UsageError, match=r'no option "list".* "lists"'):
        prepare("imagenet", tmp_path, list="x")
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    with pytest.raises(UsageError, match="DETECTRON2_DATASETS"):
        prepare("voc", sbd="x")
    with pytest.raises(UserError, match=r"There is no folder .*image-net.org"):
        prepare("imagenet", tmp_path / "absent", lists="x")


def test_origin_and_licence_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"_gtFine_polygons\.json in"):
        prepare("cityscapes", tmp_path, progress=False)
    said = capsys.readouterr().err
    assert "www.cityscapes-dataset.com" in said
    assert "non-commercial" in said
    assert prepare("coco", tmp_path, progress=False) == []
