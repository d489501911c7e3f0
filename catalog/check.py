"""`twist data check`: everything that is missing or wrong in data, at once, with the remedy. It changes nothing.

Lists, counts and file names are looked at completely, pictures and masks by a sample spread evenly over each split. A
run asks the same walk in short (`require_data`), and which data it is (`identify_data`).
"""

import contextlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps

from twist.catalog.boxes import OUTSIDE, BoxSet, coco_boxes, voc_boxes
from twist.catalog.card import Card, MaskValues, Section
from twist.catalog.card_data import CardData, open_card, pretraining_images
from twist.catalog.class_folders import (
    class_names,
    find_subset,
    labelled,
    open_tree,
    read_subset,
    refuse_other_classes,
    split_files,
)
from twist.catalog.data_sets import (
    DATA_SETS,
    ORIGINS,
    SAMPLE_JSON,
    VOID,
    DataSet,
    Files,
    Split,
    Truth,
    find_data_set,
    named,
    read_names,
    read_sample,
    spread,
)
from twist.catalog.masks import Pair, check_pair, mask_values, summary, voc_palette
from twist.contracts.errors import UsageError, UserError, did_you_mean, printable
from twist.contracts.files import atomic_path, sha256_file, sha256_json
from twist.contracts.images import (
    EXTENSIONS,
    UnreadableImage,
    file_entries,
    image_names,
    is_image,
    open_picture,
    upright,
)
from twist.contracts.progress import Progress
from twist.contracts.record import RunRecord, Task

