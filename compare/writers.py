"""A table as text: terminal, Markdown and LaTeX for readers, CSV and JSON for programs.

Wide tables are cut into blocks of whole protocols. Sources stand below their block, notes once below the last.
"""

import csv
import io
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from twist.compare.comparison import Comparison
from twist.compare.statistics import FEWEST, SIGNIFICANT
from twist.compare.table import FIELDS, PUBLISHED, Cell, Column, Measured, Published, Table, long_rows
from twist.contracts.errors import UsageError
from twist.contracts.published import protocol_title
from twist.contracts.record import RunRecord

ABSENT = "–"
EMPTY = "No records and no published rows.\n"
PAGE_COLUMNS = 6
# Characters: of a line where there is no terminal, and of a column's head in one.
LINE, HEAD = 120, 24
SUFFIXES = {
    ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".csv": "csv", ".json": "json",
    ".tex": "latex",
}  # fmt: skip


def format_for(output: Path | None, asked: str | None) -> str:
    """The format that is asked for, else the one of the suffix of `output`, else the terminal's.

    Raises:
        UsageError: the two contradict each other.
    """
    named = None if output is None else SUFFIXES.get(output.suffix.lower())
    if asked and named and asked != named:
        raise UsageError(f"{output} is {named} by its name, and --format says {asked}: change one of the two.")
    return asked or named or "table"


def render(table: Table, format: str) -> str:
    """`table` as text of `format`: "table" (plain, for a terminal), "markdown", "csv", "json" or "latex"."""
    return {"table": plain, "markdown": _markdown, "csv": _csv, "json": _json, "latex": _latex}[format](table)


def render_all(comparisons: Sequence[Comparison], format: str) -> str:
    """The tables of `comparisons` one after the other, each headed by its study's folder.

    Raises:
        UsageError: the format holds a single table and there are several.
    """
    if len(comparisons) == 1:
        return render(comparisons[0].table, format)
    folders = [os.path.relpath(one.folder or "") for one in comparisons]
    head = {"table": "━━ {} ━━", "markdown": "### `{}`", "latex": "% {}"}.get(format)
    if head is None:
        listed = ", ".join(folders)
        raise UsageError(
            f"The format {format} holds one table, and there are {len(folders)} studies: name one, {listed}."
        )
    return "\n".join(f"{head.format(name)}\n\n{render(one.table, format)}" for name, one in zip(folders, comparisons))


# ── Parts that the formats share ──────────────────────────────────────────────────────────────────────────────────────


class Block(NamedTuple):
    """Some columns of a table and the rows that have anything in them."""

    columns: Sequence[int]
    rows: Sequence[int]


def blocks_of(table: Table, *, widest: int = PAGE_COLUMNS, apart: bool = False) -> list[Block]:
    """Whole protocols of one task, as many as fit `widest` columns; `apart`: each alone, cut where it is wider."""
    cut: list[list[int]] = []
    for group in column_groups(table):
        same_task = cut and table.columns[cut[-1][0]].task == table.columns[group[0]].task
        if apart:
            cut += [group[start : start + widest] for start in range(0, len(group), widest)]
        elif same_task and len(cut[-1]) + len(group) <= widest:
            cut[-1] += group
        else:
            cut.append(group)
    return [
        Block(columns, [row for row in range(len(table.rows)) if any((row, c) in table.cells for c in columns)])
        for columns in cut
    ]


def column_groups(table: Table) -> list[list[int]]:
    """The indexes of the columns, those of one protocol under one recipe together."""
    return [list(group) for _, group in groupby(range(len(table.columns)), key=lambda c: _group(table.columns[c]))]


def _group(column: Column) -> tuple[str, str | None, str, str]:
    return column.protocol, column.recipe_hash, column.scale, column.mixed


def _columns(table: Table, columns: Sequence[int]) -> Iterator[tuple[Column, bool]]:
    """Each of the columns, and whether it is the first of its protocol and recipe."""
    before = None
    for column in (table.columns[index] for index in columns):
        yield column, before is None or _group(before) != _group(column)
        before = column


