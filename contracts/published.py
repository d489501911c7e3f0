"""Published numbers: `published.toml` read into rows that each name their source.

The file groups rows as papers do, one table of a source at a time; here they become flat rows. A row's protocol is one
of ours only where the source followed that recipe; everything else is `foreign:<name>` and, with `beside`, names the
protocol of ours whose neighbour it is, so that it is shown near it in a column of its own.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from pydantic import Field, model_validator

from twist.contracts.config import Config, validate
from twist.contracts.metrics import check_metrics
from twist.contracts.record import Task

FOREIGN = "foreign:"
Text = Annotated[str, Field(min_length=1)]


class PublishedRow(Config):
    """One row of a published table. Values and standard deviations are in the units of their metrics' names.

    `read` says where the number was read: in the primary source (the repository's file, the paper's text) or in a
    secondary copy. `variant` tells apart weights of one method and length: other pretraining data, another code base.
    """

    method: Text
    architecture: Text
    epochs: int | None
    variant: str
    protocol: Text
    beside: str | None
    task: Task
    metrics: dict[str, float]
    sd: dict[str, float]
    trials: int | None
    source: Text
    read: Literal["primary", "secondary"]
    note: str

    @property
    def is_foreign(self) -> bool:
        return self.protocol.startswith(FOREIGN)


class _Row(Config):
    method: Text
    # A dash where the source prints nothing; TOML has no null.
    values: tuple[float | Literal["-"], ...]
    sd: tuple[float, ...] = ()
    architecture: Text = "resnet50"
    epochs: int | None = Field(default=None, gt=0)
    variant: str = ""
    note: str = ""


class _SourceTable(Config):
    protocol: Text
    beside: str | None = None
    task: Task
    metrics: tuple[str, ...] = Field(min_length=1)
    source: Text
    read: Literal["primary", "secondary"]
    trials: int | None = Field(default=None, gt=0)
    note: str = ""
    rows: tuple[_Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> _SourceTable:
        check_metrics(dict.fromkeys(self.metrics, 0.0), where=self.protocol)
        if self.beside is not None and not self.protocol.startswith(FOREIGN):
            raise ValueError(f"{self.protocol} has its own column: only foreign protocols stand beside another")
        for row in self.rows:
            where = f"{self.protocol}, {row.method}, {self.source}"
            if len(row.values) != len(self.metrics) or len(row.sd) not in (0, len(self.metrics)):
                raise ValueError(f"{where}: one value a metric is needed ({len(self.metrics)})")
            numbers = [value for value in row.values if value != "-"]
            if not numbers or not all(0 <= value <= 100 and math.isfinite(value) for value in numbers):
                raise ValueError(f"{where}: values are percent, between 0 and 100, at least one a row")
        return self


class _Collection(Config):
    names: dict[str, Text]
    titles: dict[str, Text]
    tables: tuple[_SourceTable, ...]

    @model_validator(mode="after")
    def _named(self) -> _Collection:
        unnamed = sorted({row.method for table in self.tables for row in table.rows} - self.names.keys())
        if unnamed:
            raise ValueError(f"no display name for {', '.join(unnamed)}: add it to [names]")
        foreign = {table.protocol for table in self.tables if table.protocol.startswith(FOREIGN)}
        if odd := sorted(foreign ^ self.titles.keys()):
            raise ValueError(f"[titles] has one for each foreign protocol and no other: see {', '.join(odd)}")
        return self


@cache
def _collection() -> _Collection:
    file = resources.files("twist.contracts") / "published.toml"
    return validate(tomllib.loads(file.read_text(encoding="utf-8")), _Collection, where="contracts/published.toml")


def load_published() -> list[PublishedRow]:
    """Every published row of the collection, in the file's order.

    Raises:
        UsageError: the file does not follow its schema (a row without source, an unknown metric, …).
    """
    return [_flat(table, row) for table in _collection().tables for row in table.rows]


def display_name(method: str) -> str:
    """`moco-v2` → `MoCo v2`; a method that the collection does not know keeps the name its record gives it."""
    return _collection().names.get(method, method)


def protocol_title(protocol: str) -> str:
    """What a table calls a protocol: ours by their names, foreign ones by a title that says what they are."""
    return _collection().titles.get(protocol, protocol)


def home_of(protocol: str) -> str:
    """The protocol of ours that a foreign one stands beside; any other is its own home."""
    return _homes().get(protocol) or protocol


@cache
def _homes() -> dict[str, str | None]:
    return {table.protocol: table.beside for table in _collection().tables}


def select(rows: Iterable[PublishedRow], protocols: Iterable[str]) -> list[PublishedRow]:
    """The rows of `protocols` and the foreign ones that stand beside them."""
    wanted = set(protocols)
    return [row for row in rows if row.protocol in wanted or row.beside in wanted]


def _flat(table: _SourceTable, row: _Row) -> PublishedRow:
    printed = {name: value for name, value in zip(table.metrics, row.values) if value != "-"}
    return PublishedRow(
        method=row.method,
        architecture=row.architecture,
        epochs=row.epochs,
        variant=row.variant,
        protocol=table.protocol,
        beside=table.beside,
        task=table.task,
        metrics=printed,
        sd=dict(zip(table.metrics, row.sd)),
        trials=table.trials,
        source=table.source,
        read=table.read,
        note=" ".join(part for part in (table.note, row.note) if part),
    )
