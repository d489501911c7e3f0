"""THE table of data sets, `data_sets.toml`: what each one is called, how it lies below a data root, what is in it.

The data root is the tree that `DETECTRON2_DATASETS` names (`coco/`, `VOC2007/`, …); paths of a row are relative to the
folder of its data set. `000012` is the image `JPEGImages/000012.jpg` of `Files("JPEGImages", ".jpg")`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from twist.contracts import files
from twist.contracts.config import Config, read_toml, validate
from twist.contracts.errors import MOST_SEED, UsageError, UserError, did_you_mean
from twist.contracts.images import file_entries

SAMPLE_JSON = "sample.json"
# The label value of pixels that belong to no class.
VOID = 255
NAMED = 5  # names that a message gives
# boxes: Pascal VOC's XML · masks: a class number for each pixel · polygons, instances: Cityscapes'.
Truth = Literal["boxes", "masks", "polygons", "instances"]


class Files(NamedTuple):
    """Files of a split: those below `folder` that end in `suffix`; what stands before it is the image's name."""

    folder: str
    suffix: str

    def of(self, name: str, place: Path) -> Path:
        """The file of an image, in the folder `place` of its data set."""
        return place / self.folder / f"{name}{self.suffix}"


class Split(Config):
    """One split. `names` lists its images (a .txt with one name a line, or COCO's .json); without it all are meant."""

    images: Files
    names: str = ""
    truth: dict[Truth, Files] = Field(default={})
    # Images of the published split; the sets of a sample that make it up (keys of `counts` in its sample.json).
    count: int | None = None
    sample: tuple[str, ...] = ()
    role: Literal["train", "val"] = "train"
    # Splits that no protocol reads are looked at by `twist data check` alone.
    in_runs: bool = True
    # The command that makes masks (and `names`) which are not part of the download, and where their originals come
    # from when that is not where the data set comes from.
    masks_made_by: str = ""
    origin: str = ""
    # Its name in Detectron2's DatasetCatalog.
    detectron2: str = ""

    def image_names(self, place: Path) -> list[str]:
        """The names of its images by its list; without one, or with COCO's, of the files that are there, sorted."""
        if self.names.endswith(".txt"):
            return read_names(place / self.names)
        suffix = self.images.suffix
        found = file_entries(place / self.images.folder, lambda name: name.endswith(suffix))
        return sorted(name.removesuffix(suffix) for name, _ in found)

    def images_expected(self, sample: dict[str, Any] | None) -> int | None:
        """How many images it has: of the published data, or of a built-in sample as its sample.json says."""
        if sample is None:
            return self.count
        # A sample of an earlier version may lack a set.
        return sum(sample.get("counts", {}).get(key, 0) for key in self.sample) if self.sample else None


class DataSet(Config):
    """One row. `group`: what `twist data` calls it. `folders`: where it may lie below a root, the first that exists."""

    name: str
    group: str
    folders: tuple[str, ...]
    splits: dict[str, Split]
    # Class names, or how many there are where nothing here needs their names; None: as many as are found.
    classes: tuple[str, ...] | int | None = None
    # Masks have one more class, 0, for what is none of `classes`.
    background: bool = False
    # Value 0 of a mask is no class, and 1 is the first of `classes`.
    reduce_zero_label: bool = False
    # In a built-in sample a tree of this layout has the sample's classes and not these.
    classes_of_sample: bool = True
    # Splits are folders of classes, <class>/…/<file>, and `subsets` the lists of their labelled parts with line counts.
    class_folders: bool = False
    subsets: dict[str, int] = Field(default={})
    # Every image is decoded by a check, not a part of them.
    decode_all: bool = False
    # Masks have the palette of the VOC development kit.
    voc_palette: bool = False
    # Arguments of Detectron2's own registration.
    detectron2_metadata: str = ""
    voc_year: int = 0

    def place(self, root: Path) -> Path:
        """The folder of this data set below `root`: the first of `folders` that exists, else the first."""
        places = [root / folder for folder in self.folders]
        return next((place for place in places if place.is_dir()), places[0])

    def run_splits(self) -> dict[str, Split]:
        """The splits that runs read, by name."""
        return {name: split for name, split in self.splits.items() if split.in_runs}

    def label_names(self, sample: dict[str, Any] | None) -> tuple[str, ...] | int | None:
        """Names of the label values 0, 1, … (or their number) at a root whose sample.json, if any, is `sample`."""
        classes = tuple(sample["classes"]) if sample and self.classes_of_sample else self.classes
        if not self.background or classes is None:
            return classes
        return classes + 1 if isinstance(classes, int) else ("background", *classes)

    def label_count(self, sample: dict[str, Any] | None) -> int | None:
        """How many label values there are, 0 the first."""
        names = self.label_names(sample)
        return len(names) if isinstance(names, tuple) else names

    def origin(self, split: Split | None = None) -> str:
        """One sentence: where the data come from and what their licence asks."""
        return ORIGINS.get((split.origin if split else "") or self.group, "")


