"""`twist data card FOLDER`: the card that a folder of data suggests, with what cannot be known as comments.

Boxes and masks are known also as CVAT, labelme's own converters and Roboflow export them.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from twist.catalog.boxes import yolo_names
from twist.catalog.card import CARD, ROLES, find_card
from twist.catalog.class_folders import READERS, SPLIT_NAMES, class_names
from twist.catalog.data_sets import VOID, spread
from twist.catalog.masks import MASK_ENDINGS
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage, file_entries, image_names, open_picture

MASK_FOLDERS = (
    "masks", "mask", "labels", "annotations", "gt", "SegmentationClassPNG", "SegmentationClass", "label",
    "segmentation",
)  # fmt: skip
IMAGE_FOLDERS = ("images", "image", "imgs", "JPEGImages", "img", "pictures")
SUFFIXES = ("_mask", "_labelIds", "_label", "_seg", "_gt", "_L", "_labelTrainIds", "_gtFine_labelIds")
# Masks whose values are looked at.
LOOKED_AT = 40
NO_VAL = "# val is missing: name one, or `twist data prepare CARD split=0.2 seed=0`\n"
Splits = dict[str, dict[str, str]]


def write_card(folder: Path, output: Path | None = None) -> Path:
    """Write the card that `folder` suggests to `output`, or to `card.toml` in it; never over an existing file.

    `UserError`: there is no such folder, the file exists, or nothing in the folder is known.
    """
    path = output or folder / CARD
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: check the path.")
    if path.exists():
        raise UserError(f"{path} exists and is not replaced: remove it, or name another with --output.")
    boxes, masks = _coco(folder) or _yolo(folder) or _voc(folder), _masks(folder)
    classes = "" if boxes or masks else _classes(folder)
    sections = [one for one in (boxes, masks, classes, "" if classes else _pictures(folder, masks)) if one]
    if not sections:
        raise UserError(
            f"{folder} holds nothing that is known: no COCO .json, VOC .xml, YOLO labels, masks, class folders, "
            "Parquet or Arrow files, tar shards or pictures; write the card by hand."
        )
    name = re.sub(r"[^\w.+-]+", "-", folder.resolve().name).strip("-.") or "data"
    root = "" if path.resolve().parent == folder.resolve() else f'root = "{os.path.abspath(folder)}"\n'
    head = f'# Guessed from the files; correct what is wrong.\nname = "{name}"\n{root}\n'
    files.write_text(path, head + "\n".join(sections))
    find_card(path)  # what was written can be read
    return path


def _pictures(folder: Path, masks: str) -> str:
    """[pretraining]: the folder of pictures, without the masks and a `test` split among them."""
    named = [name for name in IMAGE_FOLDERS if (folder / name).is_dir()]
    pictures = next((place for place in (*named, ".") if next(file_entries(folder / place), None)), None)
    if pictures is None:
        return ""
    suffix = re.search(r'masks = "(.+?)"(?s:.*)mask_suffix = "(.+?)"', masks)
    patterns = [f"*{suffix[2]}.*"] if suffix and f'images = "{suffix[1]}"' in masks else []
    patterns += [f"{name}/*" for name in class_names(folder / pictures) if name.lower() == "test"]
    said = ""
    if any((folder / f"{Path(name).with_suffix('')}.json").is_file() for name in spread(image_names(folder), 1)):
        said = "# labels in .json beside pictures, as labelme writes, are not read: labelme2coco makes a file that is\n"
    excluded = f"exclude = {json.dumps(patterns)}\n" if patterns else ""
    return f'[pretraining]   # val splits are left out\nimages = "{pictures}"\n{said}{excluded}'


def _role(*names: str) -> str:
    """The split that the first of `names` stands for which stands for one; "" for none."""
    for name in names:
        words = set(re.split(r"[^a-z]+", re.sub(r"\d+", "", name.lower())))
        if found := [role for role in ROLES if words & set(SPLIT_NAMES[role])]:
            return found[0]
    return ""


def _usual_first(names: Iterable[str]) -> list[str]:
    """Sorted, but what is called `test` last: beside a `val` it is for neither split."""
    return sorted(names, key=lambda name: ("test" in name.lower(), name))


def _files(folder: Path, *endings: str) -> list[str]:
    return _usual_first(name for name, _ in file_entries(folder, lambda name: name.endswith(endings)))


def _folders(names: Iterable[str]) -> list[str]:
    return _usual_first({str(Path(name).parent) for name in names})


def _section(head: str, splits: Splits) -> str:
    """The lines of a section, a comment where there is no `val`; one split alone is for training."""
    if not splits:
        return ""
    if "train" not in splits:
        splits = {"train": next(iter(splits.values()))}
    lines = ""
    for role in ROLES:
        if role in splits:
            keys = ", ".join(f'{key} = "{value}"' for key, value in splits[role].items())
            lines += f"{role} = {{ {keys} }}\n"
    return head + lines + ("" if "val" in splits else NO_VAL)


# ── Boxes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _coco(folder: Path) -> str:
    splits: Splits = {}
    for name in _files(folder, ".json"):
        try:
            content = files.read_json(folder / name, most=files.MOST_DATA)
            first = content["images"][0]["file_name"]
            if not isinstance(content["annotations"], list):
                continue
        except (ValueError, LookupError, TypeError):
            continue
        place = Path(name)
        images = str(place.parent) if (folder / place.parent / first).is_file() else _folder_with(folder, first)
        if images is not None:
            role = _role(place.stem, place.parent.name) or "train"
            splits.setdefault(role, {"images": images, "annotations": name})
    return _section('[detection]\nformat = "coco"\n', splits)


def _folder_with(folder: Path, file: str) -> str | None:
    """The folder below which the path `file` lies, for a COCO file that does not say it."""
    names = image_names(folder)
    for name in sorted(names, key=len):
        if name == file or name.endswith(f"/{file}"):
            return name.removesuffix(file).rstrip("/") or "."
    return next((str(Path(name).parent) for name in names if Path(name).name == Path(file).name), None)


def _voc(folder: Path) -> str:
    xml = _files(folder, ".xml")
    pictures = {Path(name).stem: str(Path(name).parent) for name in image_names(folder)}
    lists = {_role(path.stem): path for path in sorted((folder / "ImageSets" / "Main").glob("*.txt"))}
    splits: Splits = {}
    for place in _folders(xml):
        stems = [Path(name).stem for name in xml if name.startswith(place)]
        images = next((pictures[stem] for stem in stems if stem in pictures), None)
        if images is None:
            continue
        keys = {"images": images, "annotations": place}
        if len(_folders(xml)) == 1 and "" not in lists and len(lists) > 1:
            splits = {role: {**keys, "list": path.relative_to(folder).as_posix()} for role, path in lists.items()}
        else:
            splits.setdefault(_role(Path(place).name) or "train", keys)
    return _section('[detection]\nformat = "voc"\n', splits)


def _yolo(folder: Path) -> str:
    # Beside the pictures, as Darknet and CVAT have them, or in `labels` where the pictures are in `images`.
    beside = {name.rpartition(".")[0] for name in image_names(folder)}
    labels = [n for n in _files(folder, ".txt") if "labels" in Path(n).parts[:-1] or n.removesuffix(".txt") in beside]
    splits: Splits = {}
    for place in _folders(labels):
        images = re.sub(r"(^|/)labels(?=/|$)", r"\1images", place)
        if (folder / images).is_dir():
            splits.setdefault(_role(place) or "train", {"images": images, "annotations": place})
    section = _section('[detection]\nformat = "yolo"\n', splits)
    return section and section + _yolo_classes(folder, labels)


def _yolo_classes(folder: Path, labels: list[str]) -> str:
    described = next(iter(sorted([*folder.glob("data.y*ml"), *folder.glob("*.yaml")])), None)
    if described is not None:
        yolo_names(described)  # it has them
        return f'data = "{described.name}"\n'
    if (folder / "obj.names").is_file():
        return f"classes = {json.dumps(files.read_text(folder / 'obj.names').split())}\n"
    words = [line.split() for name in labels for line in files.read_text(folder / name).splitlines()]
    most = max((int(float(one[0])) for one in words if one), default=0)
    names = json.dumps([f"class {number}" for number in range(most + 1)])
    return f"classes = {names}   # there is no data.yaml: write their names\n"


# ── Masks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _masks(folder: Path) -> str:
    for images, place, suffix in _mask_places(folder):
        splits: Splits = {}
        for below in _usual_first(os.listdir(folder / place)):
            role = _role(below)
            if role and (folder / images / below).is_dir() and (folder / place / below).is_dir():
                parts = {"images": f"{images}/{below}", "masks": f"{place}/{below}"}
                splits.setdefault(role, {key: value.removeprefix("./") for key, value in parts.items()})
        masks = [n for n, _ in file_entries(folder / place, lambda n: n.lower().endswith(MASK_ENDINGS))]
        masks = sorted(name for name in masks if Path(name).stem.endswith(suffix))
        ends = f'mask_suffix = "{suffix}"\n' if suffix else ""
        section = _section("[segmentation]\n", splits or {"train": {"images": images, "masks": place}})
        chosen = [folder / place / name for name in spread(masks, LOOKED_AT)]
        return section + _mask_classes(chosen, _mask_names(folder)) + ends
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
    values: set[int | str] = set()
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


# ── Classes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _classes(folder: Path) -> str:
    tables: dict[str, list[Path]] = {}
    for path in map(Path, _files(folder, *READERS)):
        tables.setdefault(_role(path.stem, path.parent.name) or "train", []).append(path)
    places = {}
    for role, (first, *others) in tables.items():
        several = any(path.parent == first.parent for path in others)
        places[role] = first.with_name(f"{first.stem.split('-')[0]}-*{first.suffix}") if several else first
    if not places:
        below = class_names(folder)
        splits = {_role(name): Path(name) for name in reversed(_usual_first(below)) if _role(name)}
        with_pictures = {name for name in below if next(file_entries(folder / name), None)}
        if "train" in splits and len(class_names(folder / splits["train"])) > 1:
            places = splits
        elif len(with_pictures) > 1 and not splits and not with_pictures & {*IMAGE_FOLDERS, *MASK_FOLDERS}:
            places = {"train": Path()}
    lines = "".join(f'{role} = "{places[role].as_posix()}"\n' for role in ROLES if role in places)
    return lines and f"[classification]\n{lines}{'' if 'val' in places else NO_VAL}"
