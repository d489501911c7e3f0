"""What makes a step on small views cheap on a CPU: matrix products for one-pixel maps, and bfloat16.

    python -m benchmarks.small_views [--size 32] [--batch 128] [--json FILE]

Forward and backward of a ResNet-18: torchvision's in float32 and in bfloat16, and ours (`contracts/networks.py`,
`Conv3x3`) in both. On a processor without bfloat16 instructions that is float32 too (`pretrain/plan.py`).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet18

from benchmarks.side_by_side import heading, measure, ratio, table, write
from twist.contracts.networks import build_backbone
from twist.pretrain.config import Precision
from twist.pretrain.plan import autocast, precision_on

CPU = torch.device("cpu")


def figures(*, size: int, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    theirs, ours = resnet18(), build_backbone("resnet18")
    theirs.fc = nn.Identity()  # type: ignore[assignment]
    views = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

    def step(network: nn.Module, precision: Precision) -> Callable[[], None]:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def run() -> None:
            network.zero_grad()
            with autocast(CPU, precision):
                features = network(views)
            features.float().square().mean().backward()

        return run

    times = measure(
        {
            "torchvision, float32": step(theirs, "fp32"),
            "torchvision, bfloat16": step(theirs, "bf16"),
            "ours, float32": step(ours, "fp32"),
            "ours, bfloat16": step(ours, "bf16"),
        },
        rounds=rounds,
    )
    return {
        "times": times,
        "speedup": ratio(times, of="torchvision, bfloat16", to="ours, bfloat16"),
        "speedup_float32": ratio(times, of="torchvision, float32", to="ours, float32"),
        "speedup_of_bfloat16": ratio(times, of="ours, float32", to="ours, bfloat16"),
        "views_per_s": {name: batch / time.median_s for name, time in times.items()},
        "size": size,
        "batch": batch,
        "bf16_becomes": precision_on(CPU, "bf16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = figures(size=given.size, batch=given.batch, rounds=given.rounds)
    print(heading(f"ResNet-18, {given.batch} views of {given.size} pixels, forward and backward"))
    print(table(found["times"]))
    print(f"  ours over torchvision: {found['speedup']:.2f} (bfloat16), {found['speedup_float32']:.2f} (float32)")
    print(f"  bfloat16 (done as {found['bf16_becomes']}) over float32, ours: {found['speedup_of_bfloat16']:.2f}")
    write(given.json, found)


if __name__ == "__main__":
    main()
