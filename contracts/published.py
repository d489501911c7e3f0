"""Published numbers: `published.toml`, the one place that has them, read into rows that each name their source.

A row's protocol is one of ours only where the source followed that recipe. Every other is `foreign:<name>`, with a
column of its own, and `beside` names the protocol of ours that it is shown next to.
"""

import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from twist.contracts.config import Config, validate
from twist.contracts.metrics import check_metrics
from twist.contracts.record import Task

FOREIGN = "foreign:"
Text = Annotated[str, Field(min_length=1)]
Percent = Annotated[float, Field(ge=0, le=100)]


class PublishedRow(Config):
    """One row of a published table. Values and standard deviations are in the units of their metrics' names.

    `read`: in the primary source (the repository's file, the paper's text) or in a secondary copy. `variant` tells
    weights of one method and length apart: other pretraining data, another code base.
    """

    method: str
    architecture: str
    epochs: int | None
    variant: str
    protocol: str
    beside: str | None
    task: Task
    metrics: dict[str, float]
    sd: dict[str, float]
    trials: int | None
    source: str
    read: Literal["primary", "secondary"]
    note: str


class _Row(Config):
    method: Text
    # A dash where the source prints nothing; TOML has no null.
    values: tuple[Percent | Literal["-"], ...]
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
    def _fits(self) -> Self:
        check_metrics(self.metrics, where=self.protocol)
        if self.beside is not None and not self.protocol.startswith(FOREIGN):
            raise ValueError(f"{self.protocol} has its own column: only foreign protocols stand beside another")
        for row in self.rows:
            if len(row.values) != len(self.metrics) or len(row.sd) not in (0, len(self.metrics)):
                raise ValueError(f"{self.protocol}, {row.method}: one value a metric is needed ({len(self.metrics)})")
        return self

    def flat(self) -> Iterator[PublishedRow]:
        for row in self.rows:
            yield PublishedRow(
                **row.model_dump(include={"method", "architecture", "epochs", "variant"}),
                **self.model_dump(include={"protocol", "beside", "task", "trials", "source", "read"}),
                metrics={name: value for name, value in zip(self.metrics, row.values) if value != "-"},
                sd=dict(zip(self.metrics, row.sd)),
                note=" ".join(part for part in (self.note, row.note) if part),
            )


class Collection(Config):
    """`published.toml`: display names of methods, titles of foreign protocols, and the tables."""

    names: dict[str, Text]
    titles: dict[str, Text]
    tables: tuple[_SourceTable, ...]

    @model_validator(mode="after")
    def _named(self) -> Self:
        unnamed = sorted({row.method for table in self.tables for row in table.rows} - self.names.keys())
        if unnamed:
            raise ValueError(f"no display name for {', '.join(unnamed)}: add it to [names]")
        foreign = {table.protocol for table in self.tables if table.protocol.startswith(FOREIGN)}
        if odd := sorted(foreign ^ self.titles.keys()):
            raise ValueError(f"[titles] has one for each foreign protocol and no other: see {', '.join(odd)}")
        return self


@cache
def _collection() -> Collection:
    file = resources.files("twist.contracts") / "published.toml"
    return validate(tomllib.loads(file.read_text(encoding="utf-8")), Collection, where="contracts/published.toml")


@cache
def load_published() -> tuple[PublishedRow, ...]:
    """Every published row, in the file's order; `UsageError` where the file does not follow its schema."""
    return tuple(row for table in _collection().tables for row in table.flat())


def display_name(method: str) -> str:
    """`moco-v2` → `MoCo v2`; an unknown method keeps the name that its record gives it."""
    return _collection().names.get(method, method)


def protocol_title(protocol: str) -> str:
    """What a table calls a protocol: ours by their names, foreign ones by a title that says what they are."""
    return _collection().titles.get(protocol, protocol)


def home_of(protocol: str) -> str:
    """The protocol of ours that a foreign one stands beside; any other is its own home."""
    return next((row.beside for row in load_published() if row.protocol == protocol and row.beside), protocol)


def select(rows: Iterable[PublishedRow], protocols: Iterable[str]) -> list[PublishedRow]:
    """The rows of `protocols` and the foreign ones that stand beside them."""
    wanted = set(protocols)
    return [row for row in rows if row.protocol in wanted or row.beside in wanted]


def find_neighbours(protocol: str) -> list[PublishedRow]:
    """The published rows that a run of `protocol` may be compared with, in the file's order.

    Of each method, architecture and number of epochs: the authors' own weights, else others' (`variant`), under this
    very protocol, else under the foreign ones beside it, which differ as their titles say.
    """
    rows = select(load_published(), [protocol])
    nearest: dict[tuple[str, str, int | None], tuple[bool, bool]] = {}
    for row in rows:
        kind, distance = (row.method, row.architecture, row.epochs), (bool(row.variant), row.protocol != protocol)
        nearest[kind] = min(distance, nearest.get(kind, distance))
    return [
        row
        for row in rows
        if (bool(row.variant), row.protocol != protocol) == nearest[row.method, row.architecture, row.epochs]
    ]
