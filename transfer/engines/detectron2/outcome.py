"""What comes of a Detectron2 model: the proof that the weights arrived, the metrics under our names, the pictures."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from torch import Tensor, nn

from twist.contracts.errors import UserError
from twist.transfer.pictures import draw_instances, save_pair
from twist.transfer.request import Request

PICTURES = 4
# Detections below this score would hide a picture; the evaluation uses all of them.
PICTURE_SCORE = 0.1


def prove_loaded(model: nn.Module, weights: Path) -> None:
    """Every tensor of the weights file is in `model`, once and bit for bit; every backbone tensor came from the file.

    Raises:
        UserError: Detectron2 skipped something (it would only warn).
    """
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = loaded.get("model", loaded)
    state = model.state_dict()
    filled = set()
    wrong = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or name.endswith("num_batches_tracked"):
            continue
        places = [key for key in state if key == name or key.endswith(f".{name}")]
        if len(places) != 1 or not torch.equal(state[places[0]].cpu(), tensor):
            wrong.append(name)
        filled.update(places)
    expected = {key for key in state if _is_backbone(key)}
    random = sorted(expected - filled)
    if wrong or random:
        raise UserError(
            f"Detectron2 did not take the weights: {len(wrong)} tensors of {weights} are not in the model, "
            f"{len(random)} of the backbone's {len(expected)} were left at random (first: {(wrong or random)[0]}); "
            "convert them again."
        )


def _is_backbone(key: str) -> bool:
    if key.endswith("num_batches_tracked"):
        return False
    if key.startswith("roi_heads.res5."):
        return not key.startswith("roi_heads.res5.norm.")
    return key.startswith(("backbone.bottom_up.", "backbone.stem.", "backbone.res"))


def metrics_of(results: dict[str, dict[str, float]], request: Request) -> tuple[dict[str, float], list[str]]:
    """Detectron2's results under the names of `twist.contracts.metrics`."""
    metrics, notes = {}, []
    for name in request.protocol.metrics:
        _, kind, which, _ = name.rsplit("_", 3)
        value = results.get({"box": "bbox", "mask": "segm"}[kind], {}).get(which.upper())
        if value is None or not math.isfinite(value):
            # Detectron2 gives nothing, or NaN, where the model detected nothing at all: that is an AP of 0. Where there
            # is nothing to detect it gives NaN, too: such data do not come so far (`count_images`).
            notes.append(f"{name}: the evaluator gave no number because nothing was detected; counted as 0")
            value = 0.0
        metrics[name] = float(value)
    return metrics, notes


def draw(model: nn.Module, config: CfgNode, output: Path) -> list[Path]:
    """Truth and prediction of the first images of the test set that have objects."""
    (name,) = config.DATASETS.TEST
    metadata = MetadataCatalog.get(name)
    entries = [entry for entry in DatasetCatalog.get(name) if entry["annotations"]][:PICTURES]
    mapper = DatasetMapper(config, is_train=False)
    model.eval()
    paths = []
    for number, entry in enumerate(entries):
        image = read_image(entry["file_name"], "RGB")
        truth = annotations_to_instances(
            [a for a in entry["annotations"] if not a.get("iscrowd", 0)], image.shape[:2], mask_format="bitmask"
        )
        masks = truth.gt_masks.tensor.numpy() if truth.has("gt_masks") else None
        left = draw_instances(
            image, truth.gt_boxes.tensor.numpy(), truth.gt_classes.tolist(), metadata.thing_classes, masks=masks
        )
        with torch.no_grad():
            found = model([mapper(dict(entry))])[0]["instances"].to("cpu")
        # As many as there are objects, the highest scores first (the detector's order).
        found = found[found.scores >= PICTURE_SCORE][: len(truth)]
        right = draw_instances(
            image,
            found.pred_boxes.tensor.numpy(),
            found.pred_classes.tolist(),
            metadata.thing_classes,
            scores=found.scores.tolist(),
            masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
        )
        paths.append(save_pair(left, right, output / f"prediction-{number + 1}.png"))
    return paths


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
