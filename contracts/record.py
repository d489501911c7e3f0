"""The run record: what one transfer run measured, of which weights, by which recipe, on what.

One JSON file a run, `<root>/<protocol>/<run>.json`. Runs meet in a table only when `recipe_hash` and `scale` agree.
"""

import datetime
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, Strict, ValidationError, model_validator

from twist.contracts import files
from twist.contracts.config import Config
from twist.contracts.errors import MOST_SEED, UNSAFE, UsageError, UserError
from twist.contracts.files import sha256_json
from twist.contracts.metrics import check_metrics, check_values

SCHEMA_VERSION: Final = 1
# In the file: a SHA-256 over the record's other fields. Records of earlier versions have none.
SEAL: Final = "record_sha256"
# The state of a run folder, its other files that share fields with a record, and the folder of its records.
RUN_FILE: Final = "run.json"
RUN_FILES: Final = (RUN_FILE, "recipe.json", "evaluation.json", "failure.json")
RESULTS: Final = "results"
# own: a user's own data, by a data card.
Scale = Literal["full", "reduced", "sample", "own"]
Task = Literal["detection", "instance-segmentation", "segmentation", "classification", "clustering"]
# Numbers of JSON: pydantic alone would accept the string "55".
Seed = Annotated[int, Strict(), Field(ge=0, le=MOST_SEED)]
Count = Annotated[int, Strict(), Field(ge=0, le=10**9)]
Real = Annotated[float, Strict()]


class WeightsProvenance(Config):
    """Which weights a run started from; all but `name` and `loaded_sha256` are None for random initialisation.

    `sha256` is of the file that the run was given, which each conversion writes again. What stays the same is
    `source_sha256` (the original checkpoint) with its `branch`, and for our own runs the pretraining's config, seed
    and images. `loaded_sha256` is of the backbone's tensors as every process held them before its first step. Records
    of earlier versions lack some of these.
    """

    name: str
    sha256: str | None = None
    architecture: str | None = None
    epochs: Count | None = None
    layout: str | None = None
    branch: str | None = None
    source_sha256: str | None = None
    pretrain_config_hash: str | None = None
    pretrain_seed: Seed | None = None
    pretrain_images_sha256: str | None = None
    loaded_sha256: str | None = None


class RunRecord(Config):
    """One measured run. Metric names are those of `twist.contracts.metrics`; units are in the names.

    `recipe` is the resolved recipe without weights, paths and seed; `recipe_hash` is derived from it and never given.
    `data` names what the run read, wherever it lay (transfer/identity.py); `job` is the key of a suite's run. Records
    of earlier versions lack both. `media` and `curves` are paths relative to the record's own folder (pictures for the
    page, a `metrics.jsonl`).
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    method: str
    protocol: str
    task: Task
    scale: Scale
    seed: Seed
    metrics: dict[str, Real]
    weights: WeightsProvenance
    recipe: dict[str, Any]
    recipe_hash: str = ""
    data: str | None = None
    job: str | None = None
    software: dict[str, str]
    hardware: dict[str, str | int | None]
    wall_s: Real = Field(ge=0, le=1e9)
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
    def _known_metrics(self) -> Self:
        check_label(self.method)
        check_label(self.protocol)
        check_metrics(self.metrics, where=f"record of {self.protocol}")
        check_values(self.metrics)
        datetime.datetime.fromisoformat(self.created)
        strange = next((text for text in _texts(self.model_dump()) if UNSAFE.search(text)), None)
        if strange is not None:
            raise ValueError(f"{strange!r} has control characters")
        return self

    @property
    def run_name(self) -> str:
        """`<method>-<first 8 of the weights hash>-seed<seed>-<first 8 of the recipe hash>`."""
        weights = (self.weights.sha256 or "none")[:8]
        return f"{self.method}-{weights}-seed{self.seed}-{self.recipe_hash[:8]}"


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)


def check_label(text: str) -> None:
    """`UsageError` unless `text`, which becomes part of a file's name, is one name without a path."""
    if not re.fullmatch(r"(?!\.)[^/\\]{1,100}", text) or not text.strip() or not text.isprintable():
        raise UsageError(
            f"{text!r} cannot be part of a file's name: call the method by letters, digits, spaces and . _ - + ( )."
        )


def write_record(record: RunRecord, root: str | os.PathLike[str]) -> Path:
    """Write `record` to `<root>/<protocol>/<name>.json` (`name_in`) atomically and return the path."""
    path = Path(root) / record.protocol / f"{name_in(record, root)}.json"
    fields = record.model_dump(mode="json")
    files.write_json(path, {**fields, SEAL: sha256_json(fields)})
    return path


