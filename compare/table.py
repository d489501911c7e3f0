"""Run records and published numbers → one table as plain data: rows are methods, columns protocol and metric.

What may stand in one column is decided here: the same protocol, metric, recipe hash and scale. A published number
has no recipe hash; it joins the measured column of its protocol only at full scale and of the same architecture.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

from twist.compare.grouping import (
    architecture_of,
    device_hours,
    find_copies,
    pretraining,
    recipe_differences,
    shared_recipes,
    variant_names,
    weights_key,
)
from twist.compare.statistics import Difference, differences
from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.metrics import METRICS, Metric
from twist.contracts.published import FOREIGN, PublishedRow, display_name, select
from twist.contracts.record import RunRecord, Task

TASKS: tuple[str, ...] = get_args(Task)
PUBLISHED = "published"
_VIT_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}


@dataclass(frozen=True)
class Column:
    """One protocol and metric of one recipe at one scale; `recipe_hash` is None for published numbers alone."""

    protocol: str
    metric: str
    task: str
    recipe_hash: str | None
    scale: str
    # How this recipe differs from the protocol's other ones in a mixed table; empty where it is the only one.
    mixed: str = ""
    # A user's own data, by the name and digest of their card.
    data: str = ""

    @property
    def definition(self) -> Metric:
        return METRICS[self.metric]


@dataclass(frozen=True)
class Row:
    """One method with one kind of weights: another architecture, length or origin is another row."""

    method: str
    label: str
    architecture: str | None = None
    epochs: int | None = None
    variant: str = ""


@dataclass(frozen=True)
class Measured:
    """The runs behind a cell and what of them counts, in the metric's unit.

    Runs of one pretraining are repeats of the transfer alone, and count each. Where there are several pretrainings (or
    random initialisations) these are the repeats: each counts once, by the mean of its runs, which are not independent
    of one another. Runs that repeat a result exactly, in every metric and from the same weights, are one result.
    """

    # The repeats, and the metric of each record.
    values: tuple[float, ...]
    run_values: tuple[float, ...]
    records: tuple[RunRecord, ...]
    # How many pretrainings, or random initialisations, the runs started from.
    pretrainings: int = 1
    # Whether runs were left out of `values` because they repeat another exactly.
    repeated: bool = False

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None

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
    """The values of one row in one column; a cell without any value is absent, never zero."""

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
    # Whether a column of what the runs took is shown.
    cost: bool = False

    def device_hours(self, row: int, columns: Iterable[int]) -> float | None:
        """Wall hours × devices (GPUs, else one processor) of the runs behind a row's cells in `columns`, each once."""
        cells = [self.cells[row, column].measured for column in columns if (row, column) in self.cells]
        runs = {id(run): run for cell in cells if cell for run in cell.records}
        return sum(device_hours(run) for run in runs.values()) if runs else None

    @property
    def comparisons(self) -> int:
        """The number of tests in the table, for which its p-values are corrected together."""
        return sum(c.difference is not None and c.difference.p_value is not None for c in self.cells.values())


