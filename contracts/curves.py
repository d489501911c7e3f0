"""The curves of a run: `metrics.jsonl` (one JSON object a line), the same in trackers, and pictures of them.

A row has a key, `step` or `epoch`, that counts up. A resumed run first drops the rows it is going to write again, and
lines that are damaged or that a killed run left unfinished. A number that is not finite is null, since JSON has no NaN.
"""

from __future__ import annotations

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
from twist.contracts.trackers import Logger, TensorBoard, Tracker, open_tracker

CURVES = "metrics.jsonl"
POINTS = 1000  # of a line in a picture: each is the mean of its share of the rows
SMOOTHED_SHARE = 0.04  # a smoothed line is the mean over this share of the points before each


Rows = list[dict[str, Any]]


def read_rows(path: Path, *, key: str = "step") -> Rows:
    """The rows in the file at `path` that are whole; none when there is no file."""
    return [row for row in _lines(path, key) if row is not None]


def _lines(path: Path, key: str) -> list[dict[str, Any] | None]:
    """A row a line of the file, None for one that is damaged: a kill, or a disk, left something else than a row."""
    rows: list[dict[str, Any] | None] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        rows.append(row if isinstance(row, dict) and type(row.get(key)) is int else None)
    return rows


class Curves:
    """Appends rows to the file at `path`, after dropping those whose `key` is `start` or more; `board` is TensorBoard's
    folder and `logger` a tracker, where there are to be such. Damaged lines are dropped, too, and said to be but for an
    unfinished last one."""

    def __init__(
        self, path: Path, *, start: int, key: str = "step", board: Path | None = None, logger: Logger | None = None
    ) -> None:
        lines = _lines(path, key)
        damaged = [number for number, row in enumerate(lines[:-1], 1) if row is None]
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            print(f"{path}: line {damaged[0]} is damaged{more} and left out of the curves.", file=sys.stderr)
        kept = [row for row in lines if row is not None and row[key] < start]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path, self._key = path, key
        self._trackers: list[Tracker] = []
        if board is not None:
            self._trackers.append(TensorBoard(board, start))
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
            points = means([math.nan if row.get(name) is None else row[name] for row in rows], step=count)
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
