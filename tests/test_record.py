"""The run record: what it holds, what is refused, and where records are found."""

import json
from pathlib import Path

import pytest
from made_records import make_record

from twist.contracts.errors import UserError
from twist.contracts.metrics import METRICS
from twist.contracts.record import find_collections, find_records, read_record, read_records, write_record

ABSENT = object()


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def found(*paths: Path) -> list[Path]:
    return [file for file, _ in read_records(paths)]


# ── One record ──


def test_record_round_trip_and_hash(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    assert path.parent.name == "sample-knn"
    assert read_record(path) == make_record()
    assert list(find_records([tmp_path])) == [path]
    assert make_record().recipe_hash != make_record(recipe={"k": 10}).recipe_hash


@pytest.mark.parametrize("changes", [[{"weights": {"branch": branch}} for branch in ("query", "key")],
                                     [{"data": "a 1"}, {"data": "a 2"}]], ids=["branches", "data sets"])  # fmt: skip
def test_runs_of_two_branches_or_on_two_data_sets_have_files_of_their_own(tmp_path: Path, changes: list) -> None:
    records = [make_record(**change) for change in changes]
    paths = [write_record(record, tmp_path) for record in records]
    assert [read_record(path) for path in paths] == records
    assert [write_record(record, tmp_path) for record in records] == paths, "the same run keeps its place"


@pytest.mark.parametrize(("before", "after"), [("3.11.9", "3.11.8"), ('"seed": 0', '"seed": 1'), ("60.0", "60.5")])
def test_a_record_vouches_for_itself(tmp_path: Path, before: str, after: str) -> None:
    path = write_record(make_record(), tmp_path)
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(UserError, match=rf"{path.name} is damaged or was edited .*: put a good copy back"):
        read_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": ABSENT}, "seed: Field required; run it again."),
        ({"metrics": {"knn_top1_percnt": 1.0}}, 'unknown metric "knn_top1_percnt". Did you mean "knn_top1_percent"?'),
        ({"metrics": {"knn_top1_percent": "55"}}, "metrics.knn_top1_percent: Input should be a valid number"),
        ({"metrics": {"miou_percent": 150.0}}, "miou_percent is 150, which mIoU cannot be"),
        ({"metrics": {}}, "metrics is empty"),
        ({"schema_version": 7}, "its schema_version is 7, this version reads 1"),
        ({"schema_version": True}, "its schema_version is True"),
        ({"recipe": {"k": 1}}, "recipe_hash does not belong to the recipe"),
        ({"scale": "huge"}, "scale"), ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        *(({"seed": seed}, "seed: Input should be a valid integer") for seed in ("0", True)),
        ({"seed": 2**32}, "seed: Input should be less"), ({"seed": -1}, "seed: Input should be greater"),
        ({"wall_s": "1.0"}, "wall_s: Input should be a valid number"), ({"created": "yesterday"}, "isoformat"),
        ({"weights": {"name": "w", "epochs": -5}}, "weights.epochs: Input should be greater"),
        ({"weights": {"name": "w\x1b[2J"}}, "control characters"),
        *(({"method": name}, "cannot be part of a file's name")
          for name in ("x" * 101, "../../elsewhere", ".hidden", "  ", "a\x1b[31m")),
        ({"protocol": "a/b"}, "cannot be part of a file's name"),
    ],
)  # fmt: skip
def test_a_tampered_record_is_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_record(make_record(), tmp_path)
    fields = {**json.loads(path.read_text()), **change}
    write(path, {name: value for name, value in fields.items() if value is not ABSENT})
    with pytest.raises(UserError) as error:
        read_record(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_the_ends_of_a_metrics_range_are_values() -> None:
    for share in (0.0, 100.0):
        assert make_record(metrics={"knn_top1_percent": share}).metrics == {"knn_top1_percent": share}
    with pytest.raises(ValueError, match="which k-NN top-1 cannot be"):
        make_record(metrics={"knn_top1_percent": 100.5})
    assert make_record(metrics={"ari_percent": -0.4, "ami_percent": -2.0})  # chance may do better than clusters


def test_records_of_earlier_versions_stay_readable(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    values = json.loads(path.read_text())
    del values["job"], values["data"], values["record_sha256"]
    for name in ("branch", "source_sha256", "pretrain_images_sha256"):
        del values["weights"][name]
    assert read_record(write(path, values)) == make_record()
    assert all(name == metric.name and name.endswith(f"_{metric.unit}") for name, metric in METRICS.items())


# ── Where records are found ──


def test_other_json_is_skipped_and_damaged_records_never(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    values = json.loads(path.read_text())
    write(path.parent / "speed.json", {"speedup": 4.0, "hardware": {}})
    write(path.parent / "list.json", [1, 2])
    # A run folder's state has a record's fields, and a record that is being written begins with a dot.
    write(path.parent / "run.json", {"protocol": "knn", "recipe": {}, "state": "done"})
    (path.parent / ".record.json.x1.json").write_text("{")
    assert found(tmp_path) == [path]
    del values["schema_version"]
    for damage in ("{}", path.read_text()[:99], json.dumps(values)):
        path.write_text(damage)
        with pytest.raises(UserError, match=str(path)):
            read_records([tmp_path])
    with pytest.raises(UserError, match="is no run record"):  # where it is named
        read_records([path.parent / "speed.json"])
    with pytest.raises(UserError, match="it is a folder"):
        read_record(tmp_path)


def test_records_are_found_in_a_protocols_folder_and_below_its_parent(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path / "study")
    for asked in (path, path.parent, path.parent.parent):
        assert found(asked) == [path]
    study = tmp_path / "study"
    assert find_collections(tmp_path) == find_collections(study) == {study: [study]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no run records under .*empty: .*--published-only"):
        read_records([study, tmp_path / "empty"])


def make_run(folder: Path, *, results: str = "results", **changes: object) -> Path:
    """A run folder as `twist transfer` leaves it, with the files that look like a record and are none."""
    for name in ("run.json", "evaluation.json", "recipe.json", "failure.json"):
        write(folder / name, {"metrics": {"knn_top1_percent": 1.0}, "recipe": {}, "protocol": "knn"})
    write(folder / "weights" / "proof.json", {"metrics": {}})
    return write_record(make_record(**changes), folder / results)  # type: ignore[arg-type]


def test_records_are_found_where_transfer_writes_them(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made = [make_run(runs / "knn" / f"twist-seed{seed}", seed=seed) for seed in (0, 1)]
    made.append(make_run(runs / "linear" / "twist-seed0", protocol="linear", metrics={"top1_percent": 60.0}))
    assert list(find_collections(runs)) == [runs]
    assert found(runs) == made
    assert found(runs / "knn") == made[:2]
    assert found(runs / "knn" / "twist-seed0") == made[:1]
    # A file that several paths lead to is one record.
    assert len(found(runs / "knn", runs, made[0], tmp_path / "runs" / ".." / "runs")) == 3


def test_studies_beside_runs_keep_a_table_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "knn" / "twist-seed0")
    study = tmp_path / "study" / "results"
    write_record(make_record(seed=1), study)
    assert find_collections(tmp_path) == {study: [study], tmp_path: [run.parent.parent]}