def build_table(
    records: Sequence[RunRecord],
    *,
    published: Sequence[PublishedRow] = (),
    baseline: str | None = None,
    strict: bool = False,
    metrics: Sequence[str] = (),
    paths: Sequence[Path] = (),
) -> Table:
    """The table of `records` and `published`, with differences to the row of `baseline` (a method or row label).

    Of the published rows those of the measured protocols, and the foreign ones beside them, are shown; all of them
    when there are no records. `metrics` restricts the columns; empty shows every metric. `paths` are the records'
    files, for messages.

    Raises:
        UserError: two records of one run that differ, or (with `strict`) a protocol with several recipes, scales
            or data.
        UsageError: nothing in the table is called `baseline`, or several rows are.
    """
    wanted = set(metrics) or METRICS.keys()
    copies = find_copies(records, paths)
    records = [record for index, record in enumerate(records) if index not in copies]
    shown = select(published, {record.protocol for record in records}) if records else list(published)

    runs: dict[tuple[Row, Column], list[RunRecord]] = defaultdict(list)
    variants = variant_names(records)
    differences = recipe_differences(records, strict=strict)
    for record, recipe, mixed in zip(records, shared_recipes(records), differences, strict=True):
        row = Row(record.method, "", architecture_of(record), record.weights.epochs, variants[weights_key(record)])
        data = (record.data or "") if record.scale == "own" else ""
        for metric in record.metrics.keys() & wanted:
            column = Column(record.protocol, metric, record.task, recipe, record.scale, mixed, data)
            runs[row, column].append(record)

    # (protocol, metric, architecture) → the measured column that a published value of these may stand in.
    joined = {
        (column.protocol, column.metric, row.architecture): column
        for row, column in runs
        if column.scale == "full" and not column.mixed
    }
    sources: dict[Source, int] = {}
    printed: dict[tuple[Row, Column], list[Published]] = defaultdict(list)
    for line in shown:
        row = Row(line.method, "", line.architecture, line.epochs, line.variant)
        source = sources.setdefault(Source(line.source, line.read), len(sources))
        for metric in (metric for metric in line.metrics if metric in wanted):
            own = Column(line.protocol, metric, line.task, None, PUBLISHED)
            column = joined.get((line.protocol, metric, line.architecture), own)
            value = Published(line.metrics[metric], line.sd.get(metric), line.trials, source, line.note)
            printed[row, column].append(value)

    homes = {line.protocol: line.beside for line in shown if line.beside}
    places = dict.fromkeys([*runs, *printed])
    columns = sorted({column for _, column in places}, key=lambda column: _column_order(column, homes))
    measured = {row for row, _ in runs}
    rows = sorted({row for row, _ in places}, key=lambda row: (row not in measured, *_row_order(row)))
    row_index, column_index = {row: i for i, row in enumerate(rows)}, {column: i for i, column in enumerate(columns)}
    cells = {
        (row_index[row], column_index[column]): Cell(
            _measured(runs[row, column], column.metric) if (row, column) in runs else None,
            tuple(printed.get((row, column), ())),
        )
        for row, column in places
    }
    several = len({row.architecture for row in rows if row.architecture}) > 1
    labelled = tuple(replace(row, label=_label(row, architecture=several)) for row in rows)
    chosen = None if baseline is None else _find_baseline(baseline, labelled, cells)
    if chosen is not None:
        _add_differences(cells, chosen)
    left_out = "1 record left out: it repeats" if len(copies) == 1 else f"{len(copies)} records left out: each repeats"
    notes = (f"{left_out} an older one of the same run in every metric.",) if copies else ()
    return Table(tuple(columns), labelled, cells, tuple(sources), chosen, notes, copies)


def _column_order(column: Column, homes: dict[str, str]) -> tuple[Any, ...]:
    home = homes.get(column.protocol, column.protocol)
    return (
        TASKS.index(column.task),
        # Ours and the foreign ones beside them first, then the other foreign ones.
        home.startswith(FOREIGN),
        home,
        column.protocol != home,
        column.protocol,
        column.recipe_hash is None,
        column.mixed,
        column.scale,
        column.data,
        column.recipe_hash or "",
        list(METRICS).index(column.metric),
    )


def _row_order(row: Row) -> tuple[Any, ...]:
    # The usual baselines stand first, the rest by name.
    first = {"random": 0, "supervised": 1}.get(row.method, 2)
    return first, display_name(row.method).lower(), row.architecture or "", row.epochs or 0, row.variant


def _label(row: Row, *, architecture: bool) -> str:
    """`TWIST · R50w2 · 100 ep · variant`, the architecture where it is asked for."""
    network = row.architecture if architecture and row.architecture else ""
    network = network.removeprefix("timm:").replace("resnet", "R")  # as papers write them: R50, ViT-S/16
    network = re.sub(r"^vit_([a-z]+)_patch(\d+)", lambda m: f"ViT-{_VIT_SIZES.get(m[1], m[1])}/{m[2]}", network)
    epochs = f"{row.epochs} ep" if row.epochs else ""
    label = " · ".join(part for part in (display_name(row.method), network, epochs, row.variant) if part)
    # A record may come from anybody: no line break or terminal code gets into a table.
    return "".join(letter if letter.isprintable() else " " for letter in label)


