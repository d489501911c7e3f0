"""Data cards without a framework: what the one reader makes of each format, what it refuses, guesses and splits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.made_records import make_record
from tests.tiny_cards import (
    COLOURS,
    HEIGHT,
    NAMES,
    WIDTH,
    draw_squares,
    write_card,
    write_classes,
    write_coco,
    write_masks,
    write_tables,
    write_voc,
    write_yolo,
)
from twist.catalog.boxes import mask_format, read_boxes
from twist.catalog.card import find_card
from twist.catalog.card_data import (
    labelled_images,
    open_card,
    prepare_card,
    pretraining_images,
    require_card_data,
)
from twist.catalog.card_guess import write_card as guess_card
from twist.catalog.check import check, check_card, check_images, has_errors, identify_data
from twist.catalog.class_folders import open_tree
from twist.catalog.data_sets import VOID
from twist.catalog.masks import read_mask
from twist.compare.table import build_table
from twist.contracts.errors import UsageError, UserError
from twist.contracts.images import UnreadableImage, decode
from twist.pretrain.config import DataConfig
from twist.pretrain.data.source import open_images


def card_of(path: Path) -> Any:
    card = find_card(path)
    assert card is not None
    return card


def errors_of(path: Path) -> list[str]:
    return [finding.message for finding in check_card(card_of(path), progress=False) if finding.severity == "error"]


@pytest.mark.parametrize("write", [write_coco, write_voc, write_yolo])
def test_all_formats_of_boxes_give_the_same_objects(tmp_path: Path, write: Any) -> None:
    boxes = read_boxes(card_of(write(tmp_path)))
    drawn = draw_squares(tmp_path / "again", 6, seed=1)
    assert boxes["train"].classes == NAMES
    for image in boxes["train"].images:
        found = sorted((one["category"], *(round(value, 2) for value in one["bbox"])) for one in image["objects"])
        assert found == sorted(drawn[image["file"].name])
        assert (image["width"], image["height"]) == (WIDTH, HEIGHT)
    assert errors_of(tmp_path) == []


def test_float_ids_empty_outlines_and_boxes_without_area_are_counted(tmp_path: Path) -> None:
    card = write_coco(tmp_path)
    content = json.loads((tmp_path / "train.json").read_text())
    first, second, *_ = content["annotations"]
    first["segmentation"], second["bbox"][2] = [], 0
    first["image_id"] = float(first["image_id"])
    content["images"].append({"id": 999, "file_name": "empty.jpg", "width": WIDTH, "height": HEIGHT})
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "empty.jpg")
    (tmp_path / "train.json").write_text(json.dumps(content))
    boxes = read_boxes(card_of(card))["train"]
    assert sorted((+boxes.found).values()) == [1, 1, 1]
    kept = boxes.as_coco(masks=True)["annotations"]
    assert [one["id"] for one in kept] == [*range(1, len(kept) + 1)]  # whatever gaps the file's ids have
    assert {one["category_id"] for one in kept} == {1, 2}
    assert len(kept) == len(content["annotations"]) - 1  # of an object without a mask no mask can be learnt
    assert errors_of(card) == []


@pytest.mark.parametrize(("crowds", "expected"), [((0, 0), "bitmask"), ((1, 0), "bitmask"), ((1, 1), "polygon")])
def test_run_lengths_in_coco_own_layout_are_bitmaps_unless_all_are_crowds(
    tmp_path: Path, crowds: tuple[int, ...], expected: str
) -> None:
    mask = {"size": [4, 4], "counts": [0, 16]}
    annotations = [{"segmentation": mask, "iscrowd": crowd} for crowd in crowds]
    annotations.append({"segmentation": [[0, 0, 3, 0, 3, 3]], "iscrowd": 0})
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": annotations}))
    assert mask_format(tmp_path / "instances.json") == expected


def test_mask_format_follows_the_file(tmp_path: Path) -> None:
    for form, expected in (("polygon", "polygon"), ("rle", "bitmask"), ("none", "polygon")):
        boxes = read_boxes(card_of(write_coco(tmp_path / form, form=form)))["train"]
        assert (boxes.mask_format, boxes.has_masks) == (expected, form != "none")


def rotate(path: Path, orientation: int) -> None:
    """The picture as it is, with an EXIF note that it lies on its side."""
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)


@pytest.mark.parametrize("write", [write_coco, write_voc, write_masks])
def test_annotations_of_a_picture_lying_on_its_side_are_refused(tmp_path: Path, write: Any) -> None:
    card = write(tmp_path)
    picture = sorted(tmp_path.rglob("1_000.jpg"))[0]
    for orientation in (1, 3):  # the sizes are kept
        rotate(picture, orientation)
        assert errors_of(card) == []
    for orientation in (5, 6, 8):
        rotate(picture, orientation)
        (said,) = errors_of(card)
        assert "EXIF" in said
        assert "1_000" in said
    with pytest.raises(UserError, match="EXIF"):
        require_card_data(card_of(card), "segmentation" if write is write_masks else "detection")
    if write is write_coco:  # sizes as seen upright pass
        content = json.loads((tmp_path / "train.json").read_text())
        content["images"][0] |= {"width": HEIGHT, "height": WIDTH}
        (tmp_path / "train.json").write_text(json.dumps(content))
        assert errors_of(card) == []


@pytest.mark.parametrize("flags", ["", "<difficult>1</difficult>", "<pose>Left</pose><truncated>1</truncated>"])
def test_voc_files_without_flags_are_read_with_zeros(tmp_path: Path, flags: str) -> None:
    boxes = read_boxes(card_of(write_voc(tmp_path, flags=flags)))["val"]
    one = next(boxes.objects)
    assert one["difficult"] == int("difficult" in flags)
    assert one["truncated"] == int("truncated" in flags)
    assert boxes.found["lack truncated or difficult, which count as 0"] == sum(1 for _ in boxes.objects)


def test_yolo_outlines_are_masks_and_wrong_lines_are_named(tmp_path: Path) -> None:
    card = write_yolo(tmp_path)
    label = tmp_path / "labels" / "train" / "1_000.txt"
    label.write_text("1 0.25 0.25 0.5 0.25 0.5 0.5 0.25 0.5\n")
    one = read_boxes(card_of(card))["train"].images[0]["objects"][0]
    assert one["bbox"] == [20, 16, 20, 16]
    assert one["area"] == 320
    label.write_text("7 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UserError, match=r"1_000.txt.*classes are 0 to 1"):
        read_boxes(card_of(card))


@pytest.mark.parametrize("form", ["index", "palette", "rgb", "gaps", "zero"])
def test_masks_of_every_form_are_the_same_classes(tmp_path: Path, form: str) -> None:
    section = card_of(write_masks(tmp_path, form=form)).segmentation
    mask = read_mask(tmp_path / "masks" / "train" / "1_000_mask.png", section)
    reference = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for kind, x, y, w, h in draw_squares(tmp_path / "again", 1, seed=1)["1_000.jpg"]:
        reference[y : y + h, x : x + w] = kind + 1
    if form == "zero":
        reference = np.where(reference == 0, VOID, reference - 1).astype(np.uint8)
    reference[0] = VOID
    assert np.array_equal(mask, reference)
    assert errors_of(tmp_path) == []


def test_mask_values_and_colours_that_the_card_does_not_know_are_named(tmp_path: Path) -> None:
    card = card_of(write_masks(tmp_path))
    section, path = card.segmentation, tmp_path / "masks" / "train" / "1_000_mask.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, dtype=np.uint8)).save(path)
    with pytest.raises(UserError, match="value 9"):
        read_mask(path, section)
    Image.new("RGB", (WIDTH, HEIGHT), "#804080").save(path)
    with pytest.raises(UserError, match="#804080"):
        read_mask(path, section)


@pytest.mark.parametrize("write", [write_coco, write_voc, write_yolo, write_masks, write_classes])
def test_a_guessed_card_reads_the_same_data(tmp_path: Path, write: Any) -> None:
    given = write(tmp_path / "nests")
    known = card_of(given)
    (section,) = known.sections()
    before = open_card(known, section)
    given.unlink()
    path = guess_card(tmp_path / "nests")
    after = open_card(card_of(path), section)
    assert {role: after.count(role) for role in after.splits} == {role: before.count(role) for role in before.splits}
    assert len(after.classes) == len(before.classes)
    with pytest.raises(UserError, match="not replaced"):
        guess_card(tmp_path / "nests")


VALID = {"1_*": "train", "2_*": "valid"}
# As tools export these data: what moves where (None: is not there), and the list of names that they leave.
EXPORTS: dict[str, tuple[Any, dict[str, Any], dict[str, str | None], dict[str, str]]] = {
    "CVAT COCO": (write_coco, {}, {"train.json": "annotations", "val.json": None, "images/2_*": None}, {}),
    "Roboflow COCO": (
        write_coco, {},
        {f"images/{names}": to for names, to in VALID.items()} | {"train.json": "train", "val.json": "valid"}, {},
    ),
    "Roboflow VOC": (
        write_voc, {},
        {f"{kind}/{names}": to for names, to in VALID.items() for kind in ("JPEGImages", "Annotations")}
        | {"ImageSets/Main/*": None}, {},
    ),
    "Roboflow YOLO": (
        write_yolo, {},
        {f"{kind}/{role}/*": f"{to}/{kind}" for kind in ("images", "labels") for role, to in
         (("train", "train"), ("val", "valid"))}, {},
    ),
    "CVAT YOLO": (
        write_yolo, {},
        {f"{kind}/train/*": "obj_train_data" for kind in ("images", "labels")}
        | {"*/val/*": None, "data.yaml": None}, {"obj.names": "egg\nnest\n"},
    ),
    "Roboflow masks": (
        write_masks, {},
        {f"{kind}/{role}/*": to for kind in ("images", "masks") for role, to in
         (("train", "train"), ("val", "valid"))},
        {"train/_classes.csv": "Pixel Value, Class\n0, earth\n1, egg\n2, nest\n"},
    ),
    "labelme2voc": (
        write_masks, {"form": "palette"},
        {"images/train/*": "JPEGImages", "masks/train/*": "SegmentationClassPNG", "*/val/*": None},
        {"class_names.txt": "earth\negg\nnest\n"},
    ),
    "CVAT masks": (
        write_masks, {"form": "rgb"},
        {"images/train/*": "JPEGImages", "masks/train/*": "SegmentationClass", "*/val/*": None},
        {"labelmap.txt": "# label:color_rgb:parts:actions\nearth:0,0,0::\negg:230,60,40::\nnest:40,70,220::\n"},
    ),
    "shards": (write_tables, {"form": "tar"}, {}, {}),
    "Parquet": (write_tables, {"form": "parquet", "columns": ("img", "fine_label")}, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "tool", [pytest.param(tool, marks=[pytest.mark.slow] * (row[0] is write_tables)) for tool, row in EXPORTS.items()]
)
def test_a_card_is_guessed_from_what_tools_export(tmp_path: Path, tool: str) -> None:
    write, form, moves, lists = EXPORTS[tool]
    write(tmp_path, **form).unlink()
    for pattern, to in moves.items():
        for path in sorted(tmp_path.glob(pattern)):
            if to is None:
                path.unlink()
            else:
                (tmp_path / to).mkdir(parents=True, exist_ok=True)
                path.rename(tmp_path / to / path.name)
    for folder in sorted((path for path in tmp_path.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    if (tmp_path / "valid").is_dir():
        shutil.copytree(tmp_path / "valid", tmp_path / "test")
    card = card_of(guess_card(tmp_path))
    (section,) = card.sections()
    data = open_card(card, section)
    count = 24 if write is write_tables else 6
    has_val = None not in moves.values() or "Roboflow" in tool
    assert {role: data.count(role) for role in data.splits} == {"train": count, **({"val": count} if has_val else {})}
    names = {"segmentation": ("earth", *NAMES), "classification": ("0", "1") if tool == "shards" else NAMES}
    assert data.classes == names.get(section, NAMES)
    if card.pretraining is not None:
        images = open_images(DataConfig(root=str(tmp_path)))
        assert len(images) == 6  # neither masks, val nor test


def test_a_card_elsewhere_has_a_root_and_root_can_be_given(tmp_path: Path) -> None:
    card = write_coco(tmp_path / "nests")
    moved = tmp_path / "card" / "nests.toml"
    moved.parent.mkdir()
    moved.write_text(card.read_text())
    with pytest.raises(UserError, match=r"train\.json"):
        open_card(card_of(moved), "detection")
    there = find_card(moved, root=str(tmp_path / "nests"))
    assert there is not None
    here = open_card(card_of(card), "detection")
    assert open_card(there, "detection").sha256 == here.sha256


def test_split_writes_lists_that_divide_train(tmp_path: Path) -> None:
    path = write_coco(tmp_path, count=10)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("val")))
    card = card_of(path)
    with pytest.raises(UserError, match=r"twist data prepare .*split=0.2"):
        require_card_data(card, "detection")
    written = prepare_card(card, split=0.2, seed=0)
    data = require_card_data(card, "detection")
    assert (data.count("train"), data.count("val")) == (8, 2)
    assert not set(data.images("train")) & set(data.images("val"))
    assert prepare_card(card, split=0.2, seed=0) == written
    with pytest.raises(UserError, match="another split"):
        prepare_card(card, split=0.2, seed=1)
    with pytest.raises(UsageError, match="split"):
        prepare_card(card, split=2.0)


def test_identity_follows_annotations_and_not_places(tmp_path: Path) -> None:
    one, two = (open_card(card_of(write_coco(tmp_path / name)), "detection") for name in ("a", "b"))
    assert one.sha256 == two.sha256
    content = json.loads((tmp_path / "b" / "val.json").read_text())
    content["annotations"][0]["bbox"][0] += 1
    (tmp_path / "b" / "val.json").write_text(json.dumps(content))
    assert open_card(card_of(tmp_path / "b"), "detection").sha256 != one.sha256


def test_cards_that_say_nothing_or_something_else_are_refused(tmp_path: Path) -> None:
    path = write_card(tmp_path, "")
    with pytest.raises(UsageError, match=r"\[detection\]"):
        find_card(path)
    path.write_text('name = "x"\n[detecton]\n')
    with pytest.raises(UsageError, match="detection"):
        find_card(path)
    assert find_card(tmp_path / "..") is None
    card = card_of(write_classes(tmp_path / "nests"))
    with pytest.raises(UserError, match=r"\[detection\]"):
        require_card_data(card, "instance-segmentation")


def test_an_image_in_both_splits_is_an_error(tmp_path: Path) -> None:
    path = write_card(tmp_path, write_coco(tmp_path).read_text().split("\n", 1)[1].replace("val.json", "train.json"))
    (said,) = errors_of(path)
    assert "in train and in val" in said


def test_tables_keep_own_data_apart_by_their_digest() -> None:
    data = ("nests 111111111111", "nests 222222222222")
    records = [
        make_record("twist", "knn", scale="own", data=name, recipe={"card": name}, seed=seed)
        for name in data
        for seed in (0, 1)
    ]
    table = build_table(records)
    assert {column.data for column in table.columns} == set(data)
    assert not table.sources  # no published number beside them


# ── The check looks with the engines' eyes ────────────────────────────────────────────────────────────────────────────


def png(pixels: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_deep_pictures_are_scaled_by_the_bits_in_use(bits: int) -> None:
    values = np.linspace(0, (1 << bits) - 1, 64).astype(np.uint16).reshape(8, 8)
    decoded = decode(png(values), name="deep.png")
    assert decoded.max() == 255
    assert abs(decoded.float().mean() - 127) < 2


def test_pictures_of_pillows_formats_are_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    for ending in ("tif", "bmp", "tiff"):
        Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
        decoded = decode((tmp_path / f"a.{ending}").read_bytes(), name="a")
        assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels, with hardly a byte behind it."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(11000, 10000), (60000, 60000)])
def test_giant_pictures_are_not_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(UnreadableImage, match="100,000,000"):
        decode(bomb(*size), name="giant.png")


def test_a_check_names_giant_damaged_and_foreign_files_and_goes_on(tmp_path: Path) -> None:
    write_classes(tmp_path)
    egg = tmp_path / "train" / "egg"
    (egg / "giant.png").write_bytes(bomb(14000, 13500))
    (egg / "zip.png").write_bytes(b"PK\x03\x04" + bytes(60))
    (egg / "sizes.jpg").write_bytes(
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00\xff\xc0\x00\x02"
    )
    (tmp_path / "val" / "nest" / "late.png").write_bytes(b"no picture")
    findings = check("folders", tmp_path, progress=False)
    said = " ".join(finding.message for finding in findings if finding.severity == "error")
    for name in ("giant.png", "zip.png", "sizes.jpg", "late.png"):
        assert name in said
    assert "100,000,000" in said


def test_check_images_counts_each_kind(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    draw_squares(folder, 3, seed=4)
    (folder / "copy.jpg").write_bytes((folder / "4_000.jpg").read_bytes())
    Image.new("RGB", (64, 64), "grey").save(folder / "flat.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 90, 3)).astype(np.uint8)).save(folder / "tiny.png")
    Image.fromarray((np.arange(4096).reshape(64, 64)).astype(np.uint16)).save(folder / "deep.png")
    (folder / "giant.png").write_bytes(bomb(14000, 13500))
    (folder / "broken.jpg").write_bytes(b"broken")
    (folder / "notes.heic").write_bytes(b"x")
    findings = check_images(folder, sheet=tmp_path / "sheet.png", progress=False)
    said = "\n".join(finding.message for finding in findings)
    for part in (
        "1 .heic", "broken.jpg", "giant.png", "tiny.png", "flat.png", "copies", "16 bits, up to 4095", "7 readable",
    ):  # fmt: skip
        assert part in said
    assert not has_errors(findings)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 100


# ── Pretraining on a card's pictures ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("write", [write_coco, write_masks, write_classes])
def test_pretraining_on_a_card_leaves_val_out(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path)
    where = "." if write is write_classes else "images"
    path.write_text(path.read_text() + f'[pretraining]\nimages = "{where}"\n')
    card = card_of(path)
    held_out = pretraining_images(card)[1]
    assert held_out
    images = open_images(DataConfig(root=str(path)))
    names = {Path(images.name(index)).resolve() for index in range(len(images))}
    assert names
    assert not names & held_out


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_pretraining_and_lists_of_a_split_read_the_rows_of_tables(tmp_path: Path, form: str) -> None:
    path = write_tables(tmp_path, form=form)
    images = open_images(DataConfig(root=str(path)))
    assert len(images) == 24
    decoded = [decode(images.encoded(index), name="row") for index in (0, 23)]
    assert {tuple(one.shape) for one in decoded} == {(3, 40, 48)}
    assert abs(decoded[0][0].float().mean() - COLOURS[0][0]) < 5  # in the order of the files
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("val")))
    prepare_card(card_of(path), split=0.25, seed=0)
    train, val = labelled_images(path)
    assert (len(train), len(val)) == (18, 6)
    assert len(open_images(DataConfig(root=str(path)))) == 18
    assert not {*train.paths} & {*val.paths}


def test_plain_folders_say_that_val_is_trained_on_and_exclude_leaves_it_out(tmp_path: Path) -> None:
    write_classes(tmp_path)
    everything = open_images(DataConfig(root=str(tmp_path / ".")))
    (tmp_path / "card.toml").unlink()
    everything = open_images(DataConfig(root=str(tmp_path)))
    assert any("data.exclude" in line for line in everything.remarks)  # type: ignore[attr-defined]
    kept = open_images(DataConfig(root=str(tmp_path), exclude=("val/*",)))
    assert len(kept) * 2 == len(everything)
    assert not any("trained on" in line for line in kept.remarks)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_tables_without_a_card_are_read_as_class_folders(tmp_path: Path, form: str) -> None:
    write_tables(tmp_path, form=form).unlink()
    root = tmp_path / "saved" if form == "arrow" else tmp_path
    train, val = open_tree(root)
    assert (len(train), len(val), len(train.classes)) == (24, 24, 2)
    assert abs(train.read(0)[0].float().mean() - COLOURS[0][0]) < 5
    assert not has_errors(check("folders", root, progress=False))
    before = identify_data(("imagenet",), root)
    assert before is not None
    shutil.rmtree(root / "val") if form == "arrow" else next(root.glob("val.*")).unlink()
    assert identify_data(("imagenet",), root) is None
    with pytest.raises(UserError, match="no ImageNet-like tree"):
        open_tree(root)
