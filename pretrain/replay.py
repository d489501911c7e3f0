"""Run again what a run of non-finite steps left behind: `python -m twist.pretrain.replay CAPTURE.pt`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from twist.contracts.config import validate
from twist.contracts.errors import UsageError
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import build_model
from twist.pretrain.train import objective


def replay(path: Path) -> dict[str, Any]:
    """Run the captured batch through the captured state, alone on the CPU in float32.

    Returns `loss`, `gradient_norm`, and the names of the gradients that are not finite. The statistics of the last
    batch norm are then this rank's own; in a run of several ranks the other ranks' captures may hold the culprit.
    """
    capture = torch.load(path, map_location="cpu", weights_only=True)
    config = validate(capture["config"], PretrainConfig, where=str(path))
    alone = config.model_copy(update={"model": config.model.model_copy(update={"bunch_size": 0})})
    student, teacher = build_model(alone, device=torch.device("cpu"))
    student.load_state_dict(capture["state"]["model"])
    if teacher is not None:
        teacher.load_state_dict(capture["state"]["teacher"])
    batch = capture["batch"]
    torch.manual_seed(batch["seed"])
    loss = objective(student, teacher, batch["views"], config=config, stage=batch["stage"], quantile=batch["quantile"])
    loss.total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {
        "loss": float(loss.total),
        "gradient_norm": float(torch.nn.utils.get_total_norm(list(gradients.values()))),
        "nonfinite_gradients": [name for name, g in gradients.items() if not torch.isfinite(g).all()],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(str(UsageError("usage: python -m twist.pretrain.replay CAPTURE.pt")))
    for name, value in replay(Path(sys.argv[1])).items():
        print(f"{name}: {value}")
