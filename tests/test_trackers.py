"""Experiment trackers: what each is given, offline, and that a resumed run goes on in the same one."""

import json
from pathlib import Path

import pytest

from twist.contracts.curves import CURVES, Curves
from twist.contracts.errors import UserError
from twist.contracts.trackers import Logger

pytestmark = pytest.mark.slow


def plot_two_starts(folder: Path, logger: Logger) -> None:
    for step in (1, 2):
        curves = Curves(folder / CURVES, start=step, logger=logger)
        curves.plot(step, {"loss": step / 4, "stage": "first"}, tag="pretrain/")
        curves.close()


def test_mlflow_gets_every_number_of_a_run_and_of_its_second_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plot_two_starts(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("twist-suite").experiment_id])
    points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "pretrain/loss")]
    assert (run.info.run_name, points) == ("run", [(1, 0.25), (2, 0.5)])


def test_wandb_offline_writes_both_starts_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    plot_two_starts(tmp_path / "run", "wandb")
    identity = json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]
    runs = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
    assert runs
    assert any(b"pretrain/loss" in run.read_bytes() for run in runs)


def test_a_tracker_that_is_not_installed_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twist.contracts.errors.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install \"twist-suite\[wandb\]\""):
        Curves(tmp_path / "run" / CURVES, start=1, logger="wandb")
