"""Submission through submitit: options, what is pickled, and a real job in submitit's local executor."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit
from tiny_run import make_images, rows

from twist.contracts.curves import read_rows
from twist.contracts.errors import UsageError
from twist.pretrain import slurm

CONFIG = Path(slurm.__file__).resolve().parent.parent / "configs" / "pretrain" / "smoke.toml"


def test_options_become_submitits_parameters() -> None:
    values = slurm.parameters(["partition=gpu", "nodes=2", "gpus=4", "timeout_min=60"])
    assert (values["slurm_partition"], values["nodes"], values["gpus_per_node"]) == ("gpu", 2, 4)
    assert (values["tasks_per_node"], values["timeout_min"], values["slurm_signal_delay_s"]) == (4, 60, 180)
    assert slurm.parameters(["gpus=0"])["tasks_per_node"] == 1
    assert slurm.parameters(["gpus=a100:4"])["tasks_per_node"] == 4


@pytest.mark.parametrize(
    ("override", "option", "word"),
    [
        ("run.epochs=3", "partiton=gpu", 'Did you mean "partition"'),
        ("run.epochs=3", "gpus=abc", "gpus=abc names no number"),
        ("run.epoch=3", "partition=gpu", "unknown key"),
        ("run.epochs=3", "partition=gpu", "no sbatch"),
    ],
)
def test_what_is_wrong_is_refused_before_the_queue(
    override: str, option: str, word: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=word):
        slurm.submit(CONFIG, [override], output=tmp_path / "run", options=[option])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_preempted_job_saves_is_requeued_and_resumes(tmp_path: Path) -> None:
    # submitit's local executor in SLURM's place: a real process, its real signal, its real requeue.
    images = make_images(tmp_path / "images", 16)
    executor = submitit.LocalExecutor(folder=tmp_path / "slurm")
    executor.update_parameters(timeout_min=30)  # 5 by default, which a loaded machine takes for the imports
    overrides = [f"data.root={images}", "run.device=cpu", "run.epochs=4"]
    job = executor.submit(slurm.PretrainJob(CONFIG, overrides, tmp_path / "run"))
    while len(read_rows(tmp_path / "run" / "metrics.jsonl")) < 2:
        assert not job.done(), job.stderr()
        time.sleep(0.02)
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), submitit.JobEnvironment._usr_sig())
    assert job.result() == str(tmp_path / "run" / "backbone.safetensors")
    assert "to resume from: starting from scratch" in job.stderr()
    assert "Resuming from" in job.stderr()
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(8))


@pytest.mark.parametrize(
    ("environment", "is_refused"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # the batch script itself
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "WORLD_SIZE": "4"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_bare_processes_of_srun_are_told_to_use_torchrun(environment: dict, is_refused: bool, monkeypatch) -> None:
    for name in ("SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not is_refused:
        slurm.refuse_bare_tasks()
        return
    with pytest.raises(UsageError, match=r"started 4 processes.*torchrun.*--slurm"):
        slurm.refuse_bare_tasks()


CHILD = """
import time
from twist.pretrain import slurm
slurm.end_with_torchrun()
print("up", flush=True)
time.sleep(20)
print("slept to its end")
"""
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_a_rank_ends_with_its_torchrun() -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as torchrun:
        assert torchrun.stdout is not None
        assert torchrun.stdout.readline() == b"up\n"
        torchrun.kill()
        assert torchrun.stdout.read() == b""  # its end is the child's, which has the same pipe
