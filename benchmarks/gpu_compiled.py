"""Does the compiled backbone compute what the plain one does, forwards and backwards, in float32 and bf16?

A part of `benchmarks/gpu.py`. The backbone is what `run.compile` compiles. At initialisation a deep network with batch
norms is chaotic: at batch 4 the gradients of ResNet-50 in bf16 have nothing to do with those in float32, and even two
memory layouts in float32 are 5 % apart. So the last norm of each block gets a small weight, as it has in a network
whose blocks begin as identities, and what is left is what rounding does through the ReLUs: where an activation is
nearly zero its sign, and so a gradient, is a matter of rounding.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import step
from twist.contracts.networks import ResNet
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import build_model, in_layout
from twist.pretrain.plan import autocast, precision_on

BLOCK_WEIGHT = 0.1
# Largest relative differences in float32 without TF32. Two memory layouts on a CPU, which sum in other orders, were
# 4e-6 (features), 4e-7 (statistics), 4e-3 (all gradients) and 9e-3 (the worst convolution's) apart for ResNet-50 at
# batch 4; a GPU's algorithms may round ten times as much, and a gradient that is wrong is off by about 1.
FLOAT32 = {"features": 1e-4, "statistics": 1e-4, "gradient": 0.05, "worst_convolution": 0.1}
# In bf16 the compiled backbone may be this many times as far from float32 as the plain one is. It rounds less often,
# not more, so what is above 1 is chance.
BF16_TIMES = 1.5
# And it says nothing where bf16's gradients are no longer float32's at all. They were 0.25 apart on a CPU.
BF16_GRADIENT = 0.5


class Passed(NamedTuple):
    """One forward and backward pass: features (V·B, D), gradients by parameter, running statistics in one row."""

    features: Tensor
    gradients: list[Tensor]
    statistics: Tensor


def check(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The published multi-crop backbone, compiled and plain, in both precisions; both resolutions are compiled."""
    configs = {
        (precision, compiled): step.case(
            "multi-crop", batch=4 if tiny else 8, tiny=tiny, run__precision=precision, run__compile=compiled
        )
        for precision in ("fp32", "bf16")
        for compiled in (False, True)
    }
    torch.manual_seed(0)
    views = step.random_views(configs["fp32", False], device)
    counters.clear()
    with _exactly():
        passed = {key: one_pass(config, views, device) for key, config in configs.items()}
    graphs = counters["stats"]["unique_graphs"]
    # A processor without bf16 computes that in float32 too, and compiles nothing more.
    precisions = {precision_on(device, config.run.precision) for config in configs.values()}
    assert graphs >= 2 * len(precisions), f"{graphs} graphs: not every resolution was compiled in {precisions}"
    truth = passed["fp32", False]
    plain, bf16 = (apart(passed["bf16", compiled], truth) for compiled in (False, True))
    fp32 = apart(passed["fp32", True], truth)
    assert plain["gradient"] < BF16_GRADIENT, plain
    for name, bound in FLOAT32.items():
        assert fp32[name] < bound, (name, fp32)
        # The float32 bound beside it is for a CPU that has no bf16 and runs this in float32, too.
        assert bf16[name] < BF16_TIMES * plain[name] + bound, (name, bf16, plain)
    return {
        "architecture": configs["fp32", True].model.backbone,
        "fp32_compiled": fp32,
        "bf16_plain": plain,
        "bf16_compiled": bf16,
        "graphs": graphs,
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def one_pass(config: PretrainConfig, views: list[Tensor], device: torch.device) -> Passed:
    """The backbone of `config` on `views`, and back from a fixed random functional of its features."""
    student, _ = build_model(config, device=device)
    backbone = student.backbone
    assert isinstance(backbone, ResNet)
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            norms = [m for name, m in block.named_children() if isinstance(m, nn.BatchNorm2d)]
            nn.init.constant_(norms[-1].weight, BLOCK_WEIGHT)
    with autocast(device, config.run.precision):
        features = torch.cat([backbone(batch) for batch in in_layout(views, config)])
    generator = torch.Generator(device).manual_seed(1)
    (features.float() * torch.randn(features.shape, device=device, generator=generator)).mean().backward()
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    assert len(gradients) == len(list(backbone.parameters())), "a parameter got no gradient"
    statistics = torch.cat([b for name, b in backbone.named_buffers() if "running" in name])
    return Passed(features.detach().float(), gradients, statistics)


def apart(found: Passed, truth: Passed) -> dict[str, float]:
    """Distances relative to `truth`'s lengths: all features, all gradients, the worst convolution's, statistics."""
    return {
        "features": _relative(found.features, truth.features),
        "gradient": _relative(_row(found.gradients), _row(truth.gradients)),
        "worst_convolution": max(_relative(a, b) for a, b in zip(found.gradients, truth.gradients) if b.dim() > 1),
        "statistics": _relative(found.statistics, truth.statistics),
    }


@contextlib.contextmanager
def compiler_for(device: torch.device) -> Iterator[None]:
    """torch's own compiler on a GPU; elsewhere its tracing and differentiation alone, which take no C++ compiler."""
    whole = torch.compile
    if device.type != "cuda":
        torch.compile = functools.partial(whole, backend="aot_eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = whole  # type: ignore[assignment]
        torch._dynamo.reset()  # graphs hold their networks' memory


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """No TF32, and the same algorithms for plain and compiled: none is chosen by a race, which each could win."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def _row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
