"""Words in records that a spreadsheet, a Markdown page, LaTeX or a browser would take for commands.

The check here is on what was written: the words may be there, as words.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cases import Case, changed
from texts import RECORD, RECORD_FILE

# Methods and names of weights; each is one that somebody could give.
WORDS = (
    "=cmd|' /C calc'!A0", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(1+1)", "\t=1+1", "\r=1+1", "＝1+1", "a | b | c",
    "a \\| b", "\\input{/etc/passwd}", "\\immediate\\write18{touch ran.txt}", "a % b & c # d $x^2$ ~ {",
    "[click](javascript:alert(1))", "![x](http://example.invalid/x.png)", "<http://example.invalid>",
    "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "`a` ``b``", "a ` b", "_a_ **b** ~~c~~",
    "a --> b <!-- end --> c", "a\n\n# b", '"a","b"', "&lt;script&gt; &amp;",
)  # fmt: skip
MARKUP = r"\]\(|<(?!br>|/?sup>)[a-z!/]|`|(?m:^# )|~~|(?<![*\w])_\w+_(?!\w)"


def wrong_csv(text: str) -> str | None:
    rows = list(csv.reader(io.StringIO(text)))
    if len({len(row) for row in rows}) != 1:
        return "rows of different lengths"
    number = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")
    values = (value for row in rows for value in row if not number.fullmatch(value))
    return next((f"a formula {value!r}" for value in values if value.startswith(tuple("=+-@\t\r＝＋－＠"))), None)


def wrong_markdown(text: str) -> str | None:
    columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in text.splitlines() if line.startswith("|")}
    if len(columns) != 1:
        return f"a row has another number of columns: {sorted(columns)}"
    found = re.search(MARKUP, re.sub(r"\\.", "", text))  # what is escaped is no markup
    return found and f"the markup {found.group()!r}"


def wrong_latex(text: str) -> str | None:
    if found := re.search(r"\\(input|immediate|write18)", text):
        return f"the command {found.group()}"
    plain = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum|[&%$#_{}])", "", text)
    body = [line for line in plain.splitlines() if "&" in line and "\\multicolumn" not in line]
    if len({line.count("&") for line in body}) != 1:
        return "a row has another number of columns"
    return "a comment or a parameter" if any(set("%#") & set(line) for line in body) else None


def wrong_html(text: str) -> str | None:
    return next((raw for raw in ("<img src=x", "<script>alert", "<http:", 'href="javascript') if raw in text), None)


def wrong_table(text: str) -> str | None:
    rules = [line for line in text.splitlines() if re.fullmatch(r"[- ]*---[- ]*", line)]
    return None if len(rules) == 1 and "\n\n# b" not in text else "another row"


FORMATS = {
    "csv": wrong_csv, "markdown": wrong_markdown, "latex": wrong_latex, "html": wrong_html, "table": wrong_table,
    "json": lambda text: json.loads(text) and None,
}  # fmt: skip


def compare_all() -> None:
    """`twist compare` in every format, in one process: the largest exit status."""
    from twist.cli import main

    statuses = []
    for form in FORMATS:
        sys.argv = ["twist", "compare", "records", "--format", form, "--output", f"out.{form}"]
        try:
            main()
        except SystemExit as stop:
            statuses.append(int(stop.code or 0))
    sys.exit(max(statuses, default=0))


def check(folder: Path, _said: str) -> str | None:
    for form, wrong_in in FORMATS.items():
        file = folder / f"out.{form}"
        # Refused with a sentence is as good: a method's name becomes part of a file's.
        try:
            wrong = wrong_in(file.read_bytes().decode()) if file.exists() else None
        except (csv.Error, ValueError) as error:
            wrong = f"cannot be read again: {error}"
        if wrong:
            return f"{form}: {wrong}"
    return None


def tables() -> Iterator[Case]:
    """Two sorts of weights of each method, so that the rows say their names too."""
    for word in WORDS:
        for field, changes in {
            "method": {"method": word},
            "all else": dict.fromkeys(("weights.name", "data", "git_commit", "weights.architecture"), word)
            | {"notes": [word]},
        }.items():
            other = changed(RECORD, {**changes, "weights.sha256": "1" * 64, "weights.source_sha256": "2" * 64})
            third = changed(RECORD, {"method": "byol"})
            others = ("records/sample-knn/y.json", other), ("records/sample-knn/z.json", third)
            yield Case(
                f"{word!r} as {field}", changed(RECORD, changes), RECORD_FILE, (), entry="tables:compare_all",
                others=others, named=("y.json",), check=check,
            )  # fmt: skip
