"""Boxes and masks that a finished Detectron2 run finds in any picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from pycocotools import mask as run_lengths

from twist.contracts.pickles import read_state
from twist.transfer.engines import framework
from twist.transfer.engines.detectron2.config import read_tree
from twist.transfer.engines.detectron2.model import PICTURE_SCORE
from twist.transfer.pictures import PANEL_PIXELS
from twist.transfer.predict import Picture

# So many boxes can be told apart in a picture.
_DRAWN = 20


@torch.no_grad()
def predict(run: Path, pictures: Iterable[Picture], output: Path) -> dict[str, Any]:
    """COCO's content for `pictures`, with a score for each annotation, and `<name>.png` drawn into `output`."""
    config = read_tree(CfgNode.load_cfg((run / "config.yaml").read_text()))
    config.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(config).eval()
    # A run of an earlier version has no manifests.
    checkpoint = framework.newest_checkpoint(run, "model") or run / "model_final.pth"
    model.load_state_dict(read_state(checkpoint, "model", remedy="run the protocol again")["model"])
    resize = T.AugmentationList(build_augmentation(config, is_train=False))
    names = framework.evaluation(run).get("classes") or _known_classes(config)
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
        drawn = drawing.draw_instance_predictions(found[found.scores >= PICTURE_SCORE][:_DRAWN])
        Image.fromarray(drawn.get_image()).save(output / f"{name}.png")
    categories = [{"id": place, "name": name} for place, name in enumerate(names, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def _known_classes(config: CfgNode) -> list[str]:
    """Those of a run of an earlier version: Detectron2's for the public data sets, else numbers."""
    (name,) = config.DATASETS.TEST
    public = not name.startswith(("sample_", "own_")) and MetadataCatalog.get(name).get("thing_classes", None)
    return list(public or map(str, range(1, config.MODEL.ROI_HEADS.NUM_CLASSES + 1)))
