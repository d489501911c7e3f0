"""Labelled images in tables that Hugging Face `datasets` reads, or in class folders: a card's [classification].

Tables are Parquet files, tar shards, or a data set that was saved to disk (Arrow). Rows are memory-mapped and their
image bytes decoded as files' are.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twist.catalog.card import Card, Role
from twist.catalog.class_folders import LabelledImages, read_split, refuse_other_classes
from twist.contracts import files as texts
from twist.contracts.errors import UserError, require
from twist.contracts.images import UnreadableImage, decode

if TYPE_CHECKING:
    from torch import Tensor

# File endings → the name of their reader in `datasets`.
READERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


@dataclass(frozen=True)
class TableImages(LabelledImages):
    """As class folders, but image `b"17"` of `paths` is row 17 of `rows`; `folder` is where the files lie."""

    rows: Any = None
    column: str = "image"
    files: tuple[Path, ...] = ()

    def read(self, index: int) -> Tensor:
        row = int(self.paths[index])
        value, name = self.rows[row][self.column], f"row {row} of {self.folder}"
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UnreadableImage(f"Cannot read the image {name}: the row has no bytes")
        return decode(data, name=name)

    def chosen_rows(self) -> Any:
        """The rows alone, in the order of the files."""
        return self.rows.select(sorted(map(int, self.paths)))

    def digest(self) -> str:
        names = b"".join(os.fsencode(file.name) for file in self.files)
        return hashlib.sha256(names + super().digest().encode()).hexdigest()

    def stamp(self) -> str:
        states = [f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in self.files]
        return hashlib.sha256("".join([self.digest(), *states]).encode()).hexdigest()


def read_labelled(card: Card) -> dict[Role, LabelledImages]:
    """Both splits of a card's [classification]; without `val` the written lists divide `train`.

    Raises:
        UserError: a place holds neither class folders nor tables, or the splits do not have the same classes.
    """
    section = card.classification
    assert section is not None
    found: dict[Role, LabelledImages] = {"train": _read(card, section.train)}
    if section.val is not None:
        found["val"] = _read(card, section.val)
        refuse_other_classes(card.path, found["train"].classes, found["val"].classes)
    elif card.list_file("classification", "val").is_file():
        found["val"] = _listed(found["train"], card, "val")
        found["train"] = _listed(found["train"], card, "train")
    return found


def _read(card: Card, named: str) -> LabelledImages:
    section, place = card.classification, card.place(named)
    assert section is not None
    files = sorted(place.parent.glob(place.name)) if "*" in place.name else [place] if place.is_file() else []
    if place.is_dir():
        files = sorted(file for ending in READERS for file in place.glob(f"*{ending}"))
        if not files:
            return read_split(place)
    if not files or files[0].suffix not in READERS:
        raise UserError(
            f"{place} holds neither class folders nor {' or '.join(READERS)} files: correct [classification] in "
            f"{card.path}."
        )
    rows = _open(files, section.image_column, section.label_column)
    feature = rows.features[section.label_column]
    values = list(rows[section.label_column])
    names = getattr(feature, "names", None)
    if names is None:
        named_values = sorted(set(values))
        values, names = [named_values.index(value) for value in values], [str(value) for value in named_values]
    labels = np.array(values, dtype=np.int64)
    order = np.argsort(labels, kind="stable")  # by class, as folders are
    paths = np.array([b"%d" % row for row in order])
    return TableImages(place, tuple(names), paths, labels[order], rows, section.image_column, tuple(files))


def _open(files: list[Path], image: str, label: str) -> Any:
    require("hub")
    import datasets

    reader = READERS[files[0].suffix]
    try:
        rows = datasets.load_dataset(reader, data_files=[str(file) for file in files], split="train")
        for column in (image, label):
            if column not in rows.column_names:
                raise UserError(
                    f"{files[0]} has no column {column} (it has {', '.join(rows.column_names)}): set image_column and "
                    "label_column in [classification] of the card."
                )
        return rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{files[0]} cannot be opened as {reader} ({str(error).splitlines()[0]}).") from None


def column_kinds(file: Path) -> dict[str, str]:
    """The columns of a table that hold images ("image") or numbers of classes ("label")."""
    require("hub")
    import datasets

    rows = datasets.load_dataset(READERS[file.suffix], data_files=[str(file)], split="train")
    kinds = {}
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
            kinds[name] = "image"
        elif isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "").startswith("int"):
            kinds[name] = "label"
    return kinds


def lines_of(images: LabelledImages) -> list[str]:
    """A line for every image, by which a written list finds it again."""
    return [os.fsdecode(bytes(path)) for path in images.paths]


def _listed(images: LabelledImages, card: Card, role: Role) -> LabelledImages:
    wanted = set(texts.read_text(card.list_file("classification", role)).split("\n")) - {""}
    kept = np.array([line in wanted for line in lines_of(images)])
    if kept.sum() != len(wanted):
        raise UserError(
            f"{card.list_file('classification', role)} names images that are not there: remove the lists and make them "
            "again with `twist data prepare`."
        )
    return images.only(np.flatnonzero(kept))
