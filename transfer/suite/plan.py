"""The jobs of a suite, which of them have their record, and how long the rest may take."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twist.contracts.errors import UserError
from twist.contracts.record import RunRecord, find_records, read_record
from twist.transfer.identity import data_of, identify_data
from twist.transfer.protocols import PROTOCOLS, check_protocol
from twist.transfer.suite.config import SuiteConfig, WeightsEntry, runs_of


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


def make_plan(suite: SuiteConfig, *, results: Path, data: Path) -> Plan:
    """The jobs of `suite` on `data` beside the records under `results`.

    Raises:
        UserError: a job has its record there, and that is of other data.
    """
    jobs = tuple(_jobs(suite, data))
    records = [read_checked(file) for file in find_records([results])] if results.is_dir() else []
    by_note = defaultdict(list)
    for record in records:
        for note in record.notes:
            by_note[note].append(record)
    done = {job.key: of_its_data(job, by_note[job.note], results) for job in jobs if job.note in by_note}
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


def _jobs(suite: SuiteConfig, data: Path) -> Iterator[Job]:
    found = {protocol: identify_data(PROTOCOLS[protocol], data) for protocol in suite.protocols}
    for protocol, entry in itertools.product(suite.protocols, suite.weights):
        for seed, overrides, key in runs_of(suite, protocol, entry):
            yield Job(entry, protocol, seed, overrides, key, found[protocol])


def of_its_data(job: Job, records: Sequence[RunRecord], where: Path) -> RunRecord:
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


def read_checked(file: Path) -> RunRecord:
    """The record in `file`; `UserError` when its protocol measures no such metrics."""
    record = read_record(file)
    check_protocol(file, record)
    return record
