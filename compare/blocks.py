"""What the texts of a table share: values as text, the blocks that it is cut into, column heads, notes, footnotes.

Wide tables are cut into blocks of whole protocols, so that they fit a page. What explains all blocks stands once, below
the last; sources stand below their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from twist.compare.statistics import SIGNIFICANT
from twist.compare.table import Cell, Column, Measured, Published, Table
from twist.contracts.published import protocol_title

ABSENT = "–"
# What a page holds; a terminal cuts by its width.
PAGE_COLUMNS = 6


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
class Block:
    """Some columns of a table and the rows that have anything in them."""

    columns: tuple[int, ...]
    rows: tuple[int, ...]


def blocks_of(table: Table, *, widest: int) -> Iterator[Block]:
    """Whole protocols of one task, as many as fit `widest` columns; a protocol with more has a block of its own."""
    pending: list[int] = []
    for _, group in groupby(range(len(table.columns)), key=lambda i: protocol_key(table.columns[i])):
        columns = list(group)
        same_task = not pending or table.columns[pending[0]].task == table.columns[columns[0]].task
        if pending and (len(pending) + len(columns) > widest or not same_task):
            yield _block(table, pending)
            pending = []
        pending += columns
    if pending:
        yield _block(table, pending)


def protocol_key(column: Column) -> tuple[str, str | None, str, str]:
    return column.protocol, column.recipe_hash, column.scale, column.mixed


def _block(table: Table, columns: Sequence[int]) -> Block:
    rows = [row for row in range(len(table.rows)) if any((row, column) in table.cells for column in columns)]
    return Block(tuple(columns), tuple(rows))


def group_head(column: Column) -> str:
    """`voc-frcnn-c4-24k`, with what is mixed: once over the metrics of a group."""
    return protocol_title(column.protocol) + (f" [mixed: {column.mixed}]" if column.mixed else "")


def metric_head(column: Column) -> str:
    """`AP50 (VOC07)`, with the scale where neither the protocol's name nor what is mixed tells it."""
    # The name of a sample twin says its scale already.
    told = column.mixed or column.scale in ("full", "published") or column.protocol.startswith(column.scale)
    return column.definition.label + ("" if told else f" [{column.scale}]")


def one_line_heads(columns: Sequence[Column]) -> list[str]:
    """`voc-frcnn-c4-24k · AP50 (VOC07)` for each column; what is mixed is told in the first of a group alone."""
    heads = []
    for _, group in groupby(columns, key=protocol_key):
        for place, column in enumerate(group):
            tag = "" if not column.mixed else " [mixed]" if place else f" [mixed: {column.mixed}]"
            heads.append(f"{protocol_title(column.protocol)} · {metric_head(column)}{tag}")
    return heads


def footnotes(table: Table, block: Block) -> dict[Published, str]:
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


def difference_text(cell: Cell) -> str:
    if cell.difference is None:
        return ""
    mark = {True: "*", False: "", None: "?"}[cell.difference.significant]
    return f"{round(cell.difference.value, 1) + 0.0:+.1f}{mark}"  # + 0.0: nothing is less than nothing


def notes_under(table: Table, blocks: Sequence[Block], write: Callable[[str], str] = str) -> list[str]:
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


def footnote_texts(table: Table, marks: dict[Published, str]) -> list[tuple[str, str]]:
    return [(mark, _footnote_text(table, footnote)) for footnote, mark in marks.items()]


def _footnote_text(table: Table, footnote: Published) -> str:
    """`DetCo repository, …, Table 7; mean of 5 runs, standard deviation 0.2. What the source says of it`."""
    source = table.sources[footnote.source]
    text = source.text + (", read in a copy" if source.read == "secondary" else "")
    spread = [f"mean of {footnote.trials} runs"] if footnote.trials else []
    spread += [f"standard deviation {footnote.sd:g}"] if footnote.sd is not None else []
    text += f"; {', '.join(spread)}" if spread else ""
    return f"{text}. {footnote.note.rstrip('.')}" if footnote.note else text


def marks_of(values: Sequence[Published], marks: dict[Published, str]) -> str:
    # Once each: a source may print one value twice, of two kinds of weights that our rows do not tell apart.
    return ",".join(dict.fromkeys(marks[_footnote(value)] for value in values))
