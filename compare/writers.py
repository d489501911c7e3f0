"""A table as text: terminal, Markdown and LaTeX for readers, CSV and JSON for programs.

Measured cells read `mean ± sd (n)`; published ones stand in another style with a footnote that names their source;
absent is a dash. Wide tables are cut into blocks of whole protocols, so that they fit a page. Notes that explain all
blocks stand once, below the last; sources stand below their own.
"""

import csv
import io
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from twist.compare.comparison import Comparison
from twist.compare.statistics import FEWEST, SIGNIFICANT
from twist.compare.table import PUBLISHED, Cell, Column, Measured, Published, Table
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
        raise UsageError(
            f"{output} is {named} by its name, and --format says {asked}: leave out --format, or give --output a name "
            "that fits."
        )
    return asked or named or "table"


def render(table: Table, format: str) -> str:
    """`table` as text of `format`: "table" (plain, for a terminal), "markdown", "csv", "json" or "latex"."""
    return {"table": plain, "markdown": _markdown, "csv": _csv, "json": _json, "latex": _latex}[format](table)


def render_all(comparisons: Sequence[Comparison], format: str, *, root: Path = Path()) -> str:
    """The tables of `comparisons` one after the other, each headed by its study's folder, relative to `root`.

    Raises:
        UsageError: the format holds a single table and there are several.
    """
    if len(comparisons) == 1:
        return render(comparisons[0].table, format)
    heads = {"table": "━━ {} ━━", "markdown": "### `{}`", "latex": "% {}"}
    folders = [os.path.relpath(one.folder or root, root) for one in comparisons]
    if format not in heads:
        raise UsageError(
            f"The format {format} holds one table, and there are {len(comparisons)} studies ({', '.join(folders)}): "
            "name one of these folders."
        )
    return "\n".join(
        f"{heads[format].format(folder)}\n\n{render(one.table, format)}" for folder, one in zip(folders, comparisons)
    )


# ── Parts that the formats share ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Block:
    """Some columns of a table and the rows that have anything in them."""

    columns: tuple[int, ...]
    rows: tuple[int, ...]


def blocks_of(table: Table, *, widest: int = PAGE_COLUMNS, apart: bool = False) -> list[Block]:
    """Whole protocols of one task, as many as fit `widest` columns; a protocol with more has a block of its own.

    `apart`: each protocol has its own, cut where it is wider.
    """
    cut: list[list[int]] = []
    for group in column_groups(table):
        if apart:
            cut += [group[start : start + widest] for start in range(0, len(group), widest)]
            continue
        same_task = cut and table.columns[cut[-1][0]].task == table.columns[group[0]].task
        if same_task and len(cut[-1]) + len(group) <= widest:
            cut[-1] += group
        else:
            cut.append(group)
    return [
        Block(tuple(columns), tuple(r for r in range(len(table.rows)) if any((r, c) in table.cells for c in columns)))
        for columns in cut
    ]


def column_groups(table: Table) -> list[list[int]]:
    """The indexes of the columns, those of one protocol under one recipe together."""
    return [list(group) for _, group in groupby(range(len(table.columns)), key=lambda c: _group(table.columns[c]))]


def _group(column: Column) -> tuple[str, str | None, str, str]:
    return column.protocol, column.recipe_hash, column.scale, column.mixed


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
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters


def notes_under(
    table: Table, blocks: Sequence[Block], write: Callable[[str], str] = str, *, where: str = "In brackets"
) -> list[str]:
    """The sentences under some blocks: what their cells, differences (which stand `where`) and marks mean.

    `write` makes names of the user's harmless in the format that is written.
    """
    shown = {(row, column) for block in blocks for row in block.rows for column in block.columns}
    cells = {place: cell for place, cell in sorted(table.cells.items()) if place in shown}
    notes = []
    if any(cell.measured for cell in cells.values()):
        notes.append("Measured: mean ± standard deviation (n), percent.")
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


