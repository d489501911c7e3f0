"""The checkpoint layouts of `sources.toml` as typed rows: where the backbone is, which branch to take, what is dropped.

A new source is a new `[layout.NAME]` table there. Where two sources with the same tensors want other pixels or another
padding, nothing is guessed and the user is asked (`AMBIGUOUS`, `NAMED`).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twist.contracts.config import Config
from twist.contracts.rename import Table
from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD, Resize
from twist.converters.tables import TABLES, TIMM_VIT, TORCHVISION


class Pixels(Config):
    """What a network was fed: channel order, and mean and std in units of `input_range`."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channel_order: Literal["RGB", "BGR"] = "RGB"
    input_range: Literal[1, 255] = 1
    label: str = ""


@dataclass(frozen=True)
class Branch:
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
    top: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    tables: tuple[Table, ...] = (TORCHVISION, TIMM_VIT)
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
    lookalikes: str = ""
    note: str = ""


class Ambiguous(Config):
    """A kind of file that may have any of the layouts `choices`, and why they differ."""

    entry: tuple[str, ...]
    evidence: tuple[str, ...]
    absent: tuple[str, ...] = ()
    choices: tuple[str, ...]
    why: str


class Named(Config):
    """A word in a file's name, the layouts with the same names in the file, the one that is meant, the difference."""

    word: str
    layouts: tuple[str, ...]
    meant: str
    difference: str


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
BY_NAME = {layout.name: layout for layout in LAYOUTS}
AMBIGUOUS = tuple(Ambiguous(**row) for row in _ROWS["ambiguous"])
NAMED = tuple(Named(**row) for row in _ROWS["named"])
# Regular expression for a name in the state dict of another network → why that is not converted; the first match.
FOREIGN: dict[str, str] = _ROWS["foreign"]
TRAINING_ENTRIES: tuple[str, ...] = tuple(_ROWS["training_entries"])
