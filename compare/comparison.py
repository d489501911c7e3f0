"""The options of `twist compare` → records and published rows → tables: one a study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from twist.compare.table import FIELDS, Table, build_table, long_rows
from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.metrics import METRICS
from twist.contracts.published import PublishedRow, load_published, select
from twist.contracts.record import RunRecord, find_collections, read_records

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


def compare(paths: Sequence[Path], choice: Choice) -> list[Comparison]:
    """The comparison of the records under `paths`: one, or, where a single folder holds several studies
    (`results/photos`, `results/study`), one each. Studies repeat each other's runs, so they never share a table.

    Raises:
        UsageError: options that exclude each other, an unknown metric or baseline, a metric that nothing has.
        UserError: a path without records, or records that may not meet.
    """
    if choice.published_only:
        if paths or choice.published is False:
            raise UsageError("--published-only shows published numbers alone: leave out records and --no-published.")
        rows = load_published()
        _check_metrics(choice.metrics, [], rows)
        return [Comparison(build_table([], published=rows, baseline=choice.baseline, metrics=choice.metrics), [])]
    studies = find_collections(paths[0]) if len(paths) == 1 and paths[0].is_dir() else {}
    read: list[tuple[Path | None, Found]] = [(folder, read_records(folders)) for folder, folders in studies.items()]
    read = read or [(None, read_records(paths))]
    records = [record for _, found in read for _, record in found]
    # A metric that no study has is a mistake; the studies without it are left out.
    _check_metrics(choice.metrics, records, _published_for(records, choice)[0])
    made = [_comparison(found, choice, folder if len(read) > 1 else None) for folder, found in read]
    return [one for one in made if one.table.columns] or made


def compare_records(*paths: str | Path, baseline: str | None = None, published: bool | None = None) -> pandas.DataFrame:
    """The table of `twist compare PATHS --format csv` as a frame: a row for each value, measured or published.

    Columns beside the names of row and column: study, kind, value, sd, n (of pretrainings or random initialisations),
    difference (to the row called `baseline`), p_value (of Welch's t-test), p_holm (corrected for all tests of the
    table), source (of a published number), and others.

    Raises:
        UserError: a path without records, or records that may not meet.
    """
    import pandas

    comparisons = compare([Path(path) for path in paths], Choice(baseline, published=published))
    rows = [
        {"study": one.folder.name if one.folder else None, **row} for one in comparisons for row in long_rows(one.table)
    ]
    return pandas.DataFrame(rows, columns=["study", *FIELDS])


def _comparison(found: Found, choice: Choice, folder: Path | None) -> Comparison:
    rows, notes = _published_for([record for _, record in found], choice)
    table = build_table(
        [record for _, record in found],
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
    protocols, methods = {record.protocol for record in records}, {record.method for record in records}
    rows = [row for row in select(load_published(), protocols) if not choice.same_methods or row.method in methods]
    at_full = {record.protocol for record in records if record.scale == "full"}
    left_out = sorted(name for name in protocols - at_full if select(rows, [name]))
    if choice.published or not left_out:
        return rows, []
    sentence = (
        f"Published numbers of {', '.join(left_out)} are left out: no record of {'these' if left_out[1:] else 'it'} is "
        "at full scale, so none may be compared with them; --published shows them."
    )
    return select(rows, at_full), [sentence]


def _check_metrics(asked: Iterable[str], records: Iterable[RunRecord], published: Iterable[PublishedRow]) -> None:
    """`UsageError` for a metric in `asked` that none of these has."""
    there = {name for record in records for name in record.metrics} | {
        name for row in published for name in row.metrics
    }
    for name in asked:
        if name not in there:
            known = did_you_mean("", there) if name in METRICS else did_you_mean(name, METRICS)
            raise UsageError(f'Nothing here has the metric "{name}".{known}')