class Footnotes:
    """The sources of a block's published values, lettered in the order in which the block has them."""

    def __init__(self, table: Table, block: Block) -> None:
        self._sources = table.sources
        self._marks: dict[Published, str] = {}
        for row in block.rows:
            for column in block.columns:
                for value in table.cells.get((row, column), Cell()).published:
                    self._marks.setdefault(_footnote(value), footnote_mark(len(self._marks)))

    def marks(self, values: Sequence[Published]) -> str:
        # Once each: a source may print one value twice, of weights that our rows do not distinguish.
        return ",".join(dict.fromkeys(self._marks[_footnote(value)] for value in values))

    def texts(self) -> list[tuple[str, str]]:
        """Mark and text: `DetCo repository, …, Table 7; mean of 5 runs, standard deviation 0.2. The row's note`."""
        return [(mark, self._text(footnote)) for footnote, mark in self._marks.items()]

    def _text(self, footnote: Published) -> str:
        source = self._sources[footnote.source]
        text = source.text + (", read in a copy" if source.read == "secondary" else "")
        spread = [f"mean of {footnote.trials} runs"] if footnote.trials else []
        spread += [f"standard deviation {footnote.sd:g}"] if footnote.sd is not None else []
        text += f"; {', '.join(spread)}" if spread else ""
        return f"{text}. {footnote.note.rstrip('.')}" if footnote.note else text


def _footnote(value: Published) -> Published:
    """A published value without its number: values that agree in the rest share a footnote."""
    return replace(value, value=0.0)


def row_texts(
    table: Table, row: int, columns: Sequence[int], notes: Footnotes, *, gap: str, printed: str, star: str = "*"
) -> list[str]:
    """The cells of a row, their differences and published values as the templates `gap` and `printed` say."""
    texts = []
    for cell in (table.cells.get((row, column), Cell()) for column in columns):
        parts = [measured_text(cell.measured)] if cell.measured else []
        parts += [gap.format(difference_text(cell).replace("*", star))] if cell.difference else []
        parts += [printed.format(text, notes.marks(values)) for text, values in printed_values(cell).items()]
        texts.append(" ".join(parts) or ABSENT)
    return texts


def first_heads(table: Table) -> list[str]:
    return ["method", "device hours"] if table.cost else ["method"]


def first_texts(table: Table, row: int, block: Block) -> list[str]:
    """What stands under `first_heads` in a row: its label, and what its runs in this block took."""
    return [table.rows[row].label, cost_text(table, row, block.columns)] if table.cost else [table.rows[row].label]


def cost_text(table: Table, row: int, columns: Sequence[int]) -> str:
    hours = table.device_hours(row, columns)
    return ABSENT if hours is None else f"{hours:.1f}" if hours >= 10 else f"{hours:.2g}"


# ── Terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def plain(table: Table, *, width: int | None = None) -> str:
    """Aligned columns, a protocol over its metrics; `width` in characters, None for the terminal's own.

    What is wider goes on below, methods first again.
    """
    width = width or shutil.get_terminal_size((LINE, 24)).columns
    parts = []
    blocks = blocks_of(table)
    for block in blocks:
        notes = Footnotes(table, block)
        pieces: list[str] = []
        columns: list[int] = []
        for column in block.columns:
            text = _grid(table, block, [*columns, column], notes)
            if columns and max(map(len, text.splitlines())) <= width:
                pieces[-1] = text
                columns.append(column)
            else:
                columns = [column]
                pieces.append(_grid(table, block, columns, notes))
        parts.append(
            "\n".join(["\n\n".join(pieces), "", *(f"{mark}: {text}" for mark, text in notes.texts())]).rstrip()
        )
    parts += ["\n".join(notes_under(table, blocks))] if notes_under(table, blocks) else []
    return "\n\n".join(parts) + "\n" if parts else EMPTY


