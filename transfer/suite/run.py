"""A suite: weights × protocols × seeds (× overrides), run until every job has its record.

What is done is known from the records alone: each carries the key of its job. Every run is a process of its own
(`twist transfer … --resume`), so that a crash in one framework ends one run, and that one is tried once more. What runs
of the same weights would make again is made once: conversions, and frozen features while such runs are to come.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.contracts import states
from twist.contracts.errors import UsageError, UserError
from twist.contracts.files import sha256_json
from twist.contracts.progress import duration, is_quiet
from twist.contracts.record import RunRecord, find_records
from twist.transfer.end import publish
from twist.transfer.protocols import PROTOCOLS
from twist.transfer.suite import config, launch
from twist.transfer.suite.config import Job, SuiteConfig, WeightsEntry, Workload

Command = Callable[[Job], list[str]]
ATTEMPTS = 2
# In the folder of runs: what those of the same weights share, by the weights' name.
SHARED = "shared"
POLL_S = 0.5


def run_suite(
    path: Path,
    *,
    executor: str = "local",
    dry_run: bool = False,
    gpus: Sequence[int] | None = None,
    results: Path,
    output: Path,
    data: Path | None,
) -> tuple[list[RunRecord], UserError | None]:
    """Run what is missing of the suite at `path`; the records of all jobs, and an error where runs failed twice.

    `gpus` are the devices to use as torch numbers them (None: all there are; empty: the CPU). With `dry_run` the plan
    is printed, for SLURM each job's script too, and nothing runs. `UsageError` has every problem of the file at once.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a suite has lines of its own
    suite = config.load_suite(path, data=data, download=not dry_run)
    work = config.find_work(suite, results=results)
    for job in work.missing:
        _left_by_run(job, output=output)  # refuses what was measured on other data, before anything starts
    launcher = _launcher(executor, suite, work, gpus, output)
    if dry_run or not is_quiet():
        print(config.describe_work(work, suite, slots=launcher.slots, gpus_of_run=launcher.gpus))
    if dry_run:
        for job in work.missing:
            if script := launcher.script(job.folder(output)):
                print(f"\n# ---- {job.title}", script, sep="\n")
        return list(work.done.values()), None
    # Each checkpoint is read once, whatever the number of its runs.
    entries = dict.fromkeys(job.weights for job in work.missing)
    artefacts = {entry.name: _artefact(entry, output / "weights") for entry in entries}

    def command(job: Job) -> list[str]:
        shared = output / SHARED / job.weights.name if executor == "local" else None
        weights = artefacts[job.weights.name]
        return transfer_command(job, weights, gpus=launcher.gpus, output=output, shared=shared)

    runs = _Runs(work, launcher, command, results=results, output=output)
    try:
        runs.finish()
    except OSError as error:
        raise UserError(
            f"The suite stopped: it cannot write under {output} or {results} ({error.strerror or error}): "
            "make room there and start it again; what is done is kept."
        ) from None
    records = {**work.done, **runs.made}
    return [records[job.key] for job in work.jobs if job.key in records], runs.error()


def _launcher(
    executor: str, suite: SuiteConfig, work: Workload, gpus: Sequence[int] | None, output: Path
) -> launch.Launcher:
    """What `--executor` says."""
    if executor == "slurm":
        options, at_once = suite.submitit_options, suite.slurm_jobs_at_once
        return launch.SlurmLauncher(folder=output / "slurm", gpus=suite.gpus_per_run, options=options, at_once=at_once)
    missing = max(len(work.missing), 1)
    if executor == "ray" and "RAY_ADDRESS" in os.environ:
        # The cluster may have GPUs that it has not started yet: tasks wait for them.
        each = 0 if gpus == [] else suite.gpus_per_run
        return launch.RayLauncher(gpus=each, options=suite.ray, at_once=missing)
    gpu_sets = launch.gpu_sets(gpus, size=suite.gpus_per_run)
    at_once = min(suite.cpu_runs_at_once or launch.cpu_runs_at_once(), missing)
    here = launch.LocalLauncher(gpu_sets, at_once=at_once, imported=imported_by(work.missing))
    if executor == "ray":
        return launch.RayLauncher(gpus=here.gpus, options=suite.ray, at_once=here.slots)
    return here


def imported_by(jobs: Sequence[Job]) -> list[str]:
    """The modules that runs of `jobs` begin with."""
    return ["twist.transfer.run", *dict.fromkeys(PROTOCOLS[job.protocol].engine_row.module for job in jobs)]


