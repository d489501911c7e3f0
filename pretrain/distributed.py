"""The one place that knows torch.distributed: ranks, groups, and the few collectives the method needs.

Everything works without a process group, as one rank. `W` ranks.

A convention runs through this room: DistributedDataParallel *averages* the ranks' parameter gradients, so what flows
backwards on a rank is W times the gradient of the common objective with respect to that rank's rows. An objective that
is computed identically on every rank from a mean over ranks therefore passes its gradient through that mean unchanged
(`mean_over_ranks`), and a layer whose output differs from rank to rank sums over ranks (`pretrain/batch_norm.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from twist.contracts.errors import UserError

Value = TypeVar("Value")
Group = ProcessGroup | None  # None: all ranks
# Rank 0 may hash a large checkpoint, and loaders may start slowly, while the others wait in a collective.
TIMEOUT = datetime.timedelta(minutes=30)


@contextlib.contextmanager
def process_group(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[torch.device]:
    """The device of this rank, inside the process group that torchrun's (or SLURM's) environment describes, if any.

    NCCL on GPU with gloo beside it for what lives on the CPU, gloo alone on CPU. A group that exists already is used
    and left alone.

    Raises:
        UserError: `cuda` is asked for and absent, or there are more ranks on this machine than GPUs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda, but torch sees no GPU here: use run.device=cpu, or see `twist doctor`.")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"There are more ranks than GPUs on this machine (rank {local_rank}, {torch.cuda.device_count()} GPUs): "
            "lower torchrun's --nproc-per-node, or use run.device=cpu."
        )
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    ours = "WORLD_SIZE" in os.environ and "RANK" in os.environ and not dist.is_initialized()
    if ours:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=chosen if on_gpu else None
        )
    try:
        yield chosen
    finally:
        if ours:
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def group_size(group: Group) -> int:
    """Ranks in `group`; None is all ranks."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        # Not in place: dividing by W before an in-place sum would give 1/W of the gradient (the published trap).
        mean = x.detach().clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        # Every rank computes the same scalar from this mean, so every rank holds the same gradient here, and it is
        # already W times that of its own rows' share 1/W: nothing to sum, nothing to divide.
        return gradients[0]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all ranks; differentiable for objectives that every rank computes alike (one collective)."""
    if world_size() == 1:
        return x
    return _MeanOverRanks.apply(x)


@torch.no_grad()
def averaged(x: Tensor, group: Group = None) -> Tensor:
    """The mean of `x` over the ranks of `group`, without gradient (for logging and for hand-written backwards)."""
    return summed(x, group) / group_size(group)


@torch.no_grad()
def summed(x: Tensor, group: Group = None) -> Tensor:
    """The sum of `x` over the ranks of `group`, without gradient."""
    if group_size(group) == 1:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def gathered(x: Tensor, group: Group = None) -> Tensor:
    """(W, …): every rank's `x`, in rank order, without gradient; shapes must agree."""
    size = group_size(group)
    if size == 1:
        return x[None]
    # Into one tensor: a list's parts would be copied out and stacked one by one, a kernel for every rank.
    every = x.new_empty(size * x.numel())
    dist.all_gather_into_tensor(every, x.reshape(-1), group=group)
    return every.view(size, *x.shape)


def gathered_object(value: Value) -> list[Value]:
    """Every rank's picklable `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main_rank(work: Callable[[], Value]) -> Value:
    """Do `work` on rank 0 and give every rank its result; a `UserError` there is raised on every rank."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = (type(error), str(error))
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        kind, message = outcome[1]
        raise kind(message)
    return outcome[0]


def ranks_per_bunch(bunch_size: int, *, batch_size: int, world_size: int) -> int:
    """How many consecutive ranks share the statistics of the last batch norm; `bunch_size` 0 means all ranks.

    Raises:
        UserError: the numbers do not divide; the message names a set that does.
    """
    total = batch_size * world_size
    if bunch_size == 0 or bunch_size == total:
        return world_size
    numbers = f"model.bunch_size = {bunch_size} with run.batch_size = {batch_size} on {world_size} rank(s)"
    if bunch_size > total:
        raise UserError(
            f"{numbers}: a bunch cannot hold more than the total batch of {total} images; set model.bunch_size=0 (all "
            f"ranks), or raise run.batch_size to {-(-bunch_size // world_size)}, or use more ranks."
        )
    if bunch_size % batch_size:
        raise UserError(
            f"{numbers}: the bunch must be a whole number of ranks' batches; set model.bunch_size to a multiple of "
            f"{batch_size}, or to 0 for all ranks."
        )
    ranks = bunch_size // batch_size
    if world_size % ranks:
        raise UserError(
            f"{numbers}: the ranks must split into groups of {ranks}; use a multiple of {ranks} ranks, or set "
            "model.bunch_size=0 for all ranks."
        )
    return ranks


def consecutive_group(ranks: int) -> Group:
    """This rank's group of `ranks` consecutive ranks; None when that is all of them. Every rank must call it."""
    if ranks == world_size():
        return None
    group, _ = dist.new_subgroups(group_size=ranks)
    return group


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` under DistributedDataParallel when there are several ranks, else itself.

    Buffers are not broadcast: batch norms are synchronised, and the statistics that count are rank 0's.
    """
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


class Vote:
    """Has any rank raised its flag? All ranks get the same answer at the same step.

    The question of one step is answered at the next, over gloo and without waiting, so it costs the device nothing.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def any(self, flag: bool) -> bool:
        """Cast `flag`; True when some rank had raised its own in the call before (alone: in this call)."""
        if self._group is None:
            return flag
        raised = False
        if self._pending is not None:
            work, ballot = self._pending
            work.wait()
            raised = bool(ballot.item())
        ballot = torch.tensor([int(flag)], dtype=torch.int32)
        self._pending = (dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True), ballot)
        return raised

    def close(self) -> None:
        """Wait for the last question, so that no rank leaves while another still asks."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
