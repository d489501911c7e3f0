"""Every kind of engine on a data card, from weights to one table: own classes, a record each, its own scale."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_cards import run_lengths, write_classes, write_coco, write_masks, write_tables, write_voc, write_yolo
from twist.compare.table import build_table
from twist.contracts.record import RunRecord, read_records
from twist.transfer.run import transfer

pytestmark = pytest.mark.slow

SMALL = (
    "architecture=resnet18", "iterations=2", "SOLVER.IMS_PER_BATCH=2", "DATALOADER.NUM_WORKERS=0",
    "MODEL.RPN.POST_NMS_TOPK_TEST=20", "INPUT.MIN_SIZE_TRAIN=[64]", "INPUT.MIN_SIZE_TEST=64",
)  # fmt: skip


def run(protocol: str, card: Path, output: Path, *overrides: str) -> RunRecord:
    return transfer(protocol, weights="random", data=card, gpus=0, output=output, overrides=overrides)


def test_mask_rcnn_learns_own_classes_from_a_coco_file_of_polygons_and_run_lengths(tmp_path: Path) -> None:
    card = write_coco(tmp_path / "nests")
    content = json.loads((card.parent / "train.json").read_text())
    first = content["annotations"][0]
    first["segmentation"] = run_lengths(*first["bbox"])
    (card.parent / "train.json").write_text(json.dumps(content))
    record = run("sample-coco-mrcnn-fpn", card, tmp_path / "run", *SMALL)
    assert record.scale == "own"
    assert record.data is not None
    assert record.data.startswith("nests ")
    assert record.recipe["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 2
    assert record.recipe["INPUT"]["MASK_FORMAT"] == "bitmask"
    assert {"coco_box_ap_percent", "coco_mask_ap_percent"} <= record.metrics.keys()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "egg" in log
    assert "nest" in log


def test_boxes_alone_are_learnt_from_voc(tmp_path: Path) -> None:
    record = run("sample-coco-mrcnn-fpn", write_voc(tmp_path / "nests"), tmp_path / "run", *SMALL)
    assert record.metrics.keys() == {"coco_box_ap_percent", "coco_box_ap50_percent", "coco_box_ap75_percent"}
    assert any("boxes alone" in note for note in record.notes)


def test_voc_protocol_measures_own_boxes_as_voc_does(tmp_path: Path) -> None:
    record = run("sample-voc-frcnn-fpn", write_yolo(tmp_path / "nests"), tmp_path / "run", *SMALL)
    assert "voc07_box_ap50_percent" in record.metrics


@pytest.mark.parametrize(
    ("protocol", "write", "form", "overrides", "metric"),
    [
        ("sample-knn", write_classes, {}, (), "knn_top1_percent"),
        ("sample-linear", write_tables, {"form": "arrow"}, ("epochs=1",), "top1_percent"),
        ("sample-semi-10pct", write_tables, {"form": "tar"}, ("epochs=1",), "top1_percent"),
        ("sample-fewshot", write_tables, {"form": "parquet"}, ("draws=1",), "top1_percent"),
        ("sample-voc-knn-seg", write_masks, {"form": "rgb"}, ("size=64",), "miou_percent"),
        ("sample-voc-linear-seg", write_masks, {"form": "zero"}, ("size=64", "iterations=2", "holdout_every=3"),
         "miou_percent"),
        ("sample-voc-corloc", write_voc, {}, (), "corloc_percent"),
        ("sample-voc-svm", write_tables, {"form": "parquet"}, (), "voc07_svm_map_percent"),
    ],
)  # fmt: skip
def test_protocols_on_frozen_features_and_few_labels_run_on_cards(
    tmp_path: Path, protocol: str, write: Any, form: dict[str, Any], overrides: tuple[str, ...], metric: str
) -> None:
    card = write(tmp_path / "nests", **form)
    random = "architecture=resnet18"
    record = run(protocol, card, tmp_path / "run", random, "machine.workers=0", *overrides)
    assert record.scale == "own"
    assert record.recipe["card"]["name"] == "nests"
    assert 0 <= record.metrics[metric] <= 100
    table = build_table([record])
    assert [column.data for column in table.columns] == [record.data] * len(table.columns)


@pytest.mark.parametrize(
    ("protocol", "form", "overrides"),
    [
        ("sample-semi-10pct", "parquet", ("epochs=1",)),
        ("sample-fewshot", "tar", ("draws=1",)),
    ],
)
def test_shards_are_read_without_a_card(tmp_path: Path, protocol: str, form: str, overrides: tuple[str, ...]) -> None:
    shards = tmp_path / "shards"
    write_tables(shards, form=form).unlink()
    record = run(protocol, shards, tmp_path / "run", "architecture=resnet18", "machine.workers=0", *overrides)
    assert (record.data or "").startswith("imagenet ")
    assert all(0 <= value <= 100 for value in record.metrics.values())


# Of voc12aug-fcn-d8-20k, what a CPU does in a moment.
TINY_FCN = (
    "architecture=resnet18", "model.decode_head.channels=16", "model.auxiliary_head.channels=16",
    "train_dataloader.num_workers=0", "val_dataloader.num_workers=0",
    "model.data_preprocessor.size=[64, 64]", "train_dataloader.dataset.pipeline.2.scale=[96, 64]",
    "train_dataloader.dataset.pipeline.3.crop_size=[64, 64]", "val_dataloader.dataset.pipeline.1.scale=[96, 64]",
)  # fmt: skip


def test_epochs_of_a_full_protocol_are_passes_over_the_cards_images(tmp_path: Path) -> None:
    card = write_masks(tmp_path / "nests", form="palette", count=6)
    record = run("voc12aug-fcn-d8-20k", card, tmp_path / "run", *TINY_FCN, "epochs=2")
    assert record.recipe["iterations"] * record.recipe["images_per_step"] == 2 * 6
    assert record.recipe["model"]["decode_head"]["num_classes"] == 3
    assert record.scale == "own"


def test_real_pictures_by_our_cards_meet_in_one_table(tmp_path: Path) -> None:
    """A few images of COCO, of CamVid and of CIFAR-10."""
    real = Path(__file__).resolve().parents[2] / "shared" / "real"
    if not real.is_dir():
        pytest.skip("the real pictures of ../shared/real are not here")
    from datasets import load_dataset

    roots = {name: tmp_path / name for name in ("coco", "camvid", "cifar10")}
    for name, count in (("train", 240), ("test", 60)):
        rows = load_dataset("parquet", data_files=str(real / "cifar10" / f"{name}.parquet"), split="train")
        roots["cifar10"].mkdir(exist_ok=True)
        rows.select(range(count)).to_parquet(roots["cifar10"] / f"{name}.parquet")
    for role in ("train", "val"):
        for kind in ("images", "masks"):
            for path in sorted((real / "camvid" / kind / role).iterdir())[:8]:
                place = roots["camvid"] / kind / role
                place.mkdir(parents=True, exist_ok=True)
                (place / path.name).symlink_to(path)
        file = Path("annotations") / f"instances_{role}2017.json"
        content = json.loads((real / "coco" / file).read_text())
        content["images"] = content["images"][:12]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
        (roots["coco"] / file).parent.mkdir(parents=True, exist_ok=True)
        (roots["coco"] / file).write_text(json.dumps(content))
        (roots["coco"] / f"{role}2017").symlink_to(real / "coco" / f"{role}2017")
    results = tmp_path / "results"
    for protocol, card, more in (
        ("sample-coco-mrcnn-fpn", "real-coco", SMALL),
        ("voc12aug-fcn-d8-20k", "camvid", (*TINY_FCN, "train_dataloader.batch_size=2", "iterations=4")),
        ("sample-knn", "cifar10", ()),
        ("sample-linear", "cifar10", ("epochs=2",)),
    ):
        transfer(
            protocol, weights="random", data=Path(card), gpus=0, output=tmp_path / protocol, results=results,
            overrides=(*more, f"root={roots[card.removeprefix('real-')]}"),
        )  # fmt: skip
    records = [record for _, record in read_records([results])]
    columns = {(column.protocol, (column.data or "").split()[0]) for column in build_table(records).columns}
    assert columns == {
        ("sample-coco-mrcnn-fpn", "real-coco"), ("voc12aug-fcn-d8-20k", "camvid"),
        ("sample-knn", "cifar10"), ("sample-linear", "cifar10"),
    }  # fmt: skip
