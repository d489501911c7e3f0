"""`twist pretrain CONFIG --slurm partition=… --slurm nodes=…`: the same run, submitted through submitit.

SLURM's signal before the time limit (or at preemption) raises the run's stop flag; the run saves between two steps, and
then submitit's own handler puts the job back into the queue, where it resumes.
"""

from __future__ import annotations

import os
import shutil
import signal
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.config import load_config
from twist.contracts.errors import UsageError, did_you_mean
from twist.pretrain.config import PretrainConfig

if TYPE_CHECKING:
    import submitit

# What --slurm takes, with submitit's names behind; everything else is a mistake or goes in `additional_parameters`.
OPTIONS = {
    "partition": "slurm_partition",
    "account": "slurm_account",
    "qos": "slurm_qos",
    "constraint": "slurm_constraint",
    "comment": "slurm_comment",
    "exclude": "slurm_exclude",
    "nodes": "nodes",
    "gpus": "gpus_per_node",
    "cpus": "cpus_per_task",
    "mem_gb": "mem_gb",
    "timeout_min": "timeout_min",
    "name": "name",
}
DEFAULTS: dict[str, Any] = {
    "nodes": 1,
    "gpus_per_node": 8,
    "cpus_per_task": 10,
    "timeout_min": 24 * 60,
    "name": "twist",
}
# Seconds before the time limit at which SLURM signals: a step, a vote and a checkpoint of some GB fit in.
SIGNAL_BEFORE_S = 180
# A job may be requeued this many times by the time limit; preemption does not count.
MAX_REQUEUES = 100


class PretrainJob:
    """What runs in each task of the job: submitit pickles it, calls it, and asks `checkpoint` for what to requeue."""

    def __init__(self, config: Path, overrides: Sequence[str], output: Path, *, resume: bool) -> None:
        self.config, self.overrides, self.output, self.resume = config, tuple(overrides), output, resume

    def __call__(self) -> str:
        import submitit

        from twist.pretrain.signals import Requeue
        from twist.pretrain.train import pretrain

        if submitit.JobEnvironment().num_tasks > 1:
            # RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun would set them.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        config = load_config(self.config, PretrainConfig, self.overrides)
        number = submitit.JobEnvironment._usr_sig()
        hand_on = signal.getsignal(number)
        try:
            return str(pretrain(config, output=self.output, resume=self.resume))
        except Requeue:
            # The state is saved: now submitit's handler requeues the job (on task 0) and ends the process.
            if callable(hand_on):
                hand_on(number, None)
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same job, to be resumed."""
        import submitit

        again = PretrainJob(self.config, self.overrides, self.output, resume=True)
        return submitit.helpers.DelayedSubmission(again)


def submit(config: Path, overrides: Sequence[str], *, output: Path, options: Sequence[str]) -> str:
    """Submit the run and return SLURM's job number. The config is checked here, before anything waits in a queue.

    Args:
        options: `key=value`, keys as in `OPTIONS`.

    Raises:
        UsageError: an option is unknown or not key=value, or SLURM is not on this machine.
    """
    load_config(config, PretrainConfig, overrides)
    values = parameters(options)
    if shutil.which("sbatch") is None:
        raise UsageError("There is no sbatch on this machine: run --slurm where SLURM jobs are submitted from.")
    return str(_submit(_executor(output, values), config, overrides, output).job_id)


def parameters(options: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters from `key=value` options, with one task a GPU."""
    values = dict(DEFAULTS)
    for option in options:
        key, separator, text = option.partition("=")
        if not separator:
            raise UsageError(f'--slurm "{option}" is not key=value: for example --slurm partition=gpu.')
        if key not in OPTIONS:
            raise UsageError(f'--slurm: unknown key "{key}".{did_you_mean(key, OPTIONS)}')
        try:
            values[OPTIONS[key]] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[OPTIONS[key]] = text
    try:
        # SLURM's own `gpus=a100:4` too: the number of tasks is that of the GPUs.
        tasks = max(int(str(values["gpus_per_node"]).rpartition(":")[2]), 1)
    except ValueError:
        raise UsageError(
            f"--slurm gpus={values['gpus_per_node']} names no number: write gpus=4, or gpus=a100:4."
        ) from None
    return {**values, "tasks_per_node": tasks, "slurm_signal_delay_s": SIGNAL_BEFORE_S}


def _executor(output: Path, values: dict[str, Any]) -> submitit.AutoExecutor:
    import submitit

    executor = submitit.AutoExecutor(folder=output / "slurm", cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
    executor.update_parameters(**values)
    return executor


def _submit(executor: Any, config: Path, overrides: Sequence[str], output: Path) -> submitit.Job[str]:
    # Absolute paths: the job starts in another folder. `resume` from the start, so that a requeue by SLURM itself (a
    # node that failed) also goes on; a first start then says that it starts from scratch.
    absolute = [_absolute(override) for override in overrides]
    return executor.submit(PretrainJob(config.resolve(), absolute, output.resolve(), resume=True))


def _absolute(override: str) -> str:
    key, _, value = override.partition("=")
    if key.strip() in ("data.root", "run.online_eval_root", "run.warm_start") and os.path.exists(value):
        return f"{key}={os.path.abspath(value)}"
    return override
