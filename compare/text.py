"""A table for readers: terminal and Markdown (LaTeX: compare/latex.py).

Measured cells read `mean ± sd (n)`; published ones stand in another style with a footnote that tells their source and
what the source says of them; absent is a dash.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from twist.compare.blocks import (
    ABSENT,
    PAGE_COLUMNS,
    blocks_of,
    difference_text,
    footnote_texts,
    footnotes,
    group_head,
    marks_of,
    measured_text,
    metric_head,
    notes_under,
    one_line_heads,
    printed_values,
)
from twist.compare.table import Cell, Published, Table

# Of text that no terminal takes: a pipe, a file.
PLAIN_WIDTH = 120


def plain(table: Table, *, width: int | None = None) -> str:
    """Aligned columns, a protocol over its metrics; `width` in characters, None for the terminal's own.

    What is wider goes on below, methods first again.
    """
    width = width or shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    parts = []
    blocks = list(blocks_of(table, widest=PAGE_COLUMNS))
    for block in blocks:
        marks = footnotes(table, block)
        methods = ["method", *(table.rows[row].label for row in block.rows)]
        columns = []
        for c in block.columns:
            column = table.columns[c]
            cells = [_plain_cell(table.cells.get((row, c), Cell()), marks) for row in block.rows]
            columns.append(_PlainColumn(group_head(column), metric_head(column), cells))
        text = []
        for some in _that_fit(columns, width - max(map(len, methods))):
            text += [*_plain_lines(methods, some), ""]
        text += [f"{mark}: {said}" for mark, said in footnote_texts(table, marks)]
        parts.append("\n".join(text).rstrip())
    parts += ["\n".join(notes_under(table, blocks))] if notes_under(table, blocks) else []
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
        if run and sum(map(_group_width, _groups([*run, column]))) > width:
            yield run
            run = []
        run.append(column)
    if run:
        yield run


def _groups(columns: Sequence[_PlainColumn]) -> list[list[_PlainColumn]]:
    return [list(group) for _, group in groupby(columns, key=lambda column: column.protocol)]


def _group_width(group: Sequence[_PlainColumn]) -> int:
    """With the gap before each column: that of the columns, or of the name over them where it is longer."""
    return max(sum(2 + column.width for column in group), 2 + len(group[0].protocol))


def _plain_lines(methods: Sequence[str], columns: Sequence[_PlainColumn]) -> list[str]:
    first = max(map(len, methods))
    above, widths = " " * first, []
    for group in _groups(columns):
        own = [column.width for column in group]
        # A name that is longer than what it stands over makes room in the first column.
        own[0] += _group_width(group) - sum(2 + size for size in own)
        above += "  " + group[0].protocol.ljust(_group_width(group) - 2)
        widths += own
    rows = zip(methods, zip(*([column.metric, *column.cells] for column in columns)))
    lines = [
        "  ".join([method.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths))]).rstrip()
        for method, cells in rows
    ]
    return [above.rstrip(), lines[0], "─" * (first + sum(widths) + 2 * len(widths)), *lines[1:]]


def _plain_cell(cell: Cell, marks: dict[Published, str]) -> str:
    parts = [measured_text(cell.measured)] if cell.measured else []
    parts += [f"[{difference_text(cell)}]"] if cell.difference else []
    parts += [f"“{text}”{marks_of(values, marks)}" for text, values in printed_values(cell)]
    return " ".join(parts) or ABSENT


def markdown(table: Table) -> str:
    """Pipe tables as GitHub reads them, notes and sources below each."""
    parts = []
    blocks = list(blocks_of(table, widest=PAGE_COLUMNS))
    for block in blocks:
        marks = footnotes(table, block)
        lines = [
            "| method | " + " | ".join(map(_escape, one_line_heads([table.columns[c] for c in block.columns]))) + " |",
            "|---|" + "---:|" * len(block.columns),
        ]
        for row in block.rows:
            cells = (_markdown_cell(table.cells.get((row, c), Cell()), marks) for c in block.columns)
            lines.append(f"| {_escape(table.rows[row].label)} | " + " | ".join(cells) + " |")
        sources = [f"<sup>{mark}</sup> {_escape(text)}." for mark, text in footnote_texts(table, marks)]
        if marks:
            sources.insert(0, "*Italic: published, by others.*")
        parts.append("\n".join(lines) + ("\n\n" + "<br>\n".join(sources) if sources else ""))
    notes = notes_under(table, blocks, _escape)
    parts += ["<br>\n".join(notes)] if notes else []
    return "\n\n".join(parts) + "\n" if parts else "No records and no published rows.\n"


def _markdown_cell(cell: Cell, marks: dict[Published, str]) -> str:
    parts = [measured_text(cell.measured)] if cell.measured else []
    parts += [f"[{difference_text(cell).replace('*', chr(92) + '*')}]"] if cell.difference else []
    parts += [f"*{text}*<sup>{marks_of(values, marks)}</sup>" for text, values in printed_values(cell)]
    return " ".join(parts) or ABSENT


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