def metric_head(column: Column) -> str:
    """`AP50 (VOC07)`, with the scale where neither the protocol's name nor `mixed` says it."""
    if column.data:
        return f"{column.definition.label} [{column.data}]"
    known = column.mixed or column.scale in ("full", PUBLISHED) or column.protocol.startswith(column.scale)
    return column.definition.label + ("" if known else f" [{column.scale}]")


def measured_text(measured: Measured) -> str:
    """`58.1 ± 0.2 (5)`, or `58.1 (1)`: one run has no spread."""
    spread = "" if measured.sd is None else f" ± {measured.sd:.1f}"
    return f"{measured.mean:.1f}{spread} ({measured.n})"


def difference_text(cell: Cell) -> str:
    """`+1.2*`; empty without a difference."""
    if cell.difference is None:
        return ""
    mark = {True: "*", False: "", None: "?"}[cell.difference.significant]
    return f"{round(cell.difference.value, 1) + 0.0:+.1f}{mark}"  # + 0.0: no "-0.0"


def printed_values(cell: Cell) -> dict[str, list[Published]]:
    """A cell's published values by their text: one decimal as papers print, two where the source has two."""
    grouped: dict[str, list[Published]] = {}
    for printed in cell.published:
        value = printed.value
        text = f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"
        grouped.setdefault(text, []).append(printed)
    return grouped


