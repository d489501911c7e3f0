"""A suite file, the runs that it asks for, which of them have their record, and how long the rest may take."""

from __future__ import annotations

import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from twist.catalog.card import find_card
from twist.catalog.card_data import require_card_data
from twist.catalog.check import data_of, identify_data
from twist.catalog.data_sets import find_root
from twist.contracts.config import Config, problems, read_toml, validate
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.files import sha256_file, sha256_json
from twist.contracts.machine import SLURM_KEYS
from twist.contracts.record import RunRecord, Seed, find_records, read_record
from twist.converters import zoo
from twist.transfer.protocols import PROTOCOLS, Protocol, check_protocol

RANDOM = "random"
MOST_RUNS = 20_000
Override = Annotated[str, Field(pattern=r"^[^=]+=", description="key=value")]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]


class WeightsEntry(Config):
    """One set of weights. `file` is a checkpoint that `twist convert` reads (relative to where the suite is started),
    `zoo:NAME`, or `random`. `method` and `epochs` are for files that do not say them; `overrides` go to its runs alone,
    `seeds` replace the suite's (of random weights each is another initialisation), and `protocols` are those of the
    suite's that it runs under (None: all)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    file: str
    layout: str | None = None
    branch: str | None = None
    heads: int | None = Field(default=None, gt=0)  # of a ViT whose file does not say them
    method: str | None = None
    epochs: int | None = Field(default=None, gt=0)
    seeds: Seeds | None = None
    overrides: tuple[Override, ...] = ()
    protocols: tuple[str, ...] | None = None

    @property
    def published(self) -> bool:
        return self.file.startswith(zoo.PREFIX)

    @property
    def exists(self) -> bool:
        return self.file == RANDOM or self.published or Path(self.file).is_file()

    def fetched(self, *, download: bool) -> WeightsEntry:
        """Of `zoo:NAME` the file in the user's cache, and what the zoo says of it where the suite does not.

        Without `download` an entry whose file is not there stays as it is.
        """
        if not self.published or not (download or zoo.find(self.file).file.is_file()):
            return self
        file, how = zoo.located(self.file, **self.model_dump(include={"layout", "branch", "heads", "method", "epochs"}))
        return self.model_copy(update={"file": str(file), **how})


class SuiteConfig(Config):
    """A suite file. `overrides` and `grid` are by protocol; a grid is the product of its lists, one run each."""

    weights: tuple[WeightsEntry, ...] = Field(min_length=1)
    protocols: tuple[str, ...] = Field(min_length=1)
    seeds: Seeds = (0, 1, 2)
    # Other seeds for some protocols: VOC detection is a mean of five in the literature.
    seeds_of: dict[str, Seeds] = Field(default={})
    # A data card or root of its own for some protocols, instead of `--data`.
    data: dict[str, str] = Field(default={})
    overrides: dict[str, tuple[Override, ...]] = Field(default={})
    grid: dict[str, dict[str, tuple[float | int | str | bool, ...]]] = Field(default={})
    gpus_per_run: int = Field(default=1, gt=0)
    # Without GPUs: runs at a time, which share the cores; None: as many as cores, and as memory has 2 GiB for each.
    cpu_runs_at_once: int | None = Field(default=None, gt=0)
    # Of each job: partition, account, cpus, timeout_min, … as for `twist pretrain --slurm`, or any of submitit's own
    # parameters; and how many jobs may be queued or running at a time.
    slurm: dict[str, Any] = Field(default={})
    slurm_jobs_at_once: int = Field(default=64, gt=0)
    # Of each task of Ray: num_cpus, memory, resources, max_retries, …; all tasks wait in Ray's own queue.
    ray: dict[str, Any] = Field(default={})

    @property
    def submitit_options(self) -> dict[str, Any]:
        return {SLURM_KEYS.get(key, key): value for key, value in self.slurm.items()}


@dataclass(frozen=True)
class Job:
    """One run. `key` identifies it by content: checkpoint, protocol, seed and overrides. `data` names what it is to be
    measured on, `place` is its data root or card, and `point` those of the overrides that are the grid's."""

    weights: WeightsEntry
    protocol: str
    seed: int
    overrides: tuple[str, ...]
    key: str
    point: tuple[str, ...] = ()
    data: str | None = None
    place: Path = Path()

    @property
    def title(self) -> str:
        """What tells it from the suite's others."""
        point = f" [{', '.join(self.point)}]" if self.point else ""
        return f"{self.protocol} · {self.weights.name} · seed {self.seed}{point}"

    def folder(self, output: Path) -> Path:
        return output / self.protocol / f"{self.weights.name}-seed{self.seed}-{self.key}"

    def made(self, record: RunRecord) -> bool:
        """Whether `record` is of this job; earlier versions said so in a note."""
        return record.job == self.key or f"Run by a suite as job {self.key}." in record.notes


