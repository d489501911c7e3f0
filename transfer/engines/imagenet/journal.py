"""What a training writes while it goes: `log.txt`, a line an event with its time, and the epochs' curves.

The first process alone writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from twist.contracts.curves import CURVES, Curves
from twist.contracts.trackers import Logger

LOG = "log.txt"
BOARD = "tensorboard"


def log(output: Path, text: str) -> None:
    """Append `text` to the run's log, the time before each line."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    # Opened for each event: they are minutes apart, and a kill then loses none of them.
    with (output / LOG).open("a") as file:
        file.writelines(f"{now} {line}\n" for line in text.splitlines())


class Journal:
    """One row an epoch into log, `metrics.jsonl` and TensorBoard; `quiet` (every process but the first) writes nothing.

    Use it in a `with`. Rows after `done`, the last step of the checkpoint that training goes on from, are dropped.
    """

    def __init__(self, output: Path, *, done: int, quiet: bool, logger: Logger | None = None) -> None:
        self._output = output
        self._curves = None
        if not quiet:
            self._curves = Curves(output / CURVES, start=done + 1, board=output / BOARD, logger=logger)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._curves is not None:
            self._curves.close()

    def epoch(self, row: Mapping[str, float]) -> None:
        """`row` is one of `train_classifier`'s: epoch, step, and that epoch's numbers."""
        if self._curves is None:
            return
        values = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        log(self._output, f"epoch {row['epoch'] + 1:.0f}: " + ", ".join(f"{k} {v:.6g}" for k, v in values.items()))
        self._curves.add(int(row["step"]), {"epoch": row["epoch"], **values})
        self._curves.plot(int(row["step"]), values)
