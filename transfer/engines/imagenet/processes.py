"""One process a GPU, through torch's own launcher; one process without any launcher where there is one device.

The work is a module-level function that gets its rank and returns a JSON-able value; rank 0's comes back. A user's
mistake in any rank, memory that ran out and a process that died arrive as one sentence, not as a page of traceback.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from twist.contracts.errors import UsageError
from twist.contracts.failures import explained, raise_reported
from twist.transfer.engines.imagenet.recipes import START

# How long a process waits for the others. Features of ImageNet take the first one hours, torch would give up after ten
# minutes; a process that dies is the launcher's to notice, at once.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Rank:
    """This process: its number, how many there are, and its device."""

    index: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.index == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()


Work = Callable[..., Any]


def run_ranks(work: Work, arguments: tuple[Any, ...], *, processes: int, device: str, output: Path) -> Any:
    """`work(rank, *arguments)` in `processes` processes on `device` ("cuda" or "cpu"); rank 0's value.

    `output` is the run folder, where a process that fails leaves its sentence for this one.

    Raises:
        UsageError: more GPUs asked for than there are.
        UserError: what a rank raised, memory that ran out, or a rank that died.
    """
    if device == "cuda" and processes > torch.cuda.device_count():
        raise UsageError(f"--gpus {processes}: this machine shows {torch.cuda.device_count()} GPUs to torch.")
    if processes == 1:
        with explained(memory=START):
            return work(Rank(0, 1, torch.device(device)), *arguments)
    with tempfile.TemporaryDirectory(prefix="twist-ranks-") as folder:
        with raise_reported(output):
            mp.spawn(_process, args=(processes, device, Path(folder), output, work, arguments), nprocs=processes)
        return json.loads((Path(folder) / "value.json").read_text())


def _process(
    index: int, count: int, device: str, folder: Path, output: Path, work: Work, arguments: tuple[Any, ...]
) -> None:
    with explained(report=output, memory=START):
        _work_as(index, count, device, folder, work, arguments)


def _work_as(index: int, count: int, device: str, folder: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    rank = Rank(index, count, torch.device(device, index) if device == "cuda" else torch.device(device))
    if device == "cuda":
        torch.cuda.set_device(index)
    # A file as the meeting place: no port that another job on the machine may hold.
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/meet",
        rank=index,
        world_size=count,
        timeout=PATIENCE,
    )
    value = work(rank, *arguments)
    if rank.first:
        (folder / "value.json").write_text(json.dumps(value))
    dist.destroy_process_group()
