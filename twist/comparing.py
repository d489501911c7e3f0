"""`twist compare` and the tables of a README: records and published numbers, by the options of the command line.

A README's table lies between `<!-- twist compare ARGUMENTS -->` and `<!-- end -->`, each on a line of its own; the
arguments are those of the command line, paths relative to the README's folder.
"""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from twist.compare.comparison import Choice
from twist.compare.comparison import compare as compare_records
from twist.compare.correlate import correlate as find_correlations
from twist.compare.correlate import draw_correlations, render_correlations
from twist.compare.page import HEADLINE, render_page
from twist.compare.table import build_table
from twist.compare.writers import format_for, render, render_all
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError
from twist.contracts.record import RESULTS, RunRecord, read_records
from twist.transfer.protocols import check_protocol

# The folder of run folders where `twist transfer` is given no --output.
RUNS = "runs"
_OPEN = re.compile(r"^<!-- twist compare\b(?P<arguments>.*?)-->\s*$")
_CLOSE = re.compile(r"^<!-- end -->\s*$")


def compare(
    paths: Sequence[Path],
    choice: Choice,
    *,
    table_format: str | None,
    output: Path | None,
    pretrain_runs: Sequence[Path] = (),
    title: str | None = None,
    note: Path | None = None,
    pictures: Sequence[tuple[str, Path]] = (),
) -> None:
    """Read the records under `paths` and print or write the tables of what they hold.

    Without paths it is those of `results`, or of `runs` where there is no such folder. Without a format it is the one
    of the suffix of `output`.
    """
    table_format = format_for(output, table_format)
    if not paths and not choice.published_only:
        paths = [_default_folder()]
    comparisons = compare_records(paths, choice, check=check_protocol)
    if output is not None and output.is_dir():
        raise UserError(f"{output} is a folder: give --output a file in it, for example {output / 'comparison.txt'}.")
    if table_format == "html" and len(comparisons) == 1:
        (one,) = comparisons
        output = output or Path("comparison.html")
        text = render_page(
            one.table,
            one.found,
            folder=output.parent,
            pretrain_runs=pretrain_runs,
            title=title or HEADLINE,
            note="" if note is None else files.read_text(note, remedy="--note takes a text file"),
            pictures=pictures,
        )
    else:
        text = render_all(comparisons, table_format)
    if output is None:
        print(text)
        return
    try:
        files.write_text(output, text.rstrip("\n") + "\n")
    except OSError as error:
        raise UserError(
            f"Cannot write {output} ({error.strerror}): check the path and the room there, or give another --output."
        ) from None
    print(output)


def correlate(paths: Sequence[Path], *, output: Path | None) -> None:
    """Print which protocol ranks the backbones of the records as which; `output`, a .png, gets the points drawn.

    Raises:
        UsageError: `output` is no .png.
        UserError: fewer than five backbones that two protocols share.
    """
    if output is not None and output.suffix != ".png":
        raise UsageError(f"--correlate draws its points into a .png, and {output} is none.")
    pairs = read_records(paths or [_default_folder()])
    for path, record in pairs:
        check_protocol(path, record)
    found = find_correlations([record for _, record in pairs])
    print(render_correlations(found))
    if output is not None:
        print(draw_correlations(found, output))


def _default_folder() -> Path:
    results, runs = Path(RESULTS), Path(RUNS)
    if results.exists() or not runs.is_dir():
        return results
    print(f"There is no {results}: these are the records under {runs}.", file=sys.stderr)
    return runs


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


# ── The tables of a README ────────────────────────────────────────────────────────────────────────────────────────────


def refresh_tables(readme: Path, *, write: bool) -> int:
    """Print which tables of `readme` are stale, that is, would read otherwise if made today; `write`: make them again.

    Returns the exit status: 1 where a table is stale and not rewritten, or where there is none to check.

    Raises:
        UserError: the file is absent or a marker has no end.
    """
    lines = files.read_text(readme, remedy="--check and --update take a Markdown file").splitlines(keepends=True)
    tables = list(_tables(lines, readme))
    stale = []
    for start, end, arguments in tables:
        made = f"\n{_markdown(arguments, readme)}"
        if "".join(lines[start:end]) != made:
            stale.append((start, end, made))
            done = "rewrote it" if write else f"run `twist compare --update {readme}`"
            print(f"{readme}: the table of `twist compare{arguments.rstrip()}` is stale; {done}.")
    for start, end, made in reversed(stale):  # from below, so that the places above stay
        lines[start:end] = [made]
    if stale and write:
        files.write_text(readme, "".join(lines))
    if not tables:
        print(
            f"{readme}: 0 tables found; a table lies between a line `<!-- twist compare ARGUMENTS -->` and a line "
            "`<!-- end -->`: write the two, and `twist compare --update` fills them."
        )
    return 0 if write or (tables and not stale) else 1


def _tables(lines: Sequence[str], readme: Path) -> Iterator[tuple[int, int, str]]:
    """The lines between each marker and its end, and the marker's arguments."""
    opened: tuple[int, str] | None = None
    fenced = False
    for number, line in enumerate([*lines, "<!-- twist compare -->"]):
        # A marker inside a code fence is an example of one.
        fenced ^= line.startswith("```")
        match = None if fenced else _OPEN.match(line)
        if match and opened:
            raise UserError(f"{readme}, line {opened[0]}: the marker has no <!-- end --> line; add it.")
        if match:
            opened = number + 1, match["arguments"]
        elif opened and not fenced and _CLOSE.match(line):
            yield opened[0], number, opened[1]
            opened = None


def _markdown(arguments: str, readme: Path) -> str:
    """What `twist compare ARGUMENTS --format markdown` prints in the folder of `readme`."""
    from twist.cli import app

    try:
        words = shlex.split(arguments)
    except ValueError as error:
        raise UsageError(f"{readme}, twist compare{arguments.rstrip()}: {error}; correct the marker.") from None
    if others := [word for word in words if word.split("=")[0] in ("--format", "--output", "--check", "--update")]:
        raise UsageError(f"twist compare{arguments.rstrip()}: a table in a text takes no {others[0]}; remove it.")
    with contextlib.chdir(readme.parent), contextlib.redirect_stdout(io.StringIO()) as printed:
        app(["compare", *words, "--format", "markdown"], standalone_mode=False)
    return printed.getvalue()