@dataclass(frozen=True)
class Workload:
    """All jobs of a suite, the records of those that are done by key, and mean wall times of past records."""

    jobs: tuple[Job, ...]
    done: Mapping[str, RunRecord]
    past_s: Mapping[str, float]

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if job.key not in self.done]

    def expected_s(self, job: Job) -> float | None:
        """From past records of the protocol, else the hours in the table of protocols; None where neither is known."""
        hours = PROTOCOLS[job.protocol].hours
        return self.past_s.get(job.protocol, None if hours is None else hours * 3600)


def load_suite(path: Path, *, data: Path | None, download: bool = False) -> SuiteConfig:
    """Read and check a suite file; its `data` then has a place for every protocol, `data` where it named none.

    Published weights are fetched where `download` says so. `UsageError` has one line for every problem.
    """
    values = read_toml(path)
    found = problems(values, SuiteConfig, where=str(path))
    if not found:
        suite = validate(values, SuiteConfig, where=str(path))
        found = [f"{path}: {problem}" for check in (_unknown_names, _repetitions) for problem in check(suite)]
        entries = []
        for entry in suite.weights if not found else ():
            try:
                entries.append(entry.fetched(download=download))
            except UserError as error:
                found.append(f"{path}: {error}")
    if found:
        raise UsageError("\n".join(found))
    others = {protocol: str(data or find_root(None)) for protocol in suite.protocols if protocol not in suite.data}
    return suite.model_copy(update={"weights": tuple(entries), "data": {**suite.data, **others}})


def find_work(suite: SuiteConfig, *, results: Path) -> Workload:
    """The jobs of a loaded `suite`, and the records of them under `results`; `UserError` for one of other data."""
    jobs: list[Job] = []
    for protocol in suite.protocols:
        place = Path(suite.data[protocol])
        name = _data_name(PROTOCOLS[protocol], place)
        of_protocol = (job for entry in suite.weights for job in jobs_of(suite, protocol, entry))
        jobs += [replace(job, data=name, place=place) for job in of_protocol]
    records = [read_checked(file) for file in find_records([results])] if results.is_dir() else []
    done, times = {}, defaultdict(list)
    for job in jobs:
        if own := [record for record in records if job.made(record)]:
            done[job.key] = of_its_data(job, own, results)
    for record in records:
        times[record.protocol].append(record.wall_s)
    return Workload(tuple(jobs), done, {protocol: sum(values) / len(values) for protocol, values in times.items()})


def _data_name(row: Protocol, place: Path) -> str | None:
    if (card := find_card(place)) is not None:
        return require_card_data(card, row.task).name
    return identify_data(row.data, find_root(place), subset=row.subset)


def jobs_of(suite: SuiteConfig, protocol: str, entry: WeightsEntry) -> Iterator[Job]:
    """Every run of these weights under this protocol: its seeds × the points of the protocol's grid."""
    if entry.protocols is not None and protocol not in entry.protocols:
        return
    axes = suite.grid.get(protocol, {})
    seeds = entry.seeds or suite.seeds_of.get(protocol, suite.seeds)
    # Not `product(seeds, product(…))`, which would hold all points of a grid at once.
    for seed in seeds:
        for values in itertools.product(*axes.values()):
            # JSON's scalars are TOML's: true, 0.02, "text".
            point = tuple(f"{key}={json.dumps(value)}" for key, value in zip(axes, values))
            overrides = (*suite.overrides.get(protocol, ()), *entry.overrides, *point)
            identity = {
                "weights": RANDOM if entry.file == RANDOM else digest(entry.file),
                **entry.model_dump(include={"layout", "branch", "method", "epochs"}),
                "protocol": protocol,
                "seed": seed,
                "overrides": list(overrides),
                **({"heads": entry.heads} if entry.heads else {}),
            }
            yield Job(entry, protocol, seed, overrides, sha256_json(identity)[:12], point)


@cache
def digest(file: str) -> str:
    """SHA-256 of a checkpoint, read once a process; the name of published weights that are not fetched yet."""
    return file if file.startswith(zoo.PREFIX) else sha256_file(file)


