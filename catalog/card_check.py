"""`twist data check CARD` and `twist data check images FOLDER`: what is wrong, read as the engines read it."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from twist.catalog.boxes import BoxSet
from twist.catalog.card import Card, Section
from twist.catalog.card_data import CardData, open_card, pretraining_images
from twist.catalog.data_sets import VOID, spread
from twist.catalog.masks import Pair, check_pair, summary
from twist.catalog.report import Finding, Report, has_errors, named, picture_size, upright
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.images import MAX_PIXELS, TooManyPixels, UnreadableImage, image_names, is_image, open_picture
from twist.contracts.progress import Progress

# The shortest side of a picture of which views can be cut, and the spread of grey values of one that shows something.
TINY, FLAT = 32, 4.0
SHEET_COLUMNS, SHEET_SIDE, SHEET_PICTURES = 8, 96, 40


def check_card(card: Card, *, progress: bool = True) -> list[Finding]:
    """Look at every section of a card; errors are what a run would stop at."""
    with Progress(f"check {card.name}", total=None, unit="file", quiet=not progress) as bar:
        report = Report(bar)
        for section in card.sections():
            try:
                data = open_card(card, section)
            except UserError as error:
                report.error(f"[{section}]", str(error))
                continue
            _check_section(card, section, data, report)
        if card.pretraining is not None and report.has_folder(folder := card.place(card.pretraining.images)):
            held_out = set() if has_errors(report.findings) else pretraining_images(card)[1]
            found = sum((folder / name).resolve() not in held_out for name in image_names(folder))
            report.expect(folder, "pictures for pretraining", found, found or 1)
    return report.findings


def _check_section(card: Card, section: Section, data: CardData, report: Report) -> None:
    where = f"[{section}]"
    if "val" not in data.splits:
        remedy = f"name one, or `twist data prepare {card.path} split=0.2 seed=0`"
        report.error(where, "has no val, without which nothing is measured", remedy)
    elif said := data.in_both():
        report.error(where, said, "take them out of one")
    report.fine(where, f"{len(data.classes)} classes: {named(data.classes)}")
    for role, split in data.splits.items():
        here = f"{where} {role}"
        if isinstance(split, BoxSet):
            for text, count in split.found.items():
                if count:
                    report.warning(here, f"{count} {text}", "")
            kinds = Counter(one["category"] for one in split.objects)
            absent = [name for index, name in enumerate(split.classes) if not kinds[index]]
            if absent:
                report.warning(here, f"{len(absent)} classes have no object: {named(absent)}", "their AP is no number")
            report.fine(here, ", ".join(f"{count} {what}" for what, count in split.counts().items()))
        if data.pairs is not None:
            _check_masks(here, data.pairs[role], card, report)
        images = data.images(role)
        if not hasattr(split, "files"):
            report.pictures(card.folder, images, decode_all=len(images) <= report.sampled)
        report.fine(here, f"{data.count(role)} images")


def _check_masks(here: str, pairs: list[Pair], card: Card, report: Report) -> None:
    section = card.segmentation
    assert section is not None
    chosen = spread(pairs, report.sampled)
    pixels: Counter[int] = Counter()
    faults = []
    for _, (fault, found) in report.each(lambda pair: check_pair(pair, section, picture_size(pair.image)), chosen):
        pixels += found
        faults += [fault] if fault else []
    if faults:
        report.error(here, f"{len(faults)} of {len(chosen)} masks looked at do not fit: {faults[0]}")
    elif not sum(count for value, count in pixels.items() if value != VOID):
        report.error(here, "the masks show no class at all", "correct classes or ignore in the card")
    else:
        report.fine(here, summary(pixels, section))


class _Look(NamedTuple):
    """What one picture is: its fault, or its size, spread of grey values, bits and content's digest."""

    fault: str = ""
    size: tuple[int, int] = (0, 0)
    spread: float = 0.0
    bits: int = 8
    largest: int = 0
    digest: str = ""


def check_images(folder: Path, *, sheet: Path | None = None, progress: bool = True) -> list[Finding]:
    """Pictures without labels, as pretraining would read them; `sheet` gets a contact sheet of some.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: check the path.")
    with Progress("check images", total=None, unit="file", quiet=not progress) as bar:
        report = Report(bar)
        everything = sorted(report.files(folder))
        pictures = [name for name in everything if is_image(name.rpartition("/")[2])]
        others = Counter(Path(name).suffix.lower() or "no ending" for name in everything if name not in set(pictures))
        if others:
            kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
            report.warning(folder, f"{others.total()} files are no pictures and left out: {kinds}", "")
        looks = dict(report.each(lambda name: _look(folder / name), pictures))
    _report_looks(folder, looks, report)
    if sheet is not None and pictures:
        shown = spread([name for name in pictures if not looks[name].fault], SHEET_PICTURES)
        _contact_sheet([folder / name for name in shown], sheet)
        report.fine(sheet, f"a contact sheet of {len(shown)} of them")
    return report.findings


def _look(path: Path) -> _Look:
    try:
        with open_picture(path) as image:
            deep = image.mode.startswith("I")
            values = np.asarray(image if deep else image.convert("L"))
            size = upright(image)
    except TooManyPixels:
        return _Look(f"have more than {MAX_PIXELS:,} pixels (data.max_pixels) and are not read")
    except UnreadableImage:
        return _Look("cannot be read")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _Look("", size, float(values.std()), 16 if deep else 8, int(values.max()), digest)


def _report_looks(folder: Path, looks: dict[str, _Look], report: Report) -> None:
    same: dict[str, list[str]] = defaultdict(list)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, look in looks.items():
        if look.fault:
            groups[look.fault, "replace or remove them"].append(name)
            continue
        same[look.digest].append(name)
        if min(look.size) < TINY:
            groups[f"have a side below {TINY} pixels", "views of them are enlarged"].append(name)
        if look.bits == 8 and look.spread < FLAT:
            groups["are of nearly one colour", "two views of them show nothing to agree on"].append(name)
        if look.bits == 16:
            text = f"have values of 16 bits, up to {look.largest}"
            groups[text, "each is scaled by the bits it uses (8, 10, 12, 14 or 16)"].append(name)
    for (said, remedy), names in groups.items():
        report.warning(folder, f"{len(names)} pictures {said}: {named(names)}", remedy)
    doubled = [names for names in same.values() if len(names) > 1]
    if doubled:
        extra = sum(len(names) - 1 for names in doubled)
        said = f"{extra} pictures are copies of others, byte for byte: {' = '.join(doubled[0][:3])}"
        report.warning(folder, said, "remove them, or they count more than once")
    readable = sum(not look.fault for look in looks.values())
    if readable:
        report.fine(folder, f"{readable} pictures")
    else:
        report.error(folder, "holds no readable picture")


def _contact_sheet(paths: list[Path], sheet: Path) -> None:
    rows = -(-len(paths) // SHEET_COLUMNS)
    page = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIDE, rows * SHEET_SIDE), "white")
    for place, path in enumerate(paths):
        with open_picture(path) as image:
            small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SHEET_SIDE - 4, SHEET_SIDE - 4))
        page.paste(small, (place % SHEET_COLUMNS * SHEET_SIDE + 2, place // SHEET_COLUMNS * SHEET_SIDE + 2))
    with files.atomic_path(sheet) as temporary:
        page.save(temporary, format="PNG")
