"""The checkpoint layouts of `sources.toml` as typed rows; a new source is a new `[layout.NAME]` table there.

Where two sources with the same tensors want other pixels or another padding, nothing is guessed and the user is asked
(`AMBIGUOUS`, `NAMED`).
"""

import fnmatch
import functools
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from twist.contracts.config import Config
from twist.contracts.rename import Table
from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD, Resize
from twist.converters.tables import TABLES, TIMM_ROPE, TIMM_VIT, TORCHVISION


class Place(TypedDict, total=False):
    """What is to be read of a checkpoint, where its contents do not say it; None is as good as absent.

    `entry` (`a/b`, a path of entries) and `prefix` choose among the networks of a file, wherever they are; `heads` are
    a ViT's; `architecture` is `timm:NAME` for a network that timm builds by name.
    """

    layout: str | None
    branch: str | None
    entry: str | None
    prefix: str | None
    heads: int | None
    architecture: str | None


class Reading(Place, total=False):
    """The same, and what the header calls the method."""

    method: str | None


class Pixels(Config):
    """What a network was fed: channel order, and mean and std in units of `input_range`."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channel_order: Literal["RGB", "BGR"] = "RGB"
    input_range: Literal[1, 255] = 1
    label: str = ""


class Branch(NamedTuple):
    """One network in a file: the path of entries to its state dict, and the prefix of its names there."""

    name: str
    entry: tuple[str, ...]
    prefix: str


class Layout(Config):
    """One layout; the keys are explained in `sources.toml`."""

    name: str
    method: str
    branches: tuple[Branch, ...]
    evidence: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    top: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    tables: tuple[Table, ...] = (TORCHVISION, TIMM_ROPE, TIMM_VIT)
    pixels: Pixels = Pixels()
    stride_in: Literal["3x3", "1x1"] = "3x3"
    padding: Literal["symmetric", "same"] = "symmetric"
    method_at: tuple[str, ...] = ()
    heads_known: bool = False
    vit_heads: int | None = None
    resize: Resize = "antialias"
    norm_eps: float = 1e-6
    epoch_is_count: bool = False
    detect: bool = True
    generic: bool = False
    of_hub: bool = False
    own_network: bool = False
    lookalikes: str = ""
    note: str = ""


class Ambiguous(NamedTuple):
    """A kind of file that may have any of the layouts `choices`, and why they differ."""

    entry: tuple[str, ...]
    evidence: tuple[str, ...]
    choices: tuple[str, ...]
    why: str
    absent: tuple[str, ...] = ()


class Dense(NamedTuple):
    """A trained detector or segmentor: a regular expression for names that only it has (of tensors with so many `axes`,
    where names alone would also fit a classifier), and how its backbone ran."""

    title: str
    names: str
    runs: str
    axes: int | None = None


class Foreign(NamedTuple):
    """Another network: expressions that each match one of its names (`lacks`: that match none), what it is, and what
    to do about it."""

    has: tuple[str, ...]
    says: str
    lacks: str | None = None
    do: str = "ResNets and plain ViTs are converted, and what timm builds where it is named: --architecture timm:NAME"


class Named(NamedTuple):
    """A word in a file's name, the layouts with the same names in the file, the one that is meant, the difference."""

    word: str
    layouts: tuple[str, ...]
    meant: str
    difference: str


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits one of the globs (`a|b`: either)."""
    return bool(patterns) and _expression(patterns).match(name) is not None


@functools.cache
def _expression(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(part) for pattern in patterns for part in pattern.split("|")))


def layout_of(name: str, row: dict[str, Any]) -> Layout:
    """The typed row of a table `[layout.NAME]`."""
    branches = [
        Branch(branch, tuple(entry.split("/")) if entry else (), prefix) for branch, entry, prefix in row["branches"]
    ]
    tables = {"tables": tuple(TABLES[table] for table in row["tables"])} if "tables" in row else {}
    pixels = PIXELS[row.get("pixels", "imagenet")]
    return Layout(**{**row, **tables, "name": name, "branches": branches, "pixels": pixels})


_ROWS = tomllib.loads(Path(__file__).with_name("sources.toml").read_text())
PIXELS = {name: Pixels(**row) for name, row in _ROWS["pixels"].items()}
LAYOUTS = tuple(layout_of(name, row) for name, row in _ROWS["layout"].items())
# A backbone in no layout's place (find.py); its `heads` are the field's names of what comes after a backbone.
ANYWHERE = layout_of("anywhere", _ROWS["anywhere"])
BY_NAME = {layout.name: layout for layout in (*LAYOUTS, ANYWHERE)}
AMBIGUOUS = tuple(Ambiguous(**{**row, "entry": tuple(row["entry"])}) for row in _ROWS["ambiguous"])
NAMED = tuple(Named(word=word, **row) for word, row in _ROWS["named"].items())
DENSE = tuple(Dense(title=title, **row) for title, row in _ROWS["dense"].items())
FOREIGN = tuple(Foreign(**row) for row in _ROWS["foreign"].values())
# Where timm's config.json names a pretraining: expression for architecture and tag → method, the first that matches.
TIMM_METHODS: dict[str, str] = _ROWS["timm_methods"]
# Hugging Face's `model_type` → method of a network that is read, or why another is not.
HUGGINGFACE: dict[str, str] = _ROWS["huggingface"]
HUGGINGFACE_OTHERS: dict[str, str] = _ROWS["huggingface_others"]
TRAINING_ENTRIES: tuple[str, ...] = tuple(_ROWS["training_entries"])


def copies_of(entry: tuple[str, ...]) -> list[tuple[str, str]]:
    """Branch name and last entry of each copy that programs keep beside the state dict at `entry`."""
    return [(name, copy) for name, copy in _ROWS["copies"].get(entry[-1], ())] if entry else []
