"""`twist compare --correlate`: which protocol ranks backbones as which, and when it may not say so."""

import re
from pathlib import Path
from typing import Any

import pytest
from made_records import make_record
from PIL import Image
from scipy.stats import spearmanr

from twist.cli import app
from twist.compare.correlate import correlate, render_correlations
from twist.contracts.errors import UserError
from twist.contracts.record import RunRecord, write_record

KNN, MIOU = [40.0, 45.0, 52.0, 50.0, 61.0, 66.0], [20.0, 24.0, 23.0, 30.0, 35.0, 33.0]


def measured(count: int = 6, **others: Any) -> list[RunRecord]:
    made = []
    for number, (knn, miou) in enumerate(zip(KNN[:count], MIOU[:count], strict=True)):
        network = "resnet50" if number % 2 else "vit_small_patch16"
        of = {"weights": {"sha256": f"{number}" * 64, "architecture": network}, **others}
        made.append(make_record(metrics={"knn_top1_percent": knn}, recipe={"k": 20, "architecture": network}, **of))
        made.append(
            make_record(
                protocol="voc12aug-fcn-d8-20k", task="segmentation",
                metrics={"aacc_percent": 100 - miou, "miou_percent": miou},
                recipe={"lr": 0.1, "architecture": network}, **{**of, "wall_s": 7200.0, "hardware": {"gpus_used": 4}},
            )
        )  # fmt: skip
    return made


def test_rank_correlation_over_resnets_and_vits_is_scipys() -> None:
    (one,), hours = correlate(measured())
    assert (one.cheap[:10], one.dear[:19]) == ("sample-knn", "voc12aug-fcn-d8-20k")
    assert one.rho == pytest.approx(spearmanr(KNN, MIOU).statistic)
    assert one.n == 6
    assert -1 <= one.low < one.rho < one.high <= 1
    assert hours == {one.cheap: pytest.approx(1 / 60), one.dear: 8}  # two hours on four devices
    text = render_correlations(*correlate(measured()))
    assert "n = 6" in text
    assert " 8 h" in text


def test_seeds_of_one_file_and_of_random_weights_are_one_backbone() -> None:
    more = [
        make_record("random", protocol, seed=seed, metrics={metric: value},
                    recipe={key: of, "architecture": "resnet50"}, task=task, weights={"architecture": None})
        for protocol, metric, value, key, of, task in (
            ("sample-knn", "knn_top1_percent", 10.0, "k", 20, "classification"),
            ("voc12aug-fcn-d8-20k", "miou_percent", 5.0, "lr", 0.1, "segmentation"),
        )
        for seed in range(9)
    ]  # fmt: skip
    (one,), _ = correlate([*measured(), *more])
    assert (one.n, one.rho) == (7, pytest.approx(spearmanr([*KNN, 10.0], [*MIOU, 5.0]).statistic))


def test_too_few_backbones_and_other_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="at most 4"):
        correlate(measured(4))
    apart = [
        record.model_copy(update={"recipe": {**record.recipe, "label_size": number}})
        for number, record in enumerate(measured())
    ]
    with pytest.raises(UserError, match=r"at most [01]: "):
        correlate(apart)


def test_the_command_line_correlates_records(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawn = tmp_path / "points.png"
    for record in measured():
        write_record(record, tmp_path / "records")
    app(["compare", str(tmp_path / "records"), "--correlate", "--output", str(drawn)], standalone_mode=False)
    assert min(Image.open(drawn).size) > 300
    assert re.search(r"sample-knn .* n = 6", capsys.readouterr().out)
