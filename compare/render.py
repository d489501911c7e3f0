"""A table as text: terminal, Markdown, CSV, JSON, LaTeX; and the tables of a README kept current between markers.

What a reader sees is written in `compare.text`; here are the formats for programs and the markers.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from compare.comparison import Choice, Comparison, Reader, compare
from compare.table import PUBLISHED, Cell, Measured, Published, Table
from compare.text import latex, markdown, plain
from contracts import atomic
from contracts.errors import UsageError, UserError, did_you_mean
from contracts.record import read_records

# Where `twist transfer`, `suite` and `compare` look for records when nobody says where.
RESULTS = "results"
_OPEN = re.compile(r"^<!-- twist compare\b(?P<arguments>.*?)-->\s*$")
_CLOSE = re.compile(r"^<!-- end -->\s*$")


def render(table: Table, format: str) -> str:
    """`table` as text of `format`: "table" (plain, for a terminal), "markdown", "csv", "json" or "latex".

    Raises:
        UsageError: another format.
    """
    writers = {"table": plain, "markdown": markdown, "csv": _csv, "json": _json, "latex": latex}
    if format not in writers:
        raise UsageError(f'There is no format "{format}".{did_you_mean(format, [*writers, "html"])}')
    return writers[format](table)


def render_all(comparisons: Sequence[Comparison], format: str, *, root: Path = Path()) -> str:
    """The tables of `comparisons` one after the other, each headed by its study's folder, relative to `root`.

    Raises:
        UsageError: another format, or one that holds a single table when there are several.
    """
    if len(comparisons) == 1:
        return render(comparisons[0].table, format)
    heads = {"table": "━━ {} ━━", "markdown": "### `{}`", "latex": "% {}"}
    folders = [os.path.relpath(one.folder, root) for one in comparisons if one.folder is not None]
    if format not in heads:
        raise UsageError(
            f"The format {format} holds one table, and there are {len(comparisons)} studies ({', '.join(folders)}): "
            "name one of these folders."
        )
    return "\n".join(
        f"{heads[format].format(folder)}\n\n{render(one.table, format)}" for folder, one in zip(folders, comparisons)
    )


def as_json(table: Table) -> dict[str, Any]:
    """The table as JSON values; every cell lists the runs and the sources behind it."""
    return {
        "columns": [
            {
                "protocol": column.protocol,
                "metric": column.metric,
                "label": column.definition.label,
                "unit": column.definition.unit,
                "definition": column.definition.definition,
                "task": column.task,
                "recipe_hash": column.recipe_hash,
                "scale": column.scale,
                "mixed": column.mixed,
            }
            for column in table.columns
        ],
        "rows": [
            {
                "method": row.method,
                "label": row.label,
                "architecture": row.architecture,
                "epochs": row.epochs,
                "variant": row.variant,
            }
            for row in table.rows
        ],
        "cells": [
            {"row": row, "column": column, **_cell_json(cell)} for (row, column), cell in sorted(table.cells.items())
        ],
        "sources": [{"text": source.text, "read": source.read} for source in table.sources],
        "baseline": table.baseline,
        "comparisons": table.comparisons,
    }


# ── Data formats ──────────────────────────────────────────────────────────────────────────────────────────────────────


# fmt: off
_CSV_COLUMNS = [
    "method", "row", "architecture", "pretrain_epochs", "protocol", "metric", "scale", "recipe_hash", "mixed", "kind",
    "value", "sd", "n", "runs", "pretrainings", "baseline", "difference", "p_value", "verdict", "source", "read",
    "note",
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
        recipe = [column.scale, column.recipe_hash, column.mixed]
        if cell.measured:
            gap = cell.difference
            compared = [baseline, gap.value, gap.p_value, gap.said] if gap else ["", "", "", ""]
            runs = cell.measured
            numbers = ["measured", runs.mean, runs.sd, runs.n, len(runs.records), runs.pretrainings]
            writer.writerow([*where, *recipe, *numbers, *compared, "", "", ""])
        for value in cell.published:
            source = table.sources[value.source]
            numbers = ["published", value.value, value.sd, value.trials, "", ""]
            # Its recipe is not known, whatever column it is shown in.
            writer.writerow([*where, PUBLISHED, "", "", *numbers, "", "", "", "", source.text, source.read, value.note])
    return buffer.getvalue()


def _json(table: Table) -> str:
    return json.dumps(as_json(table), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "measured": None if cell.measured is None else _measured_json(cell.measured),
        "published": [_published_json(value) for value in cell.published],
        "difference": None
        if cell.difference is None
        else {"value": cell.difference.value, "p_value": cell.difference.p_value, "said": cell.difference.said},
    }


def _measured_json(measured: Measured) -> dict[str, Any]:
    return {
        "mean": measured.mean,
        "sd": measured.sd,
        "n": measured.n,
        "pretrainings": measured.pretrainings,
        "repeated": measured.repeated,
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
            }
            for record, value in zip(measured.records, measured.run_values, strict=True)
        ],
    }


def _published_json(value: Published) -> dict[str, Any]:
    return {"value": value.value, "sd": value.sd, "trials": value.trials, "source": value.source, "note": value.note}


# ── Tables in a README ────────────────────────────────────────────────────────────────────────────────────────────────


def markdown_from_arguments(arguments: Sequence[str], *, root: Path, read: Reader = read_records) -> str:
    """The Markdown table of `twist compare ARGUMENTS`, record paths taken relative to `root`.

    Raises:
        UsageError: an unknown argument.
        UserError: a path without records, or records that may not meet.
    """
    parser = _Parser(prog="twist compare", add_help=False)
    parser.add_argument("records", nargs="*")
    parser.add_argument("--baseline")
    parser.add_argument("--published", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--published-only", action="store_true")
    parser.add_argument("--same-methods", action="store_true")
    parser.add_argument("--allow-mixed", action="store_true")
    parser.add_argument("--metric", action="append", default=[])
    chosen = parser.parse_args(list(arguments))
    choice = Choice(
        baseline=chosen.baseline,
        allow_mixed=chosen.allow_mixed,
        published=chosen.published,
        published_only=chosen.published_only,
        same_methods=chosen.same_methods,
        metrics=tuple(chosen.metric),
    )
    names = chosen.records or ([] if chosen.published_only else [RESULTS])
    return render_all(compare([root / name for name in names], choice, read=read), "markdown", root=root)


def check_markers(readme: Path, *, read: Reader = read_records) -> list[str]:
    """The opening markers of `readme` whose tables are stale: made again, they would read otherwise. Empty: current.

    A table lies between `<!-- twist compare ARGUMENTS -->` and `<!-- end -->`, each on a line of its own; the marker
    holds the very arguments that the table is made with, paths relative to the README's folder.

    Raises:
        UserError: the file is absent or a marker has no end.
    """
    return [block.marker for block in _marked(readme, read) if block.current != block.wanted]


def update_markers(readme: Path, *, read: Reader = read_records) -> list[str]:
    """Rewrite the stale tables of `readme` in place, atomically; the opening markers of those rewritten."""
    blocks = _marked(readme, read)
    stale = [block for block in blocks if block.current != block.wanted]
    if stale:
        lines = readme.read_text(encoding="utf-8").splitlines(keepends=True)
        for block in reversed(stale):
            lines[block.start : block.end] = [block.wanted]
        atomic.write_text(readme, "".join(lines))
    return [block.marker for block in stale]


@dataclass(frozen=True)
class _Marked:
    marker: str
    start: int
    end: int
    current: str
    wanted: str


def _marked(readme: Path, read: Reader) -> list[_Marked]:
    try:
        lines = readme.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"There is no file at {readme}: --check and --update take a Markdown file.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"Cannot read {readme} ({reason}): --check and --update take a Markdown file.") from None
    blocks = []
    opened: tuple[int, str, str] | None = None
    fenced = False
    for number, line in enumerate(lines):
        # A marker inside a code fence is an example of one.
        fenced ^= line.startswith("```")
        if fenced:
            continue
        match = _OPEN.match(line)
        if match and opened:
            raise UserError(f"{readme}, line {opened[0] + 1}: the marker has no <!-- end --> before the next one.")
        if match:
            opened = (number, line.strip(), match["arguments"])
        elif _CLOSE.match(line) and opened:
            start, marker, arguments = opened
            wanted = "\n" + markdown_from_arguments(shlex.split(arguments), root=readme.parent, read=read) + "\n"
            blocks.append(_Marked(marker, start + 1, number, "".join(lines[start + 1 : number]), wanted))
            opened = None
    if opened:
        raise UserError(f"{readme}, line {opened[0] + 1}: the marker has no <!-- end --> line; add it.")
    return blocks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"twist compare in a marker: {message}.")
