"""Records of earlier versions are read, compared, and stand in one column with what runs write today.

`stored/records/runs` was written by `twist transfer PROTOCOL --weights random` on the tiny sample of shapes at commit
9b5e91f, before the rooms were rebuilt; `stored/records/suite` by a suite that said its job in a note.
"""

import json
from pathlib import Path

import pytest
from tiny_sample import tiny_sample
from typer.testing import CliRunner

from twist.cli import app
from twist.contracts.record import find_records, read_record
from twist.transfer.run import transfer
from twist.transfer.suite.config import SuiteConfig, find_work

RECORDS = Path(__file__).parent / "stored" / "records"
OVERRIDES = {"sample-knn": (), "sample-coco-mrcnn-fpn": ("iterations=2",), "sample-voc-fcn-d8": ("iterations=2",)}


@pytest.mark.parametrize(("folder", "count"), [("runs", 3), ("suite", 1)])
def test_stored_records_are_read(folder: str, count: int) -> None:
    paths = list(find_records([RECORDS / folder]))
    assert len(paths) == count
    for path in paths:
        record = read_record(path)
        values = json.loads(path.read_text())
        written = json.loads(record.model_dump_json())
        values["weights"] = {**written["weights"], **values["weights"]}
        assert {name: written[name] for name in values} == values
        assert written["weights"]["loaded_sha256"] is None
        assert record.job is None


def test_the_note_of_a_suites_job_is_understood(tmp_path: Path) -> None:
    weights = [{"name": "random", "file": "random"}]
    suite = SuiteConfig.model_validate(
        {"weights": weights, "protocols": ["sample-knn"], "seeds": [0], "data": {"sample-knn": str(tmp_path)}}
    )
    work = find_work(suite, results=RECORDS / "suite")
    assert [job.key for job in work.jobs] == list(work.done) == ["06ec1035f123"]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", OVERRIDES)
def test_a_run_of_today_has_the_recipe_of_a_stored_one(protocol: str, tmp_path: Path) -> None:
    (stored,) = find_records([RECORDS / "runs" / protocol])
    transfer(
        protocol, weights="random", data=tiny_sample().root, gpus=0, output=tmp_path / "run",
        results=tmp_path / "results", overrides=OVERRIDES[protocol],
    )  # fmt: skip
    (path,) = find_records([tmp_path / "results"])
    before, now = read_record(stored), read_record(path)
    for name in ("recipe", "recipe_hash", "scale", "data", "task", "method", "run_name"):
        assert getattr(now, name) == getattr(before, name), name
    assert now.metrics.keys() == before.metrics.keys()
    # Records that may not share a column are refused by --strict.
    compared = CliRunner().invoke(app, ["compare", str(stored), str(path), "--strict", "--format", "json"])
    assert protocol in compared.stdout
