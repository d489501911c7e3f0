"""Collectives and bytes of a training step, counted from the config, and a model on paper of what they cost.

    python -m benchmarks.scaling [CONFIG.toml] [--latency-us 15] [--bandwidth-gb-s 50] [--step-s S] [--json FILE]

The counts are exact and compared with a real run by a test (tests/test_distributed.py). The times are a model, not a
measurement: a collective of b bytes over W ranks takes

    latency · log2(W)  +  2 (W − 1) / W · b / bandwidth

with latency and bandwidth as given (a 400 Gb/s card a GPU is 50 GB/s; 15 µs a hop is this file's assumption, put your
own). Gradients overlap with the backward pass; what is shown for them is their bare time. With --step-s (the time of
the step on one GPU) the share of the step lost to the collectives that nothing hides is printed too.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contracts import atomic
from contracts.config import load_config
from contracts.networks import build_backbone
from pretrain.config import PretrainConfig
from pretrain.model import Head

FLOAT = 4  # bytes: statistics, loss and gradients are float32
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "pretrain" / "r50_multicrop_850ep.toml"


@dataclass(frozen=True)
class Traffic:
    """Collectives a rank takes part in during one step, and the bytes it puts in."""

    collectives: int
    bytes: int


def traffic(config: PretrainConfig) -> dict[str, Traffic]:
    """By kind: batch norms of backbone and hidden layers (both ways), the bunch's, the loss's, and the gradients.

    A batch norm gathers mean and variance (2·C) forwards and reduces two sums (2·C) backwards, once for each
    resolution that passes through it; the head sees all views at once.
    """
    with torch.device("meta"):
        backbone = build_backbone(config.model.backbone, width=config.model.width, image_size=config.views.global_size)
        head = Head(int(backbone.num_features), config.model, truncated_normal=False)  # type: ignore[arg-type]
    resolutions = 2 if config.views.local_count else 1
    views = 2 + config.views.local_count
    widths = [m.num_features for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)] * resolutions
    widths += [m.num_features for m in head.hidden.modules() if isinstance(m, nn.BatchNorm1d)]
    parameters = sum(p.numel() for module in (backbone, head) for p in module.parameters())
    return {
        "batch norms": Traffic(2 * len(widths), 2 * 2 * sum(widths) * FLOAT),
        "bunch norm": Traffic(2, 2 * 2 * config.model.classes * FLOAT),
        "loss": Traffic(1, (2 + views * config.model.classes) * FLOAT),
        # DDP's default bucket is 25 MiB, the first one 1 MiB.
        "gradients": Traffic(1 + math.ceil(max(parameters * FLOAT - 2**20, 0) / (25 * 2**20)), parameters * FLOAT),
    }


def seconds(kind: Traffic, *, ranks: int, latency_s: float, bandwidth: float) -> float:
    """The model's time of all collectives of a kind; every one is counted as an all-reduce of its bytes."""
    if ranks == 1:
        return 0.0
    return kind.collectives * latency_s * math.log2(ranks) + 2 * (ranks - 1) / ranks * kind.bytes / bandwidth


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
    bunch = max(config.model.bunch_size // config.run.batch_size, 1)
    result: dict[str, Any] = {
        "config": arguments.config.name,
        "assumed_latency_us": arguments.latency_us,
        "assumed_bandwidth_gb_s": arguments.bandwidth_gb_s,
        "counts": {name: {"collectives": t.collectives, "bytes": t.bytes} for name, t in counted.items()},
        "model_ms": {},
    }
    print(f"{arguments.config.name}: a step of one rank (counted)")
    for name, t in counted.items():
        print(f"  {name:<14}{t.collectives:5d} collectives {t.bytes / 1e6:10.2f} MB")
    print(f"Model, not measured: {arguments.latency_us:g} µs a hop, {arguments.bandwidth_gb_s:g} GB/s a GPU; ms a step")
    for ranks in (8, 64, 256):
        row = {
            name: 1000
            * seconds(
                t,
                ranks=bunch if name == "bunch norm" else ranks,
                latency_s=arguments.latency_us * 1e-6,
                bandwidth=arguments.bandwidth_gb_s * 1e9,
            )
            for name, t in counted.items()
        }
        result["model_ms"][str(ranks)] = row
        exposed = sum(ms for name, ms in row.items() if name != "gradients")
        share = "" if arguments.step_s is None else f", {exposed / (1000 * arguments.step_s + exposed):.1%} of the step"
        values = ", ".join(f"{name} {ms:.2f}" for name, ms in row.items())
        print(f"  {ranks:3d} GPUs: {values}; not hidden {exposed:.2f}{share}")
    if arguments.json:
        atomic.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
