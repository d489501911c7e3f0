"""A suite: weights × protocols × seeds (× overrides), run until every one has its record.

What is done is known from the records alone: each carries the key of its job in a note, so a suite that was killed, or
whose run folders were cleared away, goes on where it was. The data are no part of the key (they may have moved, and
older records do not say theirs): a record of other data than `--data` holds stops the suite. Every run is a process of
its own (`twist transfer … --resume`), so that a crash in one framework ends one run, and that one is tried once more.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.files import sha256_json
from twist.contracts.record import RunRecord, find_records, name_in, write_record
from twist.transfer.suite.config import RANDOM, SuiteConfig, WeightsEntry, digest, load_suite
from twist.transfer.suite.display import SuiteDisplay
from twist.transfer.suite.launch import Handle, Launcher, LocalLauncher, SlurmLauncher, gpu_names
from twist.transfer.suite.plan import Job, Plan, make_plan, of_its_data, plan_text, read_checked

ATTEMPTS = 2
POLL_S = 0.5


class RunsFailed(UserError):
    """Some runs of a suite failed twice; `records` are those of all others."""

    def __init__(self, message: str, records: list[RunRecord]) -> None:
        super().__init__(message)
        self.records = records


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


def transfer_command(job: Job, weights: Path | str, *, data: Path, gpus: int, output: Path) -> list[str]:
    """The command line of one run; its record goes into the run folder, from where the suite collects it."""
    folder = job.folder(output)
    command = [sys.executable, "-m", "twist", "transfer", job.protocol, "--weights", str(weights), "--data", str(data)]
    command += ["--seed", str(job.seed), "--gpus", str(gpus), "--output", str(folder / "run")]
    command += ["--results", str(folder / "record"), "--resume"]
    command += ["--method", job.weights.method] if job.weights.method else []
    return [*command, *job.overrides]


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
    from twist.contracts.weights import read_header, write_backbone
    from twist.converters.read import load_artefact

    identity = sha256_json([digest(entry.file), entry.layout, entry.branch, entry.method, entry.epochs])
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
    origin = {} if header.source_sha256 else {"source_sha256": digest(entry.file)}
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
    return files[0], of_its_data(job, [read_checked(files[0])], source)


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
