"""All use of torch.distributed: ranks, groups, and the few collectives the method needs.

DistributedDataParallel *averages* the parameter gradients of `W` ranks, so what flows backwards on a rank is W times
the gradient of the common objective by that rank's rows. An objective that every rank computes identically from a mean
over ranks therefore passes its gradient through that mean unchanged (`mean_over_ranks`), and a layer whose output
differs from rank to rank sums over ranks (`SynchronisedBatchNorm`). Without a process group there is one rank.
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
from twist.contracts.progress import duration
from twist.contracts.ranks import failing_together

Value = TypeVar("Value")
Group = ProcessGroup | None  # None: all ranks
# Rank 0 may hash a large checkpoint, and loaders may start slowly, while the others wait in a collective.
TIMEOUT = datetime.timedelta(minutes=30)
# One that dies before the ranks have met is noticed by nothing else, where no torchrun watches.
JOINING = datetime.timedelta(minutes=10)


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
        on = chosen if chosen.type == "cuda" else None
        try:
            store, number, ranks = next(dist.rendezvous("env://", timeout=JOINING))
            store = of_this_start(store, number, ranks)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise UserError(
                f"Rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} waited {duration(JOINING.total_seconds())} "
                f"for the others ({str(error).splitlines()[0]}): start them all with one MASTER_ADDR and MASTER_PORT, "
                "as torchrun does."
            ) from error
        dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=JOINING, device_id=on)
        dist.distributed_c10d._set_pg_timeout(TIMEOUT)
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
    mine, end = secrets.token_hex(8), time.monotonic() + JOINING.total_seconds()
    if number == 0:
        store.set("leader", mine)
        store.set(f"{mine}/seen", " ".join(store.get(f"{mine}/{other}").decode() for other in range(1, ranks)))
        return dist.PrefixStore(mine, store)
    while time.monotonic() < end:
        leader = store.get("leader").decode()
        store.set(f"{leader}/{number}", mine)
        if store.check([f"{leader}/seen"]) and mine in store.get(f"{leader}/seen").decode():
            return dist.PrefixStore(leader, store)
        time.sleep(0.05)
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


# --- batch norm -------------------------------------------------------------------------------------------------------


class _Normalise(torch.autograd.Function):
    """x → (x − mean) / √(var + eps), with mean and biased variance over rows, positions and the ranks of the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(x, dim=_all_but_channels(x), correction=0)  # (C,)
        # Moments about each rank's own mean, combined afterwards: sums of squares would cancel for large means.
        of_ranks = gathered(torch.stack([mean, var]), group)  # (W, 2, C)
        mean = of_ranks[:, 0].mean(0)
        var = of_ranks[:, 1].mean(0) + (of_ranks[:, 0] - mean).square().mean(0)
        scale = (var + eps).rsqrt()
        normalised = (x - _wide(mean, x)) * _wide(scale, x)
        ctx.save_for_backward(normalised, scale)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var)
        return normalised, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        normalised, scale = ctx.saved_tensors
        gradient = gradients[0]
        over = _all_but_channels(gradient)
        means = averaged(torch.stack([gradient.mean(over), (gradient * normalised).mean(over)]), ctx.group)
        along = _wide(means[0], gradient) + normalised * _wide(means[1], gradient)
        return (gradient - along) * _wide(scale, gradient), None, None


class _OnCuda(torch.autograd.Function):
    """The same with the affine part, by the kernels of torch.nn.SyncBatchNorm, which keep only `x` for the way back and
    take half-precision `x` as it is. Updates the running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Any, momentum: float) -> Tensor:
        x = _dense(x)
        mean, inverse = torch.batch_norm_stats(x, norm.eps)  # (C,) each, the second is 1/√(var + eps)
        of_ranks = gathered(torch.stack([mean, inverse]), norm.group)  # (W, 2, C)
        counts = mean.new_full((len(of_ranks),), x.numel() // x.shape[1])  # (W,), known without a collective
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, of_ranks[:, 0], of_ranks[:, 1], norm.running_mean, norm.running_var, momentum, norm.eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.int())
        ctx.group = norm.group
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, norm.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        gradient = _dense(gradients[0])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Of this rank: Σ dy and Σ dy·(x − mean), which the ranks sum, and the gradients of weight and bias, which the
        # data-parallel wrapper does.
        total, along, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, needs_x, needs_weight, needs_bias
        )
        of_x = None
        if needs_x:
            total, along = summed(torch.stack([total, along]), ctx.group)
            of_x = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, weight, total, along, counts)
        return of_x, of_weight if needs_weight else None, of_bias if needs_bias else None, None, None


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's batch norm for (N, C, …), N the same on all ranks, with training statistics over the ranks of `group`
    (None: all); one collective each way. torch.nn.SyncBatchNorm is for CUDA alone, where the host waits in it."""

    def __init__(self, channels: int, *, group: Group = None, **options: Any) -> None:
        super().__init__(channels, **options)
        self.group = group

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2, f"batch norm takes (N, C, …), and got {tuple(input.shape)}"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size(self.group) == 1:
            return super().forward(input)
        return self.over_ranks(input)

    def over_ranks(self, input: Tensor) -> Tensor:
        """What training on several ranks computes, also where there is one (to check it there)."""
        if input.is_cuda and not torch.compiler.is_compiling():  # the compiler makes kernels of its own from the below
            return _OnCuda.apply(input, self.weight, self.bias, self, self._count_batch())
        with torch.autocast(input.device.type, enabled=False):
            half = input.dtype in (torch.float16, torch.bfloat16)
            normalised, mean, var = _Normalise.apply(input.float() if half else input, self.eps, self.group)
            self._track(mean, var, count=input.numel() // input.shape[1] * world_size(self.group))
            if self.weight is not None:
                normalised = normalised * _wide(self.weight, input) + _wide(self.bias, input)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _count_batch(self) -> float:
        """Count this batch; its share in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        return self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, *, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None  # noqa: PT018
        share = self._count_batch()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((var * (count / max(count - 1, 1))).to(self.running_var.dtype), share)


def synchronise(module: nn.Module, *, group: Group = None) -> nn.Module:
    """`module` with every batch norm in it (or itself) taken over the ranks of `group`; parameters and names stay."""
    if world_size(group) == 1:
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        ours = SynchronisedBatchNorm(
            module.num_features, eps=module.eps, momentum=module.momentum, affine=module.affine, group=group
        )
        ours.load_state_dict(module.state_dict())
        return ours.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, synchronise(child, group=group))
    return module


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _dense(x: Tensor) -> Tensor:
    """`x` as the kernels take it: channels last, or contiguous."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _wide(per_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) → (1, C, 1, …), to meet `x`."""
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))
