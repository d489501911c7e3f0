"""The page's table: two head rows, protocol over metric, and cells that can be reached and explain themselves."""

from __future__ import annotations

import html
from itertools import groupby

from compare.statistics import SIGNIFICANT
from compare.table import PUBLISHED, Cell, Column, Table
from compare.text import footnote_mark, printed_values, repeats_notes


def results_table(table: Table) -> str:
    """Two head rows, protocol over metric; every cell that holds something can be reached and explains itself."""
    groups = [
        (key, list(group)) for key, group in groupby(enumerate(table.columns), key=lambda pair: protocol_group(pair[1]))
    ]
    starts = {group[0][0] for _, group in groups}
    measured = measured_columns(table)
    marked = ["" if index in measured else " data-printed" for index in range(len(table.columns))]
    top = "".join(
        f'<th colspan="{len(group)}" scope="colgroup" data-of-task="{group[0][1].task}"{marked[group[0][0]]}>'
        f"{html.escape(group[0][1].protocol)}{_column_tag(group[0][1])}</th>"
        for _, group in groups
    )
    second = "".join(
        f'<th scope="col" class="{"first" if index in starts else ""}" data-column="{index}" '
        f'data-of-task="{column.task}"{marked[index]} aria-sort="none" '
        f'title="{html.escape(column.definition.definition)}">'
        f'<button type="button">{html.escape(column.definition.label)}</button></th>'
        for index, column in enumerate(table.columns)
    )
    marks = {source: footnote_mark(source) for source in range(len(table.sources))}
    body = []
    for row, named in enumerate(table.rows):
        cells = "".join(
            _table_cell(table.cells.get((row, index)), row, index, column, index in starts, marks, marked[index])
            for index, column in enumerate(table.columns)
        )
        name, *rest = named.label.split(" · ")
        small = f"<small>{html.escape(' · '.join(rest))}</small>" if rest else ""
        kind = ' class="baseline"' if row == table.baseline else ""
        body.append(f'<tr{kind} data-row="{row}"><th scope="row">{html.escape(name)}{small}</th>{cells}</tr>')
    corner = (
        '<th class="corner" rowspan="2" scope="col" data-column="name" aria-sort="none">'
        '<button type="button">method</button></th>'
    )
    head = f"<tr>{corner}{top}</tr><tr>{second}</tr>"
    return (
        '<div class="scroll" role="region" aria-labelledby="table-title"><table class="results" role="grid">'
        f"<thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def measured_switch(table: Table) -> str:
    measured = {row for (row, _), cell in table.cells.items() if cell.measured}
    if not measured or (len(measured) == len(table.rows) and len(measured_columns(table)) == len(table.columns)):
        return ""
    return (
        '<label class="switch"><input type="checkbox" id="measured-only"> '
        "only rows and columns that were measured here</label>"
    )


def measured_columns(table: Table) -> set[int]:
    return {column for (_, column), cell in table.cells.items() if cell.measured}


def protocol_group(column: Column) -> tuple[str, str | None, str]:
    return column.protocol, column.recipe_hash, column.scale


def _column_tag(column: Column) -> str:
    if column.mixed:
        return f'<span class="tag mixed">mixed: {html.escape(column.mixed)}</span>'
    if column.scale == PUBLISHED:
        return '<span class="tag">published</span>'
    return f'<span class="tag">{column.scale} · recipe {str(column.recipe_hash)[:8]}</span>'


def _table_cell(
    cell: Cell | None, row: int, index: int, column: Column, first: bool, marks: dict[int, str], marked: str
) -> str:
    kind = "first" if first else ""
    if cell is None:
        return f'<td class="{kind} absent" data-column="{index}" data-of-task="{column.task}"{marked}>–</td>'
    parts = []
    if cell.measured:
        sd = "" if cell.measured.sd is None else f" ± {cell.measured.sd:.1f}"
        spread = f'<span class="sd">{sd} ({cell.measured.n})</span>'
        parts.append(f'<span class="measured">{cell.measured.mean:.1f}{spread}</span>')
    parts += [
        f'<span class="printed">{text}<sup>{",".join(dict.fromkeys(marks[v.source] for v in values))}</sup></span>'
        for text, values in printed_values(cell)
    ]
    if cell.difference:
        mark = {True: "*", False: "", None: "?"}[cell.difference.significant]
        verdict = ("up" if cell.difference.value > 0 else "down") if cell.difference.significant else ""
        value = round(cell.difference.value, 1) + 0.0  # nothing is less than nothing
        parts.append(f'<span class="gap {verdict}">{value:+.1f}{mark}</span>'.replace("-", "−"))
    value = cell.measured.mean if cell.measured else cell.published[0].value
    return (
        f'<td class="{kind}" tabindex="-1" role="gridcell" aria-expanded="false" data-row="{row}" '
        f'data-column="{index}" data-value="{value}" data-of-task="{column.task}"{marked}>{"".join(parts)}</td>'
    )


def legend(table: Table) -> str:
    cells = table.cells.values()
    items = []
    if any(cell.measured for cell in cells):
        items.append("mean ± standard deviation (n), percent")
        items += [html.escape(note.rstrip(".")) for note in repeats_notes(table, table.cells)]
    if any(cell.published for cell in cells):
        items.append('<span class="printed">italic<sup>a</sup></span>&nbsp; published by others, source below')
    if table.baseline is not None:
        items.append(f"+0.0 difference to {html.escape(table.rows[table.baseline].label)}")
        if table.comparisons:
            items.append(
                f"* p &lt; {SIGNIFICANT}, Welch’s t-test, two-sided, not corrected for the table’s "
                f"{count(table.comparisons, 'comparison')}"
            )
        if any(cell.difference and cell.difference.significant is None for cell in cells):
            items.append("? no test: n too small, or no spread between runs")
    if len(table.cells) < len(table.rows) * len(table.columns):
        items.append("– absent")
    items += [html.escape(note.rstrip(".")) for note in table.notes]
    return '<ul class="legend">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def sources(table: Table) -> str:
    parts = []
    if table.sources:
        listed = "".join(
            f"<li><span>{footnote_mark(index)}</span>{html.escape(source.text)}"
            f"{', read in a copy' if source.read == 'secondary' else ''}</li>"
            for index, source in enumerate(table.sources)
        )
        parts.append(f"<h3>Sources of the published numbers</h3><ol>{listed}</ol>")
    metrics = {column.metric: column.definition for column in table.columns}
    defined = "".join(
        f"<dt>{html.escape(metric.label)}</dt><dd>{html.escape(metric.definition)}</dd>" for metric in metrics.values()
    )
    parts.append(f'<h3>What the metrics mean</h3><dl class="definitions">{defined}</dl>')
    return f'<section class="sources" id="sources"><h2>Sources and definitions</h2>{"".join(parts)}</section>'


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
