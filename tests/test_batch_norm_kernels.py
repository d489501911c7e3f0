"""The batch norm's paths of a GPU over several ranks, where there is none: compiled, and by torch's CUDA kernels.

The compiler does all but make code. The kernels are replaced by what they compute.

The replacements are written from the kernels' definitions (ATen/native/cuda/Normalization.cuh); on a GPU the same path
is checked with the real ones by `benchmarks/gpu.py`, part `check_batch_norm`.
"""

import pytest
import torch
import torch.distributed as dist
from gloo import run_on_ranks
from torch import Tensor, nn

from twist.pretrain.distributed import SynchronisedBatchNorm, _OnCuda

ROWS = 6


def _over(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _wide(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.mean(_over(x)), (x.var(_over(x), correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(_, means, inverses, running_mean, running_var, momentum, eps, counts):
    total = counts.sum()
    share = (counts / total)[:, None]
    mean = (share * means).sum(0)
    var = (share * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * total / (total - 1), momentum)
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, inverse, _):
    out = (x - _wide(mean, x)) * _wide(inverse, x)
    return out if weight is None else out * _wide(weight, x) + _wide(bias, x)


def batch_norm_backward_reduce(gradient, x, mean, inverse, _, *needed: bool):
    total = gradient.sum(_over(x))
    along = (gradient * (x - _wide(mean, x))).sum(_over(x))
    return total, along, along * inverse if needed[1] else None, total if needed[2] else None


def batch_norm_backward_elemt(gradient, x, mean, inverse, weight, total, along, counts):
    assert counts.dtype == torch.int32  # the kernel reads them as such
    count = counts.sum()
    centred = (x - _wide(mean, x)) * _wide(inverse**2 * along / count, x)
    scale = inverse if weight is None else inverse * weight
    return (gradient - _wide(total / count, x) - centred) * _wide(scale, x)


KERNELS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


def rows(seed: int, shape: tuple[int, ...]) -> Tensor:
    return 5 + torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(channels: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.5, 2, channels, dtype=torch.float64), torch.linspace(-1, 1, channels, dtype=torch.float64)


def give_weights(norm: nn.Module, channels: int) -> None:
    if norm.weight is not None:
        norm.weight.data, norm.bias.data = weights(channels)


# Of a row the shape, whether the norm has weights, and whether a gradient of its input is wanted.
CASES = {"head's last": ((3,), False, True), "images": ((4, 2, 3), True, True), "first layer": ((3, 2, 2), True, False)}


def on_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {"compiled": compiled_on_rank(rank)}
    for kernel in KERNELS:
        setattr(torch, kernel.__name__, kernel)
    return results | {name: by_kernels(rank, *case) for name, case in CASES.items()}


def by_kernels(rank: int, shape: tuple[int, ...], affine: bool, wanted: bool) -> dict[str, Tensor]:
    calls = []
    for name in ("all_reduce", "all_gather_into_tensor"):
        setattr(dist, name, _noting(getattr(dist, name), calls, name))
    norm = SynchronisedBatchNorm(shape[0], affine=affine).double()
    give_weights(norm, shape[0])
    x = rows(rank, shape).requires_grad_(wanted)
    out = _OnCuda.apply(x, norm.weight, norm.bias, norm, norm._count_batch())
    result = {"out": out.detach(), "mean": norm.running_mean, "var": norm.running_var}
    if wanted or affine:
        (out * rows(10 + rank, shape)).sum().backward()
    if wanted:
        result["gradient"] = x.grad
    if affine:
        result |= {"weight": norm.weight.grad, "bias": norm.bias.grad}
    result["tracked"] = norm.num_batches_tracked
    result["gathers"] = torch.tensor(calls.count("all_gather_into_tensor"))
    result["reductions"] = torch.tensor(calls.count("all_reduce"))
    return result


def _noting(function, calls: list[str], name: str):
    def noted(*arguments, **named):
        calls.append(name)
        return function(*arguments, **named)

    return noted


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Tensor]]]:
    return run_on_ranks(2, on_rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_over_two_ranks_are_torchs_batch_norm_over_both_batches(name: str, two_ranks) -> None:
    (shape, affine, wanted), ranks = CASES[name], [rank[name] for rank in two_ranks]
    reference = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], affine=affine).double()
    give_weights(reference, shape[0])
    x = torch.cat([rows(rank, shape) for rank in (0, 1)]).requires_grad_()
    out = reference(x)
    (out * torch.cat([rows(10 + rank, shape) for rank in (0, 1)])).sum().backward()
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks]), out.detach())
    for rank in ranks:
        torch.testing.assert_close(rank["mean"], reference.running_mean)
        torch.testing.assert_close(rank["var"], reference.running_var)
        assert rank["tracked"] == 1
        # One collective each way, and none backwards where no gradient is wanted.
        assert (rank["gathers"], rank["reductions"]) == (1, int(wanted))
    if wanted:
        torch.testing.assert_close(torch.cat([rank["gradient"] for rank in ranks]), x.grad)
    if affine:
        for name in ("weight", "bias"):
            torch.testing.assert_close(ranks[0][name] + ranks[1][name], getattr(reference, name).grad)


def compiled_on_rank(rank: int) -> dict[str, Tensor]:
    results = {}
    for name in ("plain", "compiled"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(4, 4, 1), SynchronisedBatchNorm(4)).double()
        # Everything in one graph, the collectives too.
        called = torch.compile(network, backend="aot_eager", fullgraph=True) if name == "compiled" else network
        out = called(rows(rank, (4, 2, 3)))
        (out * rows(10 + rank, (4, 2, 3))).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
        results[name] = torch.cat([out.detach().flatten(), gradients, network[1].running_mean, network[1].running_var])
    return results


@pytest.mark.slow
def test_compiled_over_two_ranks_it_is_what_it_is_uncompiled(two_ranks) -> None:
    for rank in two_ranks:
        torch.testing.assert_close(rank["compiled"]["compiled"], rank["compiled"]["plain"])