Severity = Literal["error", "warning", "fine"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "fine")
# Pictures and masks that are opened in a split, by a check and by the quick one before a run.
SAMPLED, SAMPLED_QUICKLY = 200, 20
THREADS = 16
# The shortest side of a picture of which views can be cut, and the spread of grey values of one that shows something.
TINY, FLAT = 32, 4.0
SHEET_COLUMNS, SHEET_SIDE, SHEET_PICTURES = 8, 96, 40
# The annotations that each task reads.
TRUTH: dict[Task, tuple[Truth, ...]] = {
    "detection": ("boxes", "polygons", "instances"),
    "instance-segmentation": ("boxes", "polygons", "instances"),
    "segmentation": ("masks",),
    "classification": (),
    "clustering": (),
}
# Files of a folder whose sizes are looked at, and classes of a tree of class folders that are listed.
SIZED, LISTED = 16, 16
Item = TypeVar("Item")
Found = TypeVar("Found")
Paths = dict[str, Path]  # name of an image → its file of one kind


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and how to correct it."""

    severity: Severity
    where: str
    message: str
    remedy: str = ""


class Report:
    """Collects findings; `origin`, where the data come from, is the remedy of errors that name no other.

    A `quick` report opens few files and none that are large, and takes no file's size.
    """

    def __init__(self, bar: Progress, *, quick: bool = False) -> None:
        self.bar, self.quick, self.origin = bar, quick, ""
        self.sampled = SAMPLED_QUICKLY if quick else SAMPLED
        self.findings: list[Finding] = []
        self._listed: dict[Path, dict[str, int]] = {}
        self._decoded: set[Path] = set()

    def error(self, where: Path | str, message: str, remedy: str = "") -> None:
        self.findings.append(Finding("error", str(where), message, remedy or self.origin))

    def warning(self, where: Path | str, message: str, remedy: str = "") -> None:
        self.findings.append(Finding("warning", str(where), message, remedy))

    def fine(self, where: Path | str, message: str) -> None:
        self.findings.append(Finding("fine", str(where), message))

    @contextlib.contextmanager
    def refusals(self, where: Path | str, remedy: str = "") -> Iterator[None]:
        """What is refused inside is an error."""
        try:
            yield
        except UserError as error:
            self.error(where, str(error), remedy)

    def has_folder(self, folder: Path, remedy: str = "") -> bool:
        if not folder.is_dir():
            self.error(folder, "is missing", remedy)
        return folder.is_dir()

    def files(self, folder: Path, remedy: str = "") -> dict[str, int]:
        """Path below `folder` → bytes of every file at any depth, 0 behind a link to nothing.

        A folder is listed, and its files without content are reported, once.
        """
        if folder not in self._listed:
            entries = [*file_entries(folder, lambda _: True)] if self.has_folder(folder, remedy) else []
            listed = self._listed[folder] = {name: size for (name, _), size in self.each(self._size, entries)}
            self.bar.advance(len(listed))
            if empty := sorted(name for name, size in listed.items() if size == 0):
                again = (
                    "the disk was full, the archive torn, or what they point to was moved: unpack or link them again"
                )
                self.error(folder, f"{len(empty)} files are empty or links to nothing: {named(empty)}", again)
        return self._listed[folder]

    def _size(self, item: tuple[str, os.DirEntry[str]]) -> int:
        return 1 if self.quick else item[1].stat().st_size if os.path.exists(item[1]) else 0

    def expect(self, where: Path, what: str, found: int, expected: int | None, remedy: str = "") -> None:
        if expected is None or found == expected:
            self.fine(where, f"{found} {what}")
        else:
            reason = "something was not unpacked" if found < expected else "something else lies there too"
            self.error(where, f"{found} {what}, {expected} expected", remedy or f"{reason}. {self.origin}")

    def names(self, path: Path, remedy: str = "") -> list[str]:
        """The names in a list of images; empty, and reported, when it is missing or cannot be read."""
        try:
            names = read_names(path)
        except UserError as error:
            self.error(path, str(error) if path.exists() else "is missing", remedy)
            return []
        if doubled := len(names) - len(set(names)):
            self.error(path, f"{doubled} names are in it twice")
        return names

    def pictures(
        self,
        folder: Path,
        paths: Sequence[Path],
        fault: Callable[[Path, Image.Image], str] = lambda *_: "",
        *,
        decode_all: bool = False,
    ) -> None:
        """Decode some pictures in `folder`, or all, that were not decoded before; `fault` may find more in one."""

        def look(path: Path) -> str:
            try:
                with open_picture(path) as image:
                    image.load()
                    return fault(path, image)
            except UnreadableImage as error:
                return str(error)

        chosen = spread(paths, len(paths) if decode_all else self.sampled)
        chosen = [path for path in chosen if path not in self._decoded]
        self._decoded.update(chosen)
        if bad := {path.relative_to(folder).as_posix(): said for path, said in self.each(look, chosen) if said}:
            names, first = named([*bad]), next(iter(bad.values()))
            said = f"{len(bad)} of {len(chosen)} pictures looked at are damaged or do not fit: {names} ({first})"
            self.error(folder, said, f"replace them, or unpack them again. {self.origin}")

    def masks(
        self, where: str, pairs: Sequence[Pair], values: MaskValues, *, palette: list[int] | None = None,
        remedy: str = "",
    ) -> None:  # fmt: skip
        """Look at some masks: form, values, size, and the palette where it tells."""
        chosen = spread(pairs, self.sampled)
        pixels: Counter[int] = Counter()
        faults = []
        for _, (fault, found) in self.each(lambda pair: check_pair(pair, values, palette), chosen):
            pixels += found
            faults += [fault] if fault else []
        if faults:
            self.error(where, f"{len(faults)} of {len(chosen)} masks looked at do not fit: {faults[0]}", remedy)
        elif chosen and not any(count for value, count in pixels.items() if value != VOID):
            again = "take the originals, or correct classes or ignore"
            self.error(where, "the masks show no class at all", remedy or again)
        elif chosen:
            self.fine(where, f"{summary(pixels, values)} in {len(chosen)} masks")

    def boxes(self, where: str, boxes: BoxSet, *, published: bool = False) -> None:
        """What is unusual in annotations; the `published` ones have some of everything."""
        objects = sum(1 for _ in boxes.objects)
        for text, count in boxes.found.items():
            if text == OUTSIDE and count * 100 > objects:  # a single one harms nobody; another convention hits many
                remedy = "x, y, width, height of many mean corners, or the other way around: export them again"
                self.error(where, f"{count} of {objects} {text}", remedy)
            elif count and published:
                self.fine(where, f"{count} {text}")
            elif count:
                self.warning(where, f"{count} {text}")
        self.fine(where, f"{objects} objects, {sum('segmentation' in one for one in boxes.objects)} with a mask")

    def each(self, look: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[Item, Found]]:
        """`look` at every item, in order, many at a time: files may be far away, and decoding releases the lock."""
        with ThreadPool(THREADS) as pool:
            for item, found in zip(items, pool.imap(look, items, chunksize=16), strict=True):
                self.bar.advance(0)  # files are counted where they are listed; this shows that the check is alive
                yield item, found


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def render(findings: Sequence[Finding]) -> str:
    """Findings as text: each with its remedy, and a line that counts them."""
    marks = {"error": "error  ", "warning": "warning", "fine": "ok     "}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.severity]}  {finding.where}: {finding.message}")
        lines += [f"         → {finding.remedy}"] if finding.remedy else []
    counts = Counter(finding.severity for finding in findings)
    summary = [f"{counts[kind]} {kind}{'' if counts[kind] == 1 else 's'}" for kind in ("error", "warning")]
    problems = counts["error"] + counts["warning"]
    return printable("\n".join([*lines, f"{', '.join(summary)}." if problems else "Everything is as it should be."]))


# ── Data sets of the table ────────────────────────────────────────────────────────────────────────────────────────────


def check(group: str, root: str | os.PathLike[str], *, progress: bool = True) -> list[Finding]:
    """Look at the data sets of `group` (of the table, or "sample") below `root` and report everything.

    `UsageError`: no such data set. `UserError`: there is no folder `root`, or a damaged sample.json.
    """
    of_sample = [row for row in DATA_SETS.values() if any(split.sample for split in row.splits.values())]
    rows = of_sample if group == "sample" else [row for row in DATA_SETS.values() if row.group == group]
    root = Path(root)
    if not rows:
        raise UsageError(
            f'There is no data set "{group}" to check.{did_you_mean(group, {row.group for row in DATA_SETS.values()})}'
        )
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: check the path. {ORIGINS.get(group, '')}".rstrip())
    # A sample is checked against itself, also when its imagenet/ is named and not its root.
    home = next((place for place in (root, root.parent) if (place / SAMPLE_JSON).exists()), root)
    sample = read_sample(home)
    if group == "sample" and sample is None:
        raise UserError(f"There is no sample at {root}: make one with `twist data sample {root}`.")
    with Progress(f"check {group}", total=None, unit="file", quiet=not progress) as bar:
        report = Report(bar)
        for row in rows:
            look_at(row, root, sample, report)
    return sorted(report.findings, key=lambda finding: SEVERITIES.index(finding.severity))


def look_at(
    row: DataSet, root: Path, sample: dict[str, Any] | None, report: Report, truth: Collection[Truth] | None = None
) -> None:
    """Add to `report` what is missing or wrong in a data set below `root`; `truth`: what matters, or all."""
    place, report.origin = row.place(root), row.origin()
    if not report.has_folder(place):
        return
    if row.class_folders:
        _look_at_classes(row, place, sample, report)
        return
    splits = row.run_splits() if report.quick else row.splits
    looks = [_Look(row, name, split, place, sample, report, truth) for name, split in splits.items()]
    for train, val in itertools.product(looks, looks):
        if (train.split.role, val.split.role) != ("train", "val"):
            continue
        if train.boxes and val.boxes and train.boxes.classes != val.boxes.classes:
            report.error(
                place / val.split.names, "its categories are not those of training: take both from one archive"
            )
        shared = sorted(set(train.names) & set(val.names)) if train.split.images == val.split.images else []
        if shared:
            said = f"{len(shared)} images of {val.name} are in it, {shared[0]} the first: numbers with it are too high"
            report.error(place / train.split.names, said, train.remake("remove the list, and `{}` makes it again"))


class _Look:
    """One split, looked at: `names` of its images, and its `boxes` where they were read."""

    def __init__(
        self, row: DataSet, name: str, split: Split, place: Path, sample: dict[str, Any] | None, report: Report,
        truth: Collection[Truth] | None,
    ) -> None:  # fmt: skip
        self.row, self.name, self.split, self.place, self.sample, self.report = row, name, split, place, sample, report
        self.boxes: BoxSet | None = None
        report.origin = row.origin(split)
        self.names = self._read_names()
        images = self._present("images", split.images)
        found = {kind: self._present(kind, one) for kind, one in split.truth.items() if truth is None or kind in truth}
        if "masks" in found:
            self._look_at_masks(found["masks"], images)
        if report.quick:
            return
        if "boxes" in found:
            classes = row.label_names(sample)
            pairs = [(images[one], path) for one, path in found["boxes"].items() if one in images]
            with report.refusals("boxes"):
                self.boxes = voc_boxes(pairs, classes if isinstance(classes, tuple) else ())
        if self.boxes:
            report.boxes(f"{place / split.images.folder} ({name})", self.boxes, published=True)
        known = self.boxes.images if self.boxes else []
        sizes = {image["file"]: (image["width"], image["height"]) for image in known}

        def fault(path: Path, image: Image.Image) -> str:
            fits = sizes.get(path, size := upright(image)) == size
            return "" if fits else "seen upright (EXIF), of another size than its annotation says"

        report.pictures(place / split.images.folder, [*images.values()], fault)
        if "instances" in found:
            report.pictures(place / split.truth["instances"].folder, [*found["instances"].values()])

    def remake(self, text: str) -> str:
        """`text` with the command that makes the split's masks and list, "" where they are part of the download."""
        return f"{text.format(self.split.masks_made_by)}. {self.report.origin}" if self.split.masks_made_by else ""

    def _read_names(self) -> list[str]:
        split, report, images = self.split, self.report, self.place / self.split.images.folder
        where = self.place / split.names if split.names else images
        if where.suffix == ".json":
            if not where.is_file():
                report.error(where, "is missing")
                return []
            if report.quick:  # the engine reads the file anyway, which may take a minute
                return []
            with report.refusals(where):
                self.boxes = coco_boxes(where, images, remedy="take instances_*.json from its archive again")
            if self.boxes is None:
                return []
            remedy = f"classes of your own go with a data card: `twist data card {self.place}` writes one"
            report.expect(where, "categories", len(self.boxes.classes), self.row.label_count(self.sample), remedy)
            names = [os.path.relpath(image["file"], images) for image in self.boxes.images]
        elif split.names:
            names = report.names(where, self.remake("`{}` makes it"))
        else:
            suffix = split.images.suffix
            names = sorted(name.removesuffix(suffix) for name in report.files(images) if name.endswith(suffix))
        if names or where.exists():
            # Before a run: any number of images but none.
            expected = max(len(names), 1) if report.quick else split.images_expected(self.sample)
            report.expect(where, f"{self.name} images", len(names), expected)
        return names

    def _present(self, kind: str, files: Files) -> Paths:
        """Name → file of a kind; those that are missing are reported, those without content left out."""
        folder = self.place / files.folder
        remedy = self.remake("`{}` makes them") if kind == "masks" else ""
        sizes = self.report.files(folder, remedy)
        missing = [name for name in self.names if name + files.suffix not in sizes]
        if missing and folder.is_dir():
            count = f"lacks {len(missing)} of the {len(self.names)} *{files.suffix} of {self.name}"
            self.report.error(folder, f"{count}, {missing[0]} the first", remedy)
        return {name: folder / (name + files.suffix) for name in self.names if sizes.get(name + files.suffix)}

    def _look_at_masks(self, masks: Paths, images: Paths) -> None:
        row, folder = self.row, self.split.truth["masks"].folder
        pairs = [Pair(images[name], path) for name, path in masks.items() if name in images]
        palette = voc_palette() if row.voc_palette and not self.report.quick else None
        values = mask_values(row, self.sample)
        remedy = self.remake(f"remove {folder}/…, and `{{}}` makes it again")
        remedy = remedy or f"unpack {folder} again, and do not open and save masks with a picture program"
        self.report.masks(f"{self.place / folder} ({self.name})", pairs, values, palette=palette, remedy=remedy)


