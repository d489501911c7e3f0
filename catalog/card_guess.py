"""`twist data card FOLDER`: the card that a folder of data suggests, with what cannot be known as comments.

Known by their files: COCO's JSON (CVAT's and Roboflow's exports too), VOC's XML, YOLO's label files, masks beside
pictures, class folders, Parquet files, and pictures alone. Nothing is written but the card.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from twist.catalog.boxes import yolo_names
from twist.catalog.card import CARD, ROLES, find_card
from twist.catalog.class_folders import class_names
from twist.catalog.data_sets import spread
from twist.catalog.masks import MASK_ENDINGS
from twist.catalog.report import UNREADABLE
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import file_entries, image_names

# How folders and files of a split are called, first the usual name.
SPLIT_NAMES = {"train": ("train", "training", "trainval"), "val": ("val", "valid", "validation", "test")}
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "gt", "SegmentationClass", "label", "segmentation")
IMAGE_FOLDERS = ("images", "image", "imgs", "JPEGImages", "img", "pictures")
SUFFIXES = ("_mask", "_labelIds", "_label", "_seg", "_gt", "_L", "_labelTrainIds", "_gtFine_labelIds")
# Masks whose values are looked at, and files of a folder by which its kind is told.
LOOKED_AT = 40


def write_card(folder: Path, output: Path | None = None) -> Path:
    """Write the card that `folder` suggests to `output`, or to `card.toml` in it; never over an existing file.

    Raises:
        UserError: there is no such folder, the file exists, or nothing in the folder is known.
    """
    path = output or folder / CARD
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: check the path.")
    if path.exists():
        raise UserError(f"{path} exists and is not replaced: remove it, or name another with --output.")
    sections = list(_sections(folder))
    if not sections:
        raise UserError(
            f"{folder} holds nothing that is known: no COCO .json, VOC .xml, YOLO labels, masks, class folders, "
            "Parquet files or pictures; write the card by hand."
        )
    name = re.sub(r"[^\w.+-]+", "-", folder.resolve().name).strip("-.") or "data"
    root = "" if path.resolve().parent == folder.resolve() else f'root = "{os.path.abspath(folder)}"\n'
    files.write_text(
        path, f'# Guessed from the files; correct what is wrong.\nname = "{name}"\n{root}\n' + "\n".join(sections)
    )
    find_card(path)  # what was written can be read
    return path


def _sections(folder: Path) -> Iterator[str]:
    boxes = _coco(folder) or _yolo(folder) or _voc(folder)
    masks = _masks(folder)
    classes = "" if boxes or masks else _classes(folder)
    yield from filter(None, (boxes, masks, classes))
    pictures = _common_folder(folder)
    if pictures is not None and not classes:
        yield f'[pretraining]   # val splits are left out\nimages = "{pictures}"\n'


def _role(name: str) -> str | None:
    """The split that a file's or folder's name stands for."""
    words = re.split(r"[^a-z]+", re.sub(r"\d+", "", name.lower()))
    return next((role for role in ROLES if set(words) & set(SPLIT_NAMES[role])), None)


def _split_line(role: str, **keys: str) -> str:
    return f"{role} = {{ " + ", ".join(f'{key} = "{value}"' for key, value in keys.items() if value) + " }\n"


NO_VAL = "# val is missing: name one, or `twist data prepare CARD split=0.2 seed=0`\n"


def _lines(splits: dict[str, dict[str, str]]) -> str:
    """The lines of the splits, a comment where there is no `val`; one split alone is for training."""
    if "train" not in splits:
        splits = {"train": next(iter(splits.values()))}
    lines = "".join(_split_line(role, **splits[role]) for role in ROLES if role in splits)
    return lines + ("" if "val" in splits else NO_VAL)


# ── Boxes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _coco(folder: Path) -> str:
    splits: dict[str, dict[str, str]] = {}
    for name, _ in sorted(file_entries(folder, lambda name: name.endswith(".json"))):
        try:
            content = json.loads((folder / name).read_bytes())
            listed = [image["file_name"] for image in content["images"]]
            if not listed or not isinstance(content["annotations"], list):
                continue
        except (OSError, ValueError, KeyError, TypeError):
            continue
        role = _role(Path(name).stem) or _role(Path(name).parent.name) or "train"
        images = _folder_with(folder, listed[0])
        if role not in splits and images is not None:
            splits[role] = {"images": images, "annotations": name}
    return f'[detection]\nformat = "coco"\n{_lines(splits)}' if splits else ""


def _folder_with(folder: Path, file: str) -> str | None:
    """The folder below which the path `file` lies, for a COCO file that does not say it."""
    names = set(image_names(folder))
    for name in sorted(names, key=len):
        if name == file or name.endswith(f"/{file}"):
            return name.removesuffix(file).rstrip("/") or "."
    return next((str(Path(name).parent) for name in sorted(names) if Path(name).name == Path(file).name), None)


def _voc(folder: Path) -> str:
    xml = sorted(name for name, _ in file_entries(folder, lambda name: name.endswith(".xml")))
    if not xml:
        return ""
    places = sorted({str(Path(name).parent) for name in xml})
    pictures = {Path(name).stem: str(Path(name).parent) for name in image_names(folder)}
    lists = {_role(path.stem): path for path in sorted((folder / "ImageSets" / "Main").glob("*.txt"))}
    splits: dict[str, dict[str, str]] = {}
    for place in places:
        images = next((pictures[Path(n).stem] for n in xml if n.startswith(place) and Path(n).stem in pictures), None)
        if images is None:
            continue
        if len(places) == 1 and None not in lists and len(lists) > 1:
            for role, path in lists.items():
                listed = path.relative_to(folder).as_posix()
                splits[str(role)] = {"images": images, "annotations": place, "list": listed}
        else:
            splits.setdefault(_role(Path(place).name) or "train", {"images": images, "annotations": place})
    return f'[detection]\nformat = "voc"\n{_lines(splits)}' if splits else ""


def _yolo(folder: Path) -> str:
    described = next(iter(sorted([*folder.glob("data.y*ml"), *folder.glob("*.yaml")])), None)
    labels = sorted(name for name, _ in file_entries(folder, lambda name: name.endswith(".txt")))
    labels = [name for name in labels if "labels" in Path(name).parts[:-1]]
    if not labels:
        return ""
    splits: dict[str, dict[str, str]] = {}
    for place in sorted({str(Path(name).parent) for name in labels}):
        images = re.sub(r"(^|/)labels(?=/|$)", r"\1images", place)
        if (folder / images).is_dir():
            splits.setdefault(_role(place) or "train", {"images": images, "annotations": place})
    if not splits:
        return ""
    classes = f'data = "{described.name}"\n' if described is not None else _numbers_as_classes(folder, labels)
    if described is not None:
        yolo_names(described)
    return f'[detection]\nformat = "yolo"\n{_lines(splits)}{classes}'


def _numbers_as_classes(folder: Path, labels: list[str]) -> str:
    words = [line.split() for name in labels for line in (folder / name).read_text().splitlines()]
    most = max((int(float(one[0])) for one in words if one), default=0)
    names = ", ".join(f'"class {number}"' for number in range(most + 1))
    return f"classes = [{names}]   # there is no data.yaml: write their names\n"


# ── Masks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _masks(folder: Path) -> str:
    places = [place for place in MASK_FOLDERS if (folder / place).is_dir()]
    images = next((place for place in IMAGE_FOLDERS if (folder / place).is_dir()), None)
    for place in places if images is not None else ():
        masks = [n for n, _ in file_entries(folder / place, lambda n: n.lower().endswith(MASK_ENDINGS))]
        stems = {Path(name).stem for name in image_names(folder / str(images))}
        suffix = _suffix(stems, [Path(name).stem for name in masks])
        if suffix is None:
            continue
        splits: dict[str, dict[str, str]] = {}
        for below in sorted(os.listdir(folder / place)):
            role = _role(below)
            if role and (folder / str(images) / below).is_dir() and (folder / place / below).is_dir():
                splits.setdefault(role, {"images": f"{images}/{below}", "masks": f"{place}/{below}"})
        splits = splits or {"train": {"images": str(images), "masks": place}}
        ends = f'mask_suffix = "{suffix}"\n' if suffix else ""
        chosen = [folder / place / name for name in spread(sorted(masks), LOOKED_AT)]
        return f"[segmentation]\n{_lines(splits)}{_mask_classes(chosen)}{ends}"
    return ""


def _suffix(stems: set[str], masks: list[str]) -> str | None:
    """What masks' stems have behind their pictures'; None where they are not these pictures' masks."""
    found = {suffix: sum(m.removesuffix(suffix) in stems for m in masks) for suffix in ("", *SUFFIXES)}
    best = max(found, key=lambda suffix: found[suffix])
    return best if found[best] * 2 > len(masks) else None


