"""What a grid of learning rates costs a linear probe: 13 classifiers in one pass over one, per training step.

    python -m benchmarks.linear_grid [--json FILE]

A step is the frozen ResNet-50's features of random crops, and the classifiers' forward, backward and update, as
`linear-grid` and `linear` train them (1,000 classes). The goal is at most 1.3 × the step with one classifier.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.side_by_side import heading, measure, ratio, write
from twist.contracts.networks import build_backbone
from twist.transfer.engines.imagenet.recipes import LinearRecipe, load_recipe
from twist.transfer.engines.imagenet.training import Classifiers, mean_losses, new_classifier

CLASSES, DIMENSION, GOAL = 1000, 2048, 1.3


def step(protocol: str, *, batch: int, device: torch.device) -> Callable[[], None]:
    """One training step of a probe's recipe on `batch` made images."""
    recipe = load_recipe(protocol, architecture="resnet50")
    assert isinstance(recipe, LinearRecipe)
    backbone = build_backbone("resnet50").to(device).eval().requires_grad_(False)
    parts = [new_classifier(DIMENSION, CLASSES, seed=0) for _ in recipe.rates]
    model = (Classifiers(parts) if len(parts) > 1 else parts[0]).to(device)
    groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in zip(parts, recipe.rates.values())]
    optimizer = torch.optim.SGD(groups, momentum=recipe.momentum)
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.arange(batch, device=device)

    def work() -> None:
        mean_losses(model(backbone(images)), labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: step(name, batch=arguments.batch, device=device) for name in ("linear", "linear-grid")}
    times = measure(steps, rounds=arguments.rounds)
    found = {
        "times": times,
        "ratio": ratio(times, of="linear-grid", to="linear"),
        "goal": GOAL,
        "batch": arguments.batch,
    }
    print(heading("a grid of rates, seconds a training step"))
    for name, time in times.items():
        print(f"  {name:<14}{time.median_s:8.3f} s   {time.least_s:.3f}–{time.most_s:.3f} (n = {time.n})")
    print(f"  13 rates cost {found['ratio']:.2f} × one; the goal is at most {GOAL} ×")
    if arguments.json:
        write(arguments.json, found)


if __name__ == "__main__":
    main()
