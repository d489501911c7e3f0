"""The page's table: two head rows, protocol over metric, and cells that can be reached and explain themselves."""

from __future__ import annotations

import html
from itertools import groupby

from twist.compare.blocks import footnote_mark, printed_values, repeats_notes
from twist.compare.statistics import SIGNIFICANT
from twist.compare.table import PUBLISHED, Cell, Column, Table
from twist.contracts.published import home_of, protocol_title

# From here on a list of protocols is worth its place on the page.
MANY_PROTOCOLS = 8


def results_table(table: Table) -> str:
    """Two head rows, protocol over metric; every cell that holds something can be reached and explains itself."""
    groups = [
        (key, list(group)) for key, group in groupby(enumerate(table.columns), key=lambda pair: protocol_group(pair[1]))
    ]
    starts = {group[0][0] for _, group in groups}
    measured = measured_columns(table)
    marked = [
        filter_marks(column) + ("" if index in measured else " data-printed")
        for index, column in enumerate(table.columns)
    ]
    top = "".join(
        f'<th colspan="{len(group)}" scope="colgroup"{marked[group[0][0]]}>'
        f"{html.escape(protocol_title(group[0][1].protocol))}{_column_tag(group[0][1])}</th>"
        for _, group in groups
    )
    second = "".join(
        f'<th scope="col" class="{"first" if index in starts else ""}" data-column="{index}" '
        f'{marked[index]} aria-sort="none" '
        f'title="{html.escape(column.definition.definition)}">'
        f'<button type="button">{html.escape(column.definition.label)}</button></th>'
        for index, column in enumerate(table.columns)
    )
    marks = {source: footnote_mark(source) for source in range(len(table.sources))}
    body = []
    for row, named in enumerate(table.rows):
        cells = "".join(
            _table_cell(table.cells.get((row, index)), row, index, index in starts, marks)
            for index in range(len(table.columns))
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
        '<p id="wider" hidden>The table scrolls sideways →</p>'
        '<div class="scroller"><div class="scroll" role="region" aria-labelledby="table-title">'
        f'<table class="results" role="grid"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div></div>'
    )


def filter_marks(column: Column) -> str:
    """What the page's filters look at: a column's task, and the protocol of ours that it is of or beside."""
    return f' data-of-task="{column.task}" data-of-home="{html.escape(home_of(column.protocol))}"'


def protocol_choice(table: Table) -> str:
    """A list of the protocols to show one of; nothing for a table that has few of them."""
    homes: dict[str, dict[str, None]] = {}
    for column in table.columns:
        homes.setdefault(column.task, {})[home_of(column.protocol)] = None
    if sum(map(len, homes.values())) < MANY_PROTOCOLS:
        return ""
    groups = "".join(
        f'<optgroup data-task="{task}" label="{task_name(task)}">'
        + "".join(f'<option value="{html.escape(home)}">{html.escape(protocol_title(home))}</option>' for home in names)
        + "</optgroup>"
        for task, names in homes.items()
    )
    return (
        '<div class="choice"><label for="protocol">protocol</label> '
        f'<select id="protocol"><option value="">every one</option>{groups}</select></div>'
    )


def task_name(task: str) -> str:
    return task.replace("-", " ").capitalize()


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


def _table_cell(cell: Cell | None, row: int, index: int, first: bool, marks: dict[int, str]) -> str:
    kind = "first" if first else ""
    if cell is None:
        return f'<td class="{kind} absent" data-column="{index}">–</td>'
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
        f'data-column="{index}" data-value="{value}">{"".join(parts)}</td>'
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
