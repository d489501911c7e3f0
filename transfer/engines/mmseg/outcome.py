"""What comes of an MMSegmentation model: the proof that the weights arrived, the metrics under our names, pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from twist.contracts.errors import UserError
from twist.contracts.images import read_image
from twist.transfer.pictures import draw_classes, legend_of, save_pair

PICTURES = 4
_METRICS = {"miou_percent": "mIoU", "macc_percent": "mAcc", "aacc_percent": "aAcc"}


def prove_loaded(backbone: nn.Module, weights: Path) -> None:
    """`backbone` holds exactly the tensors of the weights file, bit for bit.

    Raises:
        UserError: mmengine skipped something (it would only print).
    """
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("backbone."): t for name, t in loaded.get("state_dict", loaded).items()}
    counters = "num_batches_tracked"
    state = {k: v for k, v in backbone.state_dict().items() if not k.endswith(counters)}
    given = {k: v for k, v in tensors.items() if not k.endswith(counters)}
    wrong = sorted(k for k in given if k not in state or not torch.equal(state[k].cpu(), given[k]))
    random = sorted(state.keys() - given.keys())
    if wrong or random:
        raise UserError(
            f"MMSegmentation did not take the weights: {len(wrong)} tensors of {weights} are not in the model, "
            f"{len(random)} of the backbone's {len(state)} were left at random (first: {(wrong or random)[0]}); "
            "convert them again."
        )


def metrics_of(measured: dict[str, float]) -> dict[str, float]:
    metrics = {}
    for name, key in _METRICS.items():
        value = float(measured[key])
        if not math.isfinite(value):
            raise UserError(
                f"{key} is {value}: no labelled pixel was evaluated; `twist data check` looks at the masks."
            )
        metrics[name] = round(value, 4)  # two decimals, gathered as float32 over several processes
    return metrics


def draw(runner: Runner, output: Path) -> list[Path]:
    """Truth and prediction of the first images of the validation set."""
    model = bare(runner.model).eval()
    dataset = runner.val_dataloader.dataset
    paths = []
    for number in range(min(PICTURES, len(dataset))):
        item = dataset[number]
        with torch.no_grad():
            (found,) = model.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})
        image = read_image(found.img_path).permute(1, 2, 0).numpy()
        truth, prediction = (
            np.asarray(part.data[0].cpu()) for part in (item["data_samples"].gt_sem_seg, found.pred_sem_seg)
        )
        path = output / f"prediction-{number + 1}.png"
        legend = legend_of([truth, prediction], dataset.metainfo["classes"])
        paths.append(save_pair(draw_classes(image, truth), draw_classes(image, prediction), path, legend=legend))
    return paths


def bare(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model
