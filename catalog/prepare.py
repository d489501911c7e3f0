"""`twist data prepare`: files that derive from the originals of a data set. It never downloads and never changes them.

What is there already and equal stays; what is there and different is refused, not overwritten.
"""

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twist.catalog.class_folders import class_names, read_split, read_subset
from twist.catalog.data_sets import DATA_SETS, ORIGINS, read_names
from twist.catalog.masks import voc_palette
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.images import MAX_PIXELS, UnreadableImage, open_picture
from twist.contracts.progress import Progress

# Bytes of a mask in SBD, which has a few KiB: deflate makes up to a thousand times as many of them, unbounded by scipy.
MOST_MAT = 64 * 2**10
TRAINAUG = DATA_SETS["voc2012-aug"].splits["trainaug"].count or 0


def prepare(
    dataset: str, root: str | os.PathLike[str] | None = None, *, progress: bool = True, **options: Any
) -> list[Path]:
    """Make the files that derive from `dataset`, a key of `PREPARATIONS`, below `root`; returns what was written.

    `UsageError`: no such data set or option. `UserError`: originals are missing or not what they should be.
    """
    if dataset in {row.group for row in DATA_SETS.values()} - PREPARATIONS.keys():
        print(f"{dataset} needs no preparation; `twist data check {dataset}` checks it.", file=sys.stderr)
        return []
    if dataset not in PREPARATIONS:
        raise UsageError(f'There is nothing to prepare for "{dataset}".{did_you_mean(dataset, PREPARATIONS)}')
    function = PREPARATIONS[dataset]
    known = [*inspect.signature(function).parameters][2:]
    for name in options:
        if name not in known:
            raise UsageError(f'prepare {dataset} has no option "{name}".{did_you_mean(name, known)}')
    root = root or os.environ.get("DETECTRON2_DATASETS")
    if not root:
        raise UsageError("No root: name the folder of the data sets, or set DETECTRON2_DATASETS.")
    if dataset in ORIGINS:
        if not Path(root).is_dir():
            raise UserError(f"There is no folder {root}: check the path. {ORIGINS[dataset]}")
        print(ORIGINS[dataset], file=sys.stderr)
    return function(Path(root), progress, **options)


def prepare_voc(root: Path, progress: bool, *, sbd: str | None = None, expected: int = TRAINAUG) -> list[Path]:
    """`SegmentationClassAug/*.png`, `ImageSets/Segmentation/trainaug.txt` and `aug.txt` of VOC 2012.

    trainaug is VOC's segmentation train united with SBD's train and val, without VOC's val. An image of VOC's train
    keeps VOC's own mask (with its void border), the others (`aug`) get SBD's, from `sbd`: its
    `benchmark_RELEASE/dataset`, or the folder above it. `expected` names must be in trainaug.
    """
    if sbd is None:
        raise UsageError(f"prepare voc needs sbd=FOLDER. {ORIGINS['sbd']}")
    folder = DATA_SETS["voc2012-aug"].place(root)
    boundaries = _sbd_folder(Path(sbd))
    lists = folder / "ImageSets" / "Segmentation"
    train, val = (read_names(lists / f"{part}.txt") for part in ("train", "val"))
    extra = {name for part in ("train", "val") for name in read_names(boundaries / f"{part}.txt")}
    aug = sorted(extra - set(train) - set(val))
    trainaug = sorted({*train, *aug})
    if len(trainaug) != expected:
        raise UserError(
            f"trainaug would have {len(trainaug)} images and not {expected}: VOC's or SBD's lists are incomplete or "
            f"other ones (VOC train {len(train)}, val {len(val)}; SBD {len(extra)}). {ORIGINS['sbd']}"
        )
    sources = {name: folder / "SegmentationClass" / f"{name}.png" for name in train}
    sources |= {name: boundaries / "cls" / f"{name}.mat" for name in aug}
    images = [folder / "JPEGImages" / f"{name}.jpg" for name in aug]
    missing = [path for path in (*sources.values(), *images) if not path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} originals are missing, {missing[0]} the first: VOC 2012 or SBD was unpacked in part; "
            "unpack it again, nothing was written."
        )
    written: list[Path] = []
    with Progress("prepare voc", total=len(trainaug), unit="mask", quiet=not progress) as bar:
        for name in trainaug:
            read = _read_sbd if sources[name].suffix == ".mat" else _read_mask
            written += _write_mask(folder / "SegmentationClassAug" / f"{name}.png", read(sources[name]))
            bar.advance()
    # Lists last: where they are, the masks they name are complete.
    for part, names in (("aug", aug), ("trainaug", trainaug)):
        written += _write_list(lists / f"{part}.txt", names)
    return written


def prepare_cityscapes(root: Path, progress: bool) -> list[Path]:
    """Every missing `*_gtFine_labelTrainIds.png`, painted from the polygons by cityscapesScripts."""
    folder = DATA_SETS["cityscapes"].place(root) / "gtFine"
    polygons = sorted(folder.glob("*/*/*_gtFine_polygons.json"))
    if not polygons:
        raise UserError(f"There are no */*/*_gtFine_polygons.json in {folder}. {ORIGINS['cityscapes']}")
    written = []
    with Progress("prepare cityscapes", total=len(polygons), unit="mask", quiet=not progress) as bar:
        for source in polygons:
            target = source.with_name(source.name.replace("_polygons.json", "_labelTrainIds.png"))
            if not target.exists():
                written.append(_save(paint_train_ids(source), target))
            bar.advance()
    return written


