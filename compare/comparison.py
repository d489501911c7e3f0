"""What `twist compare` is asked for → records and published rows → tables: one a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twist.compare.asked_metrics import check_present, metrics_in
from twist.compare.table import Table, build_table
from twist.contracts.errors import UsageError
from twist.contracts.published import PublishedRow, load_published, select
from twist.contracts.record import RunRecord, find_collections, record_folders

Found = list[tuple[Path, RunRecord]]
# `twist.contracts.record.read_records`, or a reader that knows more of what a record may say.
Reader = Callable[[Iterable[Path]], Found]


@dataclass(frozen=True)
class Choice:
    """The options of `twist compare` that decide what is in a table."""

    baseline: str | None = None
    allow_mixed: bool = False
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


def compare(paths: Sequence[Path], choice: Choice, *, read: Reader) -> list[Comparison]:
    """The comparison of the records under `paths`: one, or, where a single folder holds several studies side by side
    (`results/photos`, `results/demo-photos`), one each. Studies repeat each other's runs, so they never share a table.

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
        check_present(choice.metrics, metrics_in([], rows))
        return [Comparison(_table([], rows, choice), [])]
    studies = find_collections(paths[0]) if len(paths) == 1 and paths[0].is_dir() else []
    read_of: list[tuple[Path | None, Found]] = [(study, read(record_folders(study) or [study])) for study in studies]
    read_of = read_of or [(None, read(paths))]
    records = [record for _, found in read_of for _, record in found]
    # What none of several studies has is a mistake; what one of them has is left out of the others.
    check_present(choice.metrics, metrics_in(records, _beside(records, choice)[0]))
    made = [_comparison(found, choice, study if len(studies) > 1 else None) for study, found in read_of]
    return [one for one in made if one.table.columns] or made


def _comparison(found: Found, choice: Choice, folder: Path | None) -> Comparison:
    rows, left_out = _beside([record for _, record in found], choice)
    table = _table(found, rows, choice)
    kept = [pair for index, pair in enumerate(found) if index not in table.left_out]
    return Comparison(replace(table, notes=(*table.notes, *left_out)), kept, folder)


def _beside(records: Sequence[RunRecord], choice: Choice) -> tuple[list[PublishedRow], list[str]]:
    """The published rows that stand beside `records`, and the sentence that says which do not."""
    if choice.published is False:
        return [], []
    rows = select(load_published(), {record.protocol for record in records})
    if choice.same_methods:
        methods = {record.method for record in records}
        rows = [row for row in rows if row.method in methods]
    if choice.published:
        return rows, []
    full = select(rows, {record.protocol for record in records if record.scale == "full"})
    return full, [] if len(full) == len(rows) else [_left_out(records, rows)]


def _left_out(records: Sequence[RunRecord], rows: Sequence[PublishedRow]) -> str:
    at_full = {record.protocol for record in records if record.scale == "full"}
    protocols = {record.protocol for record in records} - at_full
    named = sorted(protocol for protocol in protocols if select(rows, [protocol]))
    these = "these" if len(named) > 1 else "it"
    return (
        f"Published numbers of {', '.join(named)} are left out: no record of {these} is at full scale, so none may be "
        "compared with them; --published shows them."
    )


def _table(found: Found, rows: Sequence[PublishedRow], choice: Choice) -> Table:
    return build_table(
        [record for _, record in found],
        published=rows,
        baseline=choice.baseline,
        allow_mixed=choice.allow_mixed,
        metrics=choice.metrics,
        paths=[path for path, _ in found],
    )
