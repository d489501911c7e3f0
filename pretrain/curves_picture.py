"""`curves.png`: what a run's `metrics.jsonl` says, at a glance; how a healthy run looks stands over each panel."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twist.contracts import files

# A long run has a million rows: each point of a panel is the mean of its share of them …
POINTS = 1000
# … and each of its line that of this share of the points before it, since single batches say little.
SMOOTHED_SHARE = 0.04


def draw_curves(folder: Path, *, classes: int) -> Path:
    """Draw `folder`/metrics.jsonl of a run with K = `classes` as `folder`/curves.png."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    size = -(-len(rows) // POINTS)
    steps = pooled([row["step"] for row in rows], size)
    second = next((row["step"] for row in rows if row["stage"] == "self_label"), None)
    figure = Figure(figsize=(11, 5.6), dpi=100, layout="constrained")
    panels = iter(figure.subplots(2, 3).flat)

    def panel(title: str, names: dict[str, str], *, smooth: bool = True, **settings: Any) -> Any:
        axes = next(panels)
        for number, (name, label) in enumerate(names.items()):
            values = pooled([math.nan if row.get(name) is None else row[name] for row in rows], size)
            axes.plot(steps, values, color=f"C{number}", alpha=0.25 if smooth else 1, linewidth=0.8)
            if smooth:
                axes.plot(steps, smoothed(values), color=f"C{number}", linewidth=1.6, label=label)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set(xlabel="step", **settings)
        axes.spines[["top", "right"]].set_visible(False)
        if second not in (None, rows[0]["step"]):
            axes.axvline(second, color="grey", linewidth=1, linestyle=":", label="self-labelling")
        if len(names) > 1:
            axes.legend(fontsize=8, frameon=False)
        return axes

    panel("loss: falls (self-labelling has another)", {"total": "total"}, ylabel="nats")
    entropies = panel(
        "entropy: an image's falls, the mean's stays near ln K",
        {"row_entropy": "of an image (sharpness)", "mean_entropy": "of the mean (diversity)"},
        ylabel="nats",
    )
    entropies.axhline(math.log(classes), color="grey", linewidth=1, linestyle="--", label=f"ln {classes}")
    entropies.set_ylim(0, 1.08 * math.log(classes))
    entropies.legend(fontsize=8, frameon=False)
    panel("agreement of two views on a class: rises", {"agreement": "agreement"}, ylabel="share", ylim=(0, 1))
    panel(f"classes used in a batch, of {classes}: no collapse to a few", {"classes_used": "classes"}, ylim=(0, None))
    panel("gradient norm", {"gradient_norm": "norm"}, yscale="log")
    panel("learning rate", {"lr": "lr"}, smooth=False, ylim=(0, None))
    path = folder / "curves.png"
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def pooled(values: Sequence[float], size: int) -> NDArray[np.float64]:
    """The means of each `size` values in a row, of those that are numbers (NaN where none is)."""
    padded = np.full(-(-len(values) // size) * size, np.nan)
    padded[: len(values)] = values
    return _mean(padded.reshape(-1, size))


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At each place the mean of the last `SMOOTHED_SHARE` of all values, of those that are numbers."""
    window = max(1, round(SMOOTHED_SHARE * len(values)))
    padded = np.concatenate([np.full(window - 1, np.nan), values])
    return _mean(np.lib.stride_tricks.sliding_window_view(padded, window))


def _mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    there = ~np.isnan(rows)
    counts = there.sum(1)
    return np.where(counts > 0, np.where(there, rows, 0).sum(1) / np.maximum(counts, 1), np.nan)