def transfer_command(
    job: Job, weights: Path | str, *, gpus: int, output: Path, shared: Path | None = None
) -> list[str]:
    """The command line of one run; its record goes into the run folder, from where the suite collects it."""
    folder = job.folder(output)
    command = [sys.executable, "-m", "twist", "transfer", job.protocol, "--weights", str(weights)]
    command += ["--data", str(job.place), "--seed", str(job.seed), "--gpus", str(gpus), "--output", str(folder / "run")]
    command += ["--results", str(folder / "record"), "--resume"]
    command += ["--method", job.weights.method] if job.weights.method else []
    return [*command, *job.overrides, *([f"shared={shared}"] if shared else [])]


def _artefact(entry: WeightsEntry, folder: Path) -> Path | str:
    """The weights file that is made of a checkpoint, where it is not there yet; `random` stays."""
    if entry.file == config.RANDOM:
        return config.RANDOM
    from twist.contracts.weights import write_backbone
    from twist.converters.read import load_artefact

    digest = config.digest(entry.file)
    said = [entry.layout, entry.branch, entry.method, entry.epochs, *filter(None, [entry.heads])]
    # The record calls weights by their file's name; the folder's name tells two conversions apart.
    path = folder / sha256_json([digest, *said])[:12] / f"{entry.name}.safetensors"
    wrong = states.damage_of(path) if path.exists() else "it is not there"
    if wrong is None:
        return path
    if path.exists():
        print(f"{path} is not valid ({wrong}): it is made again from {entry.file}.", file=sys.stderr)
    tensors, header = load_artefact(Path(entry.file), layout=entry.layout, branch=entry.branch, heads=entry.heads)
    if entry.epochs is not None and header.epochs not in (None, entry.epochs):
        raise UsageError(
            f"The suite says that {entry.name} has {entry.epochs} epochs, {entry.file} says {header.epochs}: "
            "take `epochs` out of the suite or correct it."
        )
    about = {"method": entry.method or header.method, "epochs": entry.epochs or header.epochs}
    about["source_sha256"] = header.source_sha256 or digest
    states.save(path, lambda new: write_backbone(new, tensors, header.model_copy(update=about)))
    return path


@dataclass(frozen=True)
class _Started:
    job: Job
    run: launch.Run
    slot: int
    log: Path
    attempt: int
    began: float

    @property
    def title(self) -> str:
        return self.job.title + (" (second try)" if self.attempt > 1 else "")


