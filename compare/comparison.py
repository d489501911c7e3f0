"""What `twist compare` is asked for → records and published rows → tables: one a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare.published import load_published
from compare.table import Table, build_table
from contracts.errors import UsageError
from contracts.record import RunRecord, find_collections

Found = list[tuple[Path, RunRecord]]
# `contracts.record.read_records`, or a reader that knows more of what a record may say.
Reader = Callable[[Iterable[Path]], Found]


@dataclass(frozen=True)
class Choice:
    """The options of `twist compare` that decide what is in a table."""

    baseline: str | None = None
    allow_mixed: bool = False
    published: bool = True
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
        UsageError: options that exclude each other, an unknown metric or baseline.
        UserError: a path without records, or records that may not meet.
    """
    if choice.published_only:
        if paths:
            raise UsageError(f"--published-only reads no records: leave out {paths[0]}, or the option.")
        if not choice.published:
            raise UsageError("--published-only and --no-published leave nothing to show: leave out one of them.")
        return [Comparison(_table([], choice), [])]
    studies = find_collections(paths[0]) if len(paths) == 1 and paths[0].is_dir() else []
    if len(studies) > 1:
        return [_comparison([folder], choice, read, folder) for folder in studies]
    return [_comparison(studies or paths, choice, read, None)]


def _comparison(paths: Sequence[Path], choice: Choice, read: Reader, folder: Path | None) -> Comparison:
    found = read(paths)
    return Comparison(_table([record for _, record in found], choice), found, folder)


def _table(records: Sequence[RunRecord], choice: Choice) -> Table:
    published = load_published() if choice.published else []
    if choice.same_methods:
        methods = {record.method for record in records}
        published = [row for row in published if row.method in methods]
    return build_table(
        records,
        published=published,
        baseline=choice.baseline,
        allow_mixed=choice.allow_mixed,
        metrics=choice.metrics,
    )
