"""A table as text: terminal, Markdown, CSV, JSON, LaTeX, chosen by a name or by the file that it goes to.

What a reader sees is written in `twist.compare.text`; here are the formats for programs.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twist.compare.comparison import Comparison
from twist.compare.latex import latex
from twist.compare.table import PUBLISHED, Cell, Measured, Published, Table
from twist.compare.text import markdown, plain
from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.published import protocol_title

# A suffix that is not here says nothing of what is in the file.
SUFFIXES = {
    ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".csv": "csv", ".json": "json",
    ".tex": "latex",
}  # fmt: skip


def format_for(output: Path | None, asked: str | None) -> str:
    """The format that is asked for, else the one that the name of `output` says, else the terminal's.

    Raises:
        UsageError: what is asked for and the name contradict each other.
    """
    named = None if output is None else SUFFIXES.get(output.suffix.lower())
    if asked and named and asked != named:
        raise UsageError(
            f"{output} is {named} by its name, and --format says {asked}: leave out --format, or give --output a name "
            "that fits."
        )
    return asked or named or "table"


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
                "title": protocol_title(column.protocol),
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
        "notes": list(table.notes),
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