def prepare_imagenet(root: Path, progress: bool, *, lists: str | None = None) -> list[Path]:
    """SimCLR's lists of 1 % and 10 % of ImageNet's train set: checked and copied from the folder `lists`."""
    row = DATA_SETS["imagenet"]
    folder = row.place(root)
    if lists is None:
        raise UsageError(f"prepare imagenet needs lists=FOLDER, the published lists. {ORIGINS['imagenet-subsets']}")
    if not (folder / "train").is_dir():
        raise UserError(f"There is no {folder / 'train'}. {ORIGINS['imagenet']}")
    classes = len(class_names(folder / "train"))
    with Progress("read imagenet", total=classes, unit="folder", quiet=not progress) as bar:
        train = read_split(folder / "train", bar)
    written: list[Path] = []
    for name, count in row.subsets.items():
        source = Path(lists) / name
        lines = read_names(source, whole_lines=True)
        read_subset(train, source)  # what a run refuses is not copied
        if classes == row.classes and len(lines) != count:
            raise UserError(f"{source} has {len(lines)} lines and not {count}: it is not the published list.")
        written += _write_list(folder / name, lines)
    return written


# Data set → its function; a user's options are its keywords.
PREPARATIONS: dict[str, Callable[..., list[Path]]] = {
    "voc": prepare_voc,
    "cityscapes": prepare_cityscapes,
    "imagenet": prepare_imagenet,
}


def _sbd_folder(path: Path) -> Path:
    for candidate in (path, path / "dataset", path / "benchmark_RELEASE" / "dataset"):
        if (candidate / "cls").is_dir():
            return candidate
    raise UserError(f"There is no cls/ folder of SBD in {path}: check sbd=FOLDER. {ORIGINS['sbd']}")


def paint_train_ids(polygons: Path) -> Image.Image:
    """The train ids of a *_gtFine_polygons.json, painted by cityscapesScripts; `UserError` when they cannot.

    Not from several threads: standard output is redirected meanwhile.
    """
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    annotation = Annotation()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # they print how they are used
            files.read_json(polygons, remedy="unpack gtFine again")  # within bounds that theirs does not have
            annotation.fromJsonFile(str(polygons))
            if not annotation.objects or not 0 < annotation.imgWidth * annotation.imgHeight <= MAX_PIXELS:
                raise ValueError(f"{len(annotation.objects)} objects, {annotation.imgWidth} × {annotation.imgHeight}")
            return createLabelImage(annotation, "trainIds")
    except UserError:
        raise
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, SystemExit) as error:
        reason = "a label that Cityscapes does not have" if isinstance(error, SystemExit) else repr(error)
        raise UserError(f"{polygons} is no Cityscapes annotation ({reason}): unpack gtFine again.") from None


def _read_sbd(path: Path) -> NDArray[np.uint8]:
    """Class of every pixel from an SBD file: its struct `GTcls` has the mask as `Segmentation`."""
    from scipy.io import loadmat

    data = files.read_bytes(path, remedy="unpack SBD again", most=MOST_MAT)
    try:
        labels = np.asarray(loadmat(io.BytesIO(data))["GTcls"]["Segmentation"].item())
        if labels.dtype.kind not in "uif":
            raise ValueError(f"its mask holds {labels.dtype}")
    except Exception as error:  # a damaged file makes scipy raise anything
        raise UserError(f"{path} is no SBD annotation ({type(error).__name__}: {error}): unpack SBD again.") from None
    if labels.ndim != 2 or not ((labels >= 0) & (labels <= 20)).all():
        raise UserError(f"{path} holds no mask of VOC's classes 0 to 20: unpack SBD again.")
    return labels.astype(np.uint8)


def _read_mask(path: Path) -> NDArray[np.uint8]:
    try:
        with open_picture(path) as image:
            mode, values = image.mode, np.asarray(image)
    except UnreadableImage as error:
        raise UserError(f"{error}: unpack VOC 2012 again.") from None
    if mode not in ("P", "L"):
        raise UserError(f"{path} is a colour picture, its palette was turned to RGB: unpack SegmentationClass again.")
    return values


def _write_mask(path: Path, labels: NDArray[np.uint8]) -> list[Path]:
    if path.exists():
        with contextlib.suppress(UserError):  # unreadable, or turned to colours: it differs
            if np.array_equal(_read_mask(path), labels):
                return []
        raise UserError(f"{path} exists and differs from what the originals give: remove it to have it made again.")
    image = Image.fromarray(labels)
    image.putpalette(voc_palette())
    return [_save(image, path)]


def _save(image: Image.Image, path: Path) -> Path:
    with files.atomic_path(path) as temporary:
        image.save(temporary)
    return path


def _write_list(path: Path, names: list[str]) -> list[Path]:
    if not path.exists():
        files.write_text(path, "".join(f"{name}\n" for name in names))
        return [path]
    # Another order of the same names is the same set.
    if sorted(files.read_text(path).splitlines()) != sorted(names):
        raise UserError(f"{path} exists and holds other names: remove it to have it made again.")
    return []
