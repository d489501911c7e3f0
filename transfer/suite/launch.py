"""Starting the command of one run: as a child process here, as a SLURM job, or as a task of Ray.

On CPUs the children are forked from one process that has the engines imported; CUDA does not survive a fork. A run
holds a lock on its folder for as long as it lives, even when its suite was killed, and a SLURM job leaves its number
there, so a second suite never starts a run twice. A suite that ends early leaves its SLURM jobs in their queue.
"""

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, require
from twist.contracts.machine import cores, divided_cores, memory
from twist.contracts.run_folder import try_lock

JOB_NUMBER = "slurm-job.txt"
LOCK = ".suite-lock"
POLL_S = 0.05
# What a run that is told to end has for saving.
PATIENCE_S = 30.0


class Run(NamedTuple):
    """A run that was started. `status` gives its exit status, None while it waits or runs; `leave` is called where the
    suite ends before it, and gives the number of a job that goes on without."""

    status: Callable[[], int | None]
    leave: Callable[[], str | None]


class Launcher:
    """`slots` runs at a time, on `gpus` GPUs each."""

    slots: int
    gpus: int

    def claim(self, folder: Path) -> int | None:
        """A descriptor that holds the folder's lock; None while a run that an earlier suite started is there."""
        return try_lock(folder / LOCK, inherited=True)

    def start(self, command: Sequence[str], *, log: Path, slot: int) -> Run:
        """Run `command` (`python -m MODULE …`), its output appended to `log`, once the folder's lock is free."""
        raise NotImplementedError

    def script(self, folder: Path) -> str:  # noqa: ARG002
        """What a dry run shows of the run in `folder` beside the plan."""
        return ""


# ── Here ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def stop(process: BaseProcess) -> None:
    """Stop a child process, and what it started."""

    def send(number: int) -> None:
        try:
            os.killpg(process.pid or 0, number)
        except ProcessLookupError:  # it has ended, or has not come to make its group
            process.kill()

    if process.exitcode is not None:
        return
    # TERM first, so that the run can save. KILL then reaches workers that outlive it, also when a second Ctrl-C ends
    # the wait.
    send(signal.SIGTERM)
    try:
        process.join(PATIENCE_S)
    finally:
        send(signal.SIGKILL)
        process.join()


