"""What a run says while it goes: `log.txt`, a line an event with its time, and the epochs' scalars for TensorBoard.

The first process alone writes. `metrics.jsonl`, which the record names, is written with the checkpoint (`training.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

LOG = "log.txt"
BOARD = "tensorboard"


def log(output: Path, text: str) -> None:
    """Append `text` to the run's log, the time before each line."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    # Opened for each event: they are minutes apart, and a kill then loses none of them.
    with (output / LOG).open("a") as file:
        file.writelines(f"{now} {line}\n" for line in text.splitlines())


class Journal:
    """One row an epoch into log and TensorBoard; `quiet` (every process but the first) writes nothing.

    Use it in a `with`. `done` is the last step that an earlier start finished: what a killed one wrote beyond it is
    hidden by TensorBoard.
    """

    def __init__(self, output: Path, *, done: int, quiet: bool) -> None:
        self._output, self._done, self._quiet = output, done, quiet
        self._board: Any = None

    def __enter__(self) -> Journal:
        if not self._quiet:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, and only the first process needs it

            self._board = SummaryWriter(str(self._output / BOARD), purge_step=self._done + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def epoch(self, row: Mapping[str, float]) -> None:
        """`row` is one of `train_classifier`'s: epoch, step, and that epoch's numbers."""
        if self._quiet:
            return
        values = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        log(self._output, f"epoch {row['epoch'] + 1}: " + ", ".join(f"{k} {v:.6g}" for k, v in values.items()))
        for name, value in values.items():
            self._board.add_scalar(name, value, row["step"])
        self._board.flush()