def _load() -> tuple[dict[str, str], dict[str, DataSet]]:
    path = Path(__file__).with_name("data_sets.toml")
    values = read_toml(path)
    lists, sets = values["class_lists"], {}
    for name, row in values["sets"].items():
        row["classes"] = lists.get(row["classes"]) if isinstance(row.get("classes"), str) else row.get("classes")
        sets[name] = validate({"name": name, **row}, DataSet, where=f"{path}, {name}")
    return values["origins"], sets


ORIGINS, DATA_SETS = _load()


def find_data_set(name: str) -> DataSet:
    """The row called `name`; `UserError` with the near match when there is none."""
    if name not in DATA_SETS:
        raise UserError(f'There is no data set "{name}".{did_you_mean(name, DATA_SETS)}')
    return DATA_SETS[name]


def find_root(data: Path | None) -> Path:
    """`data`, or the folder that DETECTRON2_DATASETS names; `UserError` when there is none."""
    if data is None and (named := os.environ.get("DETECTRON2_DATASETS")):
        data = Path(named)
    if data is None:
        raise UserError(
            "No data root: name it (`--data ROOT` for a run) or set DETECTRON2_DATASETS; `twist data sample ROOT` "
            "makes one."
        )
    if not data.is_dir():
        raise UserError(
            f"There is no data root at {data}: check the path, or make one with `twist data sample {data}`."
        )
    return data.resolve()


class _SampleFile(BaseModel):
    """sample.json, as far as its fields are read."""

    model_config = ConfigDict(strict=True)
    classes: list[str] = Field(min_length=1)
    counts: dict[str, int] = Field(default={})
    source: str = Field(default="", pattern=r"^[\w .-]*$", max_length=100)
    size: str = Field(default="", pattern=r"^[\w .-]*$", max_length=100)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    format_version: int = 1


def read_sample(root: Path) -> dict[str, Any] | None:
    """`root`/sample.json when `root` is a built-in sample, else None; `UserError` when it is damaged."""
    path, remedy = root / SAMPLE_JSON, "remove the sample and make it again with `twist data sample`"
    if not os.path.lexists(path):
        return None
    values: dict[str, Any] = files.read_json(path, remedy=remedy)
    try:
        validate(values, _SampleFile, where=str(path))
    except UsageError as error:
        raise UserError(f"{error} To correct it, {remedy}.") from None
    return values


def read_names(path: Path, *, whole_lines: bool = False) -> list[str]:
    """The names in a list of images: the first word of each line, or all of it; `UserError` when there are none."""
    text = files.read_text(path, remedy="take it from the original again")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: it should name one image a line; take it from the original again.")
    return lines if whole_lines else [line.split()[0] for line in lines]


def spread(items: Any, count: int) -> list[Any]:
    """At most `count` of the sequence `items`, spread evenly over their order."""
    if len(items) <= count:
        return list(items)
    # round() rounds halves to even, as numpy does.
    return [items[round(index * (len(items) - 1) / max(count - 1, 1))] for index in range(count)]


def named(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
