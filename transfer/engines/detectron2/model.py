"""A Detectron2 model: MoCo's C4 head, the proof that the weights arrived, metrics under our names, pictures."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.utils.visualizer import Visualizer
from torch import nn

from twist.transfer.engines import framework
from twist.transfer.engines.detectron2 import vit
from twist.transfer.pictures import PANEL_PIXELS
from twist.transfer.request import Request

# Detections below this score would hide a picture; the evaluation uses all of them.
PICTURE_SCORE = 0.1
# Blocks of the last stage of the ResNets that are made of basic blocks.
_BASIC_BLOCKS = {18: 2, 34: 3}
_BACKBONE = ("backbone.bottom_up.", "backbone.stem.", "backbone.res", "roi_heads.res5.")


class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """`Res5ROIHeads` with one more batch norm after res5 (MoCo, arXiv 1911.05722, App. A.2).

    The stock head builds res5 of bottlenecks only; here the block follows the depth, so that a ResNet-18 or -34 (the
    samples) brings its own layer4.
    """

    @classmethod
    def _build_res5_block(cls, cfg: Any) -> tuple[nn.Sequential, int]:
        depth, norm = cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM
        if depth in _BASIC_BLOCKS:
            out_channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8  # res5 is 8 times res2
            blocks = _BASIC_BLOCKS[depth]
            stage = ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[2] + [1] * (blocks - 1),
                in_channels=out_channels // 2,
                out_channels=out_channels,
                norm=norm,
            )
            res5 = nn.Sequential(*stage)
        else:
            res5, out_channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(norm, out_channels))
        return res5, out_channels


# A user's own MoCo code may have registered the name in this process already.
if "Res5ROIHeadsExtraNorm" not in ROI_HEADS_REGISTRY:
    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)


def prove_loaded(model: nn.Module, weights: Path) -> str:
    """Every tensor of the weights file is in `model`, and every tensor of the backbone came from it; their digest."""
    if (network := vit.network_of(model)) is not None:
        tensors, expected = vit.tensors_for(network, weights)
        return framework.prove_loaded("Detectron2", tensors, network.state_dict(), expected=expected)
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    state = model.state_dict()
    expected = {key for key in state if key.startswith(_BACKBONE) and not key.startswith("roi_heads.res5.norm.")}
    return framework.prove_loaded("Detectron2", loaded.get("model", loaded), state, expected=expected)


def metrics_of(
    results: dict[str, dict[str, float]], request: Request, *, masks: bool = True
) -> tuple[dict[str, float], list[str]]:
    """Detectron2's results under the names of `twist.contracts.metrics`, and notes on them."""
    metrics, notes = {}, []
    for name in request.protocol.metrics:
        _, kind, which, _ = name.rsplit("_", 3)
        if kind == "mask" and not masks:
            continue  # a user's own boxes, said in the plan
        value = results.get({"box": "bbox", "mask": "segm"}[kind], {}).get(which.upper())
        if value is None or not math.isfinite(value):
            # No number, or NaN, where the model detected nothing at all, which is an AP of 0. Data in which there is
            # nothing to detect do not come so far (`count_images`).
            notes.append(f"{name}: the evaluator gave no number because nothing was detected; counted as 0")
            value = 0.0
        metrics[name] = float(value)
    return metrics, notes


@torch.no_grad()
def draw(model: nn.Module, config: CfgNode) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Truth and prediction of the images of the test set that have objects."""
    (name,) = config.DATASETS.TEST
    mapper = DatasetMapper(config, is_train=False)
    model.eval()
    for entry in filter(lambda entry: entry["annotations"], DatasetCatalog.get(name)):
        image = read_image(entry["file_name"], "RGB")
        found = model([mapper(dict(entry))])[0]["instances"].to("cpu")
        # As many as there are objects, the highest scores first (the detector's order).
        found = found[found.scores >= PICTURE_SCORE][: len(entry["annotations"])]
        truth, prediction = (
            Visualizer(image, MetadataCatalog.get(name), scale=PANEL_PIXELS / max(image.shape[:2])) for _ in range(2)
        )
        yield truth.draw_dataset_dict(entry).get_image(), prediction.draw_instance_predictions(found).get_image()


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
