"""Runs a function on several gloo ranks, in fresh processes that meet through a file: no ports, no environment.

The processes are forked from a server that has torch imported already and has never run anything: as clean as spawned
ones, without two seconds of imports each.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "twist.pretrain.train", "hypothesis"])


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on every rank; returns what each returned (tensors, plain values), in rank order.

    `function` must be importable (no closure). An exception on a rank is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _on_rank, args=(world_size, folder, function, arguments), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _on_rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        result = function(rank, *arguments)
        torch.save(result, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
