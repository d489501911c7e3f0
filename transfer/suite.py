"""A suite: weights × protocols × seeds (× overrides), run until every one has its record.

What is done is known from the records alone: each carries the key of its job in a note, so a suite that was killed, or
whose run folders were cleared away, goes on where it was. The data are no part of the key (they may have moved, and
older records do not say theirs): a record of other data than `--data` holds stops the suite. Every run is a process of
its own (`twist transfer … --resume`), so that a crash in one framework ends one run, and that one is tried once more.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from contracts.config import Config, parse_override, problems, read_toml, validate
from contracts.errors import UsageError, UserError, did_you_mean
from contracts.hashing import sha256_file, sha256_json
from contracts.record import RunRecord, find_records, name_in, read_record, write_record
from converters import sources
from transfer.data.identity import data_of, identify_data
from transfer.protocols import PROTOCOLS
from transfer.records import check_protocol
from transfer.suite_display import SuiteDisplay
from transfer.suite_launch import Handle, Launcher, LocalLauncher, SlurmLauncher, gpu_names

RANDOM = "random"
ATTEMPTS = 2
POLL_S = 0.5


class RunsFailed(UserError):
    """Some runs of a suite failed twice; `records` are those of all others."""

    def __init__(self, message: str, records: list[RunRecord]) -> None:
        super().__init__(message)
        self.records = records


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


@dataclass(frozen=True)
class Job:
    """One run to be made. `key` identifies it by content: which file, protocol, seed and overrides. `data` names what
    there is to measure on, None where that is not whole."""

    weights: WeightsEntry
    protocol: str
    seed: int
    overrides: tuple[str, ...]
    key: str
    data: str | None

    @property
    def title(self) -> str:
        changed = f" [{', '.join(self.overrides)}]" if self.overrides else ""
        return f"{self.protocol} · {self.weights.name} · seed {self.seed}{changed}"

    @property
    def note(self) -> str:
        return f"Run by a suite as job {self.key}."

    def folder(self, output: Path) -> Path:
        return output / self.protocol / f"{self.weights.name}-seed{self.seed}-{self.key}"


@dataclass(frozen=True)
class Plan:
    """Every job of a suite, which of them have their record, and how long the rest may take."""

    jobs: tuple[Job, ...]
    done: Mapping[str, RunRecord]
    # Protocol → mean wall time of past records, in seconds.
    wall_s: Mapping[str, float]

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if job.key not in self.done]

    def expected_s(self, job: Job) -> float | None:
        """From past records of the protocol, else what the protocol's table says was measured, else None."""
        hours = PROTOCOLS[job.protocol].hours
        return self.wall_s.get(job.protocol, None if hours is None else hours * 3600)


def run_suite(
    path: Path,
    *,
    executor: Literal["local", "slurm"] | str = "local",
    dry_run: bool = False,
    gpus: Sequence[int] | None = None,
    results: Path,
    output: Path,
    data: Path,
) -> list[RunRecord]:
    """Run what is missing of the suite at `path` and return the records of all its jobs.

    `gpus` are the devices to use as torch numbers them: within CUDA_VISIBLE_DEVICES, where that is set (None: all there
    are; empty: the CPU). With `dry_run` the plan is printed and the records that exist already are returned.

    Raises:
        UsageError: the file is wrong in any way; every problem at once, before anything starts.
        RunsFailed: some runs failed twice; the others are done and recorded.
        UserError: runs under `results` or `output` were made on other data; the disk is full; SLURM is not here.
    """
    suite = load_suite(path, data=data)
    plan = make_plan(suite, results=results, data=data)
    for job in plan.missing:
        _left(job, output=output)  # refuses what was measured on other data, before anything starts
    gpu_sets = _gpu_sets(suite, gpus) if executor == "local" else []
    slots = max(len(gpu_sets), 1) if executor == "local" else suite.slurm_jobs_at_once
    print(plan_text(plan, suite, slots=slots, on_gpus=bool(gpu_sets) or executor == "slurm"))
    if dry_run:
        return list(plan.done.values())

    launcher: Launcher
    if executor == "slurm":
        launcher = SlurmLauncher(
            folder=output / "slurm", gpus=suite.gpus_per_run, options=suite.slurm, at_once=suite.slurm_jobs_at_once
        )
    elif executor == "local":
        launcher = LocalLauncher(gpu_sets)
    else:
        raise UsageError(f'There is no executor "{executor}".{did_you_mean(executor, ["local", "slurm"])}')
    artefacts = _convert_each(plan.missing, output=output)
    job_gpus = suite.gpus_per_run if gpu_sets or executor == "slurm" else 0

    def command(job: Job) -> list[str]:
        return transfer_command(job, artefacts[job.weights.name], data=data, gpus=job_gpus, output=output)

    try:
        made, failed = _run(plan, launcher, command, results=results, output=output)
    except OSError as error:
        raise UserError(
            f"The suite stopped: it cannot write under {output} or {results} ({error.strerror}): make room there and "
            "start it again; what is done is kept."
        ) from None
    records = {**plan.done, **made}
    ordered = [records[job.key] for job in plan.jobs if job.key in records]
    if failed:
        listed = "; ".join(f"{job.title} ({_last_line(log)}; log: {log})" for job, log in failed[:5])
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise RunsFailed(
            f"{len(failed)} of {len(plan.jobs)} runs failed: {listed}{more}. Mend the cause and start the same suite "
            "again; what is done is kept.",
            ordered,
        )
    return ordered


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


