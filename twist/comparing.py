"""What `twist compare` prints and writes, the tables of a README, and the table at the end of a suite.

A README's table lies between `<!-- twist compare ARGUMENTS -->` and `<!-- end -->`, each on a line of its own; the
arguments are those of the command line, paths relative to the README's folder.
"""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from twist.compare.comparison import Choice
from twist.compare.comparison import compare as compare_records
from twist.compare.correlate import correlate as correlations
from twist.compare.correlate import draw_correlations, render_correlations
from twist.compare.page import PLAIN, PageOptions, render_page
from twist.compare.table import build_table
from twist.compare.writers import format_for, render, render_all
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError
from twist.contracts.record import RESULTS, RunRecord, read_records

# The folder of run folders where `twist transfer` is given no --output.
RUNS = "runs"
# Inside a code fence it is an example of a marker; one without an end goes to the next or to the file's end.
_TABLE = re.compile(
    r"^```.*?^```|^<!-- twist compare\b(?P<arguments>.*?)-->[ \t]*\n"
    r"(?P<table>(?:(?!<!-- twist compare).)*?)(?P<end>^<!-- end -->[ \t]*$|(?=<!-- twist compare|\Z))",
    re.MULTILINE | re.DOTALL,
)


def compare(
    paths: Sequence[Path], choice: Choice, *, table_format: str | None, output: Path | None, page: PageOptions = PLAIN
) -> None:
    """Read the records under `paths` (default `results`, or `runs` where there is no such folder), and print their
    tables or write them to `output`."""
    table_format = format_for(output, table_format)
    comparisons = compare_records(paths if choice.published_only else _given(paths), choice)
    if table_format == "html" and len(comparisons) == 1:
        output = output or Path("comparison.html")
        text = render_page(comparisons[0].table, comparisons[0].found, folder=output.parent, options=page)
    else:
        text = render_all(comparisons, table_format)
    if output is None:
        print(text)
        return
    files.write_text(output, text.rstrip("\n") + "\n")
    print(output)


def correlate(paths: Sequence[Path], output: Path | None) -> None:
    """Print which protocol ranks the backbones of the records as which; `output`, a .png, gets the points drawn."""
    if output is not None and output.suffix != ".png":
        raise UsageError(f"--correlate draws its points into a .png, and {output} is none.")
    found, costs = correlations(record for _, record in read_records(_given(paths)))
    print(render_correlations(found, costs))
    if output is not None:
        draw_correlations(found, output)
        print(output)


def _given(paths: Sequence[Path]) -> Sequence[Path]:
    results, runs = Path(RESULTS), Path(RUNS)
    if paths or results.exists() or not runs.is_dir():
        return paths or [results]
    print(f"There is no {results}: these are the records under {runs}.", file=sys.stderr)
    return [runs]


def suite_table(records: Sequence[RunRecord]) -> str:
    """The end of a suite: its records, with differences to random initialisation, else to supervised weights."""
    # A grid runs several recipes of one protocol on purpose; they come out in columns of their own, marked.
    table = build_table(records)
    for method in ("random", "supervised"):
        rows = [row.label for row in table.rows if row.method == method]
        # Of several (two architectures, two files) none is the baseline of all others.
        if len(rows) == 1 and len(table.rows) > 1:
            table = build_table(records, baseline=rows[0])
            break
    return render(table, "table")


def refresh_tables(readme: Path, *, write: bool) -> int:
    """Print which tables of `readme` are stale, that is, would read otherwise if made today; `write`: make them again.

    Returns the exit status: 1 where a table is stale and not rewritten, or where there is none to check.

    Raises:
        UserError: the file is absent or a marker has no end.
    """
    before = files.read_text(readme, remedy="--check and --update take a Markdown file")
    tables, stale = 0, 0

    def renewed(match: re.Match[str]) -> str:
        nonlocal tables, stale
        if match["arguments"] is None:
            return match[0]
        if not match["end"]:
            line = before.count("\n", 0, match.start()) + 1
            raise UserError(f"{readme}, line {line}: the marker has no <!-- end --> line; add it.")
        made = f"\n{_markdown(match['arguments'], readme)}"
        tables += 1
        if made != match["table"]:
            stale += 1
            done = "rewrote it" if write else f"run `twist compare --update {readme}`"
            print(f"{readme}: the table of `twist compare{match['arguments'].rstrip()}` is stale; {done}.")
        start, end = match.start("table") - match.start(), match.end("table") - match.start()
        return match[0][:start] + made + match[0][end:]

    after = _TABLE.sub(renewed, before)
    if stale and write:
        files.write_text(readme, after)
    if not tables:
        print(f"{readme}: 0 tables found; one lies between `<!-- twist compare ARGUMENTS -->` and `<!-- end -->`.")
    return 0 if write or (tables and not stale) else 1


def _markdown(arguments: str, readme: Path) -> str:
    """What `twist compare ARGUMENTS --format markdown` prints in the folder of `readme`."""
    from twist.cli import app

    try:
        words = shlex.split(arguments)
    except ValueError as error:
        raise UserError(
            f"{readme}: <!-- twist compare{arguments}--> cannot be read ({error}): close the quotation."
        ) from None
    if others := [word for word in words if word.split("=")[0] in ("--format", "--output", "--check", "--update")]:
        raise UsageError(f"twist compare{arguments.rstrip()}: a table in a text takes no {others[0]}; remove it.")
    with contextlib.chdir(readme.parent), contextlib.redirect_stdout(io.StringIO()) as printed:
        app(["compare", *words, "--format", "markdown"], standalone_mode=False)
    return printed.getvalue()
