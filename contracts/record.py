"""The run record: what one transfer run measured, of which weights, by which recipe, on what.

One JSON file a run, `<root>/<protocol>/<run>.json`. Runs meet in a table only when `recipe_hash` and `scale` agree.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from contracts import atomic
from contracts.config import Config
from contracts.errors import UserError
from contracts.hashing import sha256_json
from contracts.metrics import check_metrics

SCHEMA_VERSION: Final = 1
Scale = Literal["full", "reduced", "sample"]
Task = Literal["detection", "instance-segmentation", "segmentation", "classification", "clustering"]


class WeightsProvenance(Config):
    """Which weights a run started from; everything but `name` is None for random initialisation."""

    name: str
    sha256: str | None = None
    architecture: str | None = None
    epochs: int | None = None
    layout: str | None = None
    pretrain_config_hash: str | None = None
    pretrain_seed: int | None = None


class RunRecord(Config):
    """One measured run. Metric names are those of `contracts.metrics`; units are in the names.

    `recipe` is the resolved recipe without weights, paths and seed; `recipe_hash` is derived from it and never given.
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
        check_metrics(self.metrics, where=f"record of {self.protocol}")
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}: a record holds finite numbers only")
        return self

    @property
    def run_name(self) -> str:
        """`<method>-<first 8 of the weights hash>-seed<seed>-<first 8 of the recipe hash>`."""
        weights = (self.weights.sha256 or "none")[:8]
        return f"{self.method}-{weights}-seed{self.seed}-{self.recipe_hash[:8]}"


def write_record(record: RunRecord, root: str | os.PathLike[str]) -> Path:
    """Write `record` to `<root>/<protocol>/<run_name>.json` atomically and return the path."""
    path = Path(root) / record.protocol / f"{record.run_name}.json"
    atomic.write_json(path, record.model_dump(mode="json"))
    return path


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """Read and check one record; `UserError` with the file's name when it is not a valid record."""
    path = Path(path)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no record at {path}: run `twist transfer` first, or check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): it is no run record.") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: record schema {version!r} is unknown, this version reads {SCHEMA_VERSION}; update the suite."
        )
    try:
        return RunRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise UserError(f"{path}: {place + ': ' if place else ''}{message}.") from None


def find_records(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """The record files under `paths`: a file as it is, a folder searched as `<folder>/<protocol>/*.json`."""
    for path in map(Path, paths):
        if path.is_dir():
            # A name that begins with a dot is a record that another process is writing (contracts.atomic).
            yield from sorted(file for file in path.glob("*/*.json") if not file.name.startswith("."))
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no record or folder of records at {path}.")