def make_plan(suite: SuiteConfig, *, results: Path, data: Path) -> Plan:
    """The jobs of `suite` on `data` beside the records under `results`.

    Raises:
        UserError: a job has its record there, and that is of other data.
    """
    jobs = tuple(_jobs(suite, data))
    records = [_read(file) for file in find_records([results])] if results.is_dir() else []
    by_note = defaultdict(list)
    for record in records:
        for note in record.notes:
            by_note[note].append(record)
    done = {job.key: _of_its_data(job, by_note[job.note], results) for job in jobs if job.note in by_note}
    times = defaultdict(list)
    for record in records:
        times[record.protocol].append(record.wall_s)
    return Plan(jobs, done, {protocol: sum(values) / len(values) for protocol, values in times.items()})


def plan_text(plan: Plan, suite: SuiteConfig, *, slots: int, on_gpus: bool) -> str:
    """The plan as a table, weights × protocols with runs done of runs wanted, and one sentence of how long."""
    wanted = Counter((job.weights.name, job.protocol) for job in plan.jobs)
    have = Counter((job.weights.name, job.protocol) for job in plan.jobs if job.key in plan.done)
    width = max(len(entry.name) for entry in suite.weights)
    lines = [f"{'':{width}}  " + "  ".join(suite.protocols)]
    for entry in suite.weights:
        cells = (
            f"{have[entry.name, p]}/{wanted[entry.name, p]}".rjust(len(p))
            if (entry.name, p) in wanted
            else " " * len(p)
            for p in suite.protocols
        )
        lines.append(f"{entry.name:{width}}  " + "  ".join(cells))
    known = [seconds for job in plan.missing if (seconds := plan.expected_s(job)) is not None]
    recorded = sum(job.protocol in plan.wall_s for job in plan.missing)
    unknown = sorted({job.protocol for job in plan.missing if plan.expected_s(job) is None})
    where = f"{slots} at a time, {suite.gpus_per_run} GPU each" if on_gpus else "one at a time on the CPU"
    told = [f"{recorded} from past records"] if recorded else []
    told += [f"{len(known) - recorded} from the protocols' measured hours"] if len(known) > recorded else []
    time_text = f"about {makespan_s(known, slots) / 3600:.1f} h for {len(known)} of them ({', '.join(told)})"
    time_text = time_text if known else ""
    unknown_text = f"no time is known yet for {', '.join(unknown)}" if unknown else ""
    sentence = f"{len(plan.jobs)} runs: {len(plan.done)} done, {len(plan.missing)} to run, {where}"
    return "\n".join([*lines, "", "; ".join(part for part in (sentence, time_text, unknown_text) if part) + "."])


def makespan_s(lengths: Sequence[float], slots: int) -> float:
    """When the last of these jobs ends: each begins in the slot that is free first, the longest before the others."""
    ends = [0.0] * slots
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def transfer_command(job: Job, weights: Path | str, *, data: Path, gpus: int, output: Path) -> list[str]:
    """The command line of one run; its record goes into the run folder, from where the suite collects it."""
    folder = job.folder(output)
    command = [sys.executable, "-m", "twist", "transfer", job.protocol, "--weights", str(weights), "--data", str(data)]
    command += ["--seed", str(job.seed), "--gpus", str(gpus), "--output", str(folder / "run")]
    command += ["--results", str(folder / "record"), "--resume"]
    command += ["--method", job.weights.method] if job.weights.method else []
    return [*command, *job.overrides]


# ── What a suite file may not say ─────────────────────────────────────────────────────────────────────────────────────


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
        for seed, _, key in _runs(suite, protocol, entry):
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


# ── Jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _jobs(suite: SuiteConfig, data: Path) -> Iterator[Job]:
    found = {protocol: identify_data(PROTOCOLS[protocol], data) for protocol in suite.protocols}
    for protocol, entry in itertools.product(suite.protocols, suite.weights):
        for seed, overrides, key in _runs(suite, protocol, entry):
            yield Job(entry, protocol, seed, overrides, key, found[protocol])


