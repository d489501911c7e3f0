"""The linear rule: what batch, learning rate, warm-up and iterations become on another number of GPUs.

Images a GPU stay as in the recipe. With r = processes / the recipe's GPUs, images a step and learning rates are
multiplied by r, iterations, warm-up and milestones divided by r, so the same number of images is seen (Goyal et al.
2017, arXiv 1706.02677; `DefaultTrainer.auto_scale_workers` of Detectron2, which its engine calls and a test compares).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from twist.contracts.errors import UsageError

# Shares within which a schedule is the same: rounding to whole iterations, and no more.
TOLERANCE = 0.01
Rule = Literal["as published", "linear rule", "batch kept"]


@dataclass(frozen=True)
class Schedule:
    """The part of a recipe that depends on the number of processes; `steps` are where lr drops (empty: polynomial)."""

    images_per_step: int
    learning_rate: float
    iterations: int
    warmup_iterations: int
    steps: tuple[int, ...] = ()

    @property
    def images_seen(self) -> int:
        return self.images_per_step * self.iterations


def linear_rule(schedule: Schedule, *, processes: int, reference: int) -> Schedule:
    """`schedule`, stated for `reference` GPUs, on `processes`.

    Raises:
        UsageError: the recipe's images a step do not divide over its own GPUs.
    """
    if reference == 0 or reference == processes:
        return schedule
    if schedule.images_per_step % reference:
        raise UsageError(
            f"{schedule.images_per_step} images a step do not divide over the recipe's {reference} GPUs: "
            "pass keep_batch=true, or a batch that divides."
        )
    ratio = processes / reference
    return replace(
        schedule,
        images_per_step=round(schedule.images_per_step * ratio),
        learning_rate=schedule.learning_rate * ratio,
        iterations=round(schedule.iterations / ratio),
        warmup_iterations=round(schedule.warmup_iterations / ratio),
        steps=tuple(round(step / ratio) for step in schedule.steps),
    )


def stretch(schedule: Schedule, iterations: int) -> Schedule:
    """`schedule` over another number of iterations, its form kept: warm-up and milestones in proportion.

    Over very few iterations milestones fall together or on the end; those are left out.
    """
    ratio = iterations / schedule.iterations
    steps = {round(step * ratio) for step in schedule.steps}
    return replace(
        schedule,
        iterations=iterations,
        warmup_iterations=round(schedule.warmup_iterations * ratio),
        steps=tuple(sorted(step for step in steps if 0 < step < iterations)),
    )


def leaves_protocol(published: Schedule, planned: Schedule) -> list[str]:
    """Where `planned` is no longer the published schedule, a line each; empty when it is.

    Batch, rate and warm-up may be others (searching them is part of these protocols in the literature). How many images
    are seen, and at which part of the run the rate drops, may not: a 2× run is another row of the papers' tables.
    """
    lines = []
    if abs(planned.images_seen / published.images_seen - 1) > TOLERANCE:
        lines.append(f"sees {planned.images_seen:,} images, and the protocol {published.images_seen:,}")
    ours, theirs = ([step / one.iterations for step in one.steps] for one in (planned, published))
    if len(ours) != len(theirs) or any(abs(a - b) > TOLERANCE for a, b in zip(ours, theirs)):
        drops = (", ".join(f"{share:.0%}" for share in shares) or "never" for shares in (ours, theirs))
        lines.append("the rate drops at {} of the run, and in the protocol at {}".format(*drops))
    return lines


def searched(ruled: Schedule, planned: Schedule) -> list[str]:
    """The rate where an override, and not the rule, set it: it stays within the protocol and is said."""
    if planned.learning_rate == ruled.learning_rate:
        return []
    return [f"lr {planned.learning_rate:g} by an override; the protocol's is {ruled.learning_rate:g} here"]


def choose_rule(*, processes: int, reference: int, keep_batch: bool) -> Rule:
    """Which rule applies; a recipe that names no GPUs (the samples) keeps its batch on any number."""
    if processes == reference or (reference == 0 and processes == 1):
        return "as published"
    return "batch kept" if keep_batch or reference == 0 else "linear rule"


def render_plan(
    published: Schedule,
    planned: Schedule,
    *,
    rule: Rule,
    processes: int,
    gpus: int,
    reference: int,
    changed: Sequence[str] = (),
) -> str:
    """The plan in a few lines, before anything runs; `changed` says where it is no longer the protocol."""
    told: str = rule
    if rule == "as published":
        if changed or planned != published:
            told = "changed from the recipe"
        elif reference == 0:  # the samples' own: nobody published them
            told = "as in the recipe"
    where = f"{processes} GPU{'s' * (processes > 1)}" if gpus else "1 process on the CPU"
    stated = f"; the recipe is stated for {reference} GPUs" if reference > 1 else ""
    lines = [
        f"plan: {where}{stated} → {told}",
        f"  images a step {planned.images_per_step} ({planned.images_per_step / processes:g} a process), "
        f"lr {planned.learning_rate:g}, {planned.iterations} iterations, warm-up {planned.warmup_iterations}"
        + (f", lr ×0.1 at {', '.join(map(str, planned.steps))}" if planned.steps else ""),
    ]
    if planned != published:
        lines.append(
            f"  (recipe: images a step {published.images_per_step}, lr {published.learning_rate:g}, "
            f"{published.iterations} iterations, warm-up {published.warmup_iterations}"
            + (f", steps {', '.join(map(str, published.steps))}" if published.steps else "")
            + ")"
        )
    lines += [f"  {line}" for line in changed]
    if rule == "linear rule" and planned.images_per_step < 8:
        lines.append(
            f"  batch norm takes its statistics over {planned.images_per_step} images a step instead of "
            f"{published.images_per_step}; where memory allows, keep_batch=true is closer to the published recipe"
        )
    return "\n".join(lines)