def name_in(record: RunRecord, root: str | os.PathLike[str]) -> str:
    """The file name of `record` under `root`, without suffix: its run name, which the same run keeps; with the branch
    or a digest of the data where a run of another branch of the file, or on other data, has that name already."""
    name, branch = record.run_name, record.weights.branch or "backbone"
    try:
        there = files.read_json(Path(root) / record.protocol / f"{name}.json")
        other_branch, data = there["weights"]["branch"], there.get("data")
    except (ValueError, LookupError, TypeError):
        return name  # no record there
    if (other_branch or "backbone") != branch:
        name += f"-{branch}"
    if data is not None and record.data is not None and data != record.data:
        name += f"-{sha256_json(record.data)[:8]}"
    return name


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """Read and check one record; `UserError` with the file's name when it is not a valid record."""
    values = files.read_json(path, remedy="it is no run record", kind=object)
    version, seal = (values.get("schema_version"), values.pop(SEAL, None)) if isinstance(values, dict) else (None, None)
    if type(version) is not int or version != SCHEMA_VERSION:  # True and 1.0 are equal to 1
        raise UserError(
            f"{path} is no run record: its schema_version is {version!r}, this version reads {SCHEMA_VERSION}; name "
            "another file, or update the suite."
        )
    try:
        record = RunRecord.model_validate(values)
        as_written = seal in (None, sha256_json(values))  # records of earlier versions have none
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise UserError(f"{path}: {place + ': ' if place else ''}{message}; run it again.") from None
    except ValueError:  # NaN, or half of a surrogate pair: never written
        as_written = False
    if not as_written:
        raise UserError(
            f"{path} is damaged or was edited ({SEAL} is of other fields): put a good copy back, or run it again."
        )
    return record


def find_records(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """The record files under `paths`: a file as it is, a folder searched as `*.json` and `<protocol>/*.json`.

    Other JSON is skipped; a damaged record is yielded and is for `read_record` to refuse.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from filter(_may_be_record, sorted([*path.glob("*.json"), *path.glob("*/*.json")]))
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no record or folder of records at {path}.")


def _may_be_record(file: Path) -> bool:
    # One that begins with a dot is being written (contracts/files.py). A damaged one that lost the field is known by
    # its name (`run_name`).
    if file.name.startswith(".") or file.name in RUN_FILES:
        return False
    try:
        return re.search(r"-seed\d+-[0-9a-f]{8}", file.name) is not None or b'"schema_version"' in files.read_bytes(
            file
        )
    except UserError:
        return True  # `read_record` says what is wrong


def read_records(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, RunRecord]]:
    """Every record under `paths` with its file, a file that several paths lead to once.

    Raises:
        UserError: a path is absent or holds no record, or a record is not valid.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        folders = [place for places in find_collections(path).values() for place in places] if path.is_dir() else [path]
        if not folders:
            raise UserError(
                f"There are no run records under {path}: `twist transfer` and `twist suite` write them; `twist compare "
                "--published-only` shows the published numbers alone."
            )
        found |= {os.path.abspath(file): file for file in find_records(folders)}
    return [(file, read_record(file)) for file in found.values()]


def find_collections(folder: Path) -> dict[Path, list[Path]]:
    """For each table that the records at or below `folder` make: its folder → the folders of its records.

    That is `folder` itself where it holds records. Else each study in it (an inner folder or its `results`), and
    `folder` again where it holds runs of `twist transfer` or of a suite, which make one table.
    """

    def is_run(place: Path) -> bool:
        return (place / RUN_FILE).is_file()

    def holding(*patterns: str) -> list[Path]:
        places = sorted({place for pattern in patterns for place in folder.glob(pattern) if place.is_dir()})
        return [place for place in places if any(find_records([place]))]

    if is_run(folder):
        folder = folder / RESULTS
    if any(find_records([folder])):
        return {folder: [folder]}
    found = {
        place: [place]
        for place in holding("[!.]*", f"[!.]*/{RESULTS}")
        if not is_run(place) and not (place.name == RESULTS and is_run(place.parent))
    }
    # <protocol>/<name>/results, as `twist transfer` writes them.
    if runs := [place for place in holding(f"*/{RESULTS}", f"*/*/{RESULTS}") if is_run(place.parent)]:
        found[folder] = runs
    return found
