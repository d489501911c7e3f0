"""The comparison as one self-contained HTML page: table, charts, curves, pictures, and the origin of each number.

The template writes the table and the data, the scripts draw the charts and answer the reader; nothing is fetched from
anywhere. Jinja escapes everything that comes from a record or a file.
"""

import base64
import datetime
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from twist.compare import writers
from twist.compare.comparison import Found
from twist.compare.grouping import architecture_of, device_hours
from twist.compare.statistics import FEWEST
from twist.compare.table import TASKS, Column, Row, Table
from twist.contracts import files
from twist.contracts.curves import CURVES, Rows, read_rows
from twist.contracts.errors import UserError
from twist.contracts.published import display_name, home_of, protocol_title
from twist.contracts.record import RunRecord

HEADLINE = "Self-supervised backbones, compared"
# A curve keeps this many points: more than a chart has pixels to show them.
CURVE_POINTS = 240
# Runs whose curves are drawn for one row and protocol.
CURVE_RUNS = 3
# Keys of a pretraining run's metrics.jsonl in the order of the page, each with how its curve looks in a healthy run. At
# first the loss trades consistency for sharpness; diversity begins at its largest and has to stay there.
PRETRAIN_KEYS = {
    "total": "the loss that is minimised: falls",
    "consistency": "how far apart the views' distributions are: grows while they sharpen, then settles or falls",
    "sharpness": "entropy of an image's distribution: falls",
    "diversity": "entropy of the batch's mean distribution: stays near ln K; towards 0 is collapse",
    "mean_entropy": "of the batch's mean distribution, nats: stays near ln K",
    "row_entropy": "of an image's distribution, nats: falls",
    "agreement": "share of images whose two views agree on the class: rises",
    "classes_used": "of the head's K: few is collapse",
    "knn_top1_percent": "k-NN top-1 during pretraining, percent",
    "nmi_percent": "NMI during pretraining, percent",
    "lr": "learning rate",
}
# Drawn from zero: a change of a hundredth of their height is no fall.
FROM_ZERO = ("diversity", "mean_entropy", "classes_used")
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


class PageOptions(NamedTuple):
    """What a page has beyond the table: `note` is a file with the author's own text, with an empty line between
    paragraphs; `pretrain_runs` are run folders with a `metrics.jsonl`; `pictures` (caption, file) beyond the records'.
    """

    title: str = HEADLINE
    note: Path | None = None
    pretrain_runs: Sequence[Path] = ()
    pictures: Sequence[tuple[str, Path]] = ()


PLAIN = PageOptions()


def render_page(table: Table, found: Found, *, folder: Path, options: PageOptions = PLAIN) -> str:
    """The page of `table`, whose records are `found` with their files, to be written into `folder`.

    Raises:
        UserError: a curve file, a picture or a note that a record or an option names is absent or unreadable.
    """
    # Relative to the page: it may be published, and names no folder of the machine that wrote it.
    places = {id(record): os.path.relpath(place, folder) for place, record in found}
    rows = {id(r): row for (row, _), cell in table.cells.items() if cell.measured for r in cell.measured.records}
    data = writers.as_json(table, path_of=lambda record: places.get(id(record)))
    data["curves"] = curve_groups(found, rows)
    data["pretrain"] = [pretrain_run(run) for run in options.pretrain_runs]
    data["copies"] = {format: writers.render(table, format) for format in ("markdown", "latex", "csv")}
    records = [record for _, record in found]
    note = files.read_text(options.note, remedy="--note takes a text file") if options.note else ""
    series = {key for run in data["pretrain"] for key in run["series"]}
    text: str = _template().render(
        _table_parts(table),
        title=options.title,
        lede=_lede(table, found),
        facts=_facts(records) if records else [],
        conclusions=_conclusions(table, records),
        note=[part for part in note.split("\n\n") if part.strip()],
        day=datetime.datetime.now(datetime.UTC).date().isoformat(),
        data=data,
        pretrain_keys={key: caption for key, caption in PRETRAIN_KEYS.items() if key in series},
        pictures=_pictures(found, rows, table, options.pictures),
    )
    return text


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def resource(name: str) -> str:
        return (resources.files("twist.compare") / name).read_text(encoding="utf-8")

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    environment.filters["footnote_mark"] = writers.footnote_mark
    shared = (writers.cost_text, writers.measured_text, writers.difference_text, writers.printed_values)
    environment.globals |= {
        "style": Markup(resource("page.css")),
        "script": Markup(resource("page.js") + resource("page_charts.js")),
        "curve_runs": CURVE_RUNS,
        "from_zero": FROM_ZERO,
        "rows_of": lambda groups: sorted({line["row"] for group in groups for line in group["lines"]}),
        "link": _link,
        **{function.__name__: function for function in (*shared, home_of, protocol_title)},
    }
    return environment.from_string(resource("page.html"))


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
    everything = writers.Block(range(len(table.columns)), range(len(table.rows)))
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
    of = {"run": range(len(records)), "method": {r.method for r in records}, "protocol": {r.protocol for r in records}}
    runs, methods, protocols = (writers.count(len(things), name) for name, things in of.items())
    scales = sorted({record.scale for record in records})
    at = "" if scales == ["full"] else f", at {' and '.join(scales)} scale"
    return f"{runs} of {methods} under {protocols}{at}"


