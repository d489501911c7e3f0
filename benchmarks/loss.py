"""The loss in closed form against the pair-by-pair formula, forward and backward.

    python -m benchmarks.loss [--views 14] [--batch 128] [--classes 4096] [--device cpu] [--json FILE]

The goal is at least 8 times faster for 14 views × 128 × 4096. Values are compared first.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.naive_step import pair_by_pair_loss
from benchmarks.side_by_side import heading, measure, ratio, table, write
from twist.pretrain.loss import twist_loss


def figures(*, views: int, batch: int, classes: int, device: str, rounds: int, calls: int = 1) -> dict[str, Any]:
    torch.manual_seed(0)
    logits = torch.randn(views, batch, classes, device=device, requires_grad=True)

    def closed() -> None:
        logits.grad = None
        twist_loss(logits).total.backward()

    def pairs() -> None:
        logits.grad = None
        pair_by_pair_loss(logits.unbind()).backward()

    closed()
    gradient = logits.grad
    pairs()
    assert gradient is not None
    assert logits.grad is not None
    difference = float((gradient - logits.grad).abs().max() / logits.grad.abs().max())
    assert difference < 1e-3, difference
    times = measure({"pair by pair": pairs, "closed form": closed}, rounds=rounds, calls=calls, warm_up=1)
    return {
        "times": times,
        "speedup": ratio(times, of="pair by pair", to="closed form"),
        "shape": [views, batch, classes],
        "relative_gradient_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=14)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = vars(parser.parse_args())
    path = arguments.pop("json")
    found = figures(**arguments)
    print(heading("Loss, forward and backward, {} views × {} × {}".format(*found["shape"])))
    print(table(found["times"]))
    print(f"  closed form is {found['speedup']:.1f} times faster")
    write(path, found)


if __name__ == "__main__":
    main()
