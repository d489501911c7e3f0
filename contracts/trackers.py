"""Experiment trackers: where a run's numbers go beside its own files. TensorBoard by default, one more by `logger`.

Nothing is imported or sent without being asked for. Where the numbers go is the tracker's own business:
`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`. A resumed run goes on under the id in `tracker.json`.
"""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from twist.contracts import files
from twist.contracts.errors import require

PROJECT = "twist-suite"
Logger = Literal["wandb", "mlflow", "trackio"]


class Tracker(NamedTuple):
    """Takes numbers by name, at a step or an epoch."""

    add: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]


def tensorboard(board: Path, start: int) -> Tracker:
    """Event files in the folder `board`; those of a resumed run replace what was written from `start` on."""
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    writer = SummaryWriter(str(board), purge_step=start)

    def add(values: Mapping[str, float], position: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, position)

    return Tracker(add, writer.close)


def open_tracker(logger: Logger, folder: Path) -> Tracker:
    """The tracker `logger` for the run in `folder`; `UserError` with the command that installs it when it is absent."""
    require(logger, logger)
    file = folder / "tracker.json"
    if not file.exists():
        files.write_json(file, {"id": uuid.uuid4().hex[:12]})
    identity = files.read_json(file)["id"]
    if logger == "mlflow":
        return _mlflow(folder, identity)
    if logger == "wandb":
        import wandb

        run = wandb.init(project=PROJECT, name=folder.name, id=identity, dir=str(folder), resume="allow")
    else:
        import trackio

        run = trackio.init(project=PROJECT, name=f"{folder.name}-{identity}", resume="allow", embed=False)
    return Tracker(lambda values, position: run.log(dict(values), step=position), run.finish)


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

    def add(values: Mapping[str, float], position: int) -> None:
        for name, value in values.items():
            client.log_metric(run.info.run_id, name, value, step=position)

    return Tracker(add, lambda: client.set_terminated(run.info.run_id))