# ── About these numbers ───────────────────────────────────────────────────────────────────────────────────────────────


def _facts(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Heading and text: backbones, images, image size, hardware and budget, as far as `records` say."""
    lengths = sorted({(record.method, record.weights.epochs) for record in records if record.weights.epochs})
    pretrained = ", ".join(
        f"{display_name(method)} {writers.count(epochs or 0, 'epoch')}" for method, epochs in lengths
    )
    budget = f"{len(records)} transfer runs, {sum(map(device_hours, records)):.2g} device hours"
    return [
        ("Backbones", _listed(architecture_of(record) for record in records)),
        ("Images", _images(records)),
        ("Image size", _listed(_size_of(record.recipe) for record in records)),
        ("Hardware", _listed(record.hardware.get("gpu") or record.hardware.get("processor") for record in records)),
        ("Budget", f"{budget}; pretraining: {pretrained}" if pretrained else budget),
    ]


def _conclusions(table: Table, records: Sequence[RunRecord]) -> list[str]:
    """Sentences: what may be concluded from `table`, and what not."""
    measured = [cell.measured for cell in table.cells.values() if cell.measured]
    own = " and ".join(sorted({record.scale for record in records} - {"full"}))
    sentences = {
        f"Runs at {own} scale compare weights here; do not set them beside published numbers.": own,
        f"Fewer than {FEWEST} results on a side show no difference: they are not tested.": any(
            cell.n < FEWEST for cell in measured
        ),
        "Where all runs share one pretraining, a difference may be that pretraining's, not its method's.": any(
            cell.pretrainings == 1 and cell.records[0].method != "random" for cell in measured
        ),
        "Some protocols have columns of several recipes; compare within a column only.": any(
            column.mixed for column in table.columns
        ),
        "Published numbers come from others' code and hardware, and have no recipe hash.": any(
            cell.published for cell in table.cells.values()
        ),
        "No ranking of methods follows unless their recipes were tuned alike, which records do not say.": True,
    }
    return [sentence for sentence, holds in sentences.items() if holds]


def _listed(values: Iterable[Any]) -> str:
    """Each value with the number of runs, the most frequent first."""
    counted = Counter(str(value or "not said") for value in values)
    return ", ".join(f"{value} ({n} runs)" if len(counted) > 1 else value for value, n in counted.most_common())


def _images(records: Sequence[RunRecord]) -> str:
    """`cifar10: 500 to 50000 train, 10000 val` of each data set, where records say so."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        counts = record.recipe.get("images") or record.recipe.get("data")
        name = (record.data or "").partition(" ")[0]  # without its digest
        for split in ("train", "val", "test"):
            if isinstance(counts, dict) and isinstance(counts.get(split), int):
                found[name][split].add(counts[split])
    texts = []
    for name, splits in found.items():
        ranges = {split: f"{min(of)} to {max(of)}" if len(of) > 1 else str(min(of)) for split, of in splits.items()}
        texts.append((f"{name}: " if name else "") + ", ".join(f"{count} {split}" for split, count in ranges.items()))
    return "; ".join(texts) or "not said"


def _size_of(recipe: dict[str, Any]) -> str:
    """The size in pixels, from where each engine's recipe has it: Detectron2's short side, `size`, a crop."""
    if short := re.search(r'"MIN_SIZE_TEST": (\d+)', text := json.dumps(recipe)):
        return f"short side {short[1]}"
    size = re.search(r'"size": (\d+)', text) or re.search(r'"crop_size": \[?(\d+)(?:, (\d+))?', text)
    return " × ".join((size[1], size[size.lastindex or 1])) if size else "not said"


# ── Curves ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def curve_groups(found: Found, rows: dict[int, int]) -> list[dict[str, Any]]:
    """The training losses of transfer runs by protocol, at most `CURVE_RUNS` of a row.

    `rows` has the row of each record by its `id`.
    """
    groups: dict[str, dict[str, Any]] = {}
    drawn: dict[tuple[str, int], int] = defaultdict(int)
    for path, record in sorted(found, key=lambda pair: (pair[1].protocol, pair[1].seed, pair[1].run_name)):
        row = rows.get(id(record))
        if record.curves is None or row is None or drawn[record.protocol, row] == CURVE_RUNS:
            continue
        steps = _rows_of(beside(path, record.curves))
        if points := next(filter(None, (thin(steps, key) for key in ("total_loss", "loss", "total"))), None):
            drawn[record.protocol, row] += 1
            group = groups.setdefault(record.protocol, {"protocol": record.protocol, "task": record.task, "lines": []})
            group["lines"].append({"row": row, "seed": record.seed, "points": points})
    return list(groups.values())


def pretrain_run(folder: Path) -> dict[str, Any]:
    """The series of a pretraining run's folder, and the steps at which a stage begins."""
    steps = _rows_of(folder / CURVES)
    stages = [
        [step["step"], str(step["stage"]).replace("_", " ")]
        for before, step in pairwise(step for step in steps if "stage" in step)
        if step["stage"] != before["stage"]
    ]
    # By epoch; the page's axis is the step, so each is drawn at its epoch's last one.
    ends = {step["epoch"]: step["step"] for step in steps if "epoch" in step}
    evaluated = read_rows(folder / "online_eval.jsonl", "epoch")
    steps += [{**line, "step": ends[line["epoch"]]} for line in evaluated if line["epoch"] in ends]
    series = {key: points for key in PRETRAIN_KEYS if (points := thin(steps, key))}
    return {"name": folder.name, "series": series, "stages": stages}


def beside(record: Path, name: str) -> Path:
    """The file that a record names, which must lie below the record's own folder: a record may come from anybody."""
    folder = record.parent.resolve()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise UserError(f"{record} names the file {name}, outside its own folder: a page takes nothing from there.")
    return file


def _rows_of(path: Path) -> Rows:
    rows = read_rows(path)
    if not rows and (not path.exists() or path.stat().st_size):
        raise UserError(f"There are no curves at {path}: the page needs them, one JSON object with its step a line.")
    return rows


def thin(steps: Rows, key: str) -> list[list[float]]:
    """(step, value) where `key` is a finite number, thinned to `CURVE_POINTS` with the last point kept."""
    points = [[s["step"], float(s[key])] for s in steps if type(s.get(key)) in (int, float) and math.isfinite(s[key])]
    stride = math.ceil(len(points) / CURVE_POINTS) or 1
    return points[::stride] + (points[-1:] if points and (len(points) - 1) % stride else [])


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _pictures(
    found: Found, rows: dict[int, int], table: Table, extra: Sequence[tuple[str, Path]]
) -> dict[str, dict[int, list[dict[str, str]]]]:
    """Protocol → number of a picture → figures: the picture of that number of the first run of each row that has any.

    Runs under one recipe draw the same images in the same order. Those of no protocol are `extra`.
    """
    figures: dict[str, dict[int, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for caption, file in extra:
        figures[""][0].append({"source": _data_url(file), "caption": caption, "alt": caption, "row": "", "task": ""})
    first: dict[tuple[str, int], tuple[Path, RunRecord]] = {}
    for path, record in sorted(found, key=lambda pair: pair[1].seed):
        if record.media and id(record) in rows:
            first.setdefault((record.protocol, rows[id(record)]), (path, record))
    for (protocol, row), (path, record) in sorted(first.items(), key=lambda item: item[0]):
        label = table.rows[row].label
        for number, name in enumerate(record.media):
            figure = {"source": _data_url(beside(path, name)), "row": label, "task": record.task}
            figure |= {"caption": f" · seed {record.seed}", "alt": f"{label}, {protocol}, seed {record.seed}: "}
            figure["alt"] += "predictions beside the truth"
            figures[protocol][number].append(figure)
    return figures


def _data_url(file: Path) -> str:
    kind = MIME.get(file.suffix.lower())
    if kind is None:
        raise UserError(f"{file} is no picture for a page ({', '.join(sorted(MIME))} are).")
    data = files.read_bytes(file, remedy="the page needs this picture")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
