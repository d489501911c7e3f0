"""Detectron2's data sets, registered at the root a run is given instead of at import time.

Detectron2 reads `DETECTRON2_DATASETS` once, when it is imported. The names of the configs (`coco_2017_train`, …) are
therefore registered again for every run, and the sample gets names of its own with its own classes.
"""

import contextlib
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances, register_pascal_voc
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.cityscapes import load_cityscapes_instances

from twist.catalog.boxes import read_voc_xml
from twist.catalog.card_data import CardData
from twist.catalog.data_sets import DATA_SETS, DataSet, Split, read_names
from twist.contracts import files
from twist.contracts.errors import UserError

OWN_TRAIN, OWN_VAL = "own_train", "own_val"


def write_own(own: CardData, folder: Path, *, masks: bool) -> None:
    """A card's boxes below `folder`, a COCO file a split, for `register_own` in every process."""
    assert own.boxes is not None
    for role, boxes in own.boxes.items():
        files.write_json(folder / f"own_{role}.json", boxes.as_coco(masks=masks))


def register_own(folder: Path, *, voc: bool) -> None:
    """Register what `write_own` wrote; `voc`: measured as Pascal VOC is."""
    for name in (OWN_TRAIN, OWN_VAL):
        _forget(name)
        file = str(folder / f"{name}.json")
        DatasetCatalog.register(name, functools.partial(load_coco_json, file, "", name))
        kind = {"evaluator_type": "pascal_voc", "year": 2007, "split": name} if voc else {"evaluator_type": "coco"}
        MetadataCatalog.get(name).set(json_file=file, image_root="", dirname=str(folder), **kind)


def voc_objects(name: str) -> dict[str, list[dict[str, Any]]]:
    """The objects of each image of a registered set, by the id in its results, as VOC's evaluation wants them."""
    metadata = MetadataCatalog.get(name)
    if name not in (OWN_TRAIN, OWN_VAL):
        folder = Path(metadata.dirname)
        names = read_names(folder / "ImageSets" / "Main" / f"{metadata.split}.txt")
        return {one: read_voc_xml(folder / "Annotations" / f"{one}.xml")[1] for one in names}
    content = json.loads(Path(metadata.json_file).read_text(encoding="utf-8"))
    classes = {category["id"]: category["name"] for category in content["categories"]}
    found: dict[str, list[dict[str, Any]]] = {str(image["id"]): [] for image in content["images"]}
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        # Pixels from 1, the last one inside: the evaluator adds 1 to the left and upper edge of what is detected.
        box = [x + 1, y + 1, x + width, y + height]
        ignored = int(bool(one.get("difficult", 0) or one["iscrowd"]))
        found[str(one["image_id"])].append({"name": classes[one["category_id"]], "difficult": ignored, "bbox": box})
    return found


def _forget(name: str) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    with contextlib.suppress(KeyError):
        MetadataCatalog.remove(name)


def known_splits() -> dict[str | None, tuple[DataSet, Split]]:
    """The catalog's splits by what Detectron2's configs call them."""
    return {split.detectron2: (row, split) for row in DATA_SETS.values() for split in row.splits.values()}


def register_data(root: Path, names: Sequence[str], *, sample: dict[str, Any] | None) -> None:
    """Register `names` (data sets of a config) at `root`; the `sample_…` ones have the classes of its `sample`.json."""
    known = known_splits()
    for name in names:
        plain = name.removeprefix("sample_")
        if plain not in known or not plain:
            listed = ", ".join(sorted(filter(None, known)))
            raise UserError(f"There is no data set {name}: DATASETS of a config may name {listed}.")
        _forget(name)
        _register(name, *known[plain], root, sample if plain != name else None)


def _register(name: str, row: DataSet, split: Split, root: Path, sample: dict[str, Any] | None) -> None:
    place = row.place(root)
    images, listed = place / split.images.folder, place / split.names
    # The names of a sample's classes are in its annotation files.
    known_classes = row.detectron2_metadata and not (sample and row.classes_of_sample)
    metadata = _get_builtin_metadata(row.detectron2_metadata) if known_classes else {}
    if listed.suffix == ".json":
        register_coco_instances(name, metadata, str(listed), str(images))
    elif "boxes" in split.truth:
        register_pascal_voc(name, str(place), listed.stem, row.voc_year, row.label_names(sample))
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    elif "polygons" in split.truth:
        # Detectron2 finds the annotations by the folders' names, with a slash at the end.
        folders = f"{images}/", f"{place / split.truth['polygons'].folder}/"
        DatasetCatalog.register(name, lambda: load_cityscapes_instances(*folders, from_json=True, to_polygons=True))
        kind = {"image_dir": folders[0], "gt_dir": folders[1], "evaluator_type": "cityscapes_instance"}
        MetadataCatalog.get(name).set(**kind, **metadata)
    else:
        raise UserError(f"{row.name} has no boxes, so Detectron2 cannot be trained on it: use another data set.")


def count_images(names: Sequence[str]) -> dict[str, int]:
    """Images of each registered set; `UserError` for annotations or images that are not there, or no single object."""
    counts = {}
    for name in names:
        wrong, entries = "", []
        try:
            entries = DatasetCatalog.get(name)
        except (OSError, ValueError, KeyError, AssertionError) as error:
            wrong = f"its annotations cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
        folders = {os.path.dirname(entry["file_name"]) for entry in entries}
        present = {os.path.join(folder, item.name) for folder in folders for item in os.scandir(folder)}
        if absent := [entry["file_name"] for entry in entries if entry["file_name"] not in present]:
            wrong = f"{len(absent)} of the {len(entries)} images of {name} are not on disk (first: {absent[0]})"
        elif not wrong and all(one.get("iscrowd", 0) for entry in entries for one in entry["annotations"]):
            wrong = f"none of its {len(entries)} images has an annotated object"
        if wrong:
            raise UserError(f"{name}: {wrong}; `twist data check` says what is wrong with the tree.")
        counts[name] = len(entries)
    return counts