class _Runs:
    """The jobs of a suite on their way from waiting through running to made or failed.

    What happens is one line each on stderr; on a terminal a live table below shows what runs.
    """

    def __init__(
        self, work: Workload, launcher: launch.Launcher, command: Command, *, results: Path, output: Path
    ) -> None:
        self.waiting = sorted(work.missing, key=lambda job: _turn(job, work))
        self.running: list[_Started] = []
        self.made: dict[str, RunRecord] = {}
        self.failed: list[_Started] = []
        self._total, self._wanted = len(self.waiting), len(work.jobs)
        self._tried: set[str] = set()
        self._announced: set[str] = set()
        self._launcher, self._command, self._results, self._output = launcher, command, results, output
        self._live: Any = None

    def finish(self) -> None:
        """Run every job. An early end (an error, Ctrl-C) stops runs; those of SLURM are named and go on."""
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: leave([one.run for one in self.running]))
            if sys.stderr.isatty() and self.waiting and not is_quiet():
                from rich.console import Console
                from rich.live import Live

                live = Live(self._table(), console=Console(stderr=True), auto_refresh=False, transient=True)
                self._live = stack.enter_context(live)
            while self.waiting or self.running:
                self._start_what_fits()
                time.sleep(POLL_S)
                if self._live is not None:
                    self._live.update(self._table(), refresh=True)
                for one in list(self.running):
                    if (status := one.run.status()) is not None:
                        self._take(one, status)
                self._forget_features()

    def error(self) -> UserError | None:
        """The sentence for runs that failed, None where none did."""
        listed = "; ".join(f"{one.job.title} ({last_line(one.log)[:300]}; log: {one.log})" for one in self.failed[:5])
        message = f"{len(self.failed)} of {self._wanted} runs failed: {listed}. Correct the cause and start the same "
        return UserError(f"{message}suite again; what is done is kept.") if self.failed else None

    def _start_what_fits(self) -> None:
        free = sorted(set(range(self._launcher.slots)) - {one.slot for one in self.running})
        for job in list(self.waiting):
            if not free:
                return
            lock = self._launcher.claim(job.folder(self._output))
            if lock is None:
                if job.key not in self._announced:
                    self._announced.add(job.key)
                    self._print(f"waiting  {job.title}: a process of an earlier suite is still running it")
                continue
            self.waiting.remove(job)
            try:
                if record := self._collect(job):
                    self._done(job, record, wall_s=record.wall_s)
                    continue
                attempt = 2 if job.key in self._tried else 1
                self._tried.add(job.key)
                log, slot = job.folder(self._output) / f"log-{attempt}.txt", free.pop(0)
                with _signals_wait():  # a run that starts is in the list of those to stop
                    run = self._launcher.start(self._command(job), log=log, slot=slot)
                    self.running.append(_Started(job, run, slot, log, attempt, time.monotonic()))
                self._print(f"started  {self.running[-1].title}")
            finally:
                os.close(lock)

    def _take(self, one: _Started, status: int) -> None:
        """A run has ended: its record, a second try, or a failure."""
        self.running.remove(one)
        record = self._collect(one.job) if status == 0 else None
        if record is not None:
            self._done(one.job, record, wall_s=time.monotonic() - one.began)
        elif one.attempt < ATTEMPTS and status != UsageError.exit_status:
            self.waiting.insert(0, one.job)
            self._print(f"failed   {one.job.title}, trying once more: {last_line(one.log)}")
        else:
            self.failed.append(one)
            self._print(f"failed   {one.job.title}: {last_line(one.log)}")

    def _forget_features(self) -> None:
        """Remove the features of weights that no run is to come of: of ImageNet they are 10 GB each."""
        wanted = {job.weights.name for job in [*self.waiting, *(one.job for one in self.running)]}
        for folder in (self._output / SHARED).glob("*/features"):
            if folder.parent.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)

    def _done(self, job: Job, record: RunRecord, *, wall_s: float) -> None:
        self.made[job.key] = record
        self._print(f"done     {job.title} in {duration(wall_s)}")

    def _collect(self, job: Job) -> RunRecord | None:
        """Take the record of a finished run from its folder into `results`, pictures and curves with it."""
        left = _left_by_run(job, output=self._output)
        if left is None:
            return None
        file, record = left
        media, curves = (
            [file.parent / name for name in record.media],
            file.parent / record.curves if record.curves else None,
        )
        return publish(record.model_copy(update={"job": job.key}), self._results, media=media, curves=curves)[0]

    def _print(self, text: str) -> None:
        line = f"[{len(self.made) + len(self.failed)}/{self._total}] {text}"
        if self._live is not None:
            # markup=False: overrides stand in square brackets.
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        failed = f", {len(self.failed)} failed" if self.failed else ""
        table = Table(title=f"{len(self.made)} of {self._total} runs done{failed}", title_justify="left", expand=True)
        table.add_column("running", no_wrap=True)
        table.add_column("for", justify="right", no_wrap=True)
        table.add_column("last line of its log", no_wrap=True, overflow="ellipsis", ratio=1)
        for one in self.running:
            table.add_row(Text(one.title), duration(time.monotonic() - one.began), Text(last_line(one.log)))
        return table


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM that arrive inside take effect at the end."""
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda sent, _: arrived.append(sent)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
        for sent in arrived:
            signal.raise_signal(sent)


def _turn(job: Job, work: Workload) -> tuple[bool, int, float, int]:
    """What comes first: the longest, those of unknown length before all, so that the last job to end is a short one.

    Runs on frozen features come after, by their weights, whose features then need not wait on disk for long, and by
    seed, so that two at a time seldom want the same features.
    """
    on_features = PROTOCOLS[job.protocol].engine_row.target is None
    weights = [one.weights for one in work.jobs].index(job.weights) if on_features else 0
    return on_features, weights, -(work.expected_s(job) or float("inf")), job.seed


def leave(runs: Sequence[launch.Run]) -> None:
    """Stop local runs and Ray's; name the SLURM jobs that go on without the suite."""
    queued: list[str | None] = []
    # A stack, because every run is left also when leaving another one raises (a second Ctrl-C).
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.callback(lambda run: queued.append(run.leave()), run)
    if numbers := " ".join(filter(None, reversed(queued))):
        print(
            "SLURM jobs go on without the suite: start the same suite again to collect what they make, or cancel them "
            f"with `scancel {numbers}`.",
            file=sys.stderr,
            flush=True,
        )


def _left_by_run(job: Job, *, output: Path) -> tuple[Path, RunRecord] | None:
    """The record that a finished run of `job` left in its folder."""
    source = job.folder(output) / "record"
    files = list(find_records([source])) if source.is_dir() else []
    return (files[0], config.of_its_data(job, [config.read_checked(files[0])], source)) if files else None


def last_line(log: Path, *, size: int = 2048) -> str:
    """The last line of a log that is being written, where `twist` prints its one sentence; "" where there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - size, 0))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
