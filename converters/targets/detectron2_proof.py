"""The Detectron2 side of the proof: a real R-CNN with a feature pyramid, configured by the overlay alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from torch import Tensor, nn

from twist.contracts.weights import Backbone
from twist.converters.stages import Stages, check_loaded
from twist.converters.targets.detectron2 import WEIGHTS, overlay_name


def version() -> str:
    return importlib.metadata.version("detectron2")


def run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """res2 … res5 (or all blocks' tokens) of each image, by Detectron2's own reader, normalisation and network."""
    overlay = folder / overlay_name(backbone)
    return _run_vit(folder, overlay, files) if backbone.is_vit else _run_resnet(folder, overlay, files)


def _run_resnet(folder: Path, overlay: Path, files: list[Path]) -> list[Stages]:
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
    cfg.merge_from_file(str(overlay))
    cfg.MODEL.WEIGHTS = str(folder / cfg.MODEL.WEIGHTS)
    cfg.MODEL.DEVICE = "cpu"
    # SyncBN, the recipes' norm, computes the same in eval mode but does not exist on a CPU.
    cfg.MODEL.RESNETS.NORM = "BN"
    # The box head takes no part; at its usual size, filling it with random numbers takes longer than the proof.
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    model = build_model(cfg).eval()
    with _quiet():
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    bottom_up = model.backbone.bottom_up
    check_loaded(_written(folder), bottom_up.state_dict())
    result = []
    for file in files:
        image = _tensor(read_image(str(file), format=cfg.INPUT.FORMAT))
        batch = model.preprocess_image([{"image": image}])
        result.append(dict(bottom_up(batch.tensor)))
    return result


def _run_vit(folder: Path, overlay: Path, files: list[Path]) -> list[Stages]:
    config = LazyConfig.load(str(overlay))
    network = instantiate(config.backbone).eval()
    holder = nn.Module()
    holder.backbone = nn.Module()
    holder.backbone.net = network  # where ViTDet's feature pyramid has it
    with _quiet():
        DetectionCheckpointer(holder).load(str(folder / config.train.init_checkpoint))
    check_loaded(_written(folder), network.state_dict())
    mean, std = (torch.tensor(list(config.model[key])).view(-1, 1, 1) for key in ("pixel_mean", "pixel_std"))
    result = []
    for file in files:
        image = _tensor(read_image(str(file), format=config.model.input_format))
        stages: Stages = {}
        hooks = [
            block.register_forward_hook(_keep(stages, f"block{index}")) for index, block in enumerate(network.blocks)
        ]
        network(((image - mean) / std)[None])
        for hook in hooks:
            hook.remove()
        result.append(stages)
    return result


def _keep(stages: Stages, name: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        stages[name] = output.flatten(1, 2)  # (1, H, W, D) → (1, H·W, D)

    return hook


def _tensor(image: Any) -> Tensor:
    # As DatasetMapper makes it: (H, W, C) in INPUT.FORMAT's order → (C, H, W).
    return torch.as_tensor(image.transpose(2, 0, 1).copy()).float()


def _written(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / WEIGHTS, weights_only=True, mmap=True)["model"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The checkpointer warns about heads that no backbone file fills; `check_loaded` says what matters.
    names = ("fvcore.common.checkpoint", "detectron2.checkpoint.detection_checkpoint", "detectron2.checkpoint")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
