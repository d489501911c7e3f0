"""`twist data prepare`: files that derive from the originals of a data set. It never downloads and never changes them.

- voc: `SegmentationClassAug` and the lists `trainaug`, `aug`, from SBD's `.mat` files and VOC's own maps
- cityscapes: `*_gtFine_labelTrainIds.png` beside the polygons, with cityscapesScripts
- imagenet: the 1 % and 10 % lists, from the published files or drawn with a stated seed
- detectron2: one root with the names that Detectron2 expects, by links to where the data sets lie

What is there already and equal stays; what is there and different is refused, not overwritten.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twist.catalog.check import VOC_SEGMENTATION
from twist.catalog.check_imagenet import IMAGENET_CLASSES, SUBSET_LINES
from twist.catalog.class_folders import find_listed
from twist.catalog.masks import voc_palette
from twist.catalog.origins import ORIGINS
from twist.catalog.polygons import polygons_fault
from twist.catalog.roots import voc_folder
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.images import class_names, image_names
from twist.contracts.progress import Progress


def prepare(
    dataset: str, root: str | os.PathLike[str] | None = None, *, progress: bool = True, **options: Any
) -> list[Path]:
    """Make the files that derive from `dataset` below `root`; returns those that were written, in order.

    Args:
        dataset: "voc", "cityscapes", "imagenet", "detectron2"; "coco" needs nothing and says so.
        root: the folder that holds `VOC2012/`, `cityscapes/`, …; None takes `DETECTRON2_DATASETS`.
        options: of the data set, as each function below takes them (`sbd=`, `lists=`, `seed=`, `coco=`, …).

    Raises:
        UsageError: no such data set or option. UserError: originals are missing or not what they should be.
    """
    if dataset not in PREPARATIONS:
        raise UsageError(f'There is nothing to prepare for "{dataset}".{did_you_mean(dataset, PREPARATIONS)}')
    function, known = PREPARATIONS[dataset]
    for name in options:
        if name not in known:
            raise UsageError(f'prepare {dataset} has no option "{name}".{did_you_mean(name, known)}')
    if root is None:
        if not os.environ.get("DETECTRON2_DATASETS"):
            raise UsageError("No root: name the folder of the data sets, or set DETECTRON2_DATASETS.")
        root = os.environ["DETECTRON2_DATASETS"]
    if dataset != "detectron2" and not Path(root).is_dir():
        raise UserError(f"There is no folder {root}: check the path. {ORIGINS[dataset].sentence()}")
    if dataset in ORIGINS:
        print(ORIGINS[dataset].sentence(), file=sys.stderr)
    return function(Path(root), progress=progress, **options)


def prepare_voc(
    root: Path, *, sbd: str | None = None, expected: int | None = VOC_SEGMENTATION["trainaug"], progress: bool = True
) -> list[Path]:
    """`SegmentationClassAug/*.png`, `ImageSets/Segmentation/trainaug.txt` and `aug.txt` of VOC 2012.

    trainaug is VOC's segmentation train united with SBD's train and val, without VOC's val: 10,582 images. An image of
    VOC's train keeps VOC's own map (with its void border), the others (`aug`) get SBD's.

    Args:
        sbd: SBD's `benchmark_RELEASE/dataset`, or the folder above it, with `cls/*.mat`, `train.txt` and `val.txt`.
        expected: how many names trainaug must have; None accepts any (for trees that are not the real one).
    """
    if sbd is None:
        raise UsageError(f"prepare voc needs sbd=FOLDER. {ORIGINS['sbd'].sentence()}")
    folder = voc_folder(root, 2012)
    boundaries = _sbd_folder(Path(sbd))
    lists = folder / "ImageSets" / "Segmentation"
    train, val = (_read_names(lists / f"{part}.txt", "voc") for part in ("train", "val"))
    extra = {name for part in ("train", "val") for name in _read_names(boundaries / f"{part}.txt", "sbd")}
    aug = sorted(extra - set(train) - set(val))
    trainaug = sorted({*train, *aug})
    if expected is not None and len(trainaug) != expected:
        raise UserError(
            f"trainaug would have {len(trainaug)} images and not {expected}: VOC's or SBD's lists are incomplete or "
            f"other ones (VOC train {len(train)}, val {len(val)}; SBD {len(extra)}). {ORIGINS['sbd'].sentence()}"
        )
    sources = {name: folder / "SegmentationClass" / f"{name}.png" for name in train}
    sources |= {name: boundaries / "cls" / f"{name}.mat" for name in aug}
    missing = [path for path in sources.values() if not path.exists()]
    missing += [path for name in aug if not (path := folder / "JPEGImages" / f"{name}.jpg").exists()]
    if missing:
        raise UserError(
            f"{len(missing)} originals are not there, {missing[0]} the first: VOC 2012 or SBD was unpacked in part; "
            "unpack it again, nothing was written."
        )
    written: list[Path] = []
    target = folder / "SegmentationClassAug"
    with Progress("prepare voc", total=len(trainaug), unit="map", quiet=not progress) as bar:
        for name in trainaug:
            source = sources[name]
            labels = _read_sbd(source) if source.suffix == ".mat" else _read_palette(source)
            written += _write_map(target / f"{name}.png", labels)
            bar.advance()
    # Lists last: where they are, the maps they name are complete.
    for part, names in (("aug", aug), ("trainaug", trainaug)):
        written += _write_list(lists / f"{part}.txt", names)
    return written


def prepare_cityscapes(root: Path, *, progress: bool = True) -> list[Path]:
    """Every missing `*_gtFine_labelTrainIds.png`, painted from the polygons by cityscapesScripts."""
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    folder = root / "cityscapes" / "gtFine"
    polygons = sorted(folder.glob("*/*/*_gtFine_polygons.json"))
    if not polygons:
        raise UserError(f"There are no */*/*_gtFine_polygons.json in {folder}. {ORIGINS['cityscapes'].sentence()}")
    written = []
    with Progress("prepare cityscapes", total=len(polygons), unit="map", quiet=not progress) as bar:
        for source in polygons:
            target = source.with_name(source.name.replace("_polygons.json", "_labelTrainIds.png"))
            if not target.exists():
                fault = polygons_fault(source)
                if fault:
                    raise UserError(f"{source} is no Cityscapes annotation ({fault}): unpack gtFine again.")
                try:
                    with files.atomic_path(target) as temporary:
                        json2labelImg(str(source), str(temporary), "trainIds")
                except (ValueError, LookupError, TypeError, SystemExit) as error:  # in the parts that we do not look at
                    raise UserError(f"{source} is no Cityscapes annotation ({error}): unpack gtFine again.") from None
                written.append(target)
            bar.advance()
    return written


def prepare_imagenet(
    root: Path, *, lists: str | None = None, seed: int | None = None, progress: bool = True
) -> list[Path]:
    """The 1 % and 10 % lists of ImageNet's train set, beside `train/`.

    Args:
        lists: folder of SimCLR's `1percent.txt` and `10percent.txt`; they are checked against `train/` and copied.
        seed: instead, write down the 1 % and 10 % of each class that `labels_from=seed labels_seed=N` draws, as
            `<percent>percent_seed<seed>.txt`: these are not the published lists, and their names keep it visible. Runs
            draw them anew and need no file; it is for whoever wants to see them, or to train elsewhere on the same.
    """
    folder = root / "imagenet" if (root / "imagenet").is_dir() else root
    if (lists is None) == (seed is None):
        raise UsageError(
            "prepare imagenet needs lists=FOLDER (the published lists) or seed=N (lists of your own), one of them. "
            + ORIGINS["imagenet-subsets"].sentence()
        )
    if seed is not None:
        return _write_drawn(folder, seed)
    classes = _class_files(folder / "train", progress=progress)
    written: list[Path] = []
    train = [image for images in classes.values() for image in images]
    for name, lines in SUBSET_LINES.items():
        source = Path(str(lists)) / name
        listed = _read_names(source, "imagenet-subsets", whole_lines=True)
        if len(classes) == IMAGENET_CLASSES and len(listed) != lines:
            raise UserError(f"{source} has {len(listed)} lines and not {lines}: it is not the published list.")
        # What a run refuses is not copied.
        found = find_listed(train, listed)
        if found.absent:
            raise UserError(
                f"{len(found.absent)} images of {source} are not in {folder / 'train'}, {found.absent[0]} the first: "
                "complete train, `twist data check imagenet` says what is missing."
            )
        if found.ambiguous:
            raise UserError(
                f"{source}: several classes hold a file {found.ambiguous[0]}; write the lines as <class>/<file>."
            )
        if found.doubled:
            raise UserError(f"{source} names {found.doubled} files twice: each line must be another image.")
        written += _write_list(folder / name, listed)
    return written


def prepare_detectron2(root: Path, *, progress: bool = True, **places: str) -> list[Path]:  # noqa: ARG001
    """`root`/coco, VOC2007, VOC2012, cityscapes, imagenet as links to the folders in `places`; nothing is copied."""
    if not places:
        raise UsageError(
            "prepare detectron2 needs the folders to link, for example coco=/data/coco voc2012=/data/VOCdevkit/VOC2012."
        )
    links = []
    for name, place in places.items():
        link_name, must_hold = TREE[name]
        target = Path(place).resolve()
        absent = [part for part in must_hold if not (target / part).is_dir()]
        if absent:
            raise UserError(f"{name}={place} is no {link_name} folder, it has no {absent[0]}/: check the path.")
        link = root / link_name
        if (link.exists() or link.is_symlink()) and link.resolve() != target:
            raise UserError(f"{link} exists and is not a link to {target}: remove it, or choose another root.")
        links.append((link, target))
    written = []
    root.mkdir(parents=True, exist_ok=True)
    for link, target in links:
        if not link.is_symlink() and link.resolve() != target:
            link.symlink_to(target, target_is_directory=True)
            written.append(link)
    return written


def prepare_coco(root: Path, *, progress: bool = True) -> list[Path]:  # noqa: ARG001
    """COCO is used as it is unpacked."""
    print(f"COCO needs no preparation; `twist data check coco {root}` checks it.", file=sys.stderr)
    return []


# Option of prepare_detectron2 → name that Detectron2 expects, and folders that must be in it.
TREE = {
    "coco": ("coco", ("annotations", "train2017", "val2017")),
    "voc2007": ("VOC2007", ("Annotations", "ImageSets", "JPEGImages")),
    "voc2012": ("VOC2012", ("Annotations", "ImageSets", "JPEGImages")),
    "cityscapes": ("cityscapes", ("leftImg8bit", "gtFine")),
    "imagenet": ("imagenet", ("train", "val")),
}
# Data set → its function and the options that a user may give.
PREPARATIONS: dict[str, tuple[Callable[..., list[Path]], tuple[str, ...]]] = {
    "coco": (prepare_coco, ()),
    "voc": (prepare_voc, ("sbd", "expected")),
    "cityscapes": (prepare_cityscapes, ()),
    "imagenet": (prepare_imagenet, ("lists", "seed")),
    "detectron2": (prepare_detectron2, tuple(TREE)),
}


def _sbd_folder(path: Path) -> Path:
    for candidate in (path, path / "dataset", path / "benchmark_RELEASE" / "dataset"):
        if (candidate / "cls").is_dir():
            return candidate
    raise UserError(f"There is no cls/ folder of SBD in {path}: check sbd=FOLDER. {ORIGINS['sbd'].sentence()}")


def _read_names(path: Path, dataset: str, *, whole_lines: bool = False) -> list[str]:
    """The first word of each line, or all of it, as a run takes the lines of ImageNet's lists."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        names = lines if whole_lines else [line.split()[0] for line in lines]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: check the path. {ORIGINS[dataset].sentence()}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): take it from the original again.") from None
    if not names:
        raise UserError(f"{path} is empty: take it from the original again. {ORIGINS[dataset].sentence()}")
    return names


