"""Starting the command of one run: as a child process here, or as a SLURM job.

On CPUs the children are forked from one process that has the engines imported (multiprocessing's fork server), so a run
costs its own work and no imports; a run on GPUs is a fresh process, because CUDA does not survive a fork. A local run
holds a lock on its folder for as long as it lives, even when the suite that started it is killed: the lock
belongs to an open file that the child inherits. A SLURM job leaves its number in the folder, written under the lock. A
second suite therefore waits for either and never starts a run twice. A suite that ends early stops its local runs and
leaves those of SLURM in their queue.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, require
from twist.contracts.machine import cores, divided_cores, memory
from twist.contracts.run_folder import try_lock

JOB_NUMBER = "slurm-job.txt"


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait for the end."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


class LocalRun:
    """A child process. `status()` is its exit status, None while it runs."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def status(self) -> int | None:
        return self._process.exitcode

    def leave(self, *, patience_s: float = 30.0) -> None:
        """The suite ends before the run: stop it, and what it started."""
        if self._process.exitcode is not None:
            return
        # TERM first, so that the run can save. KILL then reaches workers that outlive it, also when a second Ctrl-C
        # ends the wait.
        self._signal(signal.SIGTERM)
        try:
            self._process.join(patience_s)
        finally:
            self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # it has ended, or has not come to make its group
            self._process.kill()


class LocalLauncher:
    """One child process a GPU set (CUDA's names, see `gpu_sets`); without GPUs `at_once` that share the cores.

    `imported` are the modules that runs on CPUs find imported.
    """

    def __init__(self, gpu_sets: Sequence[Sequence[str]], *, at_once: int = 1, imported: Sequence[str] = ()) -> None:
        self._gpus = [",".join(gpus) for gpus in gpu_sets]
        self._cores: list[list[int]] = [] if gpu_sets else divided_cores(at_once)
        self.slots = len(self._gpus) or at_once
        self._context: Any = multiprocessing.get_context("spawn" if gpu_sets else "forkserver")
        if not gpu_sets:
            self._context.set_forkserver_preload(list(imported))

    def claim(self, folder: Path) -> int | None:
        """A descriptor that holds the folder's lock; None while a process of an earlier suite holds it."""
        return try_lock(folder / ".suite-lock", inherited=True)

    def start(self, command: Sequence[str], *, log: Path, slot: int, lock: int) -> LocalRun:
        """Run `command` (`python -m MODULE …`), its output appended to `log`; it holds a copy of `lock`."""
        share = {"gpus": self._gpus[slot]} if self._gpus else {"cores": self._cores[slot] if self._cores else []}
        process = self._context.Process(target=_child, args=(list(command), log, _Descriptor(lock)), kwargs=share)
        process.start()
        return LocalRun(process)


class _Descriptor:
    """An open file on its way into a child process, which gets its number there."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return _detached, (reduction.DupFd(self._number),)


def _detached(copy: Any) -> int:
    return copy.detach()


def _child(command: list[str], log: Path, _lock: int, *, gpus: str = "", cores: Sequence[int] = ()) -> None:
    os.setsid()  # a process group: the run's own workers are stopped with it
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    if cores:
        os.sched_setaffinity(0, cores)
        if "torch" in sys.modules:  # it counted the cores when it was imported
            sys.modules["torch"].set_num_threads(len(cores))
    sys.argv = command[2:]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)


class SlurmCommand:
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


class SlurmRun:
    """A SLURM job. `status()` is its exit status, None while it is queued or runs."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def status(self) -> int | None:
        if not self._job.done():
            return None
        # Without a result the job died outside our command: out of memory, cancelled, a lost node.
        return 1 if self._job.exception() is not None else int(self._job.result())

    def leave(self) -> str:
        """Its number. It may have waited for days in the queue, and the next suite takes its record: not cancelled."""
        return str(self._job.job_id)


class SlurmLauncher:
    """One SLURM job a run. `options` are submitit's: timeout_min, slurm_partition, cpus_per_task, …

    A job is called as its run's folder is."""

    def __init__(self, *, folder: Path, gpus: int, options: Mapping[str, Any], at_once: int) -> None:
        self._folder = folder
        self._executor = slurm_executor(folder)
        self._executor.update_parameters(**{"gpus_per_node": gpus, **options})
        self.slots = at_once

    def claim(self, folder: Path) -> int | None:
        """A descriptor that holds the folder's lock; None while another suite, or a job that one queued, is there."""
        import submitit

        number, lock = folder / JOB_NUMBER, try_lock(folder / ".suite-lock", inherited=True)
        if lock is None or not number.exists():
            return lock
        if submitit.SlurmJob(folder=self._folder, job_id=number.read_text()).done():
            return lock
        os.close(lock)
        return None

    def start(self, command: Sequence[str], *, log: Path, slot: int, lock: int) -> SlurmRun:  # noqa: ARG002
        """Queue `command`, its output appended to `log`, and leave the job's number beside it."""
        self._executor.update_parameters(name=log.parent.name)
        job = self._executor.submit(SlurmCommand(command, log.resolve()))
        files.write_text(log.parent / JOB_NUMBER, str(job.job_id))
        return SlurmRun(job)

    def script(self, folder: Path) -> str:
        """The batch script of the run in `folder`, as submitit writes it for sbatch."""
        self._executor.update_parameters(name=folder.name)
        executor = self._executor._executor  # there is no public way to the text
        return executor._make_submission_file_text(executor._submitit_command_str, uid="")


Run = LocalRun | SlurmRun
Launcher = LocalLauncher | SlurmLauncher


def slurm_executor(folder: Path) -> Any:
    """submitit's executor for SLURM; `UserError` where submitit or SLURM is absent."""
    require("pretrain", "submitit")
    import submitit

    if submitit.SlurmExecutor.affinity() < 0:
        raise UserError("--executor slurm: there is no SLURM here (no srun on the PATH); use --executor local.")
    return submitit.AutoExecutor(folder=folder, cluster="slurm")


def cpu_runs_at_once() -> int:
    """As many runs as cores, with 2 GiB of memory for each."""
    return max(min(cores(), memory() // 2**31), 1)


def gpu_sets(gpus: Sequence[int] | None, *, size: int) -> list[list[str]]:
    """Sets of `size` of these devices of torch's (None: of all it sees), as CUDA_VISIBLE_DEVICES calls them.

    Where the variable is set, torch numbers the places in its list; a child that got such a number would take it for
    the machine's: somebody else's GPU.

    Raises:
        UsageError: too few devices, or a number without a device in that list.
    """
    if gpus is None:
        import torch

        gpus = range(torch.cuda.device_count())
    if gpus and len(gpus) < size:
        raise UsageError(f"The suite wants {size} GPUs a run and {len(gpus)} are to be used: lower gpus_per_run.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = {gpu: str(gpu) for gpu in gpus}
    if visible is not None:
        # CUDA's own rule: the list ends at the first entry that names nothing (-1, an empty one).
        listed = map(str.strip, visible.split(","))
        names = dict(enumerate(itertools.takewhile(lambda name: name and name[0] != "-", listed)))
    if unknown := [gpu for gpu in gpus if gpu not in names]:
        raise UsageError(
            f"--gpus {unknown[0]}: CUDA_VISIBLE_DEVICES={visible} shows {len(names)} GPUs, which --gpus counts from 0: "
            "choose among them, or change the variable."
        )
    return [[names[gpu] for gpu in gpus[i : i + size]] for i in range(0, len(gpus) - size + 1, size)]
