"""The curves of a run: `metrics.jsonl` (one JSON object a line), the same in trackers, and pictures of them.

A row has a key, `step` or `epoch`, that counts up. A resumed run first drops the rows it is going to write again, and
lines that are damaged or that a killed run left unfinished. A number that is not finite is null, since JSON has no NaN.
"""

import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.trackers import Logger, Tracker, open_tracker, tensorboard

CURVES = "metrics.jsonl"
POINTS = 1000  # of a line in a picture: each is the mean of its share of the rows
SMOOTHED_SHARE = 0.04  # a smoothed line is the mean over this share of the points before each


# The largest step and the largest whole number that a row holds: floats count exactly up to it.
MOST = 2**53
Rows = list[dict[str, Any]]


def read_rows(path: Path, key: str = "step") -> Rows:
    """The rows in the file at `path`; none when there is no file. Damaged lines are left out, and said once."""
    if not path.exists():
        return []
    *lines, unfinished = files.read_bytes(path, most=files.MOST_DATA, remedy="remove it").split(b"\n")
    parsed = [_row(line, key) for line in (*lines, unfinished) if line.strip()]
    damaged = parsed.count(None) - (bool(unfinished) and parsed[-1] is None)
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out.", file=sys.stderr)
    return [row for row in parsed if row is not None]


def _row(line: bytes, key: str) -> dict[str, Any] | None:
    """The row in a line: its key counts, its other values are numbers, words or null."""
    try:
        row: dict[str, Any] = files.parse_json(line)
    except UserError:
        return None
    whole = all(-MOST <= value <= MOST for value in row.values() if isinstance(value, int))
    plain = all(value is None or isinstance(value, int | float | str) for value in row.values())
    return row if type(row.get(key)) is int and row[key] >= 0 and whole and plain else None


class Curves:
    """Appends rows to the file at `path`, after dropping those whose `key` is `start` or more, and damaged ones.
    `board` is TensorBoard's folder and `logger` a tracker, where there are to be such."""

    def __init__(
        self, path: Path, *, start: int, key: str = "step", board: Path | None = None, logger: Logger | None = None
    ) -> None:
        kept = [row for row in read_rows(path, key) if row[key] < start]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path, self._key = path, key
        self._trackers: list[Tracker] = []
        if board is not None:
            self._trackers.append(tensorboard(board, start))
        if logger is not None:
            self._trackers.append(open_tracker(logger, path.parent))

    def add(self, position: int, values: Mapping[str, Any]) -> None:
        """Append one row, with `position` as its key."""
        row = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({self._key: position, **row}) + "\n")

    def plot(self, position: int, values: Mapping[str, Any], *, tag: str = "") -> None:
        """Give TensorBoard and the tracker the numbers among `values`, each as `tag` and its name."""
        numbers = {tag + name: value for name, value in values.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.add(numbers, position)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class Panel(NamedTuple):
    """One chart over the steps: `lines` are names of the rows with their labels; `settings` are matplotlib's."""

    title: str
    lines: Mapping[str, str]
    settings: Mapping[str, Any]
    smooth: bool = True
    level: float | None = None  # of a horizontal line


def draw(rows: Rows, panels: Sequence[Panel], path: Path, *, columns: int = 1, mark: int | None = None) -> Path:
    """Draw `rows` as a PNG at `path`, with a vertical line at the step `mark`."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 3.6) if len(panels) == 1 else (11, 5.6), dpi=100, layout="constrained")
    count = max(1, -(-len(rows) // POINTS))
    steps = means([row["step"] for row in rows], step=count)
    for axes, panel in zip(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat, panels):
        for number, (name, label) in enumerate(panel.lines.items()):
            values = [row.get(name) for row in rows]
            points = means([value if isinstance(value, int | float) else math.nan for value in values], step=count)
            smoothed = means(points, window=round(SMOOTHED_SHARE * len(points))) if panel.smooth else points
            axes.plot(steps, points, color=f"C{number}", alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed, color=f"C{number}", linewidth=1.4, label=label)
        if panel.level is not None:
            axes.axhline(panel.level, color="grey", linewidth=1, linestyle="--")
        if mark is not None:
            axes.axvline(mark, color="grey", linewidth=1, linestyle=":")
        axes.set_title(panel.title, fontsize=9, loc="left")
        axes.set(**{"xlabel": "step", **panel.settings})
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def means(values: Sequence[float] | NDArray[np.float64], *, step: int = 1, window: int = 0) -> NDArray[np.float64]:
    """The mean of the numbers (not NaN) among each `step` values, or at each place among the last `window` ones."""
    if window > 1:
        padded = np.concatenate([np.full(window - 1, np.nan), values])
        groups = np.lib.stride_tricks.sliding_window_view(padded, window)
    else:
        groups = np.concatenate([values, np.full(-len(values) % step, np.nan)]).reshape(-1, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a group without a number, whose mean is NaN
        return np.nanmean(groups, axis=1)
