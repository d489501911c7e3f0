"""Run records and published numbers → one table as plain data: rows are methods, columns protocol and metric.

What may stand in one column is decided here and nowhere else: the same protocol, metric, recipe hash and scale.
A published number has no recipe hash. It joins the measured column of its protocol only where that column is at full
scale, is the protocol's only one, and was measured on the same architecture; else it has a column of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from twist.compare.asked_metrics import check_known, metrics_in
from twist.compare.duplicates import left_out
from twist.compare.mixtures import conditions_of, mixed_sentence, mixtures
from twist.compare.pretrainings import architecture_of, pretraining, variant_names, weights_key
from twist.compare.statistics import Difference, difference, mean, standard_deviation
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.metrics import METRICS, Metric
from twist.contracts.published import FOREIGN, PublishedRow, display_name, select
from twist.contracts.record import RunRecord, Task

TASKS: tuple[str, ...] = get_args(Task)
PUBLISHED = "published"


@dataclass(frozen=True)
class Column:
    """One protocol and metric of one recipe at one scale; `recipe_hash` is None for published numbers alone."""

    protocol: str
    metric: str
    task: str
    recipe_hash: str | None
    scale: str
    # What sets this recipe apart from the protocol's other ones in a mixed table; empty where it is the only one.
    mixed: str = ""

    @property
    def definition(self) -> Metric:
        return METRICS[self.metric]


@dataclass(frozen=True)
class Row:
    """One method with one kind of weights: what differs in architecture, length or origin is another row."""

    method: str
    label: str
    architecture: str | None = None
    epochs: int | None = None
    variant: str = ""


@dataclass(frozen=True)
class Measured:
    """The runs behind a cell, and what of them counts: mean and sample standard deviation in the metric's unit.

    Runs of one pretraining are repeats of the transfer alone, and count each. Where there are several pretrainings (or
    random initialisations) these are the repeats: each counts once, by the mean of its runs, which are not independent
    of one another. Runs that repeat a result exactly, in every metric and from the same weights, are one result.
    """

    # What counts as repeats, and the metric of each record.
    values: tuple[float, ...]
    run_values: tuple[float, ...]
    records: tuple[RunRecord, ...]
    # How many pretrainings, or random initialisations, the runs started from.
    pretrainings: int = 1
    # Whether runs were left out of `values` because they repeat another exactly.
    repeated: bool = False

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        return standard_deviation(self.values)

    @property
    def n(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Published:
    """One printed value; `source` is an index into `Table.sources`."""

    value: float
    sd: float | None
    trials: int | None
    source: int
    note: str


@dataclass(frozen=True)
class Source:
    """Where printed values stand, and whether that place itself was read or a copy of it."""

    text: str
    read: str


@dataclass(frozen=True)
class Cell:
    """What is known of one row in one column; a cell without either kind of value is absent, never zero."""

    measured: Measured | None = None
    published: tuple[Published, ...] = ()
    difference: Difference | None = None


@dataclass(frozen=True)
class Table:
    """Rows × columns; `cells` holds only what exists. `baseline` is the row against which differences are taken.

    `notes` are sentences about what is not in the table; `left_out` the indexes of records that repeat others.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    cells: dict[tuple[int, int], Cell]
    sources: tuple[Source, ...] = ()
    baseline: int | None = None
    notes: tuple[str, ...] = ()
    left_out: frozenset[int] = frozenset()

    @property
    def comparisons(self) -> int:
        """How many tests the table holds: p-values are not corrected for it, so it is printed beside them."""
        return sum(c.difference is not None and c.difference.p_value is not None for c in self.cells.values())


