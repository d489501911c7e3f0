"""What a run reads of a data card: one section, opened, checked and identified. The check goes through here as well."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twist.catalog.boxes import BoxSet, read_boxes
from twist.catalog.card import ROLES, Card, Role, Section, find_card
from twist.catalog.class_folders import (
    READERS,
    LabelledImages,
    TableImages,
    open_tree,
    read_files,
    refuse_other_classes,
    table_files,
)
from twist.catalog.data_sets import spread
from twist.catalog.masks import Pair, check_pair, read_pairs
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError
from twist.contracts.files import sha256_json
from twist.contracts.images import image_names
from twist.contracts.record import Task

# Files of a split whose sizes are a part of its identity, and masks that are looked at before a run.
SIZED = 16


@dataclass(frozen=True)
class CardData:
    """A section of a card: `boxes`, `pairs` or `labelled`, the one that it is of, by split."""

    card: Card
    section: Section
    boxes: dict[Role, BoxSet] | None = None
    pairs: dict[Role, list[Pair]] | None = None
    labelled: dict[Role, LabelledImages] | None = None

    @property
    def splits(self) -> Mapping[Role, Any]:
        return self.boxes or self.pairs or self.labelled or {}

    @property
    def classes(self) -> tuple[str, ...]:
        if self.card.segmentation is not None and self.pairs is not None:
            return self.card.segmentation.names
        return self.splits["train"].classes

    def images(self, role: Role) -> list[Path]:
        """The pictures of a split; of tables the files that hold them."""
        if self.boxes is not None:
            return [image["file"] for image in self.boxes[role].images]
        if self.pairs is not None:
            return [pair.image for pair in self.pairs[role]]
        return self.splits[role].files()

    def in_both(self) -> str:
        """What is wrong where images are in train and in val, "" for nothing."""
        names = []
        for role, split in self.splits.items():
            paths = list(map(str, self.images(role)))
            names.append({f"{paths[0]}/{row}" for row in split.lines()} if isinstance(split, TableImages) else {*paths})
        both = sorted(set.intersection(*names)) if len(names) > 1 else []
        if not both:
            return ""
        return f"{len(both)} images are in train and in val, {both[0]} the first: numbers would be too high"

    def count(self, role: Role) -> int:
        """Images of a split."""
        return len(self.labelled[role]) if self.labelled is not None else len(self.images(role))

    @cached_property
    def sha256(self) -> str:
        """Which data: names, annotations, classes, and the sizes of some files; neither places nor times."""
        facts: list[Any] = [self.section, list(self.classes)]
        for role, split in self.splits.items():
            facts.append([role, self.count(role)])
            if self.boxes is not None:
                facts.append(sha256_json([{**image, "file": image["file"].name} for image in split.images]))
            elif self.card.segmentation is not None and self.pairs is not None:
                keys = {"classes", "ignore", "reduce_zero_label"}
                facts.append(self.card.segmentation.model_dump(mode="json", include=keys))
                facts.append([[pair.image.name, pair.mask.name] for pair in split])
                facts.append([pair.mask.stat().st_size for pair in spread(split, SIZED)])
            else:
                facts.append(split.digest())
            facts.append([path.stat().st_size for path in spread(self.images(role), SIZED)])
        return sha256_json(facts)

    @property
    def name(self) -> str:
        """What records and tables call these data: no number is compared with, or continued on, others."""
        return f"{self.card.name} {self.sha256[:12]}"

    def summary(self) -> str:
        """One line for a plan."""
        counts = [f"{self.count(role)} {role} images" for role in self.splits]
        if self.boxes is not None:
            counts = [
                f"{count} with {sum(1 for _ in one.objects)} objects" for count, one in zip(counts, self.boxes.values())
            ]
        return f"own data: {self.name}, {len(self.classes)} classes, {', '.join(counts)}"


def open_card(card: Card, section: Section) -> CardData:
    """The data of a section; `UserError` for what a run would stumble over later."""
    if section == "detection":
        return CardData(card, section, boxes=read_boxes(card))
    if section == "segmentation":
        return CardData(card, section, pairs=read_pairs(card))
    return CardData(card, section, labelled=_read_labelled(card))


def _read_labelled(card: Card) -> dict[Role, LabelledImages]:
    """Both splits of a card's [classification]; without `val` the written lists divide `train`."""
    section = card.classification
    assert section is not None
    found: dict[Role, LabelledImages] = {}
    for role in ROLES:
        if (place := getattr(section, role)) is not None:
            sources = _files_at(card.place(place), card)
            found[role] = read_files(sources, image=section.image_column, label=section.label_column)
    if "val" in found:
        refuse_other_classes(card.path, found["train"].classes, found["val"].classes)
    elif card.list_file("classification", "val").is_file():
        found = {role: _listed(found["train"], card, role) for role in ROLES}
    return found


