"""A table for readers: terminal, Markdown, LaTeX (booktabs).

Measured cells read `mean ± sd (n)`; published ones stand in another style with a footnote that tells their source and
what the source says of them; absent is a dash. Wide tables are cut into blocks of whole protocols, so that they fit a
page; on a terminal, where its width asks for it, within a protocol too. What explains all blocks stands once, below the
last; sources stand below their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from compare.statistics import SIGNIFICANT
from compare.table import Cell, Column, Measured, Published, Table

ABSENT = "–"
# What a page holds; a terminal cuts by its width.
PAGE_COLUMNS = 6
# Of text that no terminal takes: a pipe, a file.
PLAIN_WIDTH = 120


def measured_text(measured: Measured, *, plus_minus: str = " ± ") -> str:
    """`58.1 ± 0.2 (5)`, or `58.1 (1)`: one run has no spread."""
    spread = "" if measured.sd is None else f"{plus_minus}{measured.sd:.1f}"
    return f"{measured.mean:.1f}{spread} ({measured.n})"


def printed_text(value: float) -> str:
    """One decimal as papers print, two where the source has two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def printed_values(cell: Cell) -> list[tuple[str, list[Published]]]:
    """A cell's published values as text: what several sources print alike stands once."""
    grouped: dict[str, list[Published]] = {}
    for value in cell.published:
        grouped.setdefault(printed_text(value.value), []).append(value)
    return list(grouped.items())


def repeats_notes(table: Table, cells: Iterable[tuple[int, int]], write: Callable[[str], str] = str) -> list[str]:
    """What `n` counts in `cells` (their places in the table), by row: how many pretrainings are behind each.

    `write` makes a row's label, which holds names of the user's, harmless in the format that is written.
    """
    said: dict[str, dict[int, None]] = {}
    for place in sorted(cells):
        measured = table.cells[place].measured
        if measured is None:
            continue
        row = place[0]
        if measured.pretrainings > 1 and table.rows[row].method == "random":
            said.setdefault("Every run has a random initialisation of its own", {})[row] = None
        elif measured.pretrainings > 1:
            said.setdefault("n counts pretrainings, each by the mean of its runs", {})[row] = None
        elif measured.n > 1:
            said.setdefault("Several runs of one pretraining show the spread of the transfer alone", {})[row] = None
        if measured.repeated:
            said.setdefault("Runs that repeat a result exactly count once", {})[row] = None
    return [f"{text}: {', '.join(write(table.rows[row].label) for row in rows)}." for text, rows in said.items()]