def build_table(
    records: Sequence[RunRecord],
    *,
    published: Sequence[PublishedRow] = (),
    baseline: str | None = None,
    allow_mixed: bool = False,
    metrics: Sequence[str] = (),
    paths: Sequence[Path] = (),
) -> Table:
    """The table of `records` beside `published`, with differences to the rows of `baseline` (a method or row label).

    Of the published rows those of the measured protocols, and the foreign ones beside them, are shown; all of them
    when there are no records. `metrics` restricts the columns; empty shows every metric. `paths` are the records'
    files, for messages.

    Raises:
        UserError: two records of one run that differ, or (without `allow_mixed`) a protocol with several recipes,
            scales or data.
        UsageError: nothing in the table is called `baseline`, or several rows are; an unknown metric is asked for.
    """
    wanted = set(metrics) or METRICS.keys()
    copies, notes = left_out(records, paths)
    records = [record for index, record in enumerate(records) if index not in copies]
    mixed = mixtures(records)
    if mixed and not allow_mixed:
        raise UserError(mixed_sentence(mixed))
    shown = select(published, {record.protocol for record in records}) if records else list(published)
    check_known(metrics, metrics_in(records, shown))

    values: dict[tuple[_RowKey, Column], list[RunRecord]] = defaultdict(list)
    variants, conditions = variant_names(records), conditions_of(records)
    for record, condition in zip(records, conditions, strict=True):
        key = _RowKey(record.method, architecture_of(record), record.weights.epochs, variants[weights_key(record)])
        apart = mixed.get(record.protocol, {}).get(condition, "")
        for metric in record.metrics.keys() & wanted:
            column = Column(record.protocol, metric, record.task, record.recipe_hash, record.scale, apart)
            values[key, column].append(record)

    sources: dict[Source, int] = {}
    printed: dict[tuple[_RowKey, Column], list[Published]] = defaultdict(list)
    joined = _joinable_columns({column for _, column in values}, records)
    for row in shown:
        key = _RowKey(row.method, row.architecture, row.epochs, row.variant)
        source = sources.setdefault(Source(row.source, row.read), len(sources))
        for metric, value in row.metrics.items():
            if metric not in wanted:
                continue
            own = Column(row.protocol, metric, row.task, None, PUBLISHED)
            column = joined.get((row.protocol, metric, row.architecture), own)
            printed[key, column].append(Published(value, row.sd.get(metric), row.trials, source, row.note))

    beside = {row.protocol: row.beside for row in shown if row.beside}
    places = [*values, *printed]
    columns = sorted({column for _, column in places}, key=lambda column: _column_order(column, beside))
    measured = {key for key, _ in values}
    keys = sorted({key for key, _ in places}, key=lambda key: (key not in measured, *_row_order(key)))
    rows = _labelled(keys)
    cells = _cells(keys, columns, values, printed)
    chosen = None if baseline is None else _baseline(baseline, rows, cells)
    if chosen is not None:
        cells = _with_differences(cells, chosen)
    return Table(tuple(columns), tuple(rows), cells, tuple(sources), chosen, notes, copies)


@dataclass(frozen=True)
class _RowKey:
    method: str
    architecture: str | None
    epochs: int | None
    variant: str


def _joinable_columns(
    columns: Iterable[Column], records: Sequence[RunRecord]
) -> dict[tuple[str, str, str | None], Column]:
    """(protocol, metric, architecture) → the measured column that a published value of these may stand in."""
    columns = list(columns)
    architectures: dict[tuple[str, str], set[str | None]] = defaultdict(set)
    for record in records:
        architectures[record.protocol, record.recipe_hash].add(architecture_of(record))
    return {
        (column.protocol, column.metric, architecture): column
        for column in columns
        if column.scale == "full" and not column.mixed and column.recipe_hash is not None
        for architecture in architectures[column.protocol, column.recipe_hash]
    }


def _column_order(column: Column, beside: dict[str, str]) -> tuple[Any, ...]:
    home = beside.get(column.protocol, column.protocol)
    return (
        TASKS.index(column.task),
        # Ours and their neighbours first, then what has no neighbour here.
        home.startswith(FOREIGN),
        home,
        column.protocol != home,
        column.protocol,
        column.recipe_hash is None,
        column.mixed,
        column.scale,
        column.recipe_hash or "",
        list(METRICS).index(column.metric),
    )


def _row_order(key: _RowKey) -> tuple[Any, ...]:
    # The two that everything is measured against stand first, the rest by name.
    first = {"random": 0, "supervised": 1}.get(key.method, 2)
    return first, display_name(key.method).lower(), key.architecture or "", key.epochs or 0, key.variant


