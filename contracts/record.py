"""The run record: what one transfer run measured, of which weights, by which recipe, on what.

One JSON file a run, `<root>/<protocol>/<run>.json`. Runs meet in a table only when `recipe_hash` and `scale` agree.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from twist.contracts import files
from twist.contracts.config import Config
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.files import sha256_json
from twist.contracts.metrics import check_metrics, check_values

SCHEMA_VERSION: Final = 1
# Fields that a record has and other results do not. JSON with none of them (a benchmark's figures, a table) is no
# record; with any one of them it is, and what it lacks is an error: no damage that leaves JSON takes all seven away.
MARKS: Final = ("schema_version", "method", "protocol", "metrics", "weights", "recipe", "recipe_hash")
Scale = Literal["full", "reduced", "sample"]
Task = Literal["detection", "instance-segmentation", "segmentation", "classification", "clustering"]


class WeightsProvenance(Config):
    """Which weights a run started from; everything but `name` is None for random initialisation.

    `sha256` is of the file that the run was given, which is written anew by each conversion; what stays is
    `source_sha256` (the file that was first read) with its `branch`, and for our own runs the pretraining's config,
    seed and images. Records of earlier versions lack some of these.
    """

    name: str
    sha256: str | None = None
    architecture: str | None = None
    epochs: int | None = None
    layout: str | None = None
    branch: str | None = None
    source_sha256: str | None = None
    pretrain_config_hash: str | None = None
    pretrain_seed: int | None = None
    pretrain_images_sha256: str | None = None


class RunRecord(Config):
    """One measured run. Metric names are those of `twist.contracts.metrics`; units are in the names.

    `recipe` is the resolved recipe without weights, paths and seed; `recipe_hash` is derived from it and never given.
    `data` names what the run read, wherever it lay (transfer/identity.py); records of earlier versions lack it.
    `media` and `curves` are paths relative to the record's own folder (pictures for the page, a `metrics.jsonl`).
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    method: str
    protocol: str
    task: Task
    scale: Scale
    seed: int
    metrics: dict[str, float]
    weights: WeightsProvenance
    recipe: dict[str, Any]
    recipe_hash: str = ""
    data: str | None = None
    software: dict[str, str]
    hardware: dict[str, str | int | None]
    wall_s: float = Field(ge=0)
    git_commit: str | None
    created: str = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    notes: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    curves: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _derive_hash(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "recipe" not in values:
            return values
        derived = sha256_json(values["recipe"])
        if values.get("recipe_hash") not in (None, "", derived):
            raise ValueError("recipe_hash does not belong to the recipe: the record was edited by hand; run it again")
        return {**values, "recipe_hash": derived}

    @model_validator(mode="after")
    def _known_metrics(self) -> RunRecord:
        check_label(self.method)
        check_label(self.protocol)
        check_metrics(self.metrics, where=f"record of {self.protocol}")
        check_values(self.metrics)
        return self

    @property
    def run_name(self) -> str:
        """`<method>-<first 8 of the weights hash>-seed<seed>-<first 8 of the recipe hash>`."""
        weights = (self.weights.sha256 or "none")[:8]
        return f"{self.method}-{weights}-seed{self.seed}-{self.recipe_hash[:8]}"


def check_label(text: str) -> None:
    """`UsageError` unless `text`, which becomes part of a file's name, is one name and leads nowhere else."""
    if not text.strip() or text.startswith(".") or "/" in text or "\\" in text or not text.isprintable():
        raise UsageError(
            f"{text!r} cannot be part of a file's name: call the method by letters, digits, spaces and . _ - + ( )."
        )


def write_record(record: RunRecord, root: str | os.PathLike[str]) -> Path:
    """Write `record` to `<root>/<protocol>/<name>.json` (`name_in`) atomically and return the path."""
    path = Path(root) / record.protocol / f"{name_in(record, root)}.json"
    files.write_json(path, record.model_dump(mode="json"))
    return path


def name_in(record: RunRecord, root: str | os.PathLike[str]) -> str:
    """What `record` is called under `root`: its run name, and its branch or a digest of its data where a run of another
    branch of the file, or on other data, is called that already. The same run again keeps its name."""
    there = Path(root) / record.protocol / f"{record.run_name}.json"
    try:
        values = json.loads(there.read_text())
        branch, data = values["weights"]["branch"], values.get("data")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return record.run_name  # nothing there, or nothing that would be a loss
    name, own = record.run_name, record.weights.branch or "backbone"
    if (branch or "backbone") != own:
        name += f"-{own}"
    if data is not None and record.data is not None and data != record.data:
        name += f"-{sha256_json(record.data)[:8]}"
    return name


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """Read and check one record; `UserError` with the file's name when it is not a valid record."""
    path = Path(path)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no record at {path}: run `twist transfer` first, or check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): it is no run record.") from None
    except OSError as error:
        raise UserError(f"Cannot read the record {path} ({error.strerror}): check its permissions.") from None
    if not is_marked(values):
        raise UserError(f"{path} is no run record: it has none of a record's fields ({', '.join(MARKS)}).")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: record schema {version!r} is unknown, this version reads {SCHEMA_VERSION}; update the suite."
        )
    if wrong := [place for place, value in _numbers(values) if isinstance(value, str | bool)]:
        raise UserError(f"{path}: {wrong[0]} has to be a number, and a JSON one, without quotes; run it again.")
    try:
        return RunRecord.model_validate(values)
    except ValidationError as error:
        raise UserError(_what_is_wrong(path, error.errors()[0])) from None


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What has to be a number in a record; pydantic alone would take the word "55" for one."""
    yield from ((name, values.get(name)) for name in ("seed", "wall_s"))
    for section in ("metrics", "weights"):
        inner = values.get(section)
        for name, value in inner.items() if isinstance(inner, dict) else ():
            if section == "metrics" or name in ("epochs", "pretrain_seed"):
                yield f"{section}.{name}", value


def _what_is_wrong(path: Path, first: Any) -> str:
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return (
            f"{path} lacks {place}, which every record has: it was not written by this suite, or edited; run it again."
        )
    if first["type"] == "extra_forbidden":
        known = did_you_mean(str(first["loc"][-1]), RunRecord.model_fields) if len(first["loc"]) == 1 else ""
        return f"{path} has {place}, which is no field of a record.{known} Remove it, or update the suite."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{path}: {place + ': ' if place else ''}{message}."


def is_marked(values: Any) -> bool:
    """Whether JSON has any of a record's fields."""
    return isinstance(values, dict) and any(name in values for name in MARKS)