def read_checked(file: Path) -> RunRecord:
    """The record in `file`; `UserError` when its protocol measures no such metrics."""
    record = read_record(file)
    check_protocol(file, record)
    return record


def of_its_data(job: Job, records: Sequence[RunRecord], where: Path) -> RunRecord:
    """The newest of the `records` of `job` that is of the job's data; unknown data count as the same.

    `UserError` where all of them are of other data.
    """
    fitting = [record for record in records if job.data is None or data_of(record) in (None, job.data)]
    if not fitting:
        raise UserError(
            f"{where} holds {job.title}, measured on other data ({data_of(records[0])}; --data holds {job.data}): "
            "choose another --output and --results, or the same --data as then."
        )
    return max(fitting, key=lambda record: record.created)


def describe_work(work: Workload, suite: SuiteConfig, *, slots: int, gpus_of_run: int) -> str:
    """Weights × protocols with runs done of runs wanted, and one sentence of how long the rest takes."""
    wanted = Counter((job.weights.name, job.protocol) for job in work.jobs)
    have = Counter((job.weights.name, job.protocol) for job in work.jobs if job.key in work.done)
    width = max(len(entry.name) for entry in suite.weights)
    lines = [f"{'':{width}}  " + "  ".join(suite.protocols)]
    for entry in suite.weights:
        cells = (f"{have[entry.name, p]}/{wanted[entry.name, p]}".rjust(len(p)) for p in suite.protocols)
        lines.append(f"{entry.name:{width}}  " + "  ".join(cells))
    where = f"{slots} at a time, {gpus_of_run} GPU each" if gpus_of_run else f"{slots} at a time on the CPU"
    parts = [f"{len(work.jobs)} runs: {len(work.done)} done, {len(work.missing)} to run, {where}"]
    expected = {job: work.expected_s(job) for job in work.missing}
    known = [seconds for seconds in expected.values() if seconds is not None]
    if known:
        parts.append(f"about {makespan_s(known, slots) / 3600:.1f} h for {len(known)} of them")
    if unknown := sorted({job.protocol for job, seconds in expected.items() if seconds is None}):
        parts.append(f"no time is known yet for {', '.join(unknown)}")
    if absent := [entry.file for entry in suite.weights if entry.published]:
        parts.append(f"to be fetched: {', '.join(absent)}")
    return "\n".join([*lines, "", "; ".join(parts) + "."])


def makespan_s(lengths: Sequence[float], slots: int) -> float:
    """When the last of these jobs ends: each begins in the slot that is free first, the longest before the others."""
    ends = [0.0] * slots
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


# ── What a suite file may not say: each check yields one sentence a problem ───────────────────────────────────────────


def _unknown_names(suite: SuiteConfig) -> Iterator[str]:
    for protocol in suite.protocols:
        if protocol not in PROTOCOLS:
            yield f'there is no protocol "{protocol}".{did_you_mean(protocol, PROTOCOLS)}'
    tables: dict[str, Iterable[str]] = {key: getattr(suite, key) for key in ("overrides", "grid", "seeds_of", "data")}
    tables |= {f"protocols of {entry.name}": entry.protocols or () for entry in suite.weights}
    for key, by_protocol in tables.items():
        for protocol in by_protocol:
            if protocol not in suite.protocols:
                yield f'{key} are given for "{protocol}", which is not among the protocols.'
    for entry in suite.weights:
        if not entry.exists:
            yield f"there is no file {entry.file} for the weights {entry.name}; check the path or fetch the file."


def _repetitions(suite: SuiteConfig) -> Iterator[str]:
    """Of two runs with one key the second record would replace the first, and names tell weights apart."""
    for name, count in Counter(entry.name for entry in suite.weights).items():
        if count > 1:
            yield f"the weights name {name} is listed {count} times."
    entries = [entry for entry in suite.weights if entry.exists]
    every = (job for protocol in suite.protocols for entry in entries for job in jobs_of(suite, protocol, entry))
    first: dict[str, Job] = {}
    jobs = list(itertools.islice(every, MOST_RUNS + 1))
    if len(jobs) > MOST_RUNS:
        yield f"it asks for more than {MOST_RUNS:,} runs: shorten seeds or grid."
    twice = [(first[job.key], job) for job in jobs if first.setdefault(job.key, job) is not job]
    if twice:
        one, other = twice[0]
        who = " and ".join(dict.fromkeys([one.weights.name, other.weights.name]))
        yield (
            f"{len(twice)} runs are asked for twice, the first of them {other.title} (weights {who}): remove what a "
            "list repeats, or give equal weights `seeds` of their own."
        )
