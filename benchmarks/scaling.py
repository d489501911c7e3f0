"""Collectives and bytes of a training step, counted from the config, and a model on paper of what they cost.

    python -m benchmarks.scaling [CONFIG.toml] [--latency-us 15] [--bandwidth-gb-s 50] [--step-s S] [--json FILE]

The counts, collectives and bytes of each kind, are those of a real run: `tests/test_scaling.py` listens to one. Two
things are left out, which nobody waits for: the vote on stopping (4 bytes over gloo, answered a step later), and the
log's mean every `run.log_every_steps` steps. The times are a model, not a measurement. Of b bytes that each of W ranks
puts in, a ring takes

    all-reduce:  latency · log2(W)  +  2 (W − 1) / W · b / bandwidth
    all-gather:  latency · log2(W)  +      (W − 1)  · b / bandwidth      every rank receives what the others put in

with latency and bandwidth as given (a 400 Gb/s card a GPU is 50 GB/s; 15 µs a hop is this file's assumption, put your
own). Gradients overlap with the backward pass; what is shown for them is their bare time. With --step-s (the time of
the step on one GPU) the share of the step lost to the collectives that nothing hides is printed too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contracts import atomic
from contracts.config import load_config
from contracts.errors import UserError
from contracts.networks import build_backbone
from pretrain.config import PretrainConfig
from pretrain.distributed import ranks_per_bunch
from pretrain.model import build_head

FLOAT = 4  # bytes: statistics, loss and gradients are float32
# DistributedDataParallel's defaults: the first bucket is small, so that sending begins early.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "pretrain" / "r50_multicrop_850ep.toml"


@dataclass(frozen=True)
class Traffic:
    """All-reduces and all-gathers that a rank takes part in during one step, and the bytes it puts into each kind."""

    reduces: int
    reduced_bytes: int
    gathers: int = 0
    gathered_bytes: int = 0

    @property
    def collectives(self) -> int:
        return self.reduces + self.gathers


def traffic(config: PretrainConfig) -> dict[str, Traffic]:
    """By kind: batch norms of backbone and hidden layers (both ways), the bunch's, the loss's, and the gradients.

    A batch norm gathers two statistics a channel (2·C) forwards and reduces two sums (2·C) backwards, once for each
    resolution that passes through it; the head sees all views at once. The bunch's counts are of a bunch that is
    shared; where it is one rank's own, `seconds` is zero.
    """
    with torch.device("meta"):
        backbone = build_backbone(config.model.backbone, width=config.model.width, image_size=config.views.global_size)
        head = build_head(int(backbone.num_features), config.model, truncated_normal=False)  # type: ignore[arg-type]
    resolutions = 2 if config.views.local_count else 1
    views = 2 + config.views.local_count
    widths = [m.num_features for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)] * resolutions
    widths += [m.num_features for m in head.hidden.modules() if isinstance(m, nn.BatchNorm1d)]
    # Gradients come in about the opposite order of the parameters' use.
    sizes = [p.numel() * FLOAT for module in (head, backbone) for p in reversed(list(module.parameters()))]
    return {
        "batch norms": _both_ways(widths),
        "bunch norm": _both_ways([config.model.classes]),
        "loss": Traffic(1, (2 + views * config.model.classes) * FLOAT),
        "gradients": Traffic(buckets(sizes), sum(sizes)),
    }


def _both_ways(widths: list[int]) -> Traffic:
    bytes_ = 2 * sum(widths) * FLOAT
    return Traffic(reduces=len(widths), reduced_bytes=bytes_, gathers=len(widths), gathered_bytes=bytes_)


def buckets(sizes: Iterable[int]) -> int:
    """Buckets that DistributedDataParallel fills with gradients of these sizes (bytes), in the order they come.

    A bucket is closed by the gradient that reaches its limit, and no gradient is cut: a large matrix is a bucket.
    """
    closed, filled = 0, 0
    for size in sizes:
        filled += size
        if filled >= (BUCKET if closed else FIRST_BUCKET):
            closed, filled = closed + 1, 0
    return closed + (filled > 0)


def seconds(kind: Traffic, *, ranks: int, latency_s: float, bandwidth: float) -> float:
    """The model's time of all collectives of a kind among `ranks`; bandwidth in bytes/s."""
    if ranks == 1:
        return 0.0
    received = 2 * (ranks - 1) / ranks * kind.reduced_bytes + (ranks - 1) * kind.gathered_bytes
    return kind.collectives * latency_s * math.log2(ranks) + received / bandwidth


def model_ms(config: PretrainConfig, *, ranks: int, latency_s: float, bandwidth: float) -> dict[str, float]:
    """The model's milliseconds a step by kind.

    Raises:
        UserError: a run with so many ranks would be refused, because the bunch does not divide over them.
    """
    bunch = ranks_per_bunch(config.model.bunch_size, batch_size=config.run.batch_size, world_size=ranks)
    return {
        name: 1000
        * seconds(
            kind, ranks=bunch if name == "bunch norm" else ranks, latency_s=latency_s, bandwidth=bandwidth
        )
        for name, kind in traffic(config).items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("--latency-us", type=float, default=15.0)
    parser.add_argument("--bandwidth-gb-s", type=float, default=50.0)
    parser.add_argument("--step-s", type=float, help="Measured time of the step on one GPU.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.config, PretrainConfig)
    counted = traffic(config)
    result: dict[str, Any] = {
        "config": arguments.config.name,
        "assumed_latency_us": arguments.latency_us,
        "assumed_bandwidth_gb_s": arguments.bandwidth_gb_s,
        "counts": {name: asdict(kind) for name, kind in counted.items()},
        "model_ms": {},
    }
    print(f"{arguments.config.name}: a step of one rank (counted)")
    for name, kind in counted.items():
        print(
            f"  {name:<14}{kind.collectives:5d} collectives {(kind.reduced_bytes + kind.gathered_bytes) / 1e6:10.2f} MB"
        )
    print(f"Model, not measured: {arguments.latency_us:g} µs a hop, {arguments.bandwidth_gb_s:g} GB/s a GPU; ms a step")
    for ranks in (8, 64, 256):
        try:
            row = model_ms(
                config,
                ranks=ranks,
                latency_s=arguments.latency_us * 1e-6,
                bandwidth=arguments.bandwidth_gb_s * 1e9,
            )
        except UserError as error:
            print(f"  {ranks:3d} GPUs: {error}")
            continue
        result["model_ms"][str(ranks)] = row
        exposed = sum(ms for name, ms in row.items() if name != "gradients")
        share = "" if arguments.step_s is None else f", {exposed / (1000 * arguments.step_s + exposed):.1%} of the step"
        values = ", ".join(f"{name} {ms:.2f}" for name, ms in row.items())
        print(f"  {ranks:3d} GPUs: {values}; not hidden {exposed:.2f}{share}")
    if arguments.json:
        atomic.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
