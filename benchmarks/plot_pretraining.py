"""One picture of a pretraining run: do its features become better, and do its predictions stay diverse?

    python -m benchmarks.plot_pretraining FOLDER PICTURE [--random PERCENT]

FOLDER holds `metrics.jsonl` and `online_eval.jsonl` (a run's own folder or what `benchmarks.publish` copied of it).
`--random` draws the k-NN of random weights under the same protocol, as a line to compare with.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

SMOOTHED_OVER = 25  # rows of metrics.jsonl; single batches say little


def draw(folder: Path, picture: Path, *, random_percent: float | None) -> None:
    """Write `picture` (PNG): k-NN and NMI by epoch; agreement and the two entropies by step."""
    evaluated, steps = _rows(folder / "online_eval.jsonl"), _rows(folder / "metrics.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), dpi=110, layout="constrained")
    epochs = [row["epoch"] + 1 for row in evaluated]
    left.plot(epochs, [row["knn_top1_percent"] for row in evaluated], "o-", ms=4, label="k-NN top-1")
    left.plot(epochs, [row["nmi_percent"] for row in evaluated], "s-", ms=4, label="NMI of the head's classes")
    if random_percent is not None:
        left.axhline(random_percent, ls="--", color="grey", lw=1, label="k-NN of random weights")
    left.set(xlabel="epoch", ylabel="percent", title="Features, on held-out pictures", ylim=(0, None))
    classes = np.exp(max(row["mean_entropy"] for row in steps))  # at the start the mean distribution is all but uniform
    for label, values in {
        "entropy of the mean distribution": [row["mean_entropy"] / np.log(classes) for row in steps],
        "mean entropy of a distribution": [row["row_entropy"] / np.log(classes) for row in steps],
        "agreement of two views": [row["agreement"] for row in steps],
    }.items():
        smooth = np.convolve(values, np.full(SMOOTHED_OVER, 1 / SMOOTHED_OVER), mode="valid")
        right.plot([row["step"] for row in steps][-len(smooth) :], smooth, lw=1.2, label=label)
    right.set(xlabel="step", ylabel="share of the most possible", title="Predictions, in training", ylim=(0, 1.03))
    if len(stages := [row["step"] for row in steps if row["stage"] == "self_label"]) > 1:
        right.axvline(stages[0], color="grey", lw=1, ls=":")
        right.annotate("self-labelling", (stages[0], 0.02), ha="right", fontsize=8, color="grey", rotation=90)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Software": None})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--random", type=float, metavar="PERCENT")
    given = parser.parse_args()
    draw(given.folder, given.picture, random_percent=given.random)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
