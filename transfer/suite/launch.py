"""Starting one command of a suite and asking how it does: as a child process here, or as a SLURM job.

A local job holds a lock on its run folder for as long as it lives, even when the suite that started it was killed: the
lock belongs to an open file that the child inherits. A SLURM job leaves its number in the folder, written under the
lock. A second suite therefore waits for either and never runs it twice. A suite that ends early, by Ctrl-C or a failure
of its own, stops its local jobs and leaves those of SLURM in their queue.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError
from twist.contracts.run_folder import try_lock


class Handle(Protocol):
    """A started command."""

    def status(self) -> int | None:
        """Its exit status, or None while it runs."""

    def leave(self) -> str | None:
        """The suite ends before it: stop what runs here; a job that goes on elsewhere says its number."""


class Launcher(Protocol):
    """Somewhere to run commands."""

    # How many at a time.
    slots: int

    def busy(self, folder: Path) -> bool:
        """Whether a process of an earlier suite still works in `folder`."""

    def start(self, command: Sequence[str], *, folder: Path, log: Path, slot: int) -> Handle | None:
        """Run `command`, its output appended to `log`; None when another process took `folder` meanwhile."""


class LocalLauncher:
    """One child process a GPU set (CUDA's names, see `gpu_names`); without GPUs one process at a time."""

    def __init__(self, gpu_sets: Sequence[Sequence[str]]) -> None:
        self._gpu_sets = [tuple(gpus) for gpus in gpu_sets] or [()]
        self.slots = len(self._gpu_sets)

    def busy(self, folder: Path) -> bool:
        lock = try_lock(folder / ".suite-lock", inherited=True)
        if lock is None:
            return True
        os.close(lock)
        return False

    def start(self, command: Sequence[str], *, folder: Path, log: Path, slot: int) -> Handle | None:
        lock = try_lock(folder / ".suite-lock", inherited=True)
        if lock is None:
            return None
        gpus = ",".join(self._gpu_sets[slot])
        with log.open("ab") as output:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})},
                pass_fds=(lock,),
                # A group of its own: the job's own workers are stopped with it.
                start_new_session=True,
            )
        os.close(lock)
        return _LocalHandle(process)


def gpu_names(gpus: Sequence[int]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls these devices of torch's.

    Where the variable is set (a shared node, a scheduler), torch numbers the places in its list, and a child that got
    such a number would take it for the machine's: somebody else's GPU.

    Raises:
        UsageError: a number without a device in that list.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(gpu) for gpu in gpus]
    # CUDA's own rule: the list ends at the first entry that names nothing (-1, an empty one).
    names = list(
        itertools.takewhile(lambda name: name and not name.startswith("-"), map(str.strip, visible.split(",")))
    )
    for gpu in gpus:
        if not 0 <= gpu < len(names):
            raise UsageError(
                f"--gpus {gpu}: CUDA_VISIBLE_DEVICES={visible} shows {len(names)} GPUs, which --gpus counts from 0: "
                "choose among them, or change the variable."
            )
    return [names[gpu] for gpu in gpus]


class _LocalHandle:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def status(self) -> int | None:
        return self._process.poll()

    def leave(self, *, patience_s: float = 30.0) -> None:
        if self._process.poll() is not None:
            return
        # TERM first, so that a leader can take leave. KILL then reaches workers that outlive it, also when a second
        # Ctrl-C ends the patience.
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Command:
    """What a SLURM job runs; submitit pickles it, and queues it again when the job is preempted or out of time."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log

    def __call__(self) -> int:
        with self.log.open("ab") as output:
            return subprocess.run(self.command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode

    def checkpoint(self, *_: Any) -> Any:
        # The command has --resume: the same again goes on where it stopped.
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class SlurmLauncher:
    """One SLURM job a run. `options` are submitit's: timeout_min, slurm_partition, cpus_per_task, …"""

    def __init__(self, *, folder: Path, gpus: int, options: Mapping[str, Any], at_once: int) -> None:
        self._folder = folder
        self._executor = slurm_executor(folder)
        self._executor.update_parameters(gpus_per_node=gpus, **options)
        self.slots = at_once

    def busy(self, folder: Path) -> bool:
        # A job outlives the suite that queued it; its number is in the run folder.
        import submitit

        number = folder / "slurm-job.txt"
        return number.exists() and not submitit.SlurmJob(folder=self._folder, job_id=number.read_text()).done()

    def start(self, command: Sequence[str], *, folder: Path, log: Path, slot: int) -> Handle | None:  # noqa: ARG002
        lock = try_lock(folder / ".suite-lock", inherited=True)
        if lock is None:
            return None
        try:
            # Asked once more, under the lock: two suites that start together must not both queue the job.
            if self.busy(folder):
                return None
            job = self._executor.submit(Command(command, log.resolve()))
            files.write_text(folder / "slurm-job.txt", str(job.job_id))
        finally:
            os.close(lock)
        return _SlurmHandle(job)


class _SlurmHandle:
    def __init__(self, job: Any) -> None:
        self._job = job

    def status(self) -> int | None:
        if not self._job.done():
            return None
        # Without a result the job died outside our command: out of memory, cancelled, a lost node.
        return 1 if self._job.exception() is not None else int(self._job.result())

    def leave(self) -> str:
        # It may have waited for days in the queue, and the next suite takes its record: never cancelled.
        return str(self._job.job_id)


def slurm_executor(folder: Path) -> Any:
    """submitit's executor for SLURM; `UserError` where submitit or SLURM is absent."""
    try:
        import submitit
    except ImportError:
        raise UserError('--executor slurm needs submitit: pip install "twist-suite[pretrain]".') from None
    if submitit.SlurmExecutor.affinity() < 0:
        raise UserError("--executor slurm: there is no SLURM here (no srun on the PATH); use --executor local.")
    return submitit.AutoExecutor(folder=folder, cluster="slurm")
