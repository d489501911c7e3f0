"""`twist compare`: what joins the records, the published numbers and the writers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from twist.compare.comparison import Choice
from twist.compare.comparison import compare as compare_records
from twist.compare.markers import check_markers as stale_markers
from twist.compare.markers import find_markers
from twist.compare.markers import update_markers as rewrite_markers
from twist.compare.render import format_for, render, render_all
from twist.compare.report import HEADLINE, write_report
from twist.compare.table import build_table
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.record import RESULTS, RunRecord
from twist.transfer.records import read_known_records

# Where `twist transfer` makes its run folders when nobody says where.
RUNS = "runs"


def compare(
    paths: Sequence[Path],
    choice: Choice,
    *,
    table_format: str | None,
    output: Path | None,
    pretrain_runs: Sequence[Path] = (),
    title: str | None = None,
    pictures: Sequence[tuple[str, Path]] = (),
) -> None:
    """Read the records under `paths` and print or write the tables of what they hold.

    Without paths it is those of `results`, or of `runs` where there is no such folder. Without a format it is the one
    that the suffix of `output` says.
    """
    table_format = format_for(output, table_format)
    if not paths and not choice.published_only:
        paths = [_default_folder()]
    comparisons = compare_records(paths, choice, read=read_known_records)
    if table_format == "html" and len(comparisons) == 1:
        (one,) = comparisons
        page = output or Path("comparison.html")
        _refuse_folder(page)
        print(
            write_report(
                page,
                one.table,
                one.found,
                pretrain_runs=pretrain_runs,
                title=title or HEADLINE,
                pictures=pictures,
            )
        )
        return
    text = render_all(comparisons, table_format)
    if output is None:
        print(text)
        return
    _refuse_folder(output)
    try:
        files.write_text(output, text.rstrip("\n") + "\n")
    except OSError as error:
        raise UserError(
            f"Cannot write the table {output} ({error.strerror}): check the path and the room there, or give another "
            "--output."
        ) from None
    print(output)


def suite_table(records: Sequence[RunRecord]) -> str:
    """The end of a suite: its records, with differences to random initialisation, else to supervised weights."""
    # A grid runs several recipes of one protocol on purpose; they come out in columns of their own, marked.
    table = build_table(records, allow_mixed=True)
    for method in ("random", "supervised"):
        rows = [row.label for row in table.rows if row.method == method]
        # Of several (two architectures, two files) none is the one that all others are measured against.
        if len(rows) == 1 and len(table.rows) > 1:
            table = build_table(records, allow_mixed=True, baseline=rows[0])
            break
    return render(table, "table")


def check_markers(file: Path) -> int:
    """Exit status 0 when every table in `file` is what its marker's arguments give today, else 1; 1 without tables."""
    if not find_markers(file):
        print(_no_tables(file))
        return 1
    stale = stale_markers(file, read=read_known_records)
    for block in stale:
        print(f"{file}: the table of `{block}` is stale; run `twist compare --update {file}`.")
    return 1 if stale else 0


def update_markers(file: Path) -> int:
    """Rewrite the stale tables of `file`; always 0."""
    if not find_markers(file):
        print(_no_tables(file))
    for block in rewrite_markers(file, read=read_known_records):
        print(f"{file}: rewrote the table of `{block}`.")
    return 0


def _no_tables(file: Path) -> str:
    return (
        f"{file}: 0 tables found; a table lies between a line `<!-- twist compare ARGUMENTS -->` and a line "
        "`<!-- end -->`: write the two, and `twist compare --update` fills them."
    )


def _default_folder() -> Path:
    results, runs = Path(RESULTS), Path(RUNS)
    if results.exists() or not runs.is_dir():
        return results
    print(f"There is no {results}: these are the records under {runs}.", file=sys.stderr)
    return runs


def _refuse_folder(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"{output} is a folder: give --output a file in it, for example {output / 'comparison.txt'}.")
