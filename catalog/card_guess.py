"""`twist data card FOLDER`: the card that a folder of data suggests, with what cannot be known as comments.

Known by their files: COCO's JSON, VOC's XML, YOLO's label files, masks beside pictures (all also as CVAT, labelme's own
converters and Roboflow export them), class folders, Parquet files, tar shards, Hugging Face data sets on disk, and
pictures alone. Nothing is written but the card.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from twist.catalog.boxes import yolo_names
from twist.catalog.card import CARD, ROLES, find_card
from twist.catalog.class_folders import class_names
from twist.catalog.data_sets import VOID, spread
from twist.catalog.masks import MASK_ENDINGS
from twist.catalog.tables import READERS, column_kinds
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage, file_entries, image_names, open_picture

# How folders and files of a split are called, first the usual name.
SPLIT_NAMES = {"train": ("train", "training", "trainval"), "val": ("val", "valid", "validation", "test")}
MASK_FOLDERS = (
    "masks", "mask", "labels", "annotations", "gt", "SegmentationClassPNG", "SegmentationClass", "label",
    "segmentation",
)  # fmt: skip
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
            "Parquet or Arrow files, tar shards or pictures; write the card by hand."
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
        yield f'[pretraining]   # val splits are left out\nimages = "{pictures}"\n{_excluded(folder, pictures, masks)}'


def _excluded(folder: Path, pictures: str, masks: str) -> str:
    """What lies among the pictures and is none to train on: masks, and a `test` split."""
    suffix = re.search(r'masks = "(.+?)"(?s:.*)mask_suffix = "(.+?)"', masks)
    patterns = [f"*{suffix[2]}.*"] if suffix and f'images = "{suffix[1]}"' in masks else []
    patterns += [f"{name}/*" for name in class_names(folder / pictures) if name.lower() == "test"]
    said = ""
    if any((folder / f"{Path(name).with_suffix('')}.json").is_file() for name in spread(image_names(folder), 1)):
        said = "# labels in .json beside pictures, as labelme writes, are not read: labelme2coco makes a file that is\n"
    return said + (f"exclude = {json.dumps(patterns)}\n" if patterns else "")


def _role(name: str) -> str | None:
    """The split that a file's or folder's name stands for."""
    words = re.split(r"[^a-z]+", re.sub(r"\d+", "", name.lower()))
    return next((role for role in ROLES if set(words) & set(SPLIT_NAMES[role])), None)


def _usual_first(names: Iterable[str]) -> list[str]:
    """Sorted, but what is called `test` last: beside a `val` it is for neither split."""
    return sorted(names, key=lambda name: ("test" in name.lower(), name))


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
    for name in _usual_first(name for name, _ in file_entries(folder, lambda name: name.endswith(".json"))):
        try:
            content = files.read_json(folder / name, most=files.MOST_DATA)
            listed = [image["file_name"] for image in content["images"]]
            if not listed or not isinstance(content["annotations"], list):
                continue
        except (ValueError, KeyError, TypeError):
            continue
        role = _role(Path(name).stem) or _role(Path(name).parent.name) or "train"
        beside = str(Path(name).parent)
        images = beside if (folder / beside / listed[0]).is_file() else _folder_with(folder, listed[0])
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
    places = _usual_first({str(Path(name).parent) for name in xml})
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
    labels = sorted(name for name, _ in file_entries(folder, lambda name: name.endswith(".txt")))
    # Beside the pictures, as Darknet and CVAT have them, or in `labels` where the pictures are in `images`.
    beside = {name.rpartition(".")[0] for name in image_names(folder)}
    labels = [name for name in labels if "labels" in Path(name).parts[:-1] or name.removesuffix(".txt") in beside]
    splits: dict[str, dict[str, str]] = {}
    for place in _usual_first({str(Path(name).parent) for name in labels}):
        images = re.sub(r"(^|/)labels(?=/|$)", r"\1images", place)
        if (folder / images).is_dir():
            splits.setdefault(_role(place) or "train", {"images": images, "annotations": place})
    return f'[detection]\nformat = "yolo"\n{_lines(splits)}{_yolo_classes(folder, labels)}' if splits else ""


def _yolo_classes(folder: Path, labels: list[str]) -> str:
    described = next(iter(sorted([*folder.glob("data.y*ml"), *folder.glob("*.yaml")])), None)
    if described is not None:
        yolo_names(described)  # it has them
        return f'data = "{described.name}"\n'
    if (folder / "obj.names").is_file():
        return f"classes = {json.dumps(files.read_text(folder / 'obj.names').split())}\n"
    words = [line.split() for name in labels for line in files.read_text(folder / name).splitlines()]
    most = max((int(float(one[0])) for one in words if one), default=0)
    names = ", ".join(f'"class {number}"' for number in range(most + 1))
    return f"classes = [{names}]   # there is no data.yaml: write their names\n"


# ── Masks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _masks(folder: Path) -> str:
    for images, place, suffix in _mask_places(folder):
        masks = [n for n, _ in file_entries(folder / place, lambda n: n.lower().endswith(MASK_ENDINGS))]
        masks = [name for name in masks if Path(name).stem.endswith(suffix)]
        splits: dict[str, dict[str, str]] = {}
        for below in _usual_first(os.listdir(folder / place)):
            role = _role(below)
            if role and (folder / images / below).is_dir() and (folder / place / below).is_dir():
                parts = {"images": f"{images}/{below}", "masks": f"{place}/{below}"}
                splits.setdefault(role, {key: value.removeprefix("./") for key, value in parts.items()})
        splits = splits or {"train": {"images": images, "masks": place}}
        ends = f'mask_suffix = "{suffix}"\n' if suffix else ""
        chosen = [folder / place / name for name in spread(sorted(masks), LOOKED_AT)]
        return f"[segmentation]\n{_lines(splits)}{_mask_classes(chosen, _mask_names(folder))}{ends}"
    return ""


def _mask_places(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Folders of pictures and of their masks, and what the masks' names have behind the pictures'."""
    images = next((place for place in IMAGE_FOLDERS if (folder / place).is_dir()), None)
    pairs = [(images, place) for place in MASK_FOLDERS if images and (folder / place).is_dir()]
    for pictures, place in [*pairs, (".", ".")]:
        stems = {name.rpartition(".")[0] for name in image_names(folder / pictures)}
        masks = [n.rpartition(".")[0] for n, _ in file_entries(folder / place, lambda n: n.endswith(MASK_ENDINGS))]
        # In one folder a picture would be its own mask.
        endings = SUFFIXES if pictures == place else ("", *SUFFIXES)
        found = {end: sum(m.endswith(end) and m.removesuffix(end) in stems for m in masks) for end in endings}
        best = max(found, key=lambda end: found[end])
        if found[best] * 2 > (len(masks) if pictures != place else len(stems) - found[best]):
            yield pictures, place, best