def _runs(suite: SuiteConfig, protocol: str, entry: WeightsEntry) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """Seed, overrides and key of every run of these weights under this protocol."""
    seeds = entry.seeds or suite.seeds_of.get(protocol, suite.seeds)
    for seed, point in itertools.product(seeds, _grid(suite.grid.get(protocol, {}))):
        overrides = (*suite.overrides.get(protocol, ()), *entry.overrides, *point)
        identity = {
            "weights": RANDOM if entry.file == RANDOM else _digest(entry.file),
            "layout": entry.layout,
            "branch": entry.branch,
            "method": entry.method,
            "epochs": entry.epochs,
            "protocol": protocol,
            "seed": seed,
            "overrides": list(overrides),
        }
        yield seed, overrides, sha256_json(identity)[:12]


def _of_its_data(job: Job, records: Sequence[RunRecord], where: Path) -> RunRecord:
    """The newest of `records`, which all are of `job` and lie in `where`, that is of the job's data.

    Data that are not whole, and those of records that do not say theirs, are taken for the same.
    """
    fitting = [record for record in records if job.data is None or data_of(record) in (None, job.data)]
    if not fitting:
        raise UserError(
            f"{where} holds {job.title}, measured on other data ({data_of(records[0])}; --data holds {job.data}): "
            "choose another --output and --results, or the same --data as then."
        )
    return max(fitting, key=lambda record: record.created)


def _grid(axes: Mapping[str, Sequence[Any]]) -> list[tuple[str, ...]]:
    """Every combination, as overrides; one empty combination when there are no axes."""
    points = []
    for values in itertools.product(*axes.values()):
        # JSON's scalars are TOML's: true, 0.02, "text".
        points.append(tuple(f"{key}={json.dumps(value)}" for key, value in zip(axes, values)))
    return points


@cache
def _digest(file: str) -> str:
    return sha256_file(file)


def _gpu_sets(suite: SuiteConfig, gpus: Sequence[int] | None) -> list[list[str]]:
    if gpus is None:
        import torch

        gpus = range(torch.cuda.device_count())
    if gpus and len(gpus) < suite.gpus_per_run:
        raise UsageError(
            f"The suite wants {suite.gpus_per_run} GPUs a run and {len(gpus)} are to be used: lower gpus_per_run."
        )
    whole, names = len(gpus) // suite.gpus_per_run, gpu_names(gpus)
    return [names[i * suite.gpus_per_run : (i + 1) * suite.gpus_per_run] for i in range(whole)]


def _convert_each(jobs: Sequence[Job], *, output: Path) -> dict[str, Path | str]:
    """Weights name → artefact (or `random`); each file is read once, whatever the number of its runs."""
    made: dict[str, Path | str] = {}
    for entry in dict.fromkeys(job.weights for job in jobs):
        made[entry.name] = RANDOM if entry.file == RANDOM else _artefact(entry, output / "weights")
    return made


def _artefact(entry: WeightsEntry, folder: Path) -> Path:
    from contracts.weights import read_header, write_backbone
    from converters.read import load_artefact

    identity = sha256_json([_digest(entry.file), entry.layout, entry.branch, entry.method, entry.epochs])
    # The record calls weights by their file's name; what tells two conversions apart is the folder's.
    path = folder / identity[:12] / f"{entry.name}.safetensors"
    if path.exists():
        read_header(path)  # raises when it is torn or not ours
        return path
    tensors, header = load_artefact(Path(entry.file), layout=entry.layout, branch=entry.branch)
    if entry.epochs is not None and header.epochs not in (None, entry.epochs):
        raise UsageError(
            f"The suite says that {entry.name} has {entry.epochs} epochs, {entry.file} says {header.epochs}: "
            "take `epochs` out of the suite or correct it."
        )
    said = {"method": entry.method or header.method, "epochs": entry.epochs or header.epochs}
    origin = {} if header.source_sha256 else {"source_sha256": _digest(entry.file)}
    return write_backbone(path, tensors, header.model_copy(update={**said, **origin}))


# ── Running ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Running:
    job: Job
    handle: Handle
    slot: int
    log: Path
    attempt: int
    began: float


