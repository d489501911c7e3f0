"""What a run reads of a data card: one section, opened, checked and identified. The check goes through here as well."""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from twist.catalog.boxes import BoxSet, read_boxes
from twist.catalog.card import Card, Role, Section, find_card, split_card
from twist.catalog.class_folders import LabelledImages, open_tree
from twist.catalog.data_sets import spread
from twist.catalog.masks import Pair, check_pair, read_pairs
from twist.catalog.report import picture_size
from twist.catalog.tables import TableImages, lines_of, read_labelled
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
    def splits(self) -> dict[Role, Any]:
        return self.boxes or self.pairs or self.labelled or {}

    @property
    def classes(self) -> tuple[str, ...]:
        if self.boxes is not None:
            return self.boxes["train"].classes
        if self.labelled is not None:
            return self.labelled["train"].classes
        assert self.card.segmentation is not None
        return self.card.segmentation.names

    def images(self, role: Role) -> list[Path]:
        """The pictures of a split; of tables the files that hold them."""
        if self.boxes is not None:
            return [image["file"] for image in self.boxes[role].images]
        if self.pairs is not None:
            return [pair.image for pair in self.pairs[role]]
        assert self.labelled is not None
        found = self.labelled[role]
        return [*getattr(found, "files", ())] or [found.path(index) for index in range(len(found))]

    def in_both(self) -> str:
        """What is wrong where images are in train and in val, "" for nothing."""
        names = [
            {f"{one.folder}/{line}" for line in lines_of(one)}
            if isinstance(one, LabelledImages)
            else set(map(str, self.images(role)))
            for role, one in self.splits.items()
        ]
        both = sorted(set.intersection(*names)) if len(names) > 1 else []
        return (
            f"{len(both)} images are in train and in val, {both[0]} the first: numbers would be too high"
            if both
            else ""
        )

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
                entries = [
                    {**image, "file": image["file"].name, "objects": [_plain(one) for one in image["objects"]]}
                    for image in split.images
                ]
                facts.append(sha256_json(entries))
            elif self.pairs is not None:
                section = self.card.segmentation
                assert section is not None
                facts.append(section.model_dump(mode="json", include={"classes", "ignore", "reduce_zero_label"}))
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
        parts = [
            f"{self.count(role)} {role} images"
            + (f" with {sum(1 for _ in split.objects)} objects" if isinstance(split, BoxSet) else "")
            for role, split in self.splits.items()
        ]
        return f"own data: {self.name}, {len(self.classes)} classes, {', '.join(parts)}"


def open_card(card: Card, section: Section) -> CardData:
    """The data of a section; `UserError` for what a run would stumble over later."""
    if section == "detection":
        return CardData(card, section, boxes=read_boxes(card))
    if section == "segmentation":
        return CardData(card, section, pairs=read_pairs(card))
    return CardData(card, section, labelled=read_labelled(card))


def require_card_data(card: Card, task: Task) -> CardData:
    """The data that a run of `task` reads, whole, before it starts.

    Raises:
        UserError: the card has no such section or no `val`, or something is missing or not what it should be.
    """
    data = open_card(card, card.require(task))
    for pairs in (data.pairs or {}).values():
        assert card.segmentation is not None
        for pair in spread(pairs, SIZED):
            problem, _ = check_pair(pair, card.segmentation, picture_size(pair.image))
            if problem:
                raise UserError(f"{problem.rstrip('.')}; `twist data check {card.path}` looks at all of them.")
    if said := data.in_both():
        raise UserError(f"[{data.section}] in {card.path}: {said}; take them out of one.")
    return data


def prepare_card(card: Card, **options: Any) -> list[Path]:
    """Write the lists that divide the training images of each section without `val`; options are split and seed.

    Raises:
        UsageError: no split, or another option. UserError: there is nothing to split, or other lists are there.
    """
    if unknown := options.keys() - {"split", "seed"}:
        raise UsageError(f'prepare {card.path} has no option "{min(unknown)}": it takes split=SHARE and seed=N.')
    share, seed = options.get("split"), options.get("seed", 0)
    if not isinstance(share, float) or not isinstance(seed, int) or seed < 0:
        raise UsageError("prepare CARD takes split=SHARE, the part that becomes val, and seed=N: split=0.2 seed=0.")
    names: dict[Section, list[str]] = {}
    for section in card.sections():
        if getattr(card, section).val is not None:
            continue
        alone = card.model_copy(update={"path": card.path.with_name(f"{card.path.stem}.unsplit.toml")})
        data = open_card(alone, section)
        if data.labelled is not None:
            names[section] = lines_of(data.labelled["train"])
        else:
            folder = card.place(getattr(card, section).train.images)
            names[section] = [os.path.relpath(path, folder) for path in data.images("train")]
    return split_card(card, names, share=share, seed=seed)


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


def _plain(one: dict[str, Any]) -> dict[str, Any]:
    """An object as JSON has it: compressed run lengths may be bytes."""
    outline = one.get("segmentation")
    if isinstance(outline, dict) and isinstance(outline.get("counts"), bytes):
        return {**one, "segmentation": {**outline, "counts": outline["counts"].decode()}}
    return one
