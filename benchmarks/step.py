"""A whole training step: ours, the naive one, and the bare networks as the limit, in turn on the same views.

    python -m benchmarks.step [--device cuda] [--case two-views|multi-crop] [--tiny] [--json FILE]
    python -m benchmarks.step --profile FILE [--device cuda] [--case two-views|multi-crop]  where our step's time goes

Ours is what `pretrain/train.py` runs between two logging steps (no data loading). Goals on one H100, ResNet-50: at
least 2 times the naive step for two views and 2.5 times for multi-crop; at most 5 % of the step outside backbone and
head; at least 90 % of the bare backbone's images/s.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.naive_step import NaiveStep
from benchmarks.side_by_side import heading, measure, ratio, table, write
from twist.contracts import files
from twist.contracts.config import validate
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import Twist, build_model, in_layout
from twist.pretrain.monitor import observe
from twist.pretrain.optim import set_rates
from twist.pretrain.plan import Plan, autocast, precision_on
from twist.pretrain.run import Run
from twist.pretrain.train import objective

IMAGENET_IMAGES = 1_281_167  # the training set's size; only schedules depend on it
LONGEST_SEARCH = 20  # steps in which a loss scaler that starts at 2^16 must have found a scale without an overflow


def case(name: str, *, batch: int, tiny: bool = False, **changes: Any) -> PretrainConfig:
    """The published two-view or multi-crop step with `batch` images; `tiny` shrinks everything, to prove the path."""
    views: dict[str, Any] = {"kind": "barlow", "local_count": 0} if name == "two-views" else {}
    model: dict[str, Any] = {"bunch_size": 0, "classes": 32768 if name == "two-views" else 4096}
    if tiny:
        views |= {"global_size": 32, "local_size": 16} | ({"local_count": 2} if name == "multi-crop" else {})
        model |= {"backbone": "resnet18", "hidden_dim": 32, "classes": 64}
    run = {"epochs": 100, "batch_size": batch, "device": "auto"}
    sections = {"data": {"root": "none"}, "views": views, "model": model, "run": run}
    for key, value in changes.items():
        section, name_of = key.split("__")
        sections[section] = {**sections[section], name_of: value}
    return validate(sections, PretrainConfig, where="benchmark")


def random_views(config: PretrainConfig, device: torch.device) -> list[Tensor]:
    images, views = config.run.batch_size, config.views
    shapes = [(2 * images, 3, views.global_size, views.global_size)]
    if views.local_count:
        shapes.append((views.local_count * images, 3, views.local_size, views.local_size))
    return [torch.randn(shape, device=device) for shape in shapes]


def build_run(config: PretrainConfig, device: torch.device) -> Run:
    plan = Plan(config, images=IMAGENET_IMAGES, world_size=1, device=device)
    return Run(config, plan, Path("unused"), device=device)


def our_step(
    config: PretrainConfig, views: list[Tensor], device: torch.device, *, run: Run | None = None
) -> Callable[[], Tensor]:
    """One step of `run` (a new one when none is given) on `views`; returns what the monitor would keep of it."""
    run = run or build_run(config, device)
    plan = run.plan

    def step() -> Tensor:
        set_rates(run.optimizer, lr=plan.lr, weight_decay=config.optim.weight_decay)
        with autocast(device, config.run.precision):
            logits = run.student(in_layout(views, config))
            loss = objective(logits, None, config.loss, stage="mutual_information", quantile=0.0)
        norm = run.learn(loss.total)
        skipped = {"nonfinite_steps": run.guard.total, "nonfinite_streak": run.guard.streak}
        return observe(logits, {**loss._asdict(), "gradient_norm": norm, **skipped}).numbers

    return step


def bare(
    student: Twist, config: PretrainConfig, views: list[Tensor], device: torch.device, *, head: bool
) -> Callable[[], None]:
    """Forward and backward of the networks alone, in our precision and layout: no loss, no optimiser."""
    batches = in_layout(views, config)

    def step() -> None:
        student.zero_grad()
        with autocast(device, config.run.precision):
            features = [student.backbone(batch) for batch in batches]
            outputs = [student.head(torch.cat(features))] if head else features
        sum(output.float().mean() for output in outputs).backward()  # type: ignore[union-attr]

    return step


def figures(config: PretrainConfig, *, device: torch.device, rounds: int, calls: int) -> dict[str, Any]:
    """Seconds of the naive step, ours, and the bare networks on the same views, and what follows from them."""
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in a run
    views = random_views(config, device)
    naive_config = config.model_copy(
        update={"run": config.run.model_copy(update={"channels_last": False, "compile": False})}
    )
    lr = config.optim.lr * config.run.batch_size / 256
    naive = NaiveStep(build_model(naive_config, device=device)[0], device=device, lr=lr)
    # A step that the loss scaler leaves out is shorter: let it find its scale before anything is timed.
    for _ in range(LONGEST_SEARCH):
        before = naive.skipped
        naive(views)
        if naive.skipped == before:
            break
    searched = naive.skipped
    run = build_run(config, device)
    # The bare networks are the run's own, so that a compiled backbone is compiled once.
    networks = (run.student, config, views, device)
    alternatives: dict[str, Callable[[], Any]] = {
        "naive": lambda: naive(views),
        "ours": our_step(config, views, device, run=run),
        "backbone and head": bare(*networks, head=True),
        "backbone": bare(*networks, head=False),
    }
    times = measure(alternatives, rounds=rounds, calls=calls)
    images_per_s = config.run.batch_size / times["ours"].median_s
    return {
        "times": times,
        "speedup": ratio(times, of="naive", to="ours"),
        "images_per_s": images_per_s,
        "share_outside_networks": 1 - 1 / ratio(times, of="ours", to="backbone and head"),
        "share_of_bare_backbone": ratio(times, of="backbone", to="ours"),
        "naive_steps_skipped": naive.skipped - searched,
        "our_steps_skipped": int(run.guard.total),
        "batch_size": config.run.batch_size,
        "compile": config.run.compile,
        "precision": precision_on(device, config.run.precision),
    }


def profile(config: PretrainConfig, *, device: torch.device, steps: int = 3) -> str:
    """Our step's time by operation and by kernel, of `steps` steps, as the profiler's tables."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    torch.backends.cudnn.benchmark = device.type == "cuda"
    run_step = our_step(config, random_views(config, device), device)
    for _ in range(3):
        run_step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profiler(activities=activities) as seen:
        for _ in range(steps):
            run_step()
        if on_gpu:
            torch.cuda.synchronize()
    averages = seen.key_averages()
    orders = ("self_device_time_total", "self_cpu_time_total") if on_gpu else ("self_cpu_time_total",)
    return "\n".join(str(averages.table(sort_by=order, row_limit=60, max_name_column_width=90)) for order in orders)