def _read_sbd(path: Path) -> NDArray[np.uint8]:
    """Class of every pixel from an SBD file: its struct `GTcls` has the map as `Segmentation`."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        labels = np.asarray(loadmat(path)["GTcls"]["Segmentation"].item())
    except (MatReadError, KeyError, IndexError, ValueError, OSError, NotImplementedError, TypeError) as error:
        raise UserError(f"{path} is no SBD annotation ({error}): unpack SBD again.") from None
    if labels.ndim != 2 or labels.max(initial=0) > 20:
        raise UserError(f"{path} holds no map of VOC's classes 0 to 20: unpack SBD again.")
    return labels.astype(np.uint8)


def _read_palette(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read ({error}): unpack VOC 2012 again.") from None
    if mode not in ("P", "L"):
        raise UserError(f"{path} is a colour picture, its palette was turned to RGB: unpack SegmentationClass again.")
    return values


def _write_map(path: Path, labels: NDArray[np.uint8]) -> list[Path]:
    if path.exists():
        try:
            if _equal(_read_palette(path), labels):
                return []
        except UserError:
            pass  # unreadable, or turned to colours: it differs
        raise UserError(f"{path} exists and differs from what the originals give: remove it to have it made again.")
    image = Image.fromarray(labels)
    image.putpalette(voc_palette())
    with files.atomic_path(path) as temporary:
        image.save(temporary)
    return [path]


def _write_list(path: Path, names: Sequence[str]) -> list[Path]:
    text = "".join(f"{name}\n" for name in names)
    if path.exists():
        # Another order of the same names is the same set.
        if sorted(path.read_text().splitlines()) == sorted(names):
            return []
        raise UserError(f"{path} exists and holds other names: remove it to have it made again.")
    files.write_text(path, text)
    return [path]


def _equal(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _write_drawn(folder: Path, seed: int) -> list[Path]:
    # Here, because it brings torch along, which takes seconds and only this preparation needs.
    from twist.catalog.labelled import SUBSETS, draw_subset, list_lines, read_split

    if not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed={seed} is no seed: give a whole number, 0 or more, as labels_seed takes it.")
    if not (folder / "train").is_dir():
        raise UserError(f"There is no {folder / 'train'}. {ORIGINS['imagenet'].sentence()}")
    train = read_split(folder / "train")
    written: list[Path] = []
    for name, (_, share) in SUBSETS.items():
        lines = list_lines(train, draw_subset(train, share, seed=seed))
        written += _write_list(folder / f"{name}_seed{seed}.txt", lines)
    print(f"`twist transfer semi-1pct labels_from=seed labels_seed={seed}` trains on these images.", file=sys.stderr)
    return written


def _class_files(train: Path, *, progress: bool) -> dict[str, list[str]]:
    if not train.is_dir():
        raise UserError(f"There is no {train}. {ORIGINS['imagenet'].sentence()}")
    folders = [train / name for name in class_names(train)]
    classes: dict[str, list[str]] = {}
    with Progress("read imagenet", total=len(folders), unit="folder", quiet=not progress) as bar:
        for folder in folders:
            classes[folder.name] = [f"{folder.name}/{name}" for name in image_names(folder)]
            bar.advance()
    empty = [name for name, images in classes.items() if not images]
    if empty:
        raise UserError(
            f"{train}: class folder {empty[0]} is empty; `twist data check imagenet` says all that is missing."
        )
    return classes