def _mask_names(folder: Path) -> dict[str, str]:
    """Value or colour → name, where a converter left a list: labelme's, CVAT's, Roboflow's."""
    for file in [*folder.glob("class_names.txt"), *folder.glob("labelmap.txt"), *folder.glob("*/_classes.csv")]:
        lines = [line.strip() for line in files.read_text(file).splitlines() if line.strip()]
        if file.name == "class_names.txt":
            return {str(number): name for number, name in enumerate(lines)}
        if file.name == "_classes.csv":
            return {value.strip(): name.strip() for value, _, name in (line.partition(",") for line in lines[1:])}
        parts = [line.split(":") for line in lines if not line.startswith("#")]
        return {"#{:02x}{:02x}{:02x}".format(*map(int, colour.split(","))): name for name, colour, *_ in parts}
    return {}


def _mask_classes(masks: list[Path], names: dict[str, str]) -> str:
    values: Counter[int | str] = Counter()
    for path in masks:
        try:
            with open_picture(path) as image:
                pixels = np.asarray(image)
        except UnreadableImage:
            continue
        if pixels.ndim == 3:
            triples = np.unique(pixels.reshape(-1, pixels.shape[-1])[:, :3], axis=0)
            values.update("#{:02x}{:02x}{:02x}".format(*colour) for colour in triples.tolist())
        else:
            values.update(np.unique(pixels).tolist())
    numbers = sorted(value for value in values if isinstance(value, int) and value != VOID)
    colours = sorted(value for value in values if isinstance(value, str))
    colours = [value for value in names if value in colours] if names else colours
    listed = colours or [str(number) for number in (range(max(numbers, default=0) + 1) if names else numbers)]
    said = "" if names else f"# names are not in the masks; found in {len(masks)} of them\n"
    named = {value: names.get(value, f"class {index}") for index, value in enumerate(listed)}
    if not colours and listed == [str(number) for number in range(len(listed))]:
        return f"{said}classes = {json.dumps([*named.values()], ensure_ascii=False)}\nignore = {VOID}\n"
    rows = ", ".join(f'{json.dumps(value) if colours else value} = "{name}"' for value, name in named.items())
    return f"{said}classes = {{ {rows} }}\n" + ("" if colours else f"ignore = {VOID}\n")


# ── Classes and pictures ──────────────────────────────────────────────────────────────────────────────────────────────


def _classes(folder: Path) -> str:
    tables: dict[str, list[str]] = {}
    for name in _usual_first(name for name, _ in file_entries(folder, lambda name: name.endswith(tuple(READERS)))):
        role = _role(Path(name).stem) or _role(Path(name).parent.name) or "train"
        tables.setdefault(role, []).append(name)
    if tables:
        places = {}
        for role, names in tables.items():
            same = [name for name in names if Path(name).parent == Path(names[0]).parent]
            pattern = f"{Path(names[0]).stem.split('-')[0]}-*{Path(names[0]).suffix}"
            places[role] = names[0] if len(same) == 1 else (Path(names[0]).parent / pattern).as_posix()
        return _class_lines(places) + _columns(folder / next(iter(tables.values()))[0])
    splits = {str(_role(name)): name for name in reversed(_usual_first(class_names(folder))) if _role(name)}
    if "train" in splits and len(class_names(folder / splits["train"])) > 1:
        return _class_lines(splits)
    with_pictures = [name for name in class_names(folder) if next(file_entries(folder / name), None)]
    generic = {*IMAGE_FOLDERS, *MASK_FOLDERS}
    if len(with_pictures) > 1 and not generic & set(with_pictures) and not any(map(_role, with_pictures)):
        return _class_lines({"train": "."})
    return ""


def _class_lines(places: dict[str, str]) -> str:
    lines = "".join(f'{role} = "{places[role]}"\n' for role in ROLES if role in places)
    return f"[classification]\n{lines}{'' if 'val' in places else NO_VAL}"


def _columns(table: Path) -> str:
    """The names of the columns with images and with labels, where they are not the usual ones."""
    found = column_kinds(table)
    lines = ""
    for key, usual in (("image", "image"), ("label", "label")):
        names = [name for name, kind in found.items() if kind == key]
        if names and usual not in names:
            lines += f'{key}_column = "{names[0]}"\n'
    return lines


def _common_folder(folder: Path) -> str | None:
    """The folder of pictures for pretraining: a usual name, else the folder itself where pictures lie in it."""
    for name in IMAGE_FOLDERS:
        if (folder / name).is_dir() and next(file_entries(folder / name), None):
            return name
    return "." if next(file_entries(folder), None) else None
