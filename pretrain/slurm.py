"""Stopping and going on: signals that only set a flag, and `twist pretrain CONFIG --slurm …` through submitit.

SLURM's signal before the time limit (or at preemption) sets the run's flag; the run saves between two steps, and then
submitit's own handler puts the job back into the queue, where it resumes.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from twist.contracts.config import load_config, parse_override
from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.machine import SLURM_KEYS
from twist.pretrain.config import PretrainConfig

# SIGINT: a person's Ctrl-C. SIGTERM: torchrun, containers, most schedulers. SIGUSR1: SLURM's --signal by convention.
# SIGUSR2: submitit's choice.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A terminal and a scheduler signal all processes, and torchrun passes on what it gets: two within a second are one.
TOGETHER_S = 1.0

DEFAULTS = {"nodes": 1, "gpus_per_node": 8, "cpus_per_task": 10, "timeout_min": 24 * 60, "name": "twist"}
# Seconds before the time limit at which SLURM signals: a step, a vote and a checkpoint of some GB fit in.
SIGNAL_BEFORE_S = 180
# A job may be requeued this many times by the time limit; preemption does not count.
MAX_REQUEUES = 100


class Requeue(Exception):
    """The run was asked to stop, has saved, and is to be started again with --resume (75 is EX_TEMPFAIL)."""

    exit_status = 75


def end_with_torchrun() -> None:
    """Have Linux send this process SIGTERM when its torchrun dies, whatever killed it: the ranks would train on, with
    nobody to restart them, and hold the run's folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def refuse_bare_tasks() -> None:
    """`UsageError` where srun has started several processes that know nothing of each other."""
    of_job = os.environ.get("SLURM_NTASKS", "1") if "SLURM_STEP_ID" in os.environ else "1"  # a batch script is one
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", of_job)
    if "WORLD_SIZE" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise UsageError(
            f"srun has started {tasks} processes, and each would train alone: start one torchrun a node (srun "
            "--ntasks-per-node=1 torchrun …), or let `twist pretrain … --slurm` submit the job."
        )


class StopFlag:
    raised = False


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that the first of `SIGNALS` raises, and that is looked at between steps: saving inside a handler tears
    files and hangs collectives. A later second signal has the effect it would have without us."""
    flag, first_at = StopFlag(), 0.0
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield flag
        return

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal first_at
        if not flag.raised:
            flag.raised, first_at = True, time.monotonic()
            if number == signal.SIGINT:
                # Not `print`: the signal may have come in the middle of one.
                os.write(2, b"\nStopping after this step; the state is saved. Ctrl-C again stops at once.\n")
        elif time.monotonic() - first_at > TOGETHER_S:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    # A shell lets its background jobs ignore Ctrl-C; that stays so.
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    before = {n: signal.signal(n, on_signal) for n in SIGNALS if not (ignored and n == signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PretrainJob:
    """What runs in each task: submitit pickles it, calls it in another folder, and asks `checkpoint` for what to
    requeue. It always resumes, so that a requeue by SLURM itself (a node that failed) goes on too."""

    def __init__(self, config: Path, overrides: Sequence[str], output: Path) -> None:
        self.config, self.overrides, self.output = config.resolve(), [*overrides], output.resolve()
        for number, override in enumerate(overrides):
            key, _, value = override.partition("=")
            if key.strip() in ("data.root", "run.online_eval_root", "run.warm_start") and os.path.exists(value):
                self.overrides[number] = f"{key}={os.path.abspath(value)}"

    def __call__(self) -> str:
        import submitit

        from twist.pretrain.train import pretrain

        if submitit.JobEnvironment().num_tasks > 1:
            # RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun would set them.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        config = load_config(self.config, PretrainConfig, self.overrides)
        number = submitit.JobEnvironment._usr_sig()
        requeue = signal.getsignal(number)
        try:
            return str(pretrain(config, output=self.output, resume=True))
        except Requeue:
            # The state is saved: now submitit's handler requeues the job (on task 0) and ends the process.
            if callable(requeue):
                requeue(number, None)
            raise

    def checkpoint(self) -> Any:
        """The same job, which resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(config: Path, overrides: Sequence[str], *, output: Path, options: Sequence[str]) -> str:
    """Submit the run and return SLURM's job number; the config is checked before anything waits in a queue."""
    load_config(config, PretrainConfig, overrides)
    values = parameters(options)
    if shutil.which("sbatch") is None:
        raise UsageError("There is no sbatch on this machine: run --slurm where SLURM jobs are submitted from.")
    import submitit

    executor = submitit.AutoExecutor(folder=output / "slurm", cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
    executor.update_parameters(**values)
    return str(executor.submit(PretrainJob(config, overrides, output)).job_id)


def parameters(options: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters from `key=value` options, with one task a GPU."""
    values: dict[str, Any] = dict(DEFAULTS)
    for option in options:
        (key, *_), value = parse_override(option)
        if key not in SLURM_KEYS:
            raise UsageError(f'--slurm: unknown key "{key}".{did_you_mean(key, SLURM_KEYS)}')
        values[SLURM_KEYS[key]] = value
    gpus = str(values["gpus_per_node"]).rpartition(":")[2]  # SLURM's own `gpus=a100:4` too
    if not gpus.isdecimal():
        raise UsageError(f"--slurm gpus={values['gpus_per_node']} names no number: write gpus=4, or gpus=a100:4.")
    return {**values, "tasks_per_node": max(int(gpus), 1), "slurm_signal_delay_s": SIGNAL_BEFORE_S}
