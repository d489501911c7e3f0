"""Words in records that a spreadsheet, a Markdown page, LaTeX or a browser would take for commands.

The check here is on what was written: the words may be there, as words.
"""

import csv
import html.parser
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cases import Case
from texts import RECORD, changed

# Methods and names of weights; each is one that somebody could give.
WORDS = {
    "a formula": "=cmd|' /C calc'!A0",
    "a formula with plus": "+1+1",
    "a formula with minus": "-1+cmd|' /C calc'!A0",
    "a formula with at": "@SUM(1+1)",
    "a formula behind a tab": "\t=1+1",
    "a formula behind a return": "\r=1+1",
    "a formula in full width": "＝1+1",
    "a column": "a | b | c",
    "an escaped column": "a \\| b",
    "a file of LaTeX": "\\input{/etc/passwd}",
    "a command of LaTeX": "\\immediate\\write18{touch ran.txt}",
    "a comment of LaTeX": "a % b & c # d $x^2$ ~ {",
    "a link": "[click](javascript:alert(1))",
    "a picture": "![x](http://example.invalid/x.png)",
    "a link by itself": "<http://example.invalid>",
    "a tag": "<img src=x onerror=alert(1)>",
    "a script": "</script><script>alert(1)</script>",
    "code": "`a` ``b``",
    "an open code": "a ` b",
    "emphasis": "_a_ **b** ~~c~~",
    "an end of a comment": "a --> b <!-- end --> c",
    "a line feed": "a\n\n# b",
    "a quote": '"a","b"',
    "a reference": "&lt;script&gt; &amp;",
}
FORMATS = {"csv": "csv", "markdown": "md", "latex": "tex", "html": "html", "json": "json", "table": "txt"}


def wrong_csv(text: str, word: str) -> str | None:  # noqa: ARG001
    rows = list(csv.reader(io.StringIO(text)))
    if len({len(row) for row in rows}) != 1:
        return "rows of different lengths"
    for value in (value for row in rows for value in row):
        number = re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", value)
        if value[:1] in tuple("=+-@\t\r＝＋－＠") and not number:
            return f"a spreadsheet takes {value!r} for a formula"
    return None


def wrong_markdown(text: str, word: str) -> str | None:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}
    if len(columns) != 1:
        return f"a row has another number of columns: {sorted(columns)}"
    plain = re.sub(r"\\.", "", text)  # what is escaped is no markup
    for pattern, what in (
        (r"\]\(", "a link"),
        (r"<(?!br>|/?sup>)[a-z!/]", "a tag"),
        (r"`", "code"),
        (r"<http", "a link"),
        (r"(?m)^# ", "a heading"),
        (r"~~", "struck words"),
        (r"(?<![*\w])_\w+_(?!\w)", "emphasis"),
    ):
        if re.search(pattern, plain):
            return f"{what} from {word!r}"
    return None


def wrong_latex(text: str, word: str) -> str | None:
    for command in ("\\input", "\\immediate", "\\write18"):
        if command in text:
            return f"{command} from {word!r}"
    allowed = r"\\(textbackslash|textasciitilde|textasciicircum|[&%$#_{}])"
    plain = re.sub(allowed, "", text)
    body = [line for line in plain.splitlines() if "&" in line and "\\multicolumn" not in line]
    if len({line.count("&") for line in body}) != 1:
        return f"a row has another number of columns, from {word!r}"
    if any("%" in line or "#" in line for line in body):
        return f"a comment or a parameter, from {word!r}"
    return None


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if any(name.startswith("on") for name in values) or (values.get("src") or "").startswith(("http", "x")):
            self.found.append(f"<{tag} {values}>")
        if (values.get("href") or "").startswith("javascript"):
            self.found.append(f"<{tag} {values}>")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and "alert(1)" in data and not data.lstrip().startswith("{"):
            self.found.append("a script")


def wrong_html(text: str, word: str) -> str | None:
    tags = _Tags()
    tags.feed(text)
    if tags.found:
        return f"{tags.found[0]} from {word!r}"
    return None if text.lower().count("<script") == text.lower().count("</script") else f"a script's end from {word!r}"


def wrong_json(text: str, word: str) -> str | None:  # noqa: ARG001
    json.loads(text)
    return None


def wrong_table(text: str, word: str) -> str | None:
    rules = [line for line in text.splitlines() if line.startswith("─")]
    return None if len(rules) == 1 and "\n\n# b" not in text else f"another row from {word!r}"


WRONG: dict[str, Callable[[str, str], str | None]] = {
    "csv": wrong_csv,
    "markdown": wrong_markdown,
    "latex": wrong_latex,
    "html": wrong_html,
    "json": wrong_json,
    "table": wrong_table,
}


def compare_all() -> None:
    """`twist compare` in every format, in one process: the largest exit status."""
    from twist.cli import main

    statuses = []
    for form, suffix in FORMATS.items():
        sys.argv = ["twist", "compare", "records", "--format", form, "--output", f"out.{suffix}"]
        try:
            main()
        except SystemExit as stop:
            statuses.append(int(stop.code or 0))
    sys.exit(max(statuses, default=0))


def _check(word: str) -> Callable[[Path, str], str | None]:
    def check(folder: Path, _said: str) -> str | None:
        for form, suffix in FORMATS.items():
            file = folder / f"out.{suffix}"
            # Refused with a sentence is as good: a method's name becomes part of a file's.
            try:
                wrong = WRONG[form](file.read_bytes().decode(), word) if file.exists() else None
            except (csv.Error, ValueError) as error:
                wrong = f"cannot be read again: {error}"
            if wrong:
                return f"{form}: {wrong}"
        return None

    return check


def tables() -> Iterator[Case]:
    """Two sorts of weights of each method, so that the rows say their names too."""
    for name, word in WORDS.items():
        fields: dict[str, dict[str, object]] = {
            "method": {"method": word},
            "weights": {"weights__name": word},
            "notes": {"notes": [word], "data": word, "git_commit": word, "weights__architecture": word},
        }
        for field, changes in fields.items():
            record = changed(RECORD, **changes)
            other = changed(json.loads(record), weights__sha256="1" * 64, weights__source_sha256="2" * 64)
            others = (
                ("records/sample-knn/y.json", other),
                ("records/sample-knn/z.json", changed(RECORD, method="byol")),
            )
            yield Case(
                f"{name} as {field}", "records/sample-knn/x.json", record, (), entry="tables:compare_all",
                others=others, named=("x.json", "y.json"), check=_check(word),
            )  # fmt: skip
