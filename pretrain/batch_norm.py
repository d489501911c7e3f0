"""Batch norm over the images of several ranks: the head's last norm over a bunch, every other one over all ranks.

With one rank in the group it is torch's own. `N` rows a rank, `C` channels; all ranks have the same `N`. One collective
each way. torch.nn.SyncBatchNorm runs on CUDA only, and there makes the host wait for the device in every forward pass,
because it leaves out ranks without rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from twist.pretrain import distributed
from twist.pretrain.distributed import Group


class _Normalise(torch.autograd.Function):
    """x → (x − mean) / √(var + eps), with mean and biased variance over rows, positions and the ranks of the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(x, dim=_all_but_channels(x), correction=0)  # (C,)
        # Moments about each rank's own mean, combined afterwards: sums of squares would cancel for large means.
        of_ranks = distributed.gathered(torch.stack([mean, var]), group)  # (W, 2, C)
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
        means = distributed.averaged(torch.stack([gradient.mean(over), (gradient * normalised).mean(over)]), ctx.group)
        along = _wide(means[0], gradient) + normalised * _wide(means[1], gradient)
        return (gradient - along) * _wide(scale, gradient), None, None


class _OnCuda(torch.autograd.Function):
    """The same with the affine part, by the kernels of torch.nn.SyncBatchNorm, which keep only `x` for the way back and
    take half-precision `x` as it is. Updates the running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Any, momentum: float) -> Tensor:
        x = _dense(x)
        mean, inverse = torch.batch_norm_stats(x, norm.eps)  # (C,) each, the second is 1/√(var + eps)
        of_ranks = distributed.gathered(torch.stack([mean, inverse]), norm.group)  # (W, 2, C)
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
            total, along = distributed.summed(torch.stack([total, along]), ctx.group)
            of_x = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, weight, total, along, counts)
        return of_x, of_weight if needs_weight else None, of_bias if needs_bias else None, None, None


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's batch norm, of any number of dimensions and with its names, with training statistics over the ranks of
    `group` (None: all)."""

    def __init__(self, channels: int, *, group: Group = None, **options: Any) -> None:
        super().__init__(channels, **options)
        self.group = group

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2, f"batch norm takes (N, C, …), and got {tuple(input.shape)}"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size(self.group) == 1:
            return super().forward(input)
        return self.over_ranks(input)

    def over_ranks(self, input: Tensor) -> Tensor:
        """What training on several ranks computes, also where there is one (to check it there)."""
        if input.is_cuda and not torch.compiler.is_compiling():  # the compiler makes kernels of its own from the below
            return _OnCuda.apply(input, self.weight, self.bias, self, self._count_batch())
        with torch.autocast(input.device.type, enabled=False):
            half = input.dtype in (torch.float16, torch.bfloat16)
            normalised, mean, var = _Normalise.apply(input.float() if half else input, self.eps, self.group)
            self._track(mean, var, count=input.numel() // input.shape[1] * distributed.world_size(self.group))
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
    if distributed.world_size(group) == 1:
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