def _grid(table: Table, block: Block, columns: Sequence[int], notes: Footnotes) -> str:
    from tabulate import tabulate

    heads = first_heads(table)
    for before, c in zip((None, *columns), columns):
        column = table.columns[c]
        new = before is None or _group(table.columns[before]) != _group(column)
        title = (
            [protocol_title(column.protocol), *([f"[mixed: {column.mixed}]"] if column.mixed else [])] if new else []
        )
        lines = [line for text in title for line in textwrap.wrap(text, HEAD, break_on_hyphens=False)]
        heads.append("\n".join([*lines, metric_head(column)]))
    deepest = max(head.count("\n") for head in heads)
    rows = [
        [*first_texts(table, row, block), *row_texts(table, row, columns, notes, gap="[{}]", printed="“{}”{}")]
        for row in block.rows
    ]
    text = tabulate(
        rows,
        ["\n" * (deepest - head.count("\n")) + head for head in heads],
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
        notes = Footnotes(table, block)
        heads = first_heads(table)
        for before, c in zip((None, *block.columns), block.columns):
            column = table.columns[c]
            # How mixed ones differ stands over the first of a group alone.
            new = before is None or _group(table.columns[before]) != _group(column)
            tag = "" if not column.mixed else f" [mixed: {column.mixed}]" if new else " [mixed]"
            heads.append(_escape(f"{protocol_title(column.protocol)} · {metric_head(column)}{tag}"))
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in block.rows:
            style = {"gap": "[{}]", "printed": "*{}*<sup>{}</sup>", "star": r"\*"}
            cells = row_texts(table, row, block.columns, notes, **style)
            lines.append(f"| {' | '.join([*map(_escape, first_texts(table, row, block)), *cells])} |")
        sources = [f"<sup>{mark}</sup> {_escape(text)}." for mark, text in notes.texts()]
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
    parts = [
        re.sub(r"(?<=^)(\d+)(pct|ep|k|x)$", lambda found: found[1] + _UNITS[found[2]], p) for p in protocol.split("-")
    ]
    text = " ".join(_WORDS.get(part, part) for part in parts)
    return text[:1].upper() + text[1:] if text[:2] != "k-" else text


def _latex(table: Table) -> str:
    """booktabs; published values in italics with a superscript letter, explained under the rule."""
    parts = []
    for block in blocks_of(table):
        notes = Footnotes(table, block)
        first, columns = first_heads(table), [table.columns[c] for c in block.columns]
        spans = []
        for _, same in groupby(columns, key=_group):
            head, *others = same
            title = protocol_words(head.protocol) + (f" [mixed: {head.mixed}]" if head.mixed else "")
            spans.append(rf"\multicolumn{{{1 + len(others)}}}{{c}}{{{title.translate(_TEX)}}}")
        lines = [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * (len(first) - 1 + len(columns))}}}",
            r"\toprule",
            rf"{' & ' * len(first)}{' & '.join(spans)} \\",
            rf"{' & '.join([*first, *(metric_head(column).translate(_TEX) for column in columns)])} \\",
            r"\midrule",
        ]
        for row in block.rows:
            # A minus sign, not a hyphen.
            style = {"gap": "{{[${}$]}}", "printed": r"\textit{{{}}}$^{{{}}}$", "star": "^{*}"}
            cells = row_texts(table, row, block.columns, notes, **style)
            text = " & ".join(cells).replace("±", r"$\pm$").replace("?", "^{?}").replace(ABSENT, "--")
            lines.append(rf"{' & '.join(part.translate(_TEX) for part in first_texts(table, row, block))} & {text} \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        under = [note.translate(_TEX) for note in notes_under(table, [block])]  # each may go to a page of its own
        sources = [rf"$^{{{mark}}}$ {text.translate(_TEX)}." for mark, text in notes.texts()]
        under = (["Italic: published, by others."] if sources else []) + under + sources
        # In a group: the size is the notes' alone, not that of the text that follows an \input.
        below = [r"\par\smallskip", rf"{{\footnotesize {' '.join(under)}\par}}"] if under else []
        parts.append("\n".join(lines + below))
    return "\n\n".join(parts) + "\n" if parts else f"% {EMPTY}"


# ── For programs ──────────────────────────────────────────────────────────────────────────────────────────────────────

# fmt: off
_CSV_COLUMNS = [
    "method", "row", "architecture", "pretrain_epochs", "protocol", "metric", "scale", "recipe_hash", "mixed", "kind",
    "value", "sd", "n", "runs", "pretrainings", "baseline", "difference", "p_value", "p_holm", "device_hours",
    "verdict", "source", "read", "note",
]
# fmt: on


def _csv(table: Table) -> str:
    """One line a value, so that it reads into any data frame; a cell with two values is two lines."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    baseline = "" if table.baseline is None else table.rows[table.baseline].label
    for (r, c), cell in sorted(table.cells.items()):
        row, column = table.rows[r], table.columns[c]
        where = [row.method, row.label, row.architecture, row.epochs, column.protocol, column.metric]
        if runs := cell.measured:
            recipe = [column.scale, column.recipe_hash, column.mixed]
            numbers = ["measured", runs.mean, runs.sd, runs.n, len(runs.records), runs.pretrainings]
            gap = cell.difference
            compared = [baseline, gap.value, gap.p_value, gap.p_holm] if gap else [""] * 4
            compared += [table.device_hours(r, [c]), gap.said if gap else ""]
            writer.writerow(map(_csv_field, [*where, *recipe, *numbers, *compared, "", "", ""]))
        for value in cell.published:
            source = table.sources[value.source]
            # Its recipe is not known, whatever column it is shown in.
            numbers = [PUBLISHED, "", "", "published", value.value, value.sd, value.trials]
            writer.writerow(map(_csv_field, [*where, *numbers, *[""] * 8, source.text, source.read, value.note]))
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
