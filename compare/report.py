"""The comparison as one self-contained HTML page: table, charts, curves, pictures, and where each number comes from.

Python writes the table and the data, the scripts make them live; nothing is fetched from anywhere. Everything that
comes from a record or a file is escaped on its way into the page.
"""

from __future__ import annotations

import base64
import datetime
import html
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from twist.compare.render import as_json
from twist.compare.report_curves import (
    CURVE_RUNS,
    FROM_ZERO,
    PRETRAIN_KEYS,
    beside,
    curve_groups,
    identity,
    label_families,
    pretrain_run,
)
from twist.compare.report_table import (
    count,
    filter_marks,
    legend,
    measured_columns,
    measured_switch,
    protocol_choice,
    protocol_group,
    results_table,
    sources,
    task_name,
)
from twist.compare.table import TASKS, Table
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.published import protocol_title
from twist.contracts.record import RunRecord

HEADLINE = "Self-supervised backbones, compared"
# Runs whose pictures are shown for one row and protocol.
ROW_PICTURES = 1
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def write_report(
    path: Path,
    table: Table,
    records_with_paths: Sequence[tuple[Path, RunRecord]],
    *,
    pretrain_runs: Sequence[Path] = (),
    title: str = HEADLINE,
    pictures: Sequence[tuple[str, Path]] = (),
) -> Path:
    """Write the page to `path` and return it.

    `pretrain_runs` are run folders with a `metrics.jsonl`; `pictures` are (caption, file) beyond the records' own.

    Raises:
        UserError: a curve file or a picture that a record or an argument names is absent or unreadable.
    """
    origin = {identity(record): place for place, record in records_with_paths}
    rows = {
        identity(record): row
        for (row, _), cell in table.cells.items()
        if cell.measured
        for record in cell.measured.records
    }
    values = as_json(table)
    for cell, (_, shown) in zip(values["cells"], sorted(table.cells.items())):
        if shown.measured:
            for run, record in zip(cell["measured"]["runs"], shown.measured.records):
                place = origin.get(identity(record))
                # Relative to the page: it may be published, and names no folder of the machine that wrote it.
                run["path"] = None if place is None else os.path.relpath(place, path.parent)
    values["labels"] = label_families(table)
    values["curves"] = curve_groups(records_with_paths, rows)
    values["pretrain"] = [pretrain_run(folder) for folder in pretrain_runs]
    sections = [
        _dots_section(table),
        _labels_section(values["labels"]),
        _pretrain_section(values["pretrain"]),
        _curves_section(values["curves"]),
        _pictures_section(records_with_paths, rows, table, pictures),
    ]
    page = _fill(
        _resource("report.html"),
        {
            "title": html.escape(title),
            "lede": _lede(table, records_with_paths),
            "chips": _chips(table),
            "choice": protocol_choice(table),
            "how": _how(table),
            "switch": measured_switch(table),
            "table": results_table(table),
            "legend": legend(table),
            "sections": "\n".join(filter(None, sections)),
            "sources": sources(table),
            "style": _resource("report.css"),
            "script": _resource("report.js") + _resource("report_charts.js"),
            # "<" would end the script element early.
            "data": json.dumps(values, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        },
    )
    try:
        files.write_text(path, page)
    except OSError as error:
        raise UserError(
            f"Cannot write the page {path} ({error.strerror}): check the path and the room there, or give another "
            "--output."
        ) from None
    return path


def _fill(template: str, parts: dict[str, str]) -> str:
    """The template with every `{{name}}` replaced once; what is put in is not searched again."""
    pieces = template.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def _resource(name: str) -> str:
    return (resources.files("twist.compare") / name).read_text(encoding="utf-8")


def _lede(table: Table, records: Sequence[tuple[Path, RunRecord]]) -> str:
    day = f'<span class="date">{datetime.datetime.now(datetime.UTC).date().isoformat()}</span>'
    if not records:
        return f"{len(table.rows)} published rows, each with its source. Written {day}."
    methods = len({record.method for _, record in records})
    protocols = len({record.protocol for _, record in records})
    scales = sorted({record.scale for _, record in records})
    text = f"{count(len(records), 'run')} of {count(methods, 'method')} under {count(protocols, 'protocol')}"
    if scales != ["full"]:
        text += f", at {' and '.join(scales)} scale"
    return f"{text}. Written {day}."


def _chips(table: Table) -> str:
    tasks = [task for task in TASKS if any(column.task == task for column in table.columns)]
    chips = [("all", "All"), *((task, task_name(task)) for task in tasks)]
    return "".join(
        f'<button type="button" data-task="{task}" aria-pressed="{str(task == "all").lower()}">{name}</button>'
        for task, name in (chips if len(tasks) > 1 else chips[:1])
    )


def _how(table: Table) -> str:
    text = (
        "Point at a number, or reach it with Tab and the arrow keys, to see where it comes from; Enter keeps it open."
    )
    if any(column.mixed for column in table.columns):
        text += " Columns marked “mixed” are of different recipes, scales or data: do not compare across them."
    return text


# ── Charts: places for them, drawn by report_charts.js ────────────────────────────────────────────────────────────────


def _chart(
    title: str, subtitle: str, kind: str, index: int | str, *, task: str = "", marks: str = "", minor: bool = False
) -> str:
    marked = f' data-of-task="{task}"' if task else marks
    folded = " data-minor hidden" if minor else ""
    small = f"<small>{html.escape(subtitle)}</small>" if subtitle else ""
    return (
        f'<div class="chart"{marked}{folded}><h3>{html.escape(title)}{small}</h3>'
        f'<div class="plot" data-kind="{kind}" data-index="{html.escape(str(index))}"></div></div>'
    )


def _section(name: str, title: str, note: str, inside: str) -> str:
    return (
        f'<section id="{name}" data-charts aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f'<p class="note">{note}</p>{inside}</section>'
    )


def _keys(rows: Iterable[int]) -> str:
    return f'<ul class="keys" data-rows="{json.dumps(sorted(set(rows)))}"></ul>'


def _dots_section(table: Table) -> str:
    charts = []
    measured = measured_columns(table)
    for _, group in groupby(enumerate(table.columns), key=lambda pair: protocol_group(pair[1])):
        for place, (index, column) in enumerate(group):
            subtitle = protocol_title(column.protocol) + (f" · mixed: {column.mixed}" if column.mixed else "")
            charts.append(
                _chart(
                    column.definition.label,
                    subtitle,
                    "dots",
                    index,
                    marks=filter_marks(column),
                    minor=place > 0 or bool(measured and index not in measured),
                )
            )
    if not charts:
        return ""
    note = (
        "Dot: mean. Bar: one standard deviation. Faint dots: what n counts. Open diamond: published. "
        "Axes do not start at zero; the dashed line is the baseline."
    )
    switch = '<label class="switch"><input type="checkbox" id="every-metric"> every metric and protocol</label>'
    return _section("metrics", "Metric by metric", note, f'{switch}<div class="grid">{"".join(charts)}</div>')


def _labels_section(families: list[dict[str, Any]]) -> str:
    if not families:
        return ""
    charts = "".join(
        _chart(family["title"], "", "labels", index, task="classification") for index, family in enumerate(families)
    )
    keys = _keys(line["row"] for family in families for line in family["lines"])
    note = "Fine-tuning on part of the labels. Bars are one standard deviation; open dots are published."
    return _section("labels", "How many labels it takes", note, f'<div class="grid">{charts}</div>{keys}')


def _curves_section(groups: list[dict[str, Any]]) -> str:
    if not groups:
        return ""
    charts = "".join(
        _chart("Loss", group["protocol"], "curves", index, task=group["task"]) for index, group in enumerate(groups)
    )
    keys = _keys(line["row"] for group in groups for line in group["lines"])
    note = f"Training loss of the transfer runs, up to {CURVE_RUNS} runs a method."
    return _section("curves", "Transfer runs", note, f'<div class="grid">{charts}</div>{keys}')


def _pretrain_section(runs: list[dict[str, Any]]) -> str:
    present = [key for key in PRETRAIN_KEYS if any(key in run["series"] for run in runs)]
    if not present:
        return ""
    charts = "".join(
        _chart(
            key.replace("_", " "), PRETRAIN_KEYS[key], "pretrain", key, marks=" data-zero" if key in FROM_ZERO else ""
        )
        for key in present
    )
    keys = '<ul class="keys" data-kind="pretrain"></ul>'
    return _section("pretraining", "Pretraining", "", f'{keys}<div class="grid">{charts}</div>')


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _pictures_section(
    records: Sequence[tuple[Path, RunRecord]],
    rows: dict[tuple[str, str], int],
    table: Table,
    extra: Sequence[tuple[str, Path]],
) -> str:
    parts = []
    if extra:
        figures = "".join(_figure(file, html.escape(caption), caption) for caption, file in extra)
        parts.append(f'<div class="pictures">{figures}</div>')
    taken: dict[tuple[str, int], int] = defaultdict(int)
    by_protocol: dict[str, list[str]] = defaultdict(list)
    tasks = {}
    ordered = sorted(records, key=lambda pair: (pair[1].protocol, rows.get(identity(pair[1]), -1), pair[1].seed))
    for path, record in ordered:
        row = rows.get(identity(record))
        if row is None or not record.media or taken[record.protocol, row] == ROW_PICTURES:
            continue
        taken[record.protocol, row] += 1
        tasks[record.protocol] = record.task
        label = table.rows[row].label
        plain = f"{label}, {record.protocol}, seed {record.seed}: predictions beside the truth"
        caption = f"<b>{html.escape(label)}</b> · seed {record.seed}"
        by_protocol[record.protocol] += [
            _figure(beside(path, name), caption, plain, task=record.task) for name in record.media
        ]
    for protocol, figures_of in by_protocol.items():
        head = f'<h3 data-of-task="{tasks[protocol]}">{html.escape(protocol)}</h3>'
        parts.append(f'{head}<div class="pictures">{"".join(figures_of)}</div>')
    if not parts:
        return ""
    note = "What the networks see and say. A picture opens larger."
    return _section("pictures", "Pictures", note, "".join(parts))


def _figure(file: Path, caption: str, plain: str, *, task: str = "") -> str:
    kind = MIME.get(file.suffix.lower())
    if kind is None:
        raise UserError(f"{file} is no picture for a page ({', '.join(sorted(MIME))} are).")
    try:
        encoded = base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"Cannot read the picture {file} ({error.strerror}): the page needs it.") from None
    marked = f' data-of-task="{task}"' if task else ""
    return (
        f'<figure{marked}><button type="button" aria-label="Enlarge: {html.escape(plain)}">'
        f'<img src="data:{kind};base64,{encoded}" alt="{html.escape(plain)}"></button>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