def _look_at_classes(row: DataSet, place: Path, sample: dict[str, Any] | None, report: Report) -> None:
    """What a run refuses is an error; what it leaves out is one in ImageNet, a warning among a user's own images."""
    try:
        if any(file.is_file() for name in row.splits for file in split_files(place, name)):  # tables
            for images in open_tree(place):
                report.fine(images.folder, f"{len(images)} images of {len(images.classes)} classes in tables")
            return
        found = {
            name: _look_at_split(row, name, place / split.images.folder, split, sample, report)
            for name, split in row.splits.items()
            if report.has_folder(place / split.images.folder)
        }
        if len(found) == len(row.splits):
            refuse_other_classes(place, found["train"], found["val"])
    except UserError as error:
        report.error(place, str(error))
        return
    train = labelled(place / "train", found.get("train", {}))
    for name, count in row.subsets.items() if len(train) else ():
        path = find_subset(place, name)
        if path is None:
            remedy = "`twist data prepare imagenet ROOT lists=FOLDER` takes it from SimCLR's published lists"
            report.warning(place / name, "is missing: semi-supervised runs need it", remedy)
            continue
        with report.refusals(path, "write one <file> or <class>/<file> a line, and complete train"):
            report.expect(path, "lines", len(read_subset(train, path)), None if sample else count)


