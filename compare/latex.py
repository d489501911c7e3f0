"""A table in LaTeX (booktabs); published values in italics with a superscript letter, explained under the rule."""

from __future__ import annotations

from itertools import groupby

from twist.compare.blocks import (
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
    printed_values,
    protocol_key,
)
from twist.compare.table import Cell, Published, Table

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
    for block in blocks_of(table, widest=PAGE_COLUMNS):
        marks = footnotes(table, block)
        columns = [table.columns[c] for c in block.columns]
        groups = [list(group) for _, group in groupby(columns, key=protocol_key)]
        titles = [(group_head(group[0]).translate(_LATEX), len(group)) for group in groups]
        spans = " & ".join(rf"\multicolumn{{{width}}}{{c}}{{{title}}}" for title, width in titles)
        heads = " & ".join(metric_head(column).translate(_LATEX) for column in columns)
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
        notes = [note.translate(_LATEX) for note in notes_under(table, [block])]  # each may go to a page of its own
        notes += [rf"$^{{{mark}}}$ {text.translate(_LATEX)}." for mark, text in footnote_texts(table, marks)]
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
        parts.append("{[$" + difference_text(cell).replace("*", "^{*}").replace("?", r"^{?}") + "$]}")
    parts += [rf"\textit{{{text}}}$^{{{marks_of(values, marks)}}}$" for text, values in printed_values(cell)]
    return " ".join(parts) or "--"
