"""A LARS step on ResNet-50 and its head (65 M parameters) against a loop over tensors.

    python -m benchmarks.lars [--device cpu] [--json FILE]

The goal is at least 3 times faster on the same device. The updates are compared first.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.naive_step import per_tensor_lars
from benchmarks.side_by_side import heading, measure, ratio, table, write
from twist.contracts.networks import Head, build_backbone
from twist.pretrain.model import Twist
from twist.pretrain.optim import LARS, parameter_groups

LR = 0.5


def figures(*, device: str, rounds: int, calls: int = 1, architecture: str = "resnet50") -> dict[str, Any]:
    ours, naive = network(architecture, device), network(architecture, device)
    optimizer = LARS(parameter_groups(ours, weight_decay=1.5e-6), lr=LR, weight_decay=1.5e-6)
    naive_parameters, buffers = list(naive.parameters()), {}
    generator = torch.Generator(device).manual_seed(0)
    for a, b in zip(ours.parameters(), naive.parameters()):
        a.grad = 0.01 * torch.randn(a.shape, device=device, generator=generator)
        b.grad = a.grad.clone()
    optimizer.step()  # it overwrites its gradients, which from here on are any
    per_tensor_lars(naive_parameters, buffers, lr=LR)
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), naive.parameters()))
    assert difference < 1e-5, difference
    times = measure(
        {"tensor by tensor": lambda: per_tensor_lars(naive_parameters, buffers, lr=LR), "ours": optimizer.step},
        rounds=rounds,
        calls=calls,
    )
    return {
        "times": times,
        "speedup": ratio(times, of="tensor by tensor", to="ours"),
        "parameters": sum(p.numel() for p in ours.parameters()),
        "largest_difference": difference,
    }


def network(architecture: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    backbone = build_backbone(architecture)
    return Twist(backbone, Head(int(backbone.num_features), 4096, 4096, activation="relu")).to(device)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = vars(parser.parse_args())
    path = arguments.pop("json")
    found = figures(**arguments)
    print(heading(f"LARS step, {found['parameters'] / 1e6:.1f} M parameters"))
    print(table(found["times"]))
    print(f"  ours is {found['speedup']:.1f} times faster")
    write(path, found)


if __name__ == "__main__":
    main()