def _look_at_split(
    row: DataSet, name: str, folder: Path, split: Split, sample: dict[str, Any] | None, report: Report
) -> dict[str, list[str]]:
    """Look at one split; gives <class>/…/<file> of the images of each class."""
    sizes = report.files(folder)
    found: dict[str, list[str]] = {label: [] for label in class_names(folder)}
    for path in sorted(path for path in sizes if "/" in path and is_image(path.rpartition("/")[2])):
        found[path.partition("/")[0]].append(path)
    images = [image for label in found.values() for image in label]
    if left_out := sorted(sizes.keys() - set(images)):
        said = f"{len(left_out)} files are no images in a class folder, and left out: {named(left_out)}"
        remedy = f"a run reads {', '.join(sorted(EXTENSIONS))}: unpack archives, move, convert or remove the others"
        (report.warning if row.decode_all else report.error)(folder, said, remedy)
    report.expect(folder, f"{name} classes", len(found), row.label_count(sample) or max(len(found), 1))
    report.expect(folder, f"{name} images", len(images), split.images_expected(sample))
    if empty := [label for label, inside in found.items() if not inside]:
        said = f"{len(empty)} class folders hold no images: {named(empty)}"
        report.error(folder, said, "remove them in both splits, or fill them")
    report.pictures(folder, [folder / image for image in images if sizes[image]], decode_all=row.decode_all)
    return found


