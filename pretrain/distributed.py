"""All use of torch.distributed: ranks, groups, and the few collectives the method needs.

Everything works without a process group, as one rank. `W` ranks.

DistributedDataParallel *averages* the ranks' parameter gradients, so what flows backwards on a rank is W times the
gradient of the common objective with respect to that rank's rows. An objective that every rank computes identically
from a mean over ranks therefore passes its gradient through that mean unchanged (`mean_over_ranks`), and a layer whose
output differs from rank to rank sums over ranks (`batch_norm.py`).
"""

import contextlib
import datetime
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from twist.contracts.errors import UserError
from twist.contracts.ranks import POLL_S, failing_together

Value = TypeVar("Value")
Group = ProcessGroup | None  # None: all ranks
# Rank 0 may hash a large checkpoint, and loaders may start slowly, while the others wait in a collective.
TIMEOUT = datetime.timedelta(minutes=30)


@contextlib.contextmanager
def process_group(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[torch.device]:
    """The device of this rank, inside the process group that torchrun's (or SLURM's) environment describes, if any:
    NCCL on GPU, with gloo for tensors on the CPU; gloo alone on CPU. A group that exists already is used."""
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not gpus:
        raise UserError("run.device = cuda, but torch sees no GPU here: use run.device=cpu, or see `twist doctor`.")
    chosen, backend = torch.device("cpu"), "gloo"
    if device != "cpu" and gpus:
        if local_rank >= gpus:
            raise UserError(
                f"There are more ranks than GPUs on this machine (rank {local_rank}, {gpus} GPUs): lower torchrun's "
                "--nproc-per-node, or use run.device=cpu."
            )
        chosen, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(chosen)
    ours = "WORLD_SIZE" in os.environ and "RANK" in os.environ and not dist.is_initialized()
    if ours:
        store, number, ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
        on = chosen if chosen.type == "cuda" else None
        store = of_this_start(store, number, ranks)
        dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=TIMEOUT, device_id=on)
    try:
        with failing_together() if ours else contextlib.nullcontext():
            yield chosen
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def of_this_start(store: dist.Store, number: int, ranks: int) -> dist.Store:
    """A part of `store` that rank `number` shares with the other ranks of this start alone.

    torchrun's agent keeps one store over its restarts (torch 2.11), where a new rank would find the address at which a
    killed one listened ("connectFullMesh … Connection refused"), and why it failed. Each node counts its own restarts,
    so the ranks agree on a name: rank 0's, which counts once it says to have seen mine.
    """
    mine, end = secrets.token_hex(8), time.monotonic() + TIMEOUT.total_seconds()
    if number == 0:
        store.set("leader", mine)
        store.set(f"{mine}/seen", b" ".join(store.get(f"{mine}/{other}") for other in range(1, ranks)))
        return dist.PrefixStore(mine, store)
    while time.monotonic() < end:
        leader = store.get("leader").decode()
        store.set(f"{leader}/{number}", mine)
        if store.check([f"{leader}/seen"]) and mine in store.get(f"{leader}/seen").decode():
            return dist.PrefixStore(leader, store)
        time.sleep(POLL_S)
    raise dist.DistNetworkError("Timed out waiting for rank 0")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size(group: Group = None) -> int:
    """Ranks in `group`; None is all ranks."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        # Not in place: dividing by W before an in-place sum would give 1/W of the gradient (the published error).
        return averaged(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        # Every rank computes the same scalar from this mean, so every rank has the same gradient here, already W times
        # that of its own rows' share 1/W.
        return gradients[0]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all ranks; differentiable for objectives that every rank computes alike (one collective)."""
    return x if world_size() == 1 else _MeanOverRanks.apply(x)


@torch.no_grad()
def averaged(x: Tensor, group: Group = None) -> Tensor:
    """The mean of `x` over the ranks of `group`, without gradient (for logging and for hand-written backwards)."""
    return summed(x, group) / world_size(group)


@torch.no_grad()
def summed(x: Tensor, group: Group = None) -> Tensor:
    """The sum of `x` over the ranks of `group`, without gradient."""
    if world_size(group) == 1:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def gathered(x: Tensor, group: Group = None) -> Tensor:
    """(W, …): every rank's `x`, in rank order, without gradient; shapes must agree."""
    size = world_size(group)
    if size == 1:
        return x[None]
    every = x.new_empty(size * x.numel())
    dist.all_gather_into_tensor(every, x.reshape(-1), group=group)
    return every.view(size, *x.shape)


def on_main_rank(work: Callable[[], Value]) -> Value:
    """Do `work` on rank 0 and give every rank its result; a `UserError` there is raised on every rank."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None]
    try:
        outcome = [work() if rank() == 0 else None]
    except UserError as error:
        outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


@torch.no_grad()
def take_buffers_of_main_rank(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, those that are saved: each bunch's last norm has statistics of its own."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def ranks_per_bunch(bunch_size: int, *, batch_size: int, world_size: int) -> int:
    """How many consecutive ranks share the statistics of the last batch norm; `bunch_size` 0 means all ranks."""
    total = batch_size * world_size
    ranks, rest = divmod(bunch_size or total, batch_size)
    if rest or world_size % ranks:
        raise UserError(
            f"model.bunch_size = {bunch_size} with run.batch_size = {batch_size} on {world_size} rank(s) does not give "
            f"whole bunches: it has to be a multiple of {batch_size} that divides {total}; or set "
            "model.bunch_size=0 for all ranks."
        )
    return ranks


def consecutive_group(ranks: int) -> Group:
    """This rank's group of `ranks` consecutive ranks; None when that is all of them. Every rank must call it."""
    return None if ranks == world_size() else dist.new_subgroups(group_size=ranks)[0]


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` under DistributedDataParallel when there are several ranks, else itself. Buffers are not broadcast at
    each step: batch norms are synchronised, and the statistics that count are rank 0's."""
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, ids, broadcast_buffers=False, gradient_as_bucket_view=True)


class Vote:
    """Has any rank raised its flag? All ranks get the same answer at the same step: the question of one step is
    answered at the next, over gloo, so the device does not wait."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def any(self, flag: bool) -> bool:
        """Cast `flag`; True when some rank had raised its own in the call before (alone: in this call)."""
        if self._group is None:
            return flag
        raised = self.close()
        ballot = torch.tensor([int(flag)], dtype=torch.int32)
        self._pending = (dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True), ballot)
        return raised

    def close(self) -> bool:
        """Wait for the last question, so that no rank leaves while another still asks; returns its answer."""
        if self._pending is None:
            return False
        (work, ballot), self._pending = self._pending, None
        work.wait()
        return bool(ballot.item())