def render(name: str, found: dict[str, Any]) -> str:
    title = f"Training step, {name}, {found['batch_size']} images, {found['precision']}"
    return (
        f"{heading(title)}\n{table(found['times'])}\n"
        f"  {found['images_per_s']:.1f} images/s, {found['speedup']:.2f} times the naive step, "
        f"{found['share_of_bare_backbone']:.1%} of the bare backbone, "
        f"{found['share_outside_networks']:.1%} of the step outside backbone and head; skipped for an overflow: "
        f"{found['naive_steps_skipped']} naive steps, {found['our_steps_skipped']} of ours"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", choices=("two-views", "multi-crop"), default="multi-crop")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="Small networks and views: proves the path, nothing else.")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="Write the profiler's tables there, and time nothing.")
    arguments = parser.parse_args()
    config = case(
        arguments.case,
        batch=4 if arguments.tiny else arguments.batch,
        tiny=arguments.tiny,
        run__compile=arguments.compile,
    )
    if arguments.profile is not None:
        files.write_text(arguments.profile, profile(config, device=torch.device(arguments.device)))
        return
    found = figures(config, device=torch.device(arguments.device), rounds=arguments.rounds, calls=1)
    print(render(arguments.case, found))
    write(arguments.json, found)


if __name__ == "__main__":
    main()