# ── Data cards ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_card(card: Card, *, progress: bool = True) -> list[Finding]:
    """Look at every section of a card; errors are what a run would stop at."""
    with Progress(f"check {card.name}", total=None, unit="file", quiet=not progress) as bar:
        report = Report(bar)
        for section in card.sections():
            with report.refusals(f"[{section}]"):
                _look_at_section(card, section, open_card(card, section), report)
        if card.pretraining is not None and report.has_folder(folder := card.place(card.pretraining.images)):
            held_out = set() if has_errors(report.findings) else pretraining_images(card)[1]
            found = sum((folder / name).resolve() not in held_out for name in image_names(folder))
            report.expect(folder, "pictures for pretraining", found, found or 1)
    return report.findings


def _look_at_section(card: Card, section: Section, data: CardData, report: Report) -> None:
    where = f"[{section}]"
    if "val" not in data.splits:
        remedy = f"name one, or `twist data prepare {card.path} split=0.2 seed=0`"
        report.error(where, "has no val, without which nothing is measured", remedy)
    elif said := data.in_both():
        report.error(where, said, "take them out of one")
    report.fine(where, f"{len(data.classes)} classes: {named(data.classes)}")
    for role, split in data.splits.items():
        here, images = f"{where} {role}", data.images(role)
        if isinstance(split, BoxSet):
            kinds = Counter(one["category"] for one in split.objects)
            absent = [name for index, name in enumerate(split.classes) if not kinds[index]]
            if absent:
                report.warning(here, f"{len(absent)} classes have no object: {named(absent)}", "their AP is no number")
            report.boxes(here, split)
        if data.pairs is not None and card.segmentation is not None:
            report.masks(here, data.pairs[role], card.segmentation)
        if not hasattr(split, "tables"):
            report.pictures(card.folder, images, decode_all=len(images) <= report.sampled)
        report.fine(here, f"{data.count(role)} images")