class LocalLauncher(Launcher):
    """One child process a GPU set (CUDA's names, see `gpu_sets`); without GPUs `at_once` that share the cores.

    `imported` are the modules that runs on CPUs find imported.
    """

    def __init__(self, gpu_sets: Sequence[Sequence[str]], *, at_once: int = 1, imported: Sequence[str] = ()) -> None:
        self._gpus = [",".join(gpus) for gpus in gpu_sets]
        self._cores = [] if gpu_sets else divided_cores(at_once)
        self.slots, self.gpus = len(self._gpus) or at_once, len(gpu_sets[0]) if gpu_sets else 0
        self._context: Any = multiprocessing.get_context("spawn" if gpu_sets else "forkserver")
        if not gpu_sets:
            # The server's socket lies in the folder for temporary files, and its path may have 108 bytes at most.
            before = tempfile.gettempdir()
            tempfile.tempdir = "/tmp" if len(os.fsencode(before)) > 60 else before
            multiprocessing.util.get_temp_dir()  # chosen once in a process's life, removed at its end
            tempfile.tempdir = before
            self._context.set_forkserver_preload(list(imported))

    def start(self, command: Sequence[str], *, log: Path, slot: int) -> Run:
        share = {"gpus": self._gpus[slot]} if self._gpus else {"cores": self._cores[slot] if self._cores else []}
        process = self._context.Process(target=_child, args=(list(command), log), kwargs=share)
        if not self._gpus:
            with _silent():  # of the frameworks that the server imports; a run has its log
                forkserver.ensure_running()
        process.start()
        return Run(lambda: process.exitcode, lambda: stop(process))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, new processes have no terminal to write to."""
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, before in zip((1, 2), kept):
            os.dup2(before, stream)
        for descriptor in (nowhere, *kept):
            os.close(descriptor)


def _locked(folder: Path) -> int:
    """A descriptor that holds the lock of a run's folder for this process and its children, once the suite's is freed.

    It is theirs to the end, also of a process that outlives a killed suite or a lost machine."""
    while (lock := try_lock(folder / LOCK, inherited=True)) is None:
        time.sleep(POLL_S)
    return lock


def _child(command: list[str], log: Path, *, gpus: str = "", cores: Sequence[int] = ()) -> None:
    os.setsid()  # a process group: the run's own workers are stopped with it
    _locked(log.parent)
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


# ── SLURM ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


class SlurmLauncher(Launcher):
    """One SLURM job a run, called as the run's folder is; `options` are submitit's: timeout_min, slurm_partition, …"""

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

    def start(self, command: Sequence[str], *, log: Path, slot: int) -> Run:  # noqa: ARG002
        self._executor.update_parameters(name=log.parent.name)
        job = self._executor.submit(SlurmCommand(command, log.resolve()))
        files.write_text(log.parent / JOB_NUMBER, str(job.job_id))

        def status() -> int | None:
            # Without a result the job died outside our command: out of memory, cancelled, a lost node.
            return None if not job.done() else 1 if job.exception() is not None else int(job.result())

        # It may have waited for days in the queue, and the next suite takes its record: it is not cancelled.
        return Run(status, lambda: str(job.job_id))

    def script(self, folder: Path) -> str:
        """The batch script of the run in `folder`, as submitit writes it for sbatch."""
        self._executor.update_parameters(name=folder.name)
        executor = self._executor._executor  # there is no public way to the text
        return executor._make_submission_file_text(executor._submitit_command_str, uid="")


# ── Ray ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ray_task(command: Sequence[str], log: Path, directory: Path) -> int:
    """The status of `command`, run in `directory` on whatever machine this is, alone in the folder of `log`.

    Ray cancels a task by a KeyboardInterrupt in it."""
    lock = _locked(log.parent)
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


class RayLauncher(Launcher):
    """One task of Ray a run; `options` are those of a remote function of Ray's: num_cpus (1), memory, resources, …"""

    def __init__(self, *, gpus: int, options: Mapping[str, Any], at_once: int) -> None:
        require("ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent without being asked for
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 20, which a wrong address takes minutes for
        self._options, self.slots, self.gpus = {"num_cpus": 1, "num_gpus": gpus, **options}, at_once, gpus

    def start(self, command: Sequence[str], *, log: Path, slot: int) -> Run:  # noqa: ARG002
        import ray

        if not ray.is_initialized():  # it ends with this process
            address = os.environ.get("RAY_ADDRESS", "local")
            try:
                ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                first = str(error).strip().partition("\n")[0]
                raise UserError(f"Ray ({address}) does not answer ({first}): correct or unset RAY_ADDRESS.") from None
        try:
            remote = ray.remote(_ray_task).options(**{"name": log.parent.name, **self._options})
        except (TypeError, ValueError) as error:
            raise UsageError(f"`ray` in the suite: {error}") from None
        task = remote.remote(command, log.resolve(), Path.cwd())

        def status() -> int | None:
            if not ray.wait([task], timeout=0)[0]:
                return None
            try:
                return int(ray.get(task))
            except ray.exceptions.RayError as error:  # Ray's own tries are used up: a lost machine, no memory
                with log.open("a") as output:
                    print(str(error).strip(), file=output)
                return 1

        def leave() -> None:
            ray.cancel(task)
            ray.wait([task], timeout=PATIENCE_S + 5)  # it may save; Ray ends with the suite

        return Run(status, leave)


def slurm_executor(folder: Path) -> Any:
    """submitit's executor for SLURM; `UserError` where submitit or SLURM is absent."""
    require("pretrain", "submitit")
    import submitit

    if submitit.SlurmExecutor.affinity() < 0:
        raise UserError("--executor slurm: there is no SLURM here (no srun on the PATH); use --executor local.")
    return submitit.AutoExecutor(folder=folder, cluster="slurm")


def gpu_sets(gpus: Sequence[int] | None, *, size: int) -> list[list[str]]:
    """Sets of `size` of these devices of torch's (None: of all it sees), as CUDA_VISIBLE_DEVICES calls them.

    Where the variable is set, torch numbers the places in its list; a child that got such a number would take it for
    the machine's: somebody else's GPU. `UsageError` for too few devices, or a number without a device in that list.
    """
    if gpus is None:
        import torch

        gpus = range(torch.cuda.device_count())
    if gpus and len(gpus) < size:
        raise UsageError(f"The suite wants {size} GPUs a run and {len(gpus)} are to be used: lower gpus_per_run.")
    names, visible = [str(gpu) for gpu in gpus], os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA's own rule: the list ends at the first entry that names nothing (-1, an empty one).
        listed = [*itertools.takewhile(lambda name: name and name[0] != "-", map(str.strip, visible.split(",")))]
        if beyond := [gpu for gpu in gpus if gpu >= len(listed)]:
            raise UsageError(
                f"--gpus {beyond[0]}: CUDA_VISIBLE_DEVICES={visible} shows {len(listed)} GPUs, which --gpus counts "
                "from 0: choose among them, or change the variable."
            )
        names = [listed[gpu] for gpu in gpus]
    return [names[i : i + size] for i in range(0, len(names) - size + 1, size)]


def cpu_runs_at_once() -> int:
    """As many runs as cores, with 2 GiB of memory for each."""
    return max(min(cores(), memory() // 2**31), 1)
