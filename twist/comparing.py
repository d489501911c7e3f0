"""`twist compare`: what joins the records, the published numbers and the writers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compare.published import load_published
from compare.render import check_markers as stale_markers
from compare.render import render
from compare.render import update_markers as rewrite_markers
from compare.report import write_report
from compare.table import build_table
from contracts import atomic
from contracts.record import find_records, read_record


def compare(
    paths: Sequence[Path],
    *,
    baseline: str | None,
    table_format: str,
    output: Path | None,
    allow_mixed: bool,
    published: bool,
    same_methods: bool,
    metrics: Sequence[str],
    pretrain_runs: Sequence[Path],
) -> None:
    """Read the records under `paths` and print or write one table."""
    found = [(path, read_record(path)) for path in find_records(paths)]
    rows = load_published() if published else []
    if same_methods:
        measured = {record.method for _, record in found}
        rows = [row for row in rows if row.method in measured]
    table = build_table(
        [record for _, record in found],
        published=rows,
        baseline=baseline,
        allow_mixed=allow_mixed,
        metrics=metrics,
    )
    if table_format == "html":
        page = write_report(output or Path("comparison.html"), table, found, pretrain_runs=pretrain_runs)
        print(page)
        return
    text = render(table, table_format)
    if output is None:
        print(text)
    else:
        atomic.write_text(output, text.rstrip("\n") + "\n")
        print(output)


def check_markers(file: Path) -> int:
    """Exit status 0 when every table in `file` is what its marker's arguments give today, else 1."""
    stale = stale_markers(file)
    for block in stale:
        print(f"{file}: the table of `{block}` is stale; run `twist compare --update {file}`.")
    return 1 if stale else 0


def update_markers(file: Path) -> int:
    """Rewrite the stale tables of `file`; always 0."""
    for block in rewrite_markers(file):
        print(f"{file}: rewrote the table of `{block}`.")
    return 0