def _mask_classes(masks: list[Path]) -> str:
    values: Counter[object] = Counter()
    for path in masks:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image)
        except UNREADABLE:
            continue
        if pixels.ndim == 3:
            triples = np.unique(pixels.reshape(-1, pixels.shape[-1])[:, :3], axis=0)
            values.update("#{:02x}{:02x}{:02x}".format(*colour) for colour in triples.tolist())
        else:
            values.update(np.unique(pixels).tolist())
    said = f"# names are not in the masks; found in {len(masks)} of them\n"
    colours = sorted(value for value in values if isinstance(value, str))
    if colours:
        rows = ", ".join(f'"{colour}" = "class {index}"' for index, colour in enumerate(colours))
        return f"{said}classes = {{ {rows} }}\n"
    numbers = sorted(value for value in values if isinstance(value, int) and value != 255)
    if numbers == list(range(len(numbers))):
        names = ", ".join(f'"class {number}"' for number in numbers)
        return f"{said}classes = [{names}]\nignore = 255\n"
    rows = ", ".join(f'{number} = "class {number}"' for number in numbers)
    return f"{said}classes = {{ {rows} }}\nignore = 255\n"


# ── Classes and pictures ──────────────────────────────────────────────────────────────────────────────────────────────


def _classes(folder: Path) -> str:
    tables: dict[str, list[str]] = {}
    for name, _ in sorted(file_entries(folder, lambda name: name.endswith(".parquet"))):
        tables.setdefault(_role(Path(name).stem) or "train", []).append(name)
    if tables:
        places = {}
        for role, names in tables.items():
            pattern = str(Path(names[0]).parent / f"{Path(names[0]).stem.split('-')[0]}-*.parquet")
            places[role] = names[0] if len(names) == 1 else pattern
        lines = "".join(f'{role} = "{place}"\n' for role, place in places.items())
        return f"[classification]\n{lines}{'' if 'val' in places else NO_VAL}"
    splits = {_role(name): name for name in reversed(class_names(folder)) if _role(name)}
    if "train" in splits and len(class_names(folder / splits["train"])) > 1:
        lines = "".join(f'{role} = "{splits[role]}"\n' for role in ROLES if role in splits)
        return f"[classification]\n{lines}{'' if 'val' in splits else NO_VAL}"
    with_pictures = [name for name in class_names(folder) if next(file_entries(folder / name), None)]
    generic = {*IMAGE_FOLDERS, *MASK_FOLDERS}
    if len(with_pictures) > 1 and not generic & set(with_pictures):
        return f'[classification]\ntrain = "."\n{NO_VAL}'
    return ""


def _common_folder(folder: Path) -> str | None:
    """The folder of pictures for pretraining: a usual name, else the folder itself where pictures lie in it."""
    for name in IMAGE_FOLDERS:
        if (folder / name).is_dir() and next(file_entries(folder / name), None):
            return name
    return "." if next(file_entries(folder), None) else None