def _files_at(place: Path, card: Card) -> list[Path]:
    """The folder of class folders, or the tables, that `place` (a folder, a file or a pattern of files) is."""
    if place.is_dir():
        return table_files(place) or [place]
    found = sorted(place.parent.glob(place.name)) if "*" in place.name else [place] if place.is_file() else []
    if not found or found[0].suffix not in READERS:
        raise UserError(
            f"{place} holds neither class folders nor {' or '.join(READERS)} files: correct [classification] in "
            f"{card.path}."
        )
    return found


def _listed(images: LabelledImages, card: Card, role: Role) -> LabelledImages:
    path = card.list_file("classification", role)
    wanted = set(files.read_text(path).split("\n")) - {""}
    kept = np.array([line in wanted for line in images.lines()])
    if kept.sum() != len(wanted):
        raise UserError(
            f"{path} names images that are not there: remove the lists and make them again with `twist data prepare`."
        )
    return images.only(np.flatnonzero(kept))


def require_card_data(card: Card, task: Task) -> CardData:
    """The data that a run of `task` reads, whole, before it starts.

    `UserError`: the card has no such section or no `val`, or something is missing or not what it should be.
    """
    data = open_card(card, card.require(task))
    for pairs in (data.pairs or {}).values():
        assert card.segmentation is not None
        for pair in spread(pairs, SIZED):
            problem, _ = check_pair(pair, card.segmentation)
            if problem:
                raise UserError(f"{problem.rstrip('.')}; `twist data check {card.path}` looks at all of them.")
    if said := data.in_both():
        raise UserError(f"[{data.section}] in {card.path}: {said}; take them out of one.")
    return data


def prepare_card(card: Card, **options: Any) -> list[Path]:
    """Write the lists that divide the training images of each section without `val`; options are split and seed.

    `UsageError`: no split, or another option. `UserError`: there is nothing to split, or other lists are there.
    """
    share, seed = options.pop("split", None), options.pop("seed", 0)
    if options or not isinstance(share, float) or not 0 < share < 1 or not isinstance(seed, int) or seed < 0:
        raise UsageError(
            f"prepare {card.path} takes split=SHARE, the part that becomes val, and seed=N: split=0.2 seed=0."
        )
    sections = [section for section in card.sections() if getattr(card, section).val is None]
    if not sections:
        raise UserError(f"Every section of {card.path} has a val already: there is nothing to split.")
    alone = card.model_copy(update={"path": card.path.with_name(f"{card.path.stem}.unsplit.toml")})
    written = []
    for section in sections:
        data = open_card(alone, section)
        if data.labelled is not None:
            images = data.labelled["train"].lines()
        else:
            folder = card.place(getattr(card, section).train.images)
            images = [os.path.relpath(path, folder) for path in data.images("train")]
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(images))
        held_out = max(1, round(share * len(images)))
        if held_out >= len(images):
            raise UserError(f"[{section}] of {card.path} has {len(images)} images: too few to split.")
        parts: dict[Role, Any] = {"train": order[held_out:], "val": order[:held_out]}
        for role in ROLES:
            path = card.list_file(section, role)
            text = "".join(f"{images[index]}\n" for index in sorted(parts[role]))
            if path.exists() and files.read_text(path) != text:
                raise UserError(f"{path} exists and holds another split: remove it to have it made again.")
            files.write_text(path, text)
            written.append(path)
    return written


def labelled_images(data: str | Path) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images of a card's [classification], or of a tree of class folders below a data root."""
    card = find_card(Path(data))
    if card is None:
        return open_tree(data)
    found = require_card_data(card, "classification").labelled or {}
    return found["train"], found["val"]


def pretraining_images(card: Card) -> tuple[Path | TableImages, set[Path]]:
    """The folder of a card's pictures for pretraining, and those below it that are held out to measure with.

    Without [pretraining] it is the folder of a section's training images, or the rows of its tables. Held out are the
    `val` splits and what `exclude` names.
    """
    sections = [card.detection, card.segmentation]
    folders = [card.pretraining.images] if card.pretraining else [part.train.images for part in sections if part]
    if card.classification and not folders:
        folders = [card.classification.train]
    root = card.place(folders[0])
    held_out: set[Path] = set()
    for section in card.sections():
        data = open_card(card, section)
        rows = (data.labelled or {}).get("train")
        if isinstance(rows, TableImages) and root == card.place(card.classification.train):  # type: ignore[union-attr]
            return rows, held_out
        if "val" in data.splits:
            held_out |= {path.resolve() for path in data.images("val")}
    patterns = card.pretraining.exclude if card.pretraining else ()
    for name in image_names(root) if patterns and root.is_dir() else ():
        if any(fnmatch(name, pattern) for pattern in patterns):
            held_out.add((root / name).resolve())
    return root, held_out
