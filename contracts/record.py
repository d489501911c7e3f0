"""The run record: what one transfer run measured, of which weights, by which recipe, on what.

One JSON file a run, `<root>/<protocol>/<run>.json`. Runs meet in a table only when `recipe_hash` and `scale` agree.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from twist.contracts import atomic
from twist.contracts.config import Config
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.hashing import sha256_json
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
    `data` names what the run read, wherever it lay (transfer/data/identity.py); records of earlier versions lack it.
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
    atomic.write_json(path, record.model_dump(mode="json"))
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