# A run folder's account of itself (transfer/folder.py), what else it holds that shares fields with a record, and the
# folder of its records.
RUN_ACCOUNT: Final = "run.json"
RUN_FILES: Final = (RUN_ACCOUNT, "recipe.json", "evaluation.json", "failure.json")
RESULTS: Final = "results"


def find_records(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """The record files under `paths`: a file as it is, a folder searched as `<folder>/<protocol>/*.json`.

    A folder of one protocol (`results/sample-knn`) is searched as `<folder>/*.json`. JSON without any of a record's
    fields is passed over; a file that is not JSON, or that has some of them, is yielded and is for `read_record` to
    refuse.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from filter(_may_be_record, sorted([*path.glob("*.json"), *path.glob("*/*.json")]))
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no record or folder of records at {path}.")


def read_records(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, RunRecord]]:
    """Every record under `paths` with its file.

    Raises:
        UserError: a path is absent or holds no record, or a record is not valid.
    """
    read: dict[str, tuple[Path, RunRecord]] = {}
    for path in map(Path, paths):
        files = _files_under(path)
        if not files:
            raise UserError(_none_under(path))
        for file in files:
            # A file that two of the paths lead to is one record.
            if (place := os.path.abspath(file)) not in read:
                read[place] = file, read_record(file)
    return list(read.values())


def find_collections(folder: Path) -> list[Path]:
    """The folders at or below `folder` whose records make a table each.

    `folder` itself where it holds records. Else the studies side by side in it (an inner folder or its `results`), and
    `folder` again where it holds runs of `twist transfer`: these make one table (`record_folders`). What a suite keeps
    of its runs counts only where there is nothing else, for it has collected those records elsewhere.
    """
    if _is_run(folder):
        return [place for place in (folder / RESULTS,) if _holds_records(place)]
    if _holds_records(folder):
        return [folder]
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    studies = [
        place for path in inner if not _is_run(path) for place in (path, path / RESULTS) if _holds_records(place)
    ]
    runs = [folder] if _of_runs(folder) else []
    if found := [*studies, *runs]:
        return found
    return [folder] if _of_suite(folder) else [place for place in inner if _of_suite(place)]


def record_folders(folder: Path) -> list[Path]:
    """Where the records of the runs in `folder` are, when it holds none itself: each run's `results`, else a suite's
    copies."""
    return [] if _holds_records(folder) else _of_runs(folder) or _of_suite(folder)


def _of_runs(folder: Path) -> list[Path]:
    # runs/<protocol>/<name>/results, as `twist transfer` writes them.
    found = [
        place for pattern in ("*", "*/*") for place in folder.glob(f"{pattern}/{RESULTS}") if _is_run(place.parent)
    ]
    return sorted(filter(_holds_records, found))


def _of_suite(folder: Path) -> list[Path]:
    # <output>/<protocol>/<name>/record, beside the run itself (transfer/suite/run.py).
    found = [place for pattern in ("*", "*/*") for place in folder.glob(f"{pattern}/record")]
    return sorted(place for place in found if _is_run(place.parent / "run") and _holds_records(place))


def _is_run(folder: Path) -> bool:
    return (folder / RUN_ACCOUNT).is_file()


def _holds_records(folder: Path) -> bool:
    return folder.is_dir() and any(find_records([folder]))


def _files_under(path: Path) -> list[Path]:
    if path.is_dir() and (_is_run(path) or not _holds_records(path)):
        places = find_collections(path)
        if places == [path]:
            return list(find_records(record_folders(path)))
        if places and _is_run(path):
            return list(find_records(places))
    return list(find_records([path]))


def _none_under(path: Path) -> str:
    if studies := find_collections(path):
        listed = " and ".join(map(str, studies))
        return f"There are no run records in {path} itself, but in {listed}: name the folders that you mean."
    return (
        f"There are no run records under {path}: `twist transfer` and `twist suite` write them; `twist compare "
        "--published-only` shows the published numbers alone."
    )


def _may_be_record(file: Path) -> bool:
    # A name that begins with a dot is a record that another process is writing (contracts.atomic).
    if file.name.startswith(".") or file.name in RUN_FILES:
        return False
    try:
        data = file.read_bytes()
        # Nearly every file is a record: what says so is not parsed twice.
        if b'"schema_version"' in data:
            return True
        values = json.loads(data)
    except (OSError, ValueError):
        return True  # reading it says what is wrong
    # `{}` says nothing about what it was.
    return is_marked(values) or values == {}
