"""The collection of published numbers: its schema, its sources, and that no two detectors share a protocol."""

import copy
import re
import tomllib
from importlib import resources
from typing import Any

import pytest

from twist.contracts.config import validate
from twist.contracts.errors import UsageError
from twist.contracts.metrics import METRICS
from twist.contracts.published import Collection, display_name, find_neighbours, load_published, protocol_title
from twist.transfer.protocols import PROTOCOLS

ROWS = load_published()
RAW = tomllib.loads((resources.files("twist.contracts") / "published.toml").read_text(encoding="utf-8"))


# A file or table of a repository, a table or the abstract of a paper, or the address of an archive's entry.
PLACES = (
    r"repository, .*(\w\.(md|rst|yaml|csv)\b|Tables? \d|issue \d)",
    r"paper, (arXiv \d{4}\.\d{5} ?\w*, )?(Table \d+|abstract)",
    r"^\w+\.com/\S+",
    r"archive for arXiv \d{4}\.\d{5}",
)


def value(method: str, protocol: str, metric: str, *, source: str = "", **where: Any) -> list[float]:
    return [
        row.metrics[metric]
        for row in ROWS
        if row.method == method
        and row.protocol == protocol
        and metric in row.metrics
        and source in row.source
        and all(getattr(row, name) == wanted for name, wanted in where.items())
    ]


def test_every_row_names_its_source_and_how_it_was_read() -> None:
    assert len(ROWS) > 340
    for row in ROWS:
        assert any(re.search(place, row.source) for place in PLACES), row.source
        assert row.read in ("primary", "secondary")
        assert row.metrics
        assert row.metrics.keys() <= METRICS.keys()
        assert all(0 < number < 100 for number in row.metrics.values())


def test_protocols_are_ours_with_their_metrics_or_foreign_by_name() -> None:
    for row in ROWS:
        assert row.beside is None or row.beside in PROTOCOLS, row.beside
        if not row.protocol.startswith("foreign:"):
            assert row.metrics.keys() <= set(PROTOCOLS[row.protocol].metrics), (row.protocol, row.metrics)
            assert row.task == PROTOCOLS[row.protocol].task


def test_three_detectors_stay_apart() -> None:
    # MoCo v1 scores 38.5, 38.5 and 39.4 box AP under C4, FPN with the 2-fc head and FPN with InfoMin's head, all 1x.
    assert set(value("moco-v1", "coco-mrcnn-c4-1x", "coco_box_ap_percent")) == {38.5}
    assert set(value("moco-v1", "coco-mrcnn-fpn-1x", "coco_box_ap_percent")) == {38.5}
    assert set(value("moco-v1", "coco-mrcnn-fpn-infomin-1x", "coco_box_ap_percent")) == {39.4}
    # TWIST's COCO row prints no schedule, and its VOC row is FPN, not C4.
    assert value("twist", "coco-mrcnn-fpn-infomin-1x", "coco_box_ap_percent") == []
    assert value("twist", "voc-frcnn-c4-24k", "voc07_box_ap_percent") == []
    assert value("twist", "voc-frcnn-fpn-24k", "voc07_box_ap_percent") == [58.1]


@pytest.mark.parametrize(
    ("method", "protocol", "metric", "where", "expected"),
    [
        ("twist", "linear", "top1_percent", {"epochs": 850}, [75.5]),
        ("twist", "semi-1pct", "top1_percent", {"architecture": "resnet50"}, [61.5, 61.2]),
        ("moco-v2", "voc-frcnn-c4-24k", "voc07_box_ap75_percent", {"epochs": 800}, [64.0, 64.4]),
        ("random", "coco-mrcnn-c4-2x", "coco_mask_ap75_percent", {"variant": ""}, [33.5]),
        ("detco", "cityscapes-mrcnn-fpn-24k", "cityscapes_mask_ap50_percent", {}, [63.2]),
        ("densecl", "voc12aug-fcn-d8-20k", "miou_percent", {"architecture": "resnet101"}, [74.1]),
        ("self-classifier", "foreign:cluster-own-head", "ami_percent", {"epochs": 400}, [52.3]),
    ],
)
def test_golden_cells(method: str, protocol: str, metric: str, where: dict[str, Any], expected: list[float]) -> None:
    assert value(method, protocol, metric, **where) == expected


def test_no_row_stands_twice() -> None:
    keys = [
        (row.method, row.architecture, row.epochs, row.variant, row.protocol, row.source, metric)
        for row in ROWS
        for metric in row.metrics
    ]
    assert len(keys) == len(set(keys))


def test_neighbours_under_another_recipe_have_its_name() -> None:
    byol = [row for row in find_neighbours("voc-frcnn-c4-24k") if (row.method, row.epochs) == ("byol", 200)]
    assert {protocol_title(row.protocol) for row in byol} >= {"VOC07+12 C4 24k, learning rate searched"}
    assert not any("coco" in row.protocol for row in find_neighbours("linear"))


def test_every_foreign_protocol_has_a_title_of_its_own() -> None:
    foreign = {row.protocol for row in ROWS if row.protocol.startswith("foreign:")}
    titles = [protocol_title(protocol) for protocol in foreign]
    assert len(set(titles)) == len(foreign)
    assert not any(title.startswith("foreign:") or " · " in title for title in titles)
    assert protocol_title("linear") == "linear"
    assert display_name("moco-v2") == "MoCo v2"
    assert display_name("my-method") == "my-method"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["tables"][0].pop("source"), "source is missing"),
        (lambda v: v["tables"][0].update(metrics=["top_one"]), 'unknown metric "top_one"'),
        (lambda v: v["tables"][0]["rows"][0].update(values=[1.0, 2.0]), "one value a metric"),
        (lambda v: v["tables"][0]["rows"][0].update(method="nobody"), "no display name for nobody"),
        (lambda v: v["tables"][0].update(beside="knn"), "only foreign"),
        (lambda v: v["titles"].pop("foreign:adelaidet-fcos"), "one for each foreign protocol .*adelaidet-fcos"),
    ],
)
def test_a_broken_collection_is_refused(change: Any, said: str) -> None:
    values = copy.deepcopy(RAW)
    change(values)
    with pytest.raises(UsageError, match=said):
        validate(values, Collection, where="published.toml")
