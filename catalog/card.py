"""A data card: one TOML file beside a user's own data that says where boxes, masks, classes and pictures lie.

It stands wherever a data root does, and a folder that holds a `card.toml` stands for it. Paths are relative to the
card, or to its `root`. Without a `val` the lists that `twist data prepare CARD split=0.2` writes divide `train`.
"""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from twist.catalog.data_sets import VOID, read_names
from twist.contracts.config import SHIPPED, Config, read_toml, validate
from twist.contracts.errors import UsageError, UserError
from twist.contracts.record import Task

CARD = "card.toml"
# Cards of well-known sets; they say where these lie, or `root=DIR` does.
OURS = SHIPPED / "data"
Role = Literal["train", "val"]
ROLES: tuple[Role, ...] = ("train", "val")
Section = Literal["detection", "segmentation", "classification"]
SECTION_OF: dict[Task, Section] = {
    "detection": "detection",
    "instance-segmentation": "detection",
    "segmentation": "segmentation",
    "classification": "classification",
    "clustering": "classification",
}


class BoxSplit(Config):
    """`annotations`: COCO's JSON, or the folder of VOC's .xml or YOLO's .txt. `list`: the images that are meant."""

    images: str
    annotations: str = ""
    list: str = ""


class Detection(Config):
    """Boxes, and masks where the annotations have them. `classes` where these have no names; `data`: a data.yaml."""

    format: Literal["coco", "voc", "yolo"] = "coco"
    train: BoxSplit
    val: BoxSplit | None = None
    classes: tuple[str, ...] = ()
    data: str = ""


class MaskSplit(Config):
    """Pictures and the masks with the same stems."""

    images: str
    masks: str
    list: str = ""


class MaskValues(Config):
    """What the numbers or colours in masks mean.

    `classes`: names of the values 0, 1, …, or a table of value or "#rrggbb" → name. Pixels of value `ignore`, and in a
    mask with a table all that the table doesn't have, belong to no class; with `reduce_zero_label` value 0 doesn't
    either and 1 is the first class.
    """

    classes: tuple[str, ...] | dict[str, str]
    ignore: int | tuple[int, ...] = VOID
    reduce_zero_label: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names, in the order of the network's outputs."""
        names = self.classes.values() if isinstance(self.classes, dict) else self.classes
        return tuple(dict.fromkeys(names))

    @property
    def ignored(self) -> tuple[int, ...]:
        return (self.ignore,) if isinstance(self.ignore, int) else self.ignore

    def table(self) -> tuple[dict[int, int], bool]:
        """Value (or colour as 0xRRGGBB) in a mask → class, `VOID` for those that are ignored; whether it is colours."""
        ignored = dict.fromkeys(self.ignored, VOID)
        if not isinstance(self.classes, dict):
            first = int(self.reduce_zero_label)
            zero = {0: VOID} if self.reduce_zero_label else {}
            return {**{index + first: index for index in range(len(self.classes))}, **zero, **ignored}, False
        colours = any(key.startswith("#") for key in self.classes)
        try:
            keys = [int(key.removeprefix("#"), 16) if key.startswith("#") else int(key) for key in self.classes]
        except ValueError as error:
            raise UserError(f'classes of [segmentation]: {error}; write 3 = "sky" or "#804080" = "road".') from None
        places = [self.names.index(name) for name in self.classes.values()]
        return {**dict(zip(keys, places)), **ignored}, colours


class Segmentation(MaskValues):
    """A class for each pixel. An image `a<image_suffix>.jpg` has the mask `a<mask_suffix>.png`."""

    train: MaskSplit
    val: MaskSplit | None = None
    image_suffix: str = ""
    mask_suffix: str = ""


class Classification(Config):
    """Folders of class folders, or tables; their columns are named where the first of their kind is not meant."""

    train: str
    val: str | None = None
    image_column: str = ""
    label_column: str = ""


class Pretraining(Config):
    """Pictures without labels; `exclude` are names or patterns of what is left out, beside the `val` splits."""

    images: str
    exclude: tuple[str, ...] = ()


SplitT = TypeVar("SplitT", BoxSplit, MaskSplit)