def footnote_mark(index: int) -> str:
    """a, b, …, z, aa, ab, …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters


@dataclass(frozen=True)
class _Block:
    """Some columns of a table and the rows that have anything in them."""

    columns: tuple[int, ...]
    rows: tuple[int, ...]


def _blocks(table: Table, *, widest: int) -> Iterator[_Block]:
    """Whole protocols of one task, as many as fit `widest` columns; a protocol with more has a block of its own."""
    pending: list[int] = []
    for _, group in groupby(range(len(table.columns)), key=lambda i: _protocol_key(table.columns[i])):
        columns = list(group)
        same_task = not pending or table.columns[pending[0]].task == table.columns[columns[0]].task
        if pending and (len(pending) + len(columns) > widest or not same_task):
            yield _block(table, pending)
            pending = []
        pending += columns
    if pending:
        yield _block(table, pending)


def _protocol_key(column: Column) -> tuple[str, str | None, str]:
    return column.protocol, column.recipe_hash, column.scale


def _block(table: Table, columns: Sequence[int]) -> _Block:
    rows = [row for row in range(len(table.rows)) if any((row, column) in table.cells for column in columns)]
    return _Block(tuple(columns), tuple(rows))


def _head(column: Column) -> str:
    """`voc-frcnn-c4-24k · AP50 (VOC07)`, with what is mixed, or the scale where neither it nor the name is plain."""
    head = f"{column.protocol} · {column.definition.label}"
    if column.mixed:
        return f"{head} [mixed: {column.mixed}]"
    # The name of a sample twin says its scale already.
    told = column.scale in ("full", "published") or column.protocol.startswith(column.scale)
    return head if told else f"{head} [{column.scale}]"


def _footnotes(table: Table, block: _Block) -> dict[Published, str]:
    """Footnote → mark, numbered in the order in which the block meets them."""
    marks: dict[Published, str] = {}
    for row in block.rows:
        for column in block.columns:
            for value in table.cells.get((row, column), Cell()).published:
                marks.setdefault(_footnote(value), footnote_mark(len(marks)))
    return marks


def _footnote(value: Published) -> Published:
    """What is said of a published value, which others share: everything but the value."""
    return replace(value, value=0.0)


def _difference_text(cell: Cell) -> str:
    if cell.difference is None:
        return ""
    mark = {True: "*", False: "", None: "?"}[cell.difference.significant]
    return f"{round(cell.difference.value, 1) + 0.0:+.1f}{mark}"  # + 0.0: nothing is less than nothing


def _notes(table: Table, blocks: Sequence[_Block], write: Callable[[str], str] = str) -> list[str]:
    """The sentences under some blocks: what their cells, differences and marks mean."""
    shown = {(row, column) for block in blocks for row in block.rows for column in block.columns}
    places = [place for place in table.cells if place in shown]
    cells = [table.cells[place] for place in places]
    notes = []
    if any(cell.measured for cell in cells):
        notes += ["Measured: mean ± standard deviation (n), percent.", *repeats_notes(table, places, write)]
    gaps = [cell.difference for cell in cells if cell.difference]
    if gaps and table.baseline is not None:
        text = f"In brackets the difference to {write(table.rows[table.baseline].label)}"
        tested = [gap for gap in gaps if gap.p_value is not None]
        if tested:
            text += (
                f"; * p < {SIGNIFICANT} by Welch's t-test, two-sided, not corrected for the table's "
                f"{table.comparisons} comparison{'' if table.comparisons == 1 else 's'}"
            )
        if len(tested) < len(gaps):
            text += "; ? no test, n too small or no spread between runs"
        notes.append(text + ".")
    if any(table.columns[column].mixed for _, column in shown):
        notes.append(
            "Mixed: columns of one protocol with different recipes, scales or data; do not compare across them."
        )
    return [*notes, *map(write, table.notes)]


def _footnote_texts(table: Table, marks: dict[Published, str]) -> list[tuple[str, str]]:
    return [(mark, _footnote_text(table, footnote)) for footnote, mark in marks.items()]


def _footnote_text(table: Table, footnote: Published) -> str:
    """`DetCo repository, …, Table 7; mean of 5 runs, standard deviation 0.2. What the source says of it`."""
    source = table.sources[footnote.source]
    text = source.text + (", read in a copy" if source.read == "secondary" else "")
    spread = [f"mean of {footnote.trials} runs"] if footnote.trials else []
    spread += [f"standard deviation {footnote.sd:g}"] if footnote.sd is not None else []
    text += f"; {', '.join(spread)}" if spread else ""
    return f"{text}. {footnote.note.rstrip('.')}" if footnote.note else text


def _marks(values: Sequence[Published], marks: dict[Published, str]) -> str:
    # Once each: a source may print one value twice, of two kinds of weights that our rows do not tell apart.
    return ",".join(dict.fromkeys(marks[_footnote(value)] for value in values))


def plain(table: Table, *, width: int | None = None) -> str:
    """Aligned columns, a protocol over its metrics; `width` in characters, None for the terminal's own.

    What is wider goes on below, methods first again.
    """
    width = width or shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    parts = []
    blocks = list(_blocks(table, widest=PAGE_COLUMNS))
    for block in blocks:
        marks = _footnotes(table, block)
        methods = ["method", *(table.rows[row].label for row in block.rows)]
        columns = []
        for c in block.columns:
            protocol, _, metric = _head(table.columns[c]).partition(" · ")
            cells = [_plain_cell(table.cells.get((row, c), Cell()), marks) for row in block.rows]
            columns.append(_PlainColumn(protocol, metric, cells))
        text = []
        for some in _that_fit(columns, width - max(map(len, methods))):
            text += [*_plain_lines(methods, some), ""]
        text += [f"{mark}: {said}" for mark, said in _footnote_texts(table, marks)]
        parts.append("\n".join(text).rstrip())
    parts += ["\n".join(_notes(table, blocks))] if _notes(table, blocks) else []
    return "\n\n".join(parts) + "\n" if parts else "No records and no published rows.\n"


@dataclass(frozen=True)
class _PlainColumn:
    protocol: str
    metric: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(len(text) for text in [self.metric, *self.cells])


def _that_fit(columns: Sequence[_PlainColumn], width: int) -> Iterator[list[_PlainColumn]]:
    """The columns in runs that are no wider than `width`, at least one a run."""
    run: list[_PlainColumn] = []
    for column in columns:
        if run and sum(2 + one.width for one in [*run, column]) > width:
            yield run
            run = []
        run.append(column)
    if run:
        yield run


def _plain_lines(methods: Sequence[str], columns: Sequence[_PlainColumn]) -> list[str]:
    first = max(map(len, methods))
    above, widths = " " * first, []
    for protocol, group in groupby(columns, key=lambda column: column.protocol):
        own = [column.width for column in group]
        # A name that is longer than what it stands over makes room in the first column.
        own[0] += max(0, len(protocol) - sum(own) - 2 * (len(own) - 1))
        above += "  " + protocol.ljust(sum(own) + 2 * (len(own) - 1))
        widths += own
    rows = zip(methods, zip(*([column.metric, *column.cells] for column in columns)))
    lines = [
        "  ".join([method.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths))]).rstrip()
        for method, cells in rows
    ]
    return [above.rstrip(), lines[0], "─" * (first + sum(widths) + 2 * len(widths)), *lines[1:]]


def _plain_cell(cell: Cell, marks: dict[Published, str]) -> str:
    parts = [measured_text(cell.measured)] if cell.measured else []
    parts += [f"[{_difference_text(cell)}]"] if cell.difference else []
    parts += [f"“{text}”{_marks(values, marks)}" for text, values in printed_values(cell)]
    return " ".join(parts) or ABSENT


def markdown(table: Table) -> str:
    """Pipe tables as GitHub reads them, notes and sources below each."""
    parts = []
    blocks = list(_blocks(table, widest=PAGE_COLUMNS))
    for block in blocks:
        marks = _footnotes(table, block)
        lines = [
            "| method | " + " | ".join(_escape(_head(table.columns[c])) for c in block.columns) + " |",
            "|---|" + "---:|" * len(block.columns),
        ]
        for row in block.rows:
            cells = (_markdown_cell(table.cells.get((row, c), Cell()), marks) for c in block.columns)
            lines.append(f"| {_escape(table.rows[row].label)} | " + " | ".join(cells) + " |")
        sources = [f"<sup>{mark}</sup> {_escape(text)}." for mark, text in _footnote_texts(table, marks)]
        if marks:
            sources.insert(0, "*Italic: published, by others.*")
        parts.append("\n".join(lines) + ("\n\n" + "<br>\n".join(sources) if sources else ""))
    notes = _notes(table, blocks, _escape)
    parts += ["<br>\n".join(notes)] if notes else []
    return "\n\n".join(parts) + "\n" if parts else "No records and no published rows.\n"


def _markdown_cell(cell: Cell, marks: dict[Published, str]) -> str:
    parts = [measured_text(cell.measured)] if cell.measured else []
    parts += [f"[{_difference_text(cell).replace('*', chr(92) + '*')}]"] if cell.difference else []
    parts += [f"*{text}*<sup>{_marks(values, marks)}</sup>" for text, values in printed_values(cell)]
    return " ".join(parts) or ABSENT


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "·": r"\,$\cdot$\,", "–": "--", "×": r"$\times$",
        "±": r"$\pm$", "<": "$<$", "[": "{[}", "]": "{]}", "…": r"\dots{}",
    }
)  # fmt: skip


def latex(table: Table) -> str:
    """booktabs; published values in italics with a superscript letter, explained under the rule."""
    parts = []
    for block in _blocks(table, widest=PAGE_COLUMNS):
        marks = _footnotes(table, block)
        columns = [table.columns[c] for c in block.columns]
        groups = [(key, len(list(group))) for key, group in groupby(columns, key=_protocol_key)]
        spans = " & ".join(rf"\multicolumn{{{width}}}{{c}}{{{key[0].translate(_LATEX)}}}" for key, width in groups)
        heads = " & ".join(_head(column).split(" · ", 1)[1].translate(_LATEX) for column in columns)
        lines = [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            rf" & {spans} \\",
            rf"method & {heads} \\",
            r"\midrule",
        ]
        for row in block.rows:
            cells = (_latex_cell(table.cells.get((row, c), Cell()), marks) for c in block.columns)
            lines.append(f"{table.rows[row].label.translate(_LATEX)} & " + " & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        notes = [note.translate(_LATEX) for note in _notes(table, [block])]  # each may go to a page of its own
        notes += [rf"$^{{{mark}}}$ {text.translate(_LATEX)}." for mark, text in _footnote_texts(table, marks)]
        if marks:
            notes.insert(0, "Italic: published, by others.")
        # In a group: the size is the notes' alone, not that of what follows an \input.
        below = [r"\par\smallskip", rf"{{\footnotesize {' '.join(notes)}\par}}"] if notes else []
        parts.append("\n".join(lines + below))
    return "\n\n".join(parts) + "\n" if parts else "% No records and no published rows.\n"


def _latex_cell(cell: Cell, marks: dict[Published, str]) -> str:
    parts = [measured_text(cell.measured, plus_minus=r" $\pm$ ")] if cell.measured else []
    if cell.difference:
        # A minus sign, not a hyphen.
        parts.append("{[$" + _difference_text(cell).replace("*", "^{*}").replace("?", r"^{?}") + "$]}")
    parts += [rf"\textit{{{text}}}$^{{{_marks(values, marks)}}}$" for text, values in printed_values(cell)]
    return " ".join(parts) or "--"
