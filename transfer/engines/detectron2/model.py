"""A Detectron2 model: MoCo's C4 head, the proof that the weights arrived, metrics under our names, what it predicts."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import build_augmentation, read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import get_norm
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from pycocotools import mask as run_lengths
from torch import nn

from twist.contracts.pickles import read_state
from twist.transfer.engines import framework
from twist.transfer.engines.detectron2 import vit
from twist.transfer.engines.detectron2.config import read_tree
from twist.transfer.pictures import PANEL_PIXELS
from twist.transfer.predict import Picture
from twist.transfer.request import Request

# Detections below this score would hide a picture, and so would more boxes; the evaluation uses all of them.
PICTURE_SCORE, PICTURE_BOXES = 0.1, 20
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
            channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8  # res5 is 8 times res2
            strides = {"stride_per_block": [2] + [1] * (_BASIC_BLOCKS[depth] - 1)}
            sides = {"in_channels": channels // 2, "out_channels": channels}
            res5 = nn.Sequential(*ResNet.make_stage(BasicBlock, _BASIC_BLOCKS[depth], **strides, **sides, norm=norm))
        else:
            res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(norm, channels))
        return res5, channels


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


@torch.no_grad()
def predict(run: Path, pictures: Iterable[Picture], output: Path) -> dict[str, Any]:
    """COCO's content for `pictures`, with a score for each annotation, and `<name>.png` drawn into `output`."""
    config = read_tree(CfgNode.load_cfg((run / "config.yaml").read_text()))
    config.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(config).eval()
    # A run of an earlier version has no manifests, and no names of classes.
    checkpoint = framework.newest_checkpoint(run, "model") or run / "model_final.pth"
    model.load_state_dict(read_state(checkpoint, "model", remedy="run the protocol again")["model"])
    resize = T.AugmentationList(build_augmentation(config, is_train=False))
    numbers = [str(number) for number in range(1, config.MODEL.ROI_HEADS.NUM_CLASSES + 1)]
    names = framework.evaluation(run).get("classes") or numbers
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, path, pixels) in enumerate(pictures, start=1):
        image = pixels.permute(1, 2, 0).numpy()
        height, width = image.shape[:2]
        seen = T.AugInput(image[:, :, ::-1] if config.INPUT.FORMAT == "BGR" else image)
        resize(seen)
        inputs = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        (result,) = model([{"image": inputs, "height": height, "width": width}])
        found = result["instances"].to("cpu")
        images.append({"id": number, "file_name": str(path), "width": width, "height": height})
        for one in instances_to_coco_json(found, number):
            area = run_lengths.area(one["segmentation"]) if "segmentation" in one else one["bbox"][2] * one["bbox"][3]
            more = {"id": len(annotations) + 1, "area": float(area), "iscrowd": 0}
            annotations.append({**one, "category_id": one["category_id"] + 1, **more})
        drawing = Visualizer(image, Metadata(thing_classes=names), scale=max(1.0, PANEL_PIXELS / max(height, width)))
        drawn = drawing.draw_instance_predictions(found[found.scores >= PICTURE_SCORE][:PICTURE_BOXES])
        Image.fromarray(drawn.get_image()).save(output / f"{name}.png")
    categories = [{"id": place, "name": name} for place, name in enumerate(names, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}
