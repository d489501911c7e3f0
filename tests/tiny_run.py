"""Pretraining runs of seconds for tests: real loader, real loop, real files; a backbone of two layers, with dropout."""

import contextlib
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from twist.contracts.config import Config, validate
from twist.pretrain import checkpoint, distributed, train
from twist.pretrain import model as networks
from twist.pretrain.config import PretrainConfig
from twist.pretrain.train import pretrain

# What a machine's speed decides, and what does not belong to a comparison of runs.
TIMES = ("images_per_s", "data_wait_share")


def make_images(folder: Path, count: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = (generator.random((5, 6, 3)) * 255).astype(np.uint8)
        Image.fromarray(coarse).resize((40, 34), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.jpg")
    return folder


def tiny_config(root: Path, **sections: dict[str, Any]) -> PretrainConfig:
    """20 images, batch 4: five steps an epoch."""
    values: dict[str, dict[str, Any]] = {
        "data": {"root": str(root), "workers": 0},
        "views": {"global_size": 16, "local_count": 2, "local_size": 8},
        "model": {"backbone": "resnet18", "hidden_dim": 16, "classes": 12, "bunch_size": 0},
        "optim": {"lr": 8.0},
        "self_label": {"warmup_epochs": 0, "lr": 8.0},
        "run": {
            "epochs": 2,
            "mutual_information_epochs": 2,
            "batch_size": 4,
            "device": "cpu",
            "precision": "fp32",
            "deterministic": True,
            "log_every_steps": 1,
            "checkpoint_every_steps": 1,
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return validate(values, PretrainConfig, where="test")


def toml(config: Config) -> str:
    """A config as the file that it could have been read from."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None and value != {}]
    return "\n".join(lines) + "\n"


def tiny_backbone(*_: Any, **__: Any) -> nn.Module:
    """Images (N, 3, H, W) → (N, 8). Its dropout shows whether the random numbers of a step are those of the step."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    network.num_features = 8  # type: ignore[assignment]
    return network


@contextlib.contextmanager
def tiny_networks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "build_backbone", tiny_backbone)
        # A picture takes longer than the run that it is of.
        patch.setattr(train, "draw_curves", lambda folder, **_: folder / "curves.png")
        patch.setattr(distributed, "JOINING", datetime.timedelta(seconds=20))  # of a peer that was killed before
        yield


def run(config: PretrainConfig, folder: Path, *, resume: bool = False) -> Path:
    with tiny_networks():
        return pretrain(config, output=folder, resume=resume)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the machine's speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def final_state(folder: Path) -> dict[str, Any]:
    found = checkpoint.newest_valid(folder / "checkpoints", say=print)
    assert found is not None
    return checkpoint.load(found[0], device=torch.device("cpu"))


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two states are not bit-identical."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differing(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differing(x, y, f"{where}/{i}")]
    return [] if a == b else [where]


class Crash(Exception):
    """Stands for whatever kills a run."""


@contextlib.contextmanager
def crash_after(steps: int) -> Iterator[None]:
    """The loop dies after its `steps`-th step of this start, once the step's checkpoint is written."""
    from twist.pretrain.run import Run

    original, taken = Run.save, [0]

    def save(self: Run) -> None:
        original(self)
        taken[0] += 1
        if taken[0] == steps:
            raise Crash

    Run.save = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.save = original  # type: ignore[method-assign]
