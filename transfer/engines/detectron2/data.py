"""Detectron2's data sets, registered at the root a run is given instead of at import time.

Detectron2 reads `DETECTRON2_DATASETS` once, when it is imported; a suite runs several roots in one process. The names
of the configs (`coco_2017_train`, `voc_2007_trainval`, …) are therefore registered again for every run, through
Detectron2's own register functions, and the sample gets names of its own with its own classes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASS_NAMES

from twist.catalog.roots import voc_folder
from twist.contracts.errors import UserError

_COCO = ("train", "val")
_VOC = ((2007, "trainval"), (2007, "test"), (2012, "trainval"))


def register_data(root: Path, names: Sequence[str], *, sample_classes: Sequence[str] | None) -> None:
    """Register `names` (data sets of a config) at `root`; the `sample_…` ones have `sample_classes`."""
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        with contextlib.suppress(KeyError):
            MetadataCatalog.remove(name)
        plain = name.removeprefix("sample_")
        classes = sample_classes if plain != name else None
        if plain.startswith("coco_2017_"):
            split = plain.removeprefix("coco_2017_") + "2017"
            metadata = {} if classes else _get_builtin_metadata("coco")
            json_file = root / "coco" / "annotations" / f"instances_{split}.json"
            register_coco_instances(name, metadata, str(json_file), str(root / "coco" / split))
        elif plain.startswith("voc_"):
            _, year, split = plain.split("_")
            folder = str(voc_folder(root, int(year)))
            register_pascal_voc(name, folder, split, int(year), tuple(classes or VOC_CLASS_NAMES))
            MetadataCatalog.get(name).evaluator_type = "pascal_voc"
        elif plain.startswith("cityscapes_fine_instance_seg_"):
            split = plain.removeprefix("cityscapes_fine_instance_seg_")
            images, truth = (str(root / "cityscapes" / part / split) + "/" for part in ("leftImg8bit", "gtFine"))
            DatasetCatalog.register(
                name,
                lambda images=images, truth=truth: load_cityscapes_instances(
                    images, truth, from_json=True, to_polygons=True
                ),
            )
            metadata = _get_builtin_metadata("cityscapes")
            MetadataCatalog.get(name).set(
                image_dir=images, gt_dir=truth, evaluator_type="cityscapes_instance", **metadata
            )
        else:
            raise UserError(f"This suite has no data set {name}: DATASETS of a config names {_known()}.")


def count_images(names: Sequence[str]) -> dict[str, int]:
    """Images of each registered set, all of them there.

    Raises:
        UserError: an annotation file names images that are not on disk, or a set is empty, half extracted, or without
            a single object.
    """
    counts = {}
    for name in names:
        try:
            entries: list[dict[str, Any]] = DatasetCatalog.get(name)
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise UserError(
                f"Cannot read the annotations of {name}: {type(error).__name__}: {str(error).splitlines()[0]}; "
                "`twist data check` says what is wrong with the tree."
            ) from None
        if not entries:
            raise UserError(f"The data set {name} holds no images: `twist data check` says what is missing.")
        folders = {os.path.dirname(entry["file_name"]) for entry in entries}
        present = {os.path.join(folder, item.name) for folder in folders for item in os.scandir(folder)}
        absent = [entry["file_name"] for entry in entries if entry["file_name"] not in present]
        if absent:
            raise UserError(
                f"{len(absent)} of the {len(entries)} images of {name} are not on disk (first: {absent[0]}): the "
                "archive was unpacked in part; unpack it again."
            )
        if not any(not one.get("iscrowd", 0) for entry in entries for one in entry["annotations"]):
            raise UserError(
                f"The {len(entries)} images of {name} have no annotated object, so there is nothing to learn or to "
                "measure: `twist data check` says what is wrong with the tree."
            )
        counts[name] = len(entries)
    return counts


def _known() -> str:
    names = [f"coco_2017_{split}" for split in _COCO] + [f"voc_{year}_{split}" for year, split in _VOC]
    return ", ".join([*names, "cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val"])
