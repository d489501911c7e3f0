"""`twist compare`: what joins the records, the published numbers and the writers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compare.comparison import Choice
from compare.comparison import compare as compare_records
from compare.render import RESULTS, render, render_all
from compare.render import check_markers as stale_markers
from compare.render import update_markers as rewrite_markers
from compare.report import HEADLINE, write_report
from compare.table import build_table
from contracts import atomic
from contracts.errors import UserError
from contracts.record import RunRecord
from transfer.records import read_known_records


def compare(
    paths: Sequence[Path],
    choice: Choice,
    *,
    table_format: str,
    output: Path | None,
    pretrain_runs: Sequence[Path] = (),
    title: str | None = None,
    pictures: Sequence[tuple[str, Path]] = (),
) -> None:
    """Read the records under `paths` (none: those of `results`) and print or write the tables of what they hold."""
    if not paths and not choice.published_only:
        paths = [Path(RESULTS)]
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
        atomic.write_text(output, text.rstrip("\n") + "\n")
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
    """Exit status 0 when every table in `file` is what its marker's arguments give today, else 1."""
    stale = stale_markers(file, read=read_known_records)
    for block in stale:
        print(f"{file}: the table of `{block}` is stale; run `twist compare --update {file}`.")
    return 1 if stale else 0


def update_markers(file: Path) -> int:
    """Rewrite the stale tables of `file`; always 0."""
    for block in rewrite_markers(file, read=read_known_records):
        print(f"{file}: rewrote the table of `{block}`.")
    return 0


def _refuse_folder(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"{output} is a folder: give --output a file in it, for example {output / 'comparison.txt'}.")
