"""What bfloat16 gains on a CPU that has the instructions: forward and backward of a ResNet-18, against float32.

    python -m benchmarks.cpu_precision [--size 32] [--batch 128] [--json FILE]

On a processor without them both alternatives are float32 (`pretrain/precision.py`), and the ratio is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import heading, measure, ratio, table, write
from contracts.networks import build_backbone
from pretrain.precision import Precision, autocast, precision_on

CPU = torch.device("cpu")


def figures(*, size: int, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network = build_backbone("resnet18").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

    def step(precision: Precision) -> Callable[[], None]:
        def run() -> None:
            network.zero_grad()
            with autocast(CPU, precision):
                features = network(views)
            features.float().square().mean().backward()

        return run

    times = measure({"float32": step("fp32"), "bfloat16": step("bf16")}, rounds=rounds)
    return {
        "times": times,
        "speedup": ratio(times, of="float32", to="bfloat16"),
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
    print(f"  bfloat16 (done as {found['bf16_becomes']}) is {found['speedup']:.2f} times as fast")
    write(given.json, found)


if __name__ == "__main__":
    main()
