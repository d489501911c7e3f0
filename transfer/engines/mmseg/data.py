"""A data card's pictures and masks as an MMSegmentation data set, and its masks by our one reader.

The pairs lie in the run folder, so that every process and a continued run read the same; imported before the registry
is asked for `OwnSegDataset` and `LoadOwnMask`.
"""

import json
from pathlib import Path
from typing import Any

from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS

from twist.catalog.card import Segmentation
from twist.catalog.card_data import CardData
from twist.catalog.masks import read_mask
from twist.contracts import files


def write_own(own: CardData, folder: Path) -> None:
    """The pairs of each split below `folder`."""
    for role, pairs in (own.pairs or {}).items():
        files.write_json(folder / f"own_{role}.json", [[str(pair.image), str(pair.mask)] for pair in pairs])


@DATASETS.register_module(force=True)
class OwnSegDataset(BaseSegDataset):
    """Pairs of picture and mask from the list `ann_file`."""

    def load_data_list(self) -> list[dict[str, Any]]:
        pairs = json.loads(Path(self.ann_file).read_text(encoding="utf-8"))
        fixed: dict[str, Any] = {"label_map": None, "reduce_zero_label": False}
        return [{"img_path": image, "seg_map_path": mask, **fixed, "seg_fields": []} for image, mask in pairs]


@TRANSFORMS.register_module(force=True)
class LoadOwnMask(BaseTransform):
    """Sets `gt_seg_map` (H, W) uint8: classes as the card's `section` numbers them, 255 for none."""

    def __init__(self, section: dict[str, Any]) -> None:
        self.section = Segmentation.model_validate(section)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["gt_seg_map"] = read_mask(Path(results["seg_map_path"]), self.section)
        results["seg_fields"].append("gt_seg_map")
        return results
