"""The options of `twist compare` → records and published rows → tables: one a study."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.compare.table import Table, build_table
from twist.contracts.errors import UsageError
from twist.contracts.metrics import METRICS
from twist.contracts.published import PublishedRow, load_published, select
from twist.contracts.record import RunRecord, find_collections, find_foreign, read_records

if TYPE_CHECKING:
    import pandas

Found = list[tuple[Path, RunRecord]]


@dataclass(frozen=True)
class Choice:
    """The options of `twist compare` that decide what is in a table."""

    baseline: str | None = None
    strict: bool = False
    cost: bool = False
    # None: of the protocols that have a record at full scale, which alone may be compared with published numbers.
    published: bool | None = None
    # The published collection alone, without any record.
    published_only: bool = False
    # Published rows of the measured methods alone.
    same_methods: bool = False
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One table and the records in it. `folder` is the study's where one path held several, else None."""

    table: Table
    found: Found
    folder: Path | None = None


def compare(
    paths: Sequence[Path], choice: Choice, *, check: Callable[[Path, RunRecord], None] = lambda *_: None
) -> list[Comparison]:
    """The comparison of the records under `paths`: one, or, where a single folder holds several studies
    (`results/photos`, `results/demo-photos`), one each. Studies repeat each other's runs, so they never share a table.

    `check` raises for a record that may not be shown.

    Raises:
        UsageError: options that exclude each other, an unknown metric or baseline, a metric that nothing has.
        UserError: a path without records, or records that may not meet.
    """
    if choice.published_only:
        if paths:
            raise UsageError(f"--published-only reads no records: leave out {paths[0]}, or the option.")
        if choice.published is False:
            raise UsageError("--published-only and --no-published leave nothing to show: leave out one of them.")
        rows = load_published()
        _check_metrics(choice.metrics, _metrics_in([], rows))
        return [Comparison(build_table([], published=rows, baseline=choice.baseline, metrics=choice.metrics), [])]
    studies = find_collections(paths[0]) if len(paths) == 1 and paths[0].is_dir() else {}
    read: list[tuple[Path | None, Found]] = [(study, read_records(folders)) for study, folders in studies.items()]
    read = read or [(None, read_records(paths))]
    pairs = [pair for _, found in read for pair in found]
    for path, record in pairs:
        check(path, record)
    records = [record for _, record in pairs]
    # A metric that no study has is a mistake; the studies without it are left out.
    _check_metrics(choice.metrics, _metrics_in(records, _published_for(records, choice)[0]))
    made = [_comparison(found, choice, study if len(studies) > 1 else None) for study, found in read]
    if foreign := find_foreign(paths):
        some = (
            f"{foreign[0]} is no run record and was"
            if len(foreign) == 1
            else (f"{len(foreign)} files are no run records ({foreign[0]}, …) and were")
        )
        made[-1] = replace(made[-1], table=replace(last := made[-1].table, notes=(*last.notes, f"{some} skipped.")))
    return [one for one in made if one.table.columns] or made


def compare_records(*paths: str | Path, baseline: str | None = None, published: bool | None = None) -> pandas.DataFrame:
    """The table of `twist compare PATHS` as a frame with a row for each of its cells.

    Columns: study, method, row (its label), protocol, scale, metric, unit, mean, sd, n (of pretrainings or random
    initialisations), difference (to the row called `baseline`), p (of Welch's t-test), p_holm (corrected for all tests
    of the table), published (others' number for this cell) and source.

    Raises:
        UserError: a path without records, or records that may not meet.
    """
    import pandas

    comparisons = compare([Path(path) for path in paths], Choice(baseline, published=published))
    return pandas.DataFrame([cell for one in comparisons for cell in _cells(one)])


def _cells(comparison: Comparison) -> Iterator[dict[str, Any]]:
    table = comparison.table
    for (row, column), cell in sorted(table.cells.items()):
        of, measured, difference = table.columns[column], cell.measured, cell.difference
        published = cell.published[0] if cell.published else None
        yield {
            "study": comparison.folder.name if comparison.folder else None,
            "method": table.rows[row].method,
            "row": table.rows[row].label,
            "protocol": of.protocol,
            "scale": of.scale,
            "metric": of.metric,
            "unit": of.definition.unit,
            "mean": measured.mean if measured else None,
            "sd": measured.sd if measured else None,
            "n": measured.n if measured else 0,
            "difference": difference.value if difference else None,
            "p": difference.p_value if difference else None,
            "p_holm": difference.p_holm if difference else None,
            "published": published.value if published else None,
            "source": table.sources[published.source].text if published else None,
        }


def _comparison(found: Found, choice: Choice, folder: Path | None) -> Comparison:
    records = [record for _, record in found]
    rows, notes = _published_for(records, choice)
    table = build_table(
        records,
        published=rows,
        baseline=choice.baseline,
        strict=choice.strict,
        metrics=choice.metrics,
        paths=[path for path, _ in found],
    )
    kept = [pair for index, pair in enumerate(found) if index not in table.left_out]
    return Comparison(replace(table, notes=(*table.notes, *notes), cost=choice.cost), kept, folder)


def _published_for(records: Sequence[RunRecord], choice: Choice) -> tuple[list[PublishedRow], list[str]]:
    """The published rows to show with `records`, and the sentence that names the protocols whose rows are left out."""
    if choice.published is False:
        return [], []
    rows = select(load_published(), {record.protocol for record in records})
    if choice.same_methods:
        methods = {record.method for record in records}
        rows = [row for row in rows if row.method in methods]
    at_full = {record.protocol for record in records if record.scale == "full"}
    left_out = sorted(name for name in {record.protocol for record in records} - at_full if select(rows, [name]))
    if choice.published or not left_out:
        return rows, []
    sentence = (
        f"Published numbers of {', '.join(left_out)} are left out: no record of {'these' if left_out[1:] else 'it'} is "
        "at full scale, so none may be compared with them; --published shows them."
    )
    return select(rows, at_full), [sentence]


def _metrics_in(records: Iterable[RunRecord], published: Iterable[PublishedRow]) -> list[str]:
    """The metrics that these have, in the vocabulary's order."""
    there = {name for record in records for name in record.metrics} | {n for row in published for n in row.metrics}
    return [name for name in METRICS if name in there]


def _check_metrics(asked: Iterable[str], there: Collection[str]) -> None:
    """`UsageError` for a name in `asked` that is no metric, or that none of `there` is."""
    listed = f" What is here has {', '.join(there)}." if there else ""
    for name in asked:
        if name not in METRICS:
            near = _nearest_metric(name)
            raise UsageError(f'There is no metric "{name}".' + (f' Did you mean "{near}"?' if near else listed))
        if name not in there:
            raise UsageError(f'Nothing here has the metric "{name}".{listed}')


def _nearest_metric(name: str) -> str | None:
    """The metric called `name` without its unit (`top1`) or in the head of its column (`k-NN top-1`), or nearly so."""
    known = {metric.name.removesuffix("_percent"): metric.name for metric in METRICS.values()}
    known |= {metric.label.casefold(): metric.name for metric in METRICS.values()}
    near = difflib.get_close_matches(name.removesuffix("_percent").casefold(), known, n=1)
    return known[near[0]] if near else None
