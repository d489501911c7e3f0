"""Records are copied into the repository without the pictures, and whole."""

from pathlib import Path

import pytest
from made_records import make_record

from benchmarks.publish import publish
from twist.contracts.errors import UserError
from twist.contracts.record import find_records, read_record, write_record


def test_records_and_curves_come_along_and_pictures_stay(tmp_path: Path) -> None:
    made = make_record("twist", "sample-knn", metrics={"knn_top1_percent": 50.0}, media=("prediction-1.png",))
    path = write_record(made, tmp_path / "from")
    path.with_suffix("").mkdir()
    (path.with_suffix("") / "metrics.jsonl").write_text("{}\n")
    (path.with_suffix("") / "prediction-1.png").write_bytes(b"somebody's photograph")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{number}\n" for number in range(1201)))
    for _ in range(2):  # a second time replaces the first
        assert publish(tmp_path / "from", tmp_path / "to", pretrain=tmp_path / "run") == 1
    files = {file.name for file in (tmp_path / "to").rglob("*.*")}
    (copied,) = find_records([tmp_path / "to"])
    assert files == {"metrics.jsonl", copied.name}
    assert (copied.with_suffix("") / "metrics.jsonl").is_file()
    assert read_record(copied) == made.model_copy(update={"media": ()})
    rows = (tmp_path / "to" / "pretrain" / "metrics.jsonl").read_text().split()
    assert (rows[0], rows[1], rows[-1], len(rows)) == ("0", "3", "1200", 401), "thinned, with its last row"


def test_a_folder_without_records_or_one_that_would_be_replaced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run record"):
        publish(tmp_path, tmp_path / "to")
    write_record(make_record("twist", "sample-knn", metrics={"knn_top1_percent": 50.0}), tmp_path / "all" / "from")
    with pytest.raises(UserError, match="publish to another folder"):
        publish(tmp_path / "all" / "from", tmp_path / "all")
    assert list(find_records([tmp_path / "all" / "from"]))
