"""What a suite file says: its keys, what they may not say, and the runs that it asks for."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from twist.contracts.config import Config, parse_override, problems, read_toml, validate
from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.files import sha256_file, sha256_json
from twist.converters import sources
from twist.transfer.protocols import PROTOCOLS

RANDOM = "random"


class WeightsEntry(Config):
    """One set of weights. `file` is a checkpoint that `twist convert` reads (relative to where the suite is started),
    or `random`. `method` and `epochs` are for files that do not say them; `overrides` go to its runs alone, and `seeds`
    stand for the suite's (of random weights each is another initialisation, as others are other pretrainings)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    file: str
    layout: str | None = None
    branch: str | None = None
    method: str | None = None
    epochs: int | None = Field(default=None, gt=0)
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    overrides: tuple[str, ...] = ()


class SuiteConfig(Config):
    """A suite file. `overrides` and `grid` are by protocol; a grid is the product of its lists, one run each."""

    weights: tuple[WeightsEntry, ...] = Field(min_length=1)
    protocols: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    # Other seeds for some protocols: VOC detection is a mean of five in the literature.
    seeds_of: dict[str, tuple[int, ...]] = Field(default={})
    overrides: dict[str, tuple[str, ...]] = Field(default={})
    grid: dict[str, dict[str, tuple[float | int | str | bool, ...]]] = Field(default={})
    gpus_per_run: int = Field(default=1, gt=0)
    # submitit's parameters, and how many jobs may be queued or running at a time.
    slurm: dict[str, Any] = Field(default={})
    slurm_jobs_at_once: int = Field(default=64, gt=0)


def load_suite(path: Path, *, data: Path) -> SuiteConfig:
    """Read and examine a suite file.

    Raises:
        UsageError: one message with a sentence for every problem: keys, values, protocols, files, the data folder.
    """
    values = read_toml(path)
    found = problems(values, SuiteConfig, where=str(path))
    if not found:
        suite = validate(values, SuiteConfig, where=str(path))
        found = [f"{path}: {problem}" for problem in _disagreements(suite)]
    if not data.is_dir():
        found.append(f"There is no data folder at {data}: make one with `twist data sample`, or check the path.")
    if found:
        raise UsageError("\n".join(found))
    return suite


def runs_of(suite: SuiteConfig, protocol: str, entry: WeightsEntry) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """Seed, overrides and key of every run of these weights under this protocol."""
    seeds = entry.seeds or suite.seeds_of.get(protocol, suite.seeds)
    for seed, point in itertools.product(seeds, _grid(suite.grid.get(protocol, {}))):
        overrides = (*suite.overrides.get(protocol, ()), *entry.overrides, *point)
        identity = {
            "weights": RANDOM if entry.file == RANDOM else digest(entry.file),
            "layout": entry.layout,
            "branch": entry.branch,
            "method": entry.method,
            "epochs": entry.epochs,
            "protocol": protocol,
            "seed": seed,
            "overrides": list(overrides),
        }
        yield seed, overrides, sha256_json(identity)[:12]


def _grid(axes: Mapping[str, Sequence[Any]]) -> list[tuple[str, ...]]:
    """Every combination, as overrides; one empty combination when there are no axes."""
    points = []
    for values in itertools.product(*axes.values()):
        # JSON's scalars are TOML's: true, 0.02, "text".
        points.append(tuple(f"{key}={json.dumps(value)}" for key, value in zip(axes, values)))
    return points


@cache
def digest(file: str) -> str:
    """SHA-256 of a checkpoint, read once a process."""
    return sha256_file(file)


def _disagreements(suite: SuiteConfig) -> Iterator[str]:
    for protocol in suite.protocols:
        if protocol not in PROTOCOLS:
            yield f'there is no protocol "{protocol}".{did_you_mean(protocol, PROTOCOLS)}'
    for where, names in (("overrides", suite.overrides), ("grid", suite.grid), ("seeds", suite.seeds_of)):
        for protocol in names:
            if protocol not in suite.protocols:
                yield f'{where} are given for "{protocol}", which is not among the protocols.'
    lists: dict[str, Sequence[object]] = {
        "weights name": [entry.name for entry in suite.weights],
        "protocol": suite.protocols,
        "seed": suite.seeds,
        **{f"seed of {entry.name}": entry.seeds or () for entry in suite.weights},
        **{f"seed of {protocol}": seeds for protocol, seeds in suite.seeds_of.items()},
        # As overrides spell them: 1, 1.0 and true are equal to Python and three runs here.
        **{
            f"grid value of {protocol}, {key} =": [json.dumps(value) for value in values]
            for protocol, axes in suite.grid.items()
            for key, values in axes.items()
        },
    }
    for what, listed in lists.items():
        for name, count in Counter(listed).items():
            if count > 1:
                yield f"the {what} {name} is listed {count} times; once is enough."
    for entry in suite.weights:
        if entry.file != RANDOM and not Path(entry.file).is_file():
            yield f"there is no file {entry.file} for the weights {entry.name}; check the path or fetch the file."
        yield from _layout_disagreements(entry)
    yield from _equal_weights(suite)
    every = [
        *(o for e in suite.weights for o in e.overrides),
        *(o for values in suite.overrides.values() for o in values),
    ]
    for override in every:
        try:
            parse_override(override)
        except UsageError as error:
            yield str(error)


def _equal_weights(suite: SuiteConfig) -> Iterator[str]:
    """Entries that share a run: both would make it, and the second record would replace the first."""
    whose: dict[str, str] = {}
    told = set()
    there = [entry for entry in suite.weights if entry.file == RANDOM or Path(entry.file).is_file()]
    for protocol, entry in itertools.product(dict.fromkeys(suite.protocols), there):
        for seed, _, key in runs_of(suite, protocol, entry):
            pair = (whose.setdefault(key, entry.name), entry.name)
            if pair[0] != pair[1] and pair not in told:
                told.add(pair)
                yield (
                    f"the weights {pair[0]} and {pair[1]} are the same (the same file, and nothing else that differs), "
                    f"and both ask for {protocol} with seed {seed}; remove one, or give it `seeds` of its own."
                )


def _layout_disagreements(entry: WeightsEntry) -> Iterator[str]:
    if entry.layout is None:
        return
    layout = sources.BY_NAME.get(entry.layout)
    if layout is None:
        near = did_you_mean(entry.layout, sources.BY_NAME)
        yield f'there is no layout "{entry.layout}" (weights {entry.name}).{near}'
        return
    branches = [branch.name for branch in layout.branches]
    if entry.branch is not None and entry.branch not in branches:
        yield (
            f'the layout {entry.layout} has no branch "{entry.branch}" (weights {entry.name}).'
            f"{did_you_mean(entry.branch, branches)}"
        )