class Card(Config):
    """One card; `path` is its file."""

    path: Path
    name: str = Field(pattern=r"^[\w][\w .+-]*$")
    root: str = ""
    detection: Detection | None = None
    segmentation: Segmentation | None = None
    classification: Classification | None = None
    pretraining: Pretraining | None = None

    @property
    def folder(self) -> Path:
        """What paths are relative to."""
        return (self.path.parent / Path(self.root).expanduser()).resolve()

    def place(self, path: str) -> Path:
        return self.folder / Path(path).expanduser()

    def sections(self) -> tuple[Section, ...]:
        """The sections with labels that this card has."""
        return tuple(name for name in dict.fromkeys(SECTION_OF.values()) if getattr(self, name) is not None)

    def list_file(self, section: Section, role: Role) -> Path:
        """Where `twist data prepare` writes the list of a split."""
        return self.path.with_name(f"{self.path.stem}.{section}.{role}.txt")

    def require(self, task: Task) -> Section:
        """The section that a run of `task` reads; `UserError` when the card does not have it, or has no `val`."""
        section = SECTION_OF[task]
        part = getattr(self, section)
        if part is None:
            has = ", ".join(f"[{name}]" for name in self.sections()) or "none with labels"
            raise UserError(
                f"{self.path} has no section [{section}], which {task} is measured on (it has {has}): add the section, "
                f"or let `twist data card {self.folder}` guess it."
            )
        if part.val is None and not self.list_file(section, "val").is_file():
            raise UserError(
                f"{self.path} has no val in [{section}], and without one nothing can be measured: name one, or "
                f"`twist data prepare {self.path} split=0.2 seed=0` takes a part of train (it writes lists, no file is "
                "moved)."
            )
        return section

    def splits(self, section: Section, train: SplitT, val: SplitT | None) -> dict[Role, SplitT]:
        """The section's splits; without a `val` the lists that were written take their parts of `train`."""
        if val is not None:
            return {"train": train, "val": val}
        if not self.list_file(section, "val").is_file():
            return {"train": train}
        return {role: train.model_copy(update={"list": str(self.list_file(section, role))}) for role in ROLES}


def find_card(data: Path | None, *, root: str | None = None) -> Card | None:
    """The card that `data` is or, as a folder, holds; None where `data` is a data root. `root` overrides the card's.

    A name alone, as `camvid`, may stand for one of ours.

    `UsageError`: the file is no TOML or no card. `UserError`: there is no such file.
    """
    if data is None:
        return None
    path = data / CARD if data.is_dir() else data
    if data.parent == Path() and not data.exists() and (OURS / f"{data.stem}.toml").is_file():
        path = OURS / f"{data.stem}.toml"
    if path.suffix != ".toml" or (data.is_dir() and not (path.exists() or path.is_symlink())):
        if root is not None:
            raise UsageError(f"root={root} belongs to a data card, and {data} is none: name the card's .toml file.")
        return None
    if not path.is_file():
        raise UserError(f"There is no data card at {path}: check the path, or write one with `twist data card FOLDER`.")
    values = {**read_toml(path), "path": path.resolve()}
    if root is not None:
        values["root"] = str(Path(root).expanduser().resolve())
    card = validate(values, Card, where=str(path))
    if not card.sections() and card.pretraining is None:
        raise UsageError(
            f"{path} names no data: a card has [detection], [segmentation], [classification] or [pretraining]."
        )
    if not card.folder.is_dir():
        raise UserError(f"{path}: there is no folder {card.folder}: correct its root, or pass root=DIR.")
    return card


def chosen(names: list[str], listed: str, card: Card) -> list[str]:
    """Those of `names` (files below a folder) that the list file `listed` has, by name or stem; all without a list."""
    if not listed:
        return names
    path = card.place(listed)
    wanted = read_names(path, whole_lines=True)
    by_stem: dict[str, str] = {}
    for name in names:
        for key in (name, name.rpartition(".")[0], Path(name).name, Path(name).stem):
            by_stem.setdefault(key, name)
    absent = [name for name in wanted if name.removeprefix("./") not in by_stem and Path(name).name not in by_stem]
    if absent:
        raise UserError(
            f"{path} names {len(absent)} images that are not there (first: {absent[0]}): correct the list, or complete "
            "the images."
        )
    return sorted({by_stem.get(name.removeprefix("./")) or by_stem[Path(name).name] for name in wanted})
