"""The curves of the page: pretraining and transfer runs."""

import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from twist.compare.comparison import Found
from twist.contracts.curves import CURVES, Rows, read_rows
from twist.contracts.errors import UserError

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
