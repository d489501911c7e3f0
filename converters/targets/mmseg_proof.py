"""The MMSegmentation side of the proof: its backbone, loader, image reader and preprocessor, set up by the overlay."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor, nn

from twist.contracts.weights import Backbone
from twist.converters.stages import Stages, check_loaded
from twist.converters.targets.mmseg import PREFIX, WEIGHTS


def version() -> str:
    for package in ("onedl-mmsegmentation", "mmsegmentation"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "of unknown version"


def run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """res2 … res5 (or the tokens of every layer) of each image, by MMSegmentation's own path."""
    model = Config.fromfile(str(folder / "overlay.py")).model
    settings = dict(model.backbone)
    settings.pop("_delete_", None)
    settings["init_cfg"] = {**settings["init_cfg"], "checkpoint": str(folder / WEIGHTS)}
    with _quiet(), DefaultScope.overwrite_default_scope("mmseg"):
        network = MODELS.build(settings)
        network.init_weights()
    network.eval()
    preprocessor = SegDataPreProcessor(
        **{key: value for key, value in model.data_preprocessor.items() if key != "type"}
    )
    prefix = settings["init_cfg"].get("prefix", "")
    check_loaded(
        {name.removeprefix(prefix): tensor for name, tensor in _written(folder).items()},
        network.state_dict(),
    )
    assert prefix in ("", PREFIX)
    return [_stages(network, _input(preprocessor, file), backbone.is_vit) for file in files]


def _stages(network: nn.Module, images: Tensor, is_vit: bool) -> Stages:
    stages: Stages = {}
    if not is_vit:
        return {f"res{index + 2}": value for index, value in enumerate(network(images))}
    hooks = [
        layer.register_forward_hook(_keep(stages, f"block{index}"))
        for index, layer in enumerate(network.layers)  # type: ignore[arg-type]
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return stages


def _keep(stages: Stages, name: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        stages[name] = output

    return hook


def _input(preprocessor: nn.Module, file: Path) -> Tensor:
    image = LoadImageFromFile()({"img_path": str(file)})["img"]  # (H, W, BGR), as OpenCV reads
    packed = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # PackSegInputs
    return preprocessor({"inputs": [packed]})["inputs"]


def _written(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / WEIGHTS, weights_only=True, mmap=True)["state_dict"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # mmengine prints each load on standard output when no run has set up its logger.
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