def footnote_mark(index: int) -> str:
    """a, b, …, z, aa, ab, …"""
    return (footnote_mark(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def notes_under(
    table: Table, blocks: Sequence[Block], write: Callable[[str], str] = str, *, where: str = "In brackets"
) -> list[str]:
    """What the cells, differences (which stand `where`) and marks of some blocks mean; `write` as in `Style`."""
    shown = {(row, column) for block in blocks for row in block.rows for column in block.columns}
    cells = {place: cell for place, cell in sorted(table.cells.items()) if place in shown}
    notes = ["Measured: mean ± standard deviation (n), percent."] if any(c.measured for c in cells.values()) else []
    labels: dict[str, dict[str, None]] = {}
    for (row, _), cell in cells.items():
        for text in _repeats(cell.measured, table.rows[row].method):
            labels.setdefault(text, {})[write(table.rows[row].label)] = None
    notes += [f"{text}: {', '.join(names)}." for text, names in labels.items()]
    gaps = [cell.difference for cell in cells.values() if cell.difference]
    if gaps and table.baseline is not None:
        text = f"{where} the difference to {write(table.rows[table.baseline].label)}"
        tested = [gap for gap in gaps if gap.p_value is not None]
        if tested:
            text += (
                f"; * p < {SIGNIFICANT} by Welch's t-test, two-sided, p-values by Holm's correction for the table's "
                f"{count(table.comparisons, 'comparison')}"
            )
        if len(tested) < len(gaps):
            text += f"; ? no test, fewer than {FEWEST} results a side or no spread between runs"
        notes.append(text + ".")
    if any(table.columns[column].mixed for _, column in shown):
        notes.append(
            "Mixed: columns of one protocol with different recipes, scales or data; do not compare across them."
        )
    if table.cost:
        notes.append("Device hours: wall hours × devices (GPUs, else one processor) of the runs in a row.")
    return [*notes, *map(write, table.notes)]


def _repeats(measured: Measured | None, method: str) -> Iterator[str]:
    """What `n` counts in a cell."""
    if measured is None:
        return
    if measured.pretrainings > 1 and method == "random":
        yield "Every run has a random initialisation of its own"
    elif measured.pretrainings > 1:
        yield "n counts pretrainings, each by the mean of its runs"
    elif measured.n > 1:
        yield "Several runs of one pretraining show the spread of the transfer alone"
    if measured.repeated:
        yield "Runs that repeat a result exactly count once"


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


class Style(NamedTuple):
    """How a format writes names (harmless in it, whatever they hold), differences and published values."""

    write: Callable[[str], str]
    gap: str
    printed: str
    star: str = "*"


class Grid(NamedTuple):
    """A block as text: its first heads, the texts of its rows, and (mark, text) of its sources."""

    heads: list[str]
    rows: list[list[str]]
    sources: list[tuple[str, str]]


def grid_of(table: Table, block: Block, style: Style) -> Grid:
    # Published values that agree in all but the value share a footnote, lettered in the order of the block.
    cells = [[table.cells.get((row, column), Cell()) for column in block.columns] for row in block.rows]
    footnotes = dict.fromkeys(replace(value, value=0) for row in cells for cell in row for value in cell.published)
    marks = {footnote: footnote_mark(index) for index, footnote in enumerate(footnotes)}

    def text(cell: Cell) -> str:
        parts = [measured_text(cell.measured)] if cell.measured else []
        parts += [style.gap.format(difference_text(cell).replace("*", style.star))] if cell.difference else []
        for value, of in printed_values(cell).items():
            # Once each: a source may print one value twice, of weights that our rows do not distinguish.
            parts.append(style.printed.format(value, ",".join(dict.fromkeys(marks[replace(v, value=0)] for v in of))))
        return " ".join(parts) or ABSENT

    rows = []
    for row, each in zip(block.rows, cells):
        cost = [cost_text(table, row, block.columns)] if table.cost else []
        rows.append([style.write(table.rows[row].label), *cost, *map(text, each)])
    sources = [(mark, style.write(_source_text(table, footnote))) for footnote, mark in marks.items()]
    return Grid(["method", "device hours"] if table.cost else ["method"], rows, sources)


def _source_text(table: Table, footnote: Published) -> str:
    """`DetCo repository, …, Table 7; mean of 5 runs, standard deviation 0.2. The row's note`."""
    source = table.sources[footnote.source]
    text = source.text + (", read in a copy" if source.read == "secondary" else "")
    spread = [f"mean of {footnote.trials} runs"] if footnote.trials else []
    spread += [f"standard deviation {footnote.sd:g}"] if footnote.sd is not None else []
    text += f"; {', '.join(spread)}" if spread else ""
    return f"{text}. {footnote.note.rstrip('.')}" if footnote.note else text


def cost_text(table: Table, row: int, columns: Sequence[int]) -> str:
    hours = table.device_hours(row, columns)
    return ABSENT if hours is None else f"{hours:.1f}" if hours >= 10 else f"{hours:.2g}"


# ── Terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def plain(table: Table, *, width: int | None = None) -> str:
    """Aligned columns; what is wider than `width` characters (None: the terminal) goes on below, methods again."""
    width = width or shutil.get_terminal_size((LINE, 24)).columns
    blocks = blocks_of(table)
    parts = []
    for block in blocks:
        grid = grid_of(table, block, Style(str, "[{}]", "“{}”{}"))
        pieces, first = [], 0
        for last in range(1, len(block.columns) + 1):
            wider = _aligned(table, block.columns[first : last + 1], grid, first)
            if last == len(block.columns) or max(map(len, wider.splitlines())) > width:
                pieces.append(_aligned(table, block.columns[first:last], grid, first))
                first = last
        sources = "\n".join(f"{mark}: {text}" for mark, text in grid.sources)
        parts.append("\n\n".join(pieces) + (f"\n\n{sources}" if sources else ""))
    parts += ["\n".join(notes_under(table, blocks))] if notes_under(table, blocks) else []
    return "\n\n".join(parts) + "\n" if parts else EMPTY


def _aligned(table: Table, columns: Sequence[int], grid: Grid, first: int) -> str:
    """Some columns of a grid, `first` of them on."""
    from tabulate import tabulate

    fixed = len(grid.heads)
    heads = [[head] for head in grid.heads]
    for column, new in _columns(table, columns):
        titles = [protocol_title(column.protocol), *([f"[mixed: {column.mixed}]"] if column.mixed else [])]
        lines = [line for text in titles if new for line in textwrap.wrap(text, HEAD, break_on_hyphens=False)]
        heads.append([*lines, metric_head(column)])
    deepest = max(map(len, heads))
    text = tabulate(
        [row[:fixed] + row[fixed + first :][: len(columns)] for row in grid.rows],
        ["\n" * (deepest - len(lines)) + "\n".join(lines) for lines in heads],
        disable_numparse=True,
        colalign=("left", *("right" for _ in heads[1:])),
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


# ── Markdown ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _markdown(table: Table) -> str:
    """Pipe tables as GitHub reads them, notes and sources below each."""
    parts = []
    blocks = blocks_of(table)
    for block in blocks:
        grid = grid_of(table, block, Style(_escape, "[{}]", "*{}*<sup>{}</sup>", r"\*"))
        heads = grid.heads
        for column, new in _columns(table, block.columns):
            # How mixed ones differ stands over the first of a group alone.
            tag = "" if not column.mixed else f" [mixed: {column.mixed}]" if new else " [mixed]"
            heads.append(_escape(f"{protocol_title(column.protocol)} · {metric_head(column)}{tag}"))
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
        sources = [f"<sup>{mark}</sup> {text}." for mark, text in grid.sources]
        sources = ["*Italic: published, by others.*", *sources] if sources else []
        parts.append("\n".join(lines) + ("\n\n" + "<br>\n".join(sources) if sources else ""))
    under = notes_under(table, blocks, _escape)
    parts += ["<br>\n".join(under)] if under else []
    return "\n\n".join(parts) + "\n" if parts else EMPTY


def _escape(text: str) -> str:
    """`text` as itself: no column, link, picture, code, emphasis or tag comes of it, and it stays on its line."""
    # An underscore within a word and a bracket alone mean nothing.
    marks = r"[\\|*`~]|(?<!\w)_|_(?!\w)|(?<=\])\("
    text = re.sub(marks, r"\\\g<0>", " ".join(text.split()))
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


# ── LaTeX ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "·": r"\,$\cdot$\,", "–": "--", "×": r"$\times$",
        "±": r"$\pm$", "<": "$<$", "[": "{[}", "]": "{]}", "…": r"\dots{}",
    }
)  # fmt: skip


_WORDS = {
    "coco": "COCO", "voc": "VOC", "voc07": "VOC 2007", "voc12": "VOC 2012", "voc12aug": "VOC 2012 aug.",
    "ade20k": "ADE20K", "cityscapes": "Cityscapes", "mrcnn": "Mask R-CNN", "frcnn": "Faster R-CNN", "fpn": "FPN",
    "c4": "C4", "fcn": "FCN", "vit": "ViT", "vitdet": "ViTDet", "upernet": "UPerNet", "knn": "k-NN", "svm": "SVM",
    "seg": "segmentation", "semi": "semi-supervised", "finetune": "fine-tuning", "cluster": "clustering",
    "corloc": "CorLoc", "fewshot": "few-shot", "lowshot": "low-shot", "infomin": "InfoMin", "ti": "Ti", "b": "B",
}  # fmt: skip
_UNITS = {"pct": " % of labels", "ep": " epochs", "k": "k iterations", "x": "× schedule"}


def protocol_words(protocol: str) -> str:
    """`COCO Mask R-CNN FPN 1× schedule` of `coco-mrcnn-fpn-1x`; foreign protocols have a title in words."""
    if (title := protocol_title(protocol)) != protocol:
        return title
    parts = [re.sub(r"^(\d+)(pct|ep|k|x)$", lambda found: found[1] + _UNITS[found[2]], p) for p in protocol.split("-")]
    text = " ".join(_WORDS.get(part, part) for part in parts)
    return text[:1].upper() + text[1:] if text[:2] != "k-" else text


def _latex(table: Table) -> str:
    """booktabs; published values in italics with a superscript letter, explained under the rule."""
    parts = []
    for block in blocks_of(table):
        # A minus sign, not a hyphen, in a difference.
        style = Style(lambda text: text.translate(_TEX), "{{[${}$]}}", r"\textit{{{}}}$^{{{}}}$", "^{*}")
        grid, columns = grid_of(table, block, style), [table.columns[c] for c in block.columns]
        fixed, spans = len(grid.heads), []
        for _, same in groupby(columns, key=_group):
            head, *others = same
            title = protocol_words(head.protocol) + (f" [mixed: {head.mixed}]" if head.mixed else "")
            spans.append(rf"\multicolumn{{{1 + len(others)}}}{{c}}{{{style.write(title)}}}")
        lines = [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * (fixed - 1 + len(columns))}}}",
            r"\toprule",
            rf"{' & ' * fixed}{' & '.join(spans)} \\",
            rf"{' & '.join([*grid.heads, *(style.write(metric_head(column)) for column in columns)])} \\",
            r"\midrule",
        ]
        for row in grid.rows:
            cells = " & ".join(row[fixed:]).replace("±", r"$\pm$").replace("?", "^{?}").replace(ABSENT, "--")
            lines.append(rf"{' & '.join(row[:fixed]).replace(ABSENT, '--')} & {cells} \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        sources = [rf"$^{{{mark}}}$ {text}." for mark, text in grid.sources]
        under = ["Italic: published, by others."] if sources else []
        under += [style.write(note) for note in notes_under(table, [block])]  # each may go to a page of its own
        under += sources
        # In a group: the size is the notes' alone, not that of the text that follows an \input.
        below = [r"\par\smallskip", rf"{{\footnotesize {' '.join(under)}\par}}"] if under else []
        parts.append("\n".join(lines + below))
    return "\n\n".join(parts) + "\n" if parts else f"% {EMPTY}"


# ── For programs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _csv(table: Table) -> str:
    """One line a value, so that it reads into any data frame; a cell with two values is two lines."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_field(value) for name, value in line.items()} for line in long_rows(table))
    return buffer.getvalue()


def _csv_field(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, behind an apostrophe; numbers as they are."""
    if not isinstance(value, str):
        return value
    line = value.replace("\r", " ")
    return f"'{line}" if line.startswith(("=", "+", "-", "@", "\t", "＝", "＋", "－", "＠")) else line


def _json(table: Table) -> str:
    return json.dumps(as_json(table), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_json(table: Table, *, path_of: Callable[[RunRecord], str | None] | None = None) -> dict[str, Any]:
    """The table as JSON values; every cell lists the runs and the sources behind it, each run with `path_of` it."""
    return {
        "columns": [
            {
                **asdict(column),
                "title": protocol_title(column.protocol),
                **{name: getattr(column.definition, name) for name in ("label", "unit", "definition")},
            }
            for column in table.columns
        ],
        "rows": [asdict(row) for row in table.rows],
        "cells": [
            {
                "row": row,
                "column": column,
                "measured": cell.measured and _measured_json(cell.measured, path_of),
                "published": [asdict(value) for value in cell.published],
                "difference": cell.difference and asdict(cell.difference),
            }
            for (row, column), cell in sorted(table.cells.items())
        ],
        "sources": [asdict(source) for source in table.sources],
        "baseline": table.baseline,
        "comparisons": table.comparisons,
        "notes": list(table.notes),
    }


def _measured_json(measured: Measured, path_of: Callable[[RunRecord], str | None] | None) -> dict[str, Any]:
    return {
        **{name: getattr(measured, name) for name in ("mean", "sd", "n", "pretrainings", "repeated")},
        "values": list(measured.values),
        "runs": [
            {
                "run": record.run_name,
                "seed": record.seed,
                "value": value,
                "weights": record.weights.name,
                "weights_sha256": record.weights.sha256,
                "git_commit": record.git_commit,
                "created": record.created,
                "wall_s": record.wall_s,
                "hardware": record.hardware.get("gpu") or record.hardware.get("processor"),
                "notes": list(record.notes),
                **({} if path_of is None else {"path": path_of(record)}),
            }
            for record, value in zip(measured.records, measured.run_values, strict=True)
        ],
    }
