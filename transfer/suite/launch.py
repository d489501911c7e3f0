"""Starting the command of one run: as a child process here, as a SLURM job, or as a task of Ray.

On CPUs the children are forked from one process that has the engines imported (multiprocessing's fork server), so a run
costs its own work and no imports; a run on GPUs is a fresh process, because CUDA does not survive a fork. A local run
holds a lock on its folder for as long as it lives, even when the suite that started it is killed: the lock
belongs to an open file that the child inherits. A task of Ray takes the lock on its own machine, through the file
system that all machines share. A SLURM job leaves its number in the folder, written under the lock. A second suite
therefore waits for any of them and never starts a run twice. A suite that ends early stops its local runs and those of
Ray, and leaves those of SLURM in their queue.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
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
POLL_S = 0.2
# What a run that is told to end has for saving.
PATIENCE_S = 30.0


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

    def leave(self, *, patience_s: float = PATIENCE_S) -> None:
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


class Launcher:
    """`slots` runs at a time, on `gpus` GPUs each."""

    slots: int
    gpus: int

    def claim(self, folder: Path) -> int | None:
        """A descriptor that holds the folder's lock; None while a run that an earlier suite started is there."""
        return try_lock(folder / ".suite-lock", inherited=True)

    def start(self, command: Sequence[str], *, log: Path, slot: int, lock: int) -> Run:
        """Run `command` (`python -m MODULE …`), its output appended to `log`, in the folder that `lock` holds."""
        raise NotImplementedError

    def script(self, folder: Path) -> str:  # noqa: ARG002
        """What a dry run shows of the run in `folder` beside the plan."""
        return ""


class LocalLauncher(Launcher):
    """One child process a GPU set (CUDA's names, see `gpu_sets`); without GPUs `at_once` that share the cores.

    `imported` are the modules that runs on CPUs find imported.
    """

    def __init__(self, gpu_sets: Sequence[Sequence[str]], *, at_once: int = 1, imported: Sequence[str] = ()) -> None:
        self._gpus = [",".join(gpus) for gpus in gpu_sets]
        self._cores: list[list[int]] = [] if gpu_sets else divided_cores(at_once)
        self.slots, self.gpus = len(self._gpus) or at_once, len(gpu_sets[0]) if gpu_sets else 0
        self._context: Any = multiprocessing.get_context("spawn" if gpu_sets else "forkserver")
        if not gpu_sets:
            _choose_socket_folder()
            self._context.set_forkserver_preload(list(imported))

    def start(self, command: Sequence[str], *, log: Path, slot: int, lock: int) -> LocalRun:
        """The child holds a copy of `lock`."""
        share = {"gpus": self._gpus[slot]} if self._gpus else {"cores": self._cores[slot] if self._cores else []}
        process = self._context.Process(target=_child, args=(list(command), log, _Descriptor(lock)), kwargs=share)
        process.start()
        return LocalRun(process)


def _choose_socket_folder() -> None:
    """The fork server's socket lies in the folder for temporary files, and its path may have 108 bytes at most."""
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) > 60:
        tempfile.tempdir = "/tmp"
    multiprocessing.util.get_temp_dir()  # chosen once in a process's life, removed at its end
    tempfile.tempdir = before


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


class SlurmLauncher(Launcher):
    """One SLURM job a run. `options` are submitit's: timeout_min, slurm_partition, cpus_per_task, …

    A job is called as its run's folder is."""

    def __init__(self, *, folder: Path, gpus: int, options: Mapping[str, Any], at_once: int) -> None:
        self._folder = folder
        self._executor = slurm_executor(folder)
        self._executor.update_parameters(**{"gpus_per_node": gpus, **options})
        self.slots, self.gpus = at_once, gpus

    def claim(self, folder: Path) -> int | None:
        import submitit

        number, lock = folder / JOB_NUMBER, super().claim(folder)
        if lock is None or not number.exists():
            return lock
        if submitit.SlurmJob(folder=self._folder, job_id=number.read_text()).done():
            return lock
        os.close(lock)
        return None

    def start(self, command: Sequence[str], *, log: Path, slot: int, lock: int) -> SlurmRun:  # noqa: ARG002
        """The job's number is left beside `log`."""
        self._executor.update_parameters(name=log.parent.name)
        job = self._executor.submit(SlurmCommand(command, log.resolve()))
        files.write_text(log.parent / JOB_NUMBER, str(job.job_id))
        return SlurmRun(job)

    def script(self, folder: Path) -> str:
        """The batch script of the run in `folder`, as submitit writes it for sbatch."""
        self._executor.update_parameters(name=folder.name)
        executor = self._executor._executor  # there is no public way to the text
        return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def _ray_task(command: Sequence[str], log: Path, directory: Path) -> int:
    """The status of `command`, run in `directory` on whatever machine this is, alone in the folder of `log`.

    Ray cancels a task by a KeyboardInterrupt in it."""
    # The suite holds the lock until the task is submitted; a process that outlived a lost worker, until its end.
    while (lock := try_lock(log.parent / ".suite-lock", inherited=True)) is None:
        time.sleep(POLL_S)
    with log.open("ab") as output:
        streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
        here = [sys.executable, *command[1:]]
        run = subprocess.Popen(here, cwd=directory, pass_fds=(lock,), start_new_session=True, **streams)
    os.close(lock)
    try:
        while run.poll() is None:  # `wait` would not see the interrupt
            time.sleep(POLL_S)
        return run.returncode
    except KeyboardInterrupt:
        os.killpg(run.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(PATIENCE_S)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # and workers that outlive it


class RayRun:
    """A task of Ray. `status()` is its command's, None while it waits for its place or runs."""

    def __init__(self, task: Any, log: Path) -> None:
        self._task, self._log = task, log

    def status(self) -> int | None:
        import ray

        if not ray.wait([self._task], timeout=0)[0]:
            return None
        try:
            return int(ray.get(self._task))
        except ray.exceptions.RayError as error:  # Ray's own tries are used up: a lost machine, no memory
            with self._log.open("a") as output:
                print(str(error).strip(), file=output)
            return 1

    def leave(self) -> None:
        """The suite ends before the run: stop it, as Ray would do without giving it time to save."""
        import ray

        ray.cancel(self._task)
        ray.wait([self._task], timeout=PATIENCE_S + 5)  # Ray ends with the suite


class RayLauncher(Launcher):
    """One task of Ray a run, on the cluster of RAY_ADDRESS, else on this machine. Ray finds the place and its GPUs.

    `options` are those of a remote function of Ray's: num_cpus (1), memory, resources, max_retries (3, of a task whose
    machine was lost), …
    """

    def __init__(self, *, gpus: int, options: Mapping[str, Any], at_once: int) -> None:
        require("ray")
        self._options, self.slots, self.gpus = {"num_cpus": 1, "num_gpus": gpus, **options}, at_once, gpus

    def start(self, command: Sequence[str], *, log: Path, slot: int, lock: int) -> RayRun:  # noqa: ARG002
        import ray

        if not ray.is_initialized():  # it ends with this process
            _start_ray()
        try:
            task = ray.remote(_ray_task).options(**{"name": log.parent.name, **self._options})
        except (TypeError, ValueError) as error:
            raise UsageError(f"`ray` in the suite: {error}") from None
        return RayRun(task.remote(command, log.resolve(), Path.cwd()), log)


def _start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; `UserError` where neither works."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent without being asked for
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # 20 by default: a wrong address would be tried for minutes
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"Ray ({address}) does not answer ({first}): correct or unset RAY_ADDRESS.") from None


Run = LocalRun | SlurmRun | RayRun


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
