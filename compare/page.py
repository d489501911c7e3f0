"""The comparison as one self-contained HTML page: table, charts, curves, pictures, and the origin of each number.

The template writes the table and the data, the scripts draw the charts and answer the reader; nothing is fetched from
anywhere. Jinja escapes everything that comes from a record or a file.
"""

import base64
import datetime
import os
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from twist.compare import writers
from twist.compare.about import conclusions_of, facts_of
from twist.compare.comparison import Found
from twist.compare.curves import (
    CURVE_RUNS,
    FROM_ZERO,
    PRETRAIN_KEYS,
    beside,
    curve_groups,
    label_families,
    pretrain_run,
)
from twist.compare.table import TASKS, Column, Row, Table
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.published import home_of, protocol_title

HEADLINE = "Self-supervised backbones, compared"
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def render_page(
    table: Table,
    found: Found,
    *,
    folder: Path,
    pretrain_runs: Sequence[Path] = (),
    title: str = HEADLINE,
    note: str = "",
    pictures: Sequence[tuple[str, Path]] = (),
) -> str:
    """The page of `table`, whose records are `found` with their files, to be written into `folder`.

    `pretrain_runs` are run folders with a `metrics.jsonl`; `note` is the author's own text, with an empty line between
    paragraphs; `pictures` are (caption, file) beyond the records' own.

    Raises:
        UserError: a curve file or a picture that a record or an argument names is absent or unreadable.
    """
    # Relative to the page: it may be published, and names no folder of the machine that wrote it.
    places = {id(record): os.path.relpath(place, folder) for place, record in found}
    rows = {id(r): row for (row, _), cell in table.cells.items() if cell.measured for r in cell.measured.records}
    data = writers.as_json(table, path_of=lambda record: places.get(id(record)))
    data["labels"] = label_families(table)
    data["curves"] = curve_groups(found, rows)
    data["pretrain"] = [pretrain_run(run) for run in pretrain_runs]
    data["copies"] = {format: writers.render(table, format) for format in ("markdown", "latex", "csv")}
    records = [record for _, record in found]
    series = {key for run in data["pretrain"] for key in run["series"]}
    text: str = _template().render(
        _table_parts(table),
        title=title,
        lede=_lede(table, found),
        facts=facts_of(records) if records else [],
        conclusions=conclusions_of(table, records),
        note=[part for part in note.split("\n\n") if part.strip()],
        day=datetime.datetime.now(datetime.UTC).date().isoformat(),
        data=data,
        pretrain_keys={key: caption for key, caption in PRETRAIN_KEYS.items() if key in series},
        pictures=_pictures(found, rows, table, pictures),
    )
    return text


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    environment.filters["footnote_mark"] = writers.footnote_mark
    environment.globals |= {
        "style": Markup(_resource("page.css")),
        "script": Markup(_resource("page.js") + _resource("page_charts.js")),
        "curve_runs": CURVE_RUNS,
        "from_zero": FROM_ZERO,
        "rows_of": lambda groups: sorted({line["row"] for group in groups for line in group["lines"]}),
        **{
            name: getattr(writers, name) for name in ("cost_text", "measured_text", "difference_text", "printed_values")
        },
        "link": _link,
        "home_of": home_of,
        "protocol_title": protocol_title,
    }
    return environment.from_string(_resource("page.html"))


def _resource(name: str) -> str:
    return (resources.files("twist.compare") / name).read_text(encoding="utf-8")


def _link(column: Column, row: Row | None = None) -> str:
    """What follows # in the address of a protocol, or of a row's number in a column; the same on every page of it."""
    place = "/".join(filter(None, [column.protocol, (column.recipe_hash or column.scale)[:9], column.data]))
    return place if row is None else f"{place}/{column.metric}/{row.label}"


def _table_parts(table: Table) -> dict[str, Any]:
    """What the template asks of the table: its groups of columns, what was measured, the protocols to choose among."""
    groups = writers.column_groups(table)
    homes: dict[str, dict[str, None]] = {}
    for column in table.columns:
        homes.setdefault(column.task, {})[home_of(column.protocol)] = None
    everything = writers.Block(tuple(range(len(table.columns))), tuple(range(len(table.rows))))
    return {
        "table": table,
        "groups": groups,
        # One table a protocol, where the whole one has no room.
        "parts": writers.blocks_of(table, apart=True),
        "starts": {group[0] for group in groups},
        "rows_measured": {row for (row, _), cell in table.cells.items() if cell.measured},
        "columns_measured": {column for (_, column), cell in table.cells.items() if cell.measured},
        "tasks": [task for task in TASKS if task in homes],
        "homes": [(task, list(names)) for task, names in homes.items()],
        "notes": writers.notes_under(table, [everything], where="Below a number"),
    }


def _lede(table: Table, found: Found) -> str:
    if not found:
        return f"{len(table.rows)} published rows, each with its source"
    records = [record for _, record in found]
    runs = writers.count(len(records), "run")
    methods = writers.count(len({record.method for record in records}), "method")
    protocols = writers.count(len({record.protocol for record in records}), "protocol")
    scales = sorted({record.scale for record in records})
    at = "" if scales == ["full"] else f", at {' and '.join(scales)} scale"
    return f"{runs} of {methods} under {protocols}{at}"


def _pictures(
    found: Found, rows: dict[int, int], table: Table, extra: Sequence[tuple[str, Path]]
) -> dict[str, dict[int, list[dict[str, str]]]]:
    """Protocol → number of a picture → figures: the picture of that number of the first run of each row that has any.

    Runs under one recipe draw the same images in the same order. Those of no protocol are `extra`.
    """
    figures: dict[str, dict[int, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for caption, file in extra:
        figures[""][0].append({"source": _data_url(file), "caption": caption, "alt": caption, "row": "", "task": ""})
    shown = set()
    for path, record in sorted(found, key=lambda pair: (pair[1].protocol, rows.get(id(pair[1]), -1), pair[1].seed)):
        row = rows.get(id(record))
        if row is None or not record.media or (record.protocol, row) in shown:
            continue
        shown.add((record.protocol, row))
        label = table.rows[row].label
        for number, name in enumerate(record.media):
            figure = {
                "source": _data_url(beside(path, name)),
                "caption": f" · seed {record.seed}",
                "alt": f"{label}, {record.protocol}, seed {record.seed}: predictions beside the truth",
                "row": label,
                "task": record.task,
            }
            figures[record.protocol][number].append(figure)
    return figures


def _data_url(file: Path) -> str:
    kind = MIME.get(file.suffix.lower())
    if kind is None:
        raise UserError(f"{file} is no picture for a page ({', '.join(sorted(MIME))} are).")
    data = files.read_bytes(file, remedy="the page needs this picture")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