def _measured(runs: Sequence[RunRecord], metric: str) -> Measured:
    runs = sorted(runs, key=lambda run: (run.seed, run.weights.sha256 or ""))
    by_pretraining: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_pretraining[pretraining(run)].append(run)
    # One run of those that the seed does not change (k-NN): all metrics agree, for one of them may by chance.
    counted = [
        group[:1] if all(run.metrics == group[0].metrics for run in group) else group
        for group in by_pretraining.values()
    ]
    values = [[run.metrics[metric] for run in group] for group in counted]
    return Measured(
        values=tuple(values[0] if len(values) == 1 else map(fmean, values)),
        run_values=tuple(run.metrics[metric] for run in runs),
        records=tuple(runs),
        pretrainings=len(counted),
        repeated=sum(map(len, counted)) < len(runs),
    )


def _find_baseline(name: str, rows: Sequence[Row], cells: dict[tuple[int, int], Cell]) -> int:
    """The measured row called `name`: its label, or its method as in records (moco-v2) or in tables (MoCo v2)."""
    measured = {row: rows[row] for row in sorted({row for (row, _), cell in cells.items() if cell.measured})}
    found = [index for index, row in measured.items() if row.label == name] or [
        index
        for index, row in measured.items()
        if name.casefold() in (row.method.casefold(), display_name(row.method).casefold())
    ]
    if len(found) == 1:
        return found[0]
    if found:
        labels = ", ".join(f'"{rows[index].label}"' for index in found)
        raise UsageError(f'--baseline "{name}" is several rows, {labels}: give one of these labels.')
    known = did_you_mean(name, {row.method for row in measured.values()})
    raise UsageError(f'--baseline "{name}": no measured row is called that.{known}')


def _add_differences(cells: dict[tuple[int, int], Cell], baseline: int) -> None:
    """Put into all measured cells their difference to the row `baseline`, where that has one."""
    pairs = {}
    for (row, column), cell in cells.items():
        against = cells.get((baseline, column), Cell()).measured
        if row != baseline and cell.measured and against:
            pairs[row, column] = cell.measured.values, against.values
    for place, gap in zip(pairs, differences([*pairs.values()])):
        cells[place] = replace(cells[place], difference=gap)


# fmt: off
FIELDS = (
    "method", "row", "architecture", "pretrain_epochs", "protocol", "metric", "scale", "recipe_hash", "mixed", "kind",
    "value", "sd", "n", "runs", "pretrainings", "baseline", "difference", "p_value", "p_holm", "device_hours",
    "verdict", "source", "read", "note",
)
# fmt: on


def long_rows(table: Table) -> Iterator[dict[str, Any]]:
    """`FIELDS` of each value, as far as it has them; a cell with a measured and a published value is two rows."""
    baseline = None if table.baseline is None else table.rows[table.baseline].label
    for (r, c), cell in sorted(table.cells.items()):
        row, column = table.rows[r], table.columns[c]
        place = (row.method, row.label, row.architecture, row.epochs, column.protocol, column.metric)
        where = dict(zip(FIELDS, place))  # the first six
        if runs := cell.measured:
            line = {name: getattr(column, name) for name in ("scale", "recipe_hash", "mixed")} | {"kind": "measured"}
            line |= {"value": runs.mean, "sd": runs.sd, "n": runs.n, "runs": len(runs.records)}
            line |= {"pretrainings": runs.pretrainings, "device_hours": table.device_hours(r, [c])}
            if gap := cell.difference:
                line |= {"baseline": baseline, "difference": gap.value, "p_value": gap.p_value, "p_holm": gap.p_holm}
                line |= {"verdict": gap.said}
            yield {**where, **line}
        for value in cell.published:
            # Its recipe is not known, whatever column it is shown in.
            line = {"scale": PUBLISHED, "kind": PUBLISHED, "value": value.value, "sd": value.sd, "n": value.trials}
            source = table.sources[value.source]
            yield {**where, **line, "source": source.text, "read": source.read, "note": value.note}