def short_architecture(architecture: str) -> str:
    """`resnet50w2` → `R50w2`, `vit_small_patch16` → `ViT-S/16`: as papers write them."""
    named = {"vit_small_patch16": "ViT-S/16", "vit_base_patch16": "ViT-B/16"}
    return named.get(architecture, architecture.replace("resnet", "R"))


def _labelled(keys: Sequence[_RowKey]) -> list[Row]:
    several = len({key.architecture for key in keys if key.architecture}) > 1
    rows = []
    for key in keys:
        architecture = short_architecture(key.architecture) if several and key.architecture else ""
        epochs = f"{key.epochs} ep" if key.epochs else ""
        label = " · ".join(part for part in (display_name(key.method), architecture, epochs, key.variant) if part)
        # A record may come from anybody: no line break or terminal code gets into a table.
        label = "".join(letter if letter.isprintable() else " " for letter in label)
        rows.append(Row(key.method, label, key.architecture, key.epochs, key.variant))
    return rows


def _cells(
    keys: Sequence[_RowKey],
    columns: Sequence[Column],
    values: dict[tuple[_RowKey, Column], list[RunRecord]],
    printed: dict[tuple[_RowKey, Column], list[Published]],
) -> dict[tuple[int, int], Cell]:
    cells = {}
    row_index, column_index = {k: i for i, k in enumerate(keys)}, {c: i for i, c in enumerate(columns)}
    for key, column in {**values, **printed}:
        runs = sorted(values.get((key, column), ()), key=lambda run: (run.seed, run.weights.sha256 or ""))
        measured = _measured(runs, column.metric) if runs else None
        cells[row_index[key], column_index[column]] = Cell(measured, tuple(printed.get((key, column), ())))
    return cells


def _measured(runs: Sequence[RunRecord], metric: str) -> Measured:
    by_pretraining: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_pretraining[pretraining(run)].append(run)
    counted = [_without_repeats(group) for group in by_pretraining.values()]
    values = [[run.metrics[metric] for run in group] for group in counted]
    return Measured(
        values=tuple(values[0] if len(values) == 1 else map(mean, values)),
        run_values=tuple(run.metrics[metric] for run in runs),
        records=tuple(runs),
        pretrainings=len(counted),
        repeated=sum(map(len, counted)) < len(runs),
    )


def _without_repeats(runs: list[RunRecord]) -> list[RunRecord]:
    """The first run alone where the seed changes nothing (k-NN): all metrics agree, for one of them may by chance."""
    return runs[:1] if all(run.metrics == runs[0].metrics for run in runs) else runs


def _names(row: Row) -> tuple[str, str]:
    """What a row may be called, in lower case: as its records say it (moco-v2), and as the table does (MoCo v2)."""
    return row.method.casefold(), row.label.split(" · ")[0].casefold()


def _baseline(name: str, rows: Sequence[Row], cells: dict[tuple[int, int], Cell]) -> int:
    measured = {row for (row, _), cell in cells.items() if cell.measured}
    by_label = [index for index in measured if rows[index].label == name]
    found = by_label or [index for index in measured if name.casefold() in _names(rows[index])]
    if len(found) == 1:
        return found[0]
    if found:
        labels = ", ".join(f'"{rows[index].label}"' for index in sorted(found))
        raise UsageError(f'--baseline "{name}" is several rows, {labels}: give one of these labels.')
    known = {rows[index].method for index in measured}
    raise UsageError(f'--baseline "{name}": no measured row is called that.{did_you_mean(name, known)}')


def _with_differences(cells: dict[tuple[int, int], Cell], baseline: int) -> dict[tuple[int, int], Cell]:
    compared = {}
    for (row, column), cell in cells.items():
        against = cells.get((baseline, column), Cell()).measured
        if row != baseline and cell.measured is not None and against is not None:
            gap = difference(cell.measured.values, against.values)
            compared[row, column] = Cell(cell.measured, cell.published, gap)
        else:
            compared[row, column] = cell
    return compared
