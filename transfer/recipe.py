"""What a protocol's recipe becomes on this machine and under a user's overrides, and what of it is recorded."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from twist.contracts.config import parse_override
from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.run_folder import differences
from twist.transfer.request import Controls

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

    def render(self, processes: int | None = None) -> str:
        share = f" ({self.images_per_step / processes:g} a process)" if processes else ""
        drops = f", lr ×0.1 at {', '.join(map(str, self.steps))}" if self.steps else ""
        return (
            f"images a step {self.images_per_step}{share}, lr {self.learning_rate:g}, {self.iterations} iterations, "
            f"warm-up {self.warmup_iterations}{drops}"
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


def linear_rule(schedule: Schedule, *, processes: int, reference: int) -> Schedule:
    """`schedule`, stated for `reference` GPUs, on `processes`: images a GPU stay.

    With r = processes / reference, images a step and rates are multiplied by r, iterations, warm-up and milestones
    divided by it, so that as many images are seen (Goyal et al. 2017, arXiv 1706.02677; as Detectron2's
    `DefaultTrainer.auto_scale_workers`).
    """
    if schedule.images_per_step % reference:
        raise UsageError(
            f"{schedule.images_per_step} images a step do not divide over the recipe's {reference} GPUs: "
            "pass keep_batch=true, or a batch that divides."
        )
    ratio = processes / reference
    return replace(
        stretch(schedule, round(schedule.iterations / ratio)),
        images_per_step=round(schedule.images_per_step * ratio),
        learning_rate=schedule.learning_rate * ratio,
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


def choose_rule(*, processes: int, reference: int, keep_batch: bool) -> Rule:
    """Which rule applies; a recipe that names no GPUs (the samples) keeps its batch on any number."""
    if processes == (reference or 1):
        return "as published"
    return "batch kept" if keep_batch or reference == 0 else "linear rule"


def render_plan(
    published: Schedule, planned: Schedule, *, rule: Rule, processes: int, gpus: int, reference: int,
    changed: Sequence[str] = (),
) -> str:  # fmt: skip
    """The plan in a few lines, before anything runs; `changed` says where it is no longer the protocol."""
    how: str = rule
    if rule == "as published" and (changed or planned != published):
        how = "changed from the recipe"
    elif rule == "as published" and reference == 0:  # the samples' own: nobody published them
        how = "as in the recipe"
    where = f"{processes} GPU{'s' * (processes > 1)}" if gpus else "1 process on the CPU"
    stated = f"; the recipe is stated for {reference} GPUs" if reference > 1 else ""
    lines = [f"plan: {where}{stated} → {how}", planned.render(processes)]
    lines += [f"(recipe: {published.render()})"] if planned != published else []
    lines += changed
    if rule == "linear rule" and planned.images_per_step < 8:
        lines.append(
            f"batch norm takes its statistics over {planned.images_per_step} images a step instead of "
            f"{published.images_per_step}; where memory allows, keep_batch=true is closer to the published recipe"
        )
    return "\n  ".join(lines)


# ── Overrides ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# A config, or the recipe made of it, as JSON has it.
Tree = dict[str, Any]


def read_override(override: str, config: Any, options: Mapping[str, str], *, copied: Sequence[str] = ()) -> Any:
    """(dotted key, value) of an override that fits `config`, a framework's own tree of dicts and lists.

    `options` are keys that an option of the command line decides, `*` as in file names; no suggestions come from
    sections that are `copied`.
    """
    keys, value = parse_override(override)
    path = ".".join(keys)
    for name, option in options.items():
        if _under(path, (name,)):
            raise UsageError(f'"{override}": a run takes {path} from {option} alone; pass {option} in its place.')
    node = config
    for depth, key in enumerate(keys):
        inside = isinstance(node, (list, tuple)) and key.isdigit() and int(key) < len(node)
        if not inside and not (isinstance(node, dict) and key in node):
            used = {name: section for name, section in config.items() if name not in copied}
            elsewhere = list(_paths_to(key, used))
            near = [*map(str, node if isinstance(node, dict) else ()), *(() if depth else Controls.model_fields)]
            hint = f" Did you mean {' or '.join(elsewhere)}?" if 0 < len(elsewhere) <= 3 else did_you_mean(key, near)
            raise UsageError(f'The config has no key {".".join(keys[: depth + 1])} (in "{override}").{hint}')
        node = node[int(key)] if inside else node[key]
    if isinstance(node, dict):
        raise UsageError(f'"{override}": {path} is a section; name a key of it ({", ".join(sorted(node))}).')
    if isinstance(node, bool):  # a bare word would be a string, and every string is true
        value = {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise UsageError(f'"{override}" does not fit: {path} is {node!r}; write true or false.')
    elif isinstance(node, (int, float)) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UsageError(f'"{override}" does not fit: {path} is {node!r}, a number.')
    elif isinstance(node, tuple) and isinstance(value, list):  # mmseg insists on its tuples
        value = tuple(value)
    return path, value


def departures(before: Tree, after: Tree, *, free: Sequence[str]) -> list[str]:
    """What overrides changed, a line each; `free` names what may change (dotted, `*` as in file names)."""
    return [
        f"changed from the protocol: {path} {was!r} → {now!r}"
        for path, was, now in differences(before, after)
        if not _under(path, free)
    ]


def recorded(before: Tree, after: Tree, *, recipe_of: Callable[[Tree], Tree], harmless: Sequence[str]) -> Tree:
    """The recipe of `after`, and under `overrides` what changed since `before` without showing in it, if anything.

    A recipe leaves out what is the weights', the data's and the machine's. Whether a change shows is found by taking it
    back, so no list of what a recipe holds can be out of date.
    """
    recipe = recipe_of(after)
    hidden = {
        path: now
        for path, was, now in differences(before, after)
        if not _under(path, harmless) and recipe_of(_replaced(after, path, was)) == recipe
    }
    return {**recipe, "overrides": hidden} if hidden else recipe


def _replaced(tree: Tree, path: str, value: Any) -> Tree:
    tree = copy.deepcopy(tree)
    node: Any = tree
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value
    return tree


def _paths_to(key: str, node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths, in quotes, of `key` in the sections of `node`; lists are no sections."""
    for name, section in node.items() if isinstance(node, dict) else ():
        if name == key:
            yield f'"{prefix}{name}"'
        yield from _paths_to(key, section, f"{prefix}{name}.")


def _under(path: str, names: Iterable[str]) -> bool:
    """Whether `path` is one of `names` or lies inside one."""
    parts = path.split(".")
    return any(
        len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))
        for wanted in (name.split(".") for name in names)
    )
