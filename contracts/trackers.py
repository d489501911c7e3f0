"""Experiment trackers: where a run's numbers go beside its own files. TensorBoard by default, one more by `logger`.

Each of these is one function from (folder, run id) to a `Tracker`; nothing is imported or sent without being asked for.
Where the numbers go is the tracker's own business: `WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`.
A resumed run goes on under the id in the folder's `tracker.json`.
"""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from twist.contracts import files
from twist.contracts.errors import require

PROJECT = "twist-suite"
Logger = Literal["wandb", "mlflow", "trackio"]


class Tracker(Protocol):
    """What takes numbers by name, at a step or an epoch."""

    def add(self, values: Mapping[str, float], position: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `board`; those of a resumed run replace what was written from `start` on."""

    def __init__(self, board: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(board), purge_step=start)

    def add(self, values: Mapping[str, float], position: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, position)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases, and trackio, which has the same functions."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def add(self, values: Mapping[str, float], position: int) -> None:
        self._run.log(dict(values), step=position)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run

    def add(self, values: Mapping[str, float], position: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=position)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _wandb(folder: Path, identity: str) -> Tracker:
    import wandb

    return _Wandb(wandb.init(project=PROJECT, name=folder.name, id=identity, dir=str(folder), resume="allow"))


def _trackio(folder: Path, identity: str) -> Tracker:
    import trackio

    return _Wandb(trackio.init(project=PROJECT, name=f"{folder.name}-{identity}", resume="allow", embed=False))


def _mlflow(folder: Path, identity: str) -> Tracker:
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # its small package has no database to write to
        mlflow.set_tracking_uri((folder.parent / "mlruns").resolve().as_uri())
    client = mlflow.MlflowClient()
    known = client.get_experiment_by_name(PROJECT)
    experiment = known.experiment_id if known else client.create_experiment(PROJECT)
    # An mlflow run has an id of its own making: ours is a tag, by which a resumed run is found.
    found = client.search_runs([experiment], f"tags.twist_run = '{identity}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, run_name=folder.name, tags={"twist_run": identity})
    return _Mlflow(client, run.info.run_id)


_OPEN: Final[dict[str, Callable[[Path, str], Tracker]]] = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def open_tracker(logger: Logger, folder: Path) -> Tracker:
    """The tracker `logger` for the run in `folder`; `UserError` with the command that installs it when it is absent."""
    require(logger, logger)
    file = folder / "tracker.json"
    if not file.exists():
        files.write_json(file, {"id": uuid.uuid4().hex[:12]})
    return _OPEN[logger](folder, files.read_json(file)["id"])