class _Run:
    """The jobs of a suite on their way from waiting through running to made or failed."""

    def __init__(self, plan: Plan, launcher: Launcher, display: SuiteDisplay, *, results: Path, output: Path) -> None:
        # Longest first, those of unknown length before all: the last job to end then is a short one.
        lengths = {job.key: plan.expected_s(job) or float("inf") for job in plan.missing}
        self.waiting = sorted(plan.missing, key=lambda job: -lengths[job.key])
        self.running: list[_Running] = []
        self.made: dict[str, RunRecord] = {}
        self.failed: list[tuple[Job, Path]] = []
        self._attempts: Counter[str] = Counter()
        self._launcher, self._display, self._results, self._output = launcher, display, results, output

    def start_what_fits(self, command: Callable[[Job], list[str]]) -> None:
        free = sorted(set(range(self._launcher.slots)) - {one.slot for one in self.running})
        for job in list(self.waiting):
            if not free:
                return
            folder = job.folder(self._output)
            # First whether somebody is at it, then whether the record is there: in the other order a run of an
            # earlier suite could end in between and be made twice.
            if self._launcher.busy(folder):
                self._display.wait(job.key, job.title)
                continue
            record = _collected(job, results=self._results, output=self._output)
            if record is not None:
                self.waiting.remove(job)
                self.made[job.key] = record
                self._display.done(job.key, job.title, wall_s=record.wall_s)
                continue
            attempt = self._attempts[job.key] + 1
            log = folder / f"log-{attempt}.txt"
            handle = self._launcher.start(command(job), folder=folder, log=log, slot=free[0])
            if handle is None:
                continue
            self._attempts[job.key] = attempt
            self.waiting.remove(job)
            self.running.append(_Running(job, handle, free.pop(0), log, attempt, time.monotonic()))
            self._display.start(job.key, job.title, log=log, attempt=attempt)

    def take_what_ended(self) -> None:
        for one in list(self.running):
            status = one.handle.status()
            if status is None:
                continue
            self.running.remove(one)
            job, reason = one.job, _last_line(one.log)
            record = _collected(job, results=self._results, output=self._output) if status == 0 else None
            if record is not None:
                self.made[job.key] = record
                self._display.done(job.key, job.title, wall_s=time.monotonic() - one.began)
            elif one.attempt < ATTEMPTS and status != UsageError.exit_status:
                self.waiting.insert(0, job)
                self._display.retry(job.key, job.title, reason=reason)
            else:
                self.failed.append((job, one.log))
                self._display.failed(job.key, job.title, reason=reason)


def _run(
    plan: Plan, launcher: Launcher, command: Callable[[Job], list[str]], *, results: Path, output: Path
) -> tuple[dict[str, RunRecord], list[tuple[Job, Path]]]:
    """Run the missing jobs; records by key, and the failed jobs with their logs."""
    with SuiteDisplay(total=len(plan.missing)) as display:
        run = _Run(plan, launcher, display, results=results, output=output)
        try:
            while run.waiting or run.running:
                run.start_what_fits(command)
                time.sleep(POLL_S)
                display.refresh()
                run.take_what_ended()
        finally:
            _leave(run.running)
    return run.made, run.failed


def _leave(running: Sequence[_Running]) -> None:
    """End local runs; say which SLURM jobs go on without the suite."""
    queued: list[str] = []

    def leave(one: _Running) -> None:
        number = one.handle.leave()
        if number is not None:
            queued.append(number)

    # A stack, because every run is left also when leaving another one raises (a second Ctrl-C).
    with contextlib.ExitStack() as stack:
        for one in running:
            stack.callback(leave, one)
    if queued:
        count = "1 SLURM job goes" if len(queued) == 1 else f"{len(queued)} SLURM jobs go"
        print(
            f"{count} on without the suite: start the same suite again to collect what they make, or cancel them with "
            f"`scancel {' '.join(sorted(queued))}`.",
            file=sys.stderr,
            flush=True,
        )


def _left(job: Job, *, output: Path) -> tuple[Path, RunRecord] | None:
    """The record that a finished run of `job` left in its folder."""
    source = job.folder(output) / "record"
    files = list(find_records([source])) if source.is_dir() else []
    if not files:
        return None
    if len(files) > 1:
        raise UserError(f"{source} holds {len(files)} records and a run has one: remove the folder and start again.")
    return files[0], _of_its_data(job, [_read(files[0])], source)


def _collected(job: Job, *, results: Path, output: Path) -> RunRecord | None:
    """Take the record of a finished run from its folder into `results`, pictures and curves with it."""
    left = _left(job, output=output)
    if left is None:
        return None
    file, record = left
    kept = {
        "media": tuple(_keep(file, name, record, results) for name in record.media),
        "curves": None if record.curves is None else _keep(file, record.curves, record, results),
        "notes": (*(note for note in record.notes if note != job.note), job.note),
    }
    collected = record.model_copy(update=kept)
    write_record(collected, results)
    return collected


def _read(file: Path) -> RunRecord:
    record = read_record(file)
    check_protocol(file, record)
    return record


def _keep(file: Path, name: str, record: RunRecord, results: Path) -> str:
    """Copy what a record points at (a path relative to it) beside the collected record; the new relative path."""
    kept = f"{name_in(record, results)}/{Path(name).name}"
    target = results / record.protocol / kept
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file.parent / name, target)
    return kept


def _last_line(log: Path) -> str:
    """The last line that says something: `twist` prints its one sentence there."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return "it left no log"
    return lines[-1][:300] if lines else "it printed nothing"