# ── Pictures without labels ───────────────────────────────────────────────────────────────────────────────────────────


def check_images(folder: Path, *, sheet: Path | None = None, progress: bool = True) -> list[Finding]:
    """Pictures without labels, as pretraining would read them; `sheet` gets a contact sheet of some.

    `UserError`: there is no such folder.
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
            report.warning(folder, f"{others.total()} files are no pictures and left out: {kinds}")
        looks = dict(report.each(lambda name: _look(folder / name), pictures))
    _report_pictures(folder, looks, report)
    if sheet is not None and pictures:
        shown = spread([name for name in pictures if looks[name][0]], SHEET_PICTURES)
        _contact_sheet([folder / name for name in shown], sheet)
        report.fine(sheet, f"a contact sheet of {len(shown)} of them")
    return report.findings


def _look(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """The digest of a picture, "" where it cannot be read, and what is unusual in it, each with a remedy."""
    try:
        with open_picture(path) as image:
            deep = image.mode.startswith("I")
            values = np.asarray(image if deep else image.convert("L"))
    except UnreadableImage:
        return "", [("cannot be read, or are too large (data.max_pixels)", "replace or remove them")]
    said = []
    if min(values.shape) < TINY:
        said.append((f"have a side below {TINY} pixels", "views of them are enlarged"))
    if deep:
        remedy = "each is scaled by the bits it uses (8, 10, 12, 14 or 16)"
        said.append((f"have values of 16 bits, up to {values.max()}", remedy))
    elif values.std() < FLAT:
        said.append(("are of nearly one colour", "two views of them show nothing to agree on"))
    return sha256_file(path), said


def _report_pictures(folder: Path, looks: dict[str, tuple[str, list[tuple[str, str]]]], report: Report) -> None:
    same: dict[str, list[str]] = defaultdict(list)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, (digest, unusual) in looks.items():
        same[digest].append(name)
        for said in unusual:
            groups[said].append(name)
    for (text, remedy), names in groups.items():
        report.warning(folder, f"{len(names)} pictures {text}: {named(names)}", remedy)
    unreadable = same.pop("", [])
    if doubled := [names for names in same.values() if len(names) > 1]:
        extra = sum(len(names) - 1 for names in doubled)
        text = f"{extra} pictures are copies of others, byte for byte: {' = '.join(doubled[0][:3])}"
        report.warning(folder, text, "remove them, or they count more than once")
    readable = len(looks) - len(unreadable)
    report.expect(folder, "readable pictures", readable, readable or 1)


def _contact_sheet(paths: list[Path], sheet: Path) -> None:
    rows = -(-len(paths) // SHEET_COLUMNS)
    page = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIDE, rows * SHEET_SIDE), "white")
    for place, path in enumerate(paths):
        with open_picture(path) as image:
            small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SHEET_SIDE - 4, SHEET_SIDE - 4))
        page.paste(small, (place % SHEET_COLUMNS * SHEET_SIDE + 2, place // SHEET_COLUMNS * SHEET_SIDE + 2))
    with atomic_path(sheet) as temporary:
        page.save(temporary, format="PNG")


# ── Before a run ──────────────────────────────────────────────────────────────────────────────────────────────────────
#
# Is it whole, and which data is it: seconds for the largest sets. The identity has neither places nor times in it; a
# change of a few images keeps it.


def require_data(
    names: Sequence[str], root: Path, *, task: Task, scale: Literal["full", "sample"]
) -> dict[str, Any] | None:
    """The sample.json of `root` (None when it is no sample), once what a run of `task` reads there is whole.

    `UserError`: something of the data sets `names` is missing or not what it should be.
    """
    rows = [find_data_set(name) for name in names]
    sample = read_sample(root)
    if all(row.class_folders for row in rows):
        return sample  # any folder of classes will do, and the engine reads all of it at once
    if scale == "sample" and sample is None:
        raise UserError(
            f"{root} holds no sample.json, and this protocol runs on the sample: `twist data sample {root}` makes it."
        )
    if scale == "full" and sample is not None:
        raise UserError(f"{root} is a sample, and this protocol needs the real data: use a sample-… protocol for it.")
    report = Report(Progress("", total=None, quiet=True), quick=True)
    for row in rows:
        look_at(row, root, sample, report, TRUTH[task])
    if errors := [finding for finding in report.findings if finding.severity == "error"]:
        missing = [str(Path(one.where).relative_to(root)) for one in errors if one.message == "is missing"]
        first = f"{errors[0].where}: {errors[0].message}: {errors[0].remedy}".rstrip(".")
        raise UserError(
            f"{f'{root} lacks ' + ', '.join(missing) if missing else first}; `twist data check {rows[0].group} {root}` "
            "says all that is missing or wrong and where it comes from."
        )
    return sample


def identify_data(names: Sequence[str], root: Path, *, subset: str | None = None) -> str | None:
    """Which data a run on the data sets `names` would read below `root`; `subset`: its list of labelled images.

    None where a part is missing or unreadable, which a run refuses. `UserError`: a damaged sample.json.
    """
    rows = [find_data_set(name) for name in names]
    sample = read_sample(root)
    if sample is not None:
        return _name_sample(sample)
    try:
        facts = [list(_facts(row, row.place(root), subset)) for row in rows]
    except (OSError, UserError):
        return None
    return f"{' + '.join(names)} {sha256_json(facts)[:12]}"


def data_of(record: RunRecord) -> str | None:
    """What `record` was measured on, None where it does not say: earlier versions kept this of samples alone."""
    sample = record.recipe.get("sample")
    return record.data or (_name_sample(sample) if sample else None)


def _name_sample(settings: Mapping[str, Any]) -> str:
    source, size, seed, version = (settings.get(key) for key in ("source", "size", "seed", "format_version"))
    return f"sample of {source}, {size}, seed {seed}, format {version}"


def _facts(row: DataSet, place: Path, subset: str | None) -> Iterator[Any]:
    """What tells data apart. Records hold digests of it: for the existing rows it may not change."""
    splits = [*row.run_splits().values()]
    if row.class_folders:
        for name in row.run_splits():
            found = split_files(place, name)
            if not found:
                raise FileNotFoundError(place / name)
            yield from (_class_facts(found[0]) if found[0].is_dir() else ([x.name, x.stat().st_size] for x in found))
        if subset is not None:
            path = find_subset(place, subset)
            yield None if path is None else sha256_file(path)
        return
    described = [split for split in splits if split.names.endswith(".json")]
    for split in described:
        yield (place / split.names).stat().st_size
    # Where the annotation files name all images, the smaller split stands for both.
    for split in described[-1:] or splits:
        names = split.image_names(place)
        for files in (split.images, split.truth.get("boxes")):
            if files is not None:
                yield _names_and_sizes(place, files, names)


def _class_facts(folder: Path) -> Iterator[Any]:
    classes = list(class_names(folder))
    yield classes
    for label in spread(classes, LISTED):
        files = sorted(name for name in os.listdir(folder / label) if not name.startswith("."))
        yield _names_and_sizes(folder, Files(label, ""), files)


def _names_and_sizes(place: Path, files: Files, names: Sequence[str]) -> list[Any]:
    """Digest of the file names, and the sizes of some files."""
    if not names:
        raise FileNotFoundError(place / files.folder)
    sizes = [files.of(name, place).stat().st_size for name in spread(names, SIZED)]
    return [sha256_json([f"{name}{files.suffix}" for name in names]), sizes]
