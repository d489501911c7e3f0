"""Every kind of engine on a data card, from weights to one table: own classes, a record each, its own scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_cards import write_classes, write_coco, write_masks, write_voc, write_yolo
from twist.contracts.record import RunRecord, read_records
from twist.transfer.run import transfer

pytestmark = pytest.mark.slow

SMALL = ("iterations=2", "SOLVER.IMS_PER_BATCH=2", "DATALOADER.NUM_WORKERS=0", "MODEL.RPN.POST_NMS_TOPK_TEST=20")


def run(protocol: str, card: Path, output: Path, *overrides: str) -> RunRecord:
    return transfer(protocol, weights="random", data=card, gpus=0, output=output, overrides=overrides)


@pytest.mark.parametrize("form", ["polygon", "rle", "mixed"])
def test_mask_rcnn_learns_own_classes_from_coco_files(tmp_path: Path, form: str) -> None:
    card = write_coco(tmp_path / "nests", form="polygon" if form == "mixed" else form)
    if form == "mixed":
        from json import dumps, loads

        from tests.tiny_cards import run_lengths

        file = card.parent / "train.json"
        content = loads(file.read_text())
        first = content["annotations"][0]
        first["segmentation"] = run_lengths(*first["bbox"])
        file.write_text(dumps(content))
    record = run("sample-coco-mrcnn-fpn", card, tmp_path / "run", *SMALL)
    assert record.scale == "own"
    assert record.data is not None
    assert record.data.startswith("nests ")
    assert record.recipe["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 2
    assert record.recipe["INPUT"]["MASK_FORMAT"] == ("polygon" if form == "polygon" else "bitmask")
    assert {"coco_box_ap_percent", "coco_mask_ap_percent"} <= record.metrics.keys()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "egg" in log
    assert "nest" in log


@pytest.mark.parametrize("write", [write_voc, write_yolo])
def test_boxes_alone_are_learnt_from_voc_and_yolo(tmp_path: Path, write: object) -> None:
    card = write(tmp_path / "nests")  # type: ignore[operator]
    record = run("sample-coco-mrcnn-fpn", card, tmp_path / "run", *SMALL)
    assert record.metrics.keys() == {"coco_box_ap_percent", "coco_box_ap50_percent", "coco_box_ap75_percent"}
    assert any("boxes alone" in note for note in record.notes)


def test_voc_protocol_measures_own_boxes_as_voc_does(tmp_path: Path) -> None:
    card = write_yolo(tmp_path / "nests")
    record = run("sample-voc-frcnn-fpn", card, tmp_path / "run", *SMALL)
    assert "voc07_box_ap50_percent" in record.metrics


@pytest.mark.parametrize("form", ["palette", "rgb"])
def test_fcn_learns_own_masks_in_every_form(tmp_path: Path, form: str) -> None:
    card = write_masks(tmp_path / "nests", form=form)  # the other forms: test_cards.py
    record = run(
        "sample-voc-fcn-d8",
        card,
        tmp_path / "run",
        "iterations=2",
    )
    assert record.scale == "own"
    assert 0 <= record.metrics["miou_percent"] <= 100
    assert record.recipe["model"]["decode_head"]["num_classes"] == 3


def test_class_folders_and_tables_by_card_meet_in_one_table(tmp_path: Path) -> None:
    card = write_classes(tmp_path / "nests")
    results = tmp_path / "results"
    for protocol, more in (("sample-knn", ()), ("sample-linear", ("epochs=1",))):
        record = transfer(
            protocol, weights="random", data=card, gpus=0, output=tmp_path / protocol, results=results, overrides=more
        )
        assert record.scale == "own"
        assert record.data is not None
    assert {record.protocol for _, record in read_records([results])} == {"sample-knn", "sample-linear"}


@pytest.mark.parametrize(("name", "folder", "protocol"), [
    ("real-coco", "coco", "sample-coco-mrcnn-fpn"),
    ("camvid", "camvid", "sample-voc-fcn-d8"),
])  # fmt: skip
def test_real_pictures_by_our_cards(tmp_path: Path, name: str, folder: str, protocol: str) -> None:
    place = Path(__file__).resolve().parents[2] / "shared" / "real" / folder
    if not place.is_dir():
        pytest.skip(f"the real pictures of ../shared/real/{folder} are not here")
    record = run(protocol, Path(name), tmp_path / "run", "iterations=4", f"root={place}")
    assert record.scale == "own"
    assert (record.data or "").startswith(name)
