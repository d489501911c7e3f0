"""The single looks of a data check: folders, lists, pairs of files, pictures, label maps. Each adds to a `Report`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twist.catalog.findings import Report, named
from twist.catalog.origins import ORIGINS

Found = TypeVar("Found")

# Pictures and label maps that are opened in a set.
SAMPLED = 200
# Of a label map: pixels of no class.
VOID = 255
# Files that are handed to threads at a time.
AHEAD = 4096


def origin(dataset: str) -> str:
    if dataset == "sample":
        return "Remove the sample and make it again with `twist data sample`."
    if dataset == "folders":
        return "Images of your own lie in ROOT/train/<class>/ and ROOT/val/<class>/, with the same classes in both."
    return ORIGINS[dataset].sentence()


def is_there(folder: Path, dataset: str, report: Report) -> bool:
    if folder.is_dir():
        return True
    report.error(folder, "is missing", remedy=origin(dataset))
    return False


def file_names(folder: Path, endings: tuple[str, ...], dataset: str, report: Report) -> set[str] | None:
    """File names in `folder` that end so; empty files are reported. None when there is no folder."""
    if not is_there(folder, dataset, report):
        return None
    sizes: dict[str, int | None] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(endings):
                sizes[entry.name] = size_of(entry)
    report.count(folder, len(sizes))
    report_hollow(folder, sizes, report)
    return set(sizes)


def size_of(file: Path | os.DirEntry[str]) -> int | None:
    """Bytes of a file; None where there is nothing to read, as behind a link whose target is gone."""
    try:
        return file.stat().st_size
    except OSError:
        return None


def report_hollow(folder: Path, sizes: Mapping[str, int | None], report: Report) -> None:
    """Report the files without content: of 0 bytes, and links whose target is not there."""
    empty = [name for name, size in sizes.items() if size == 0]
    gone = [name for name, size in sizes.items() if size is None]
    if empty:
        report.error(
            folder,
            f"{len(empty)} files are empty: {named(sorted(empty))}",
            count=len(empty),
            remedy="the disk was full or the archive torn: unpack it again",
        )
    if gone:
        report.error(
            folder,
            f"{len(gone)} files are links to nothing: {named(sorted(gone))}",
            count=len(gone),
            remedy="what they point to was moved or is not mounted: bring it back, or make the links again",
        )


def expect(where: Path, what: str, found: int, expected: int | None, dataset: str, report: Report) -> None:
    if expected is None or found == expected:
        report.fine(where, f"{found} {what}", count=found)
        return
    report.error(
        where,
        f"{found} {what}, {expected} expected",
        count=abs(expected - found),
        remedy=("something was not unpacked. " if found < expected else "something else lies there too. ")
        + origin(dataset),
    )


def read_list(
    path: Path, expected: int | None, dataset: str, report: Report, *, whole_lines: bool = False
) -> list[str]:
    """Names of an image set, the first word of each line or all of it; reports what is missing, doubled or too many."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        names = lines if whole_lines else [line.split()[0] for line in lines]
    except FileNotFoundError:
        report.error(path, "is missing", remedy=origin(dataset))
        return []
    except (OSError, UnicodeDecodeError) as error:
        report.error(path, f"cannot be read ({error})", remedy=origin(dataset))
        return []
    doubled = len(names) - len(set(names))
    if doubled:
        report.error(path, f"{doubled} names are in it twice", count=doubled, remedy=origin(dataset))
    expect(path, "names", len(names), expected, dataset, report)
    return names


def expect_files(folder: Path, present: set[str], names: list[str], ending: str, dataset: str, report: Report) -> None:
    missing = [name for name in names if f"{name}{ending}" not in present]
    if missing:
        remedy = "`twist data prepare voc ROOT sbd=FOLDER` makes them" if dataset == "sbd" else origin(dataset)
        report.error(
            folder,
            f"{len(missing)} of {len(names)} listed files are not there, {missing[0]}{ending} the first",
            count=len(missing),
            remedy=remedy,
        )


def check_pictures(
    folder: Path,
    paths: Sequence[Path],
    complaint: Callable[[Path, Image.Image], str | None] | None,
    dataset: str,
    report: Report,
    sampled: int | None = SAMPLED,
) -> None:
    """Decode a sample of pictures whole, or all where `sampled` is None; `complaint` may add what is wrong with one.

    Whoever calls it has looked at all their sizes before: files without content are not reported again. All are counted
    as they are decoded, which takes longer than to list them.
    """

    def look(path: Path) -> str | None:
        if not size_of(path):
            return None  # said by `report_hollow`
        try:
            with Image.open(path) as image:
                image.load()
                return complaint(path, image) if complaint else None
        except (OSError, SyntaxError):
            return "cannot be decoded"

    bad: dict[str, list[str]] = {}
    chosen = spread(paths, len(paths) if sampled is None else sampled)
    for path, said in each(look, chosen, report, counted=sampled is not None):
        if said:
            inside = path.relative_to(folder) if path.is_relative_to(folder) else path
            bad.setdefault(said, []).append(inside.as_posix())
    what = "pictures" if sampled is None else "sampled pictures"
    again = "delete or replace them" if dataset == "folders" else f"unpack them again. {origin(dataset)}"
    for said, names in bad.items():
        report.error(
            folder, f"{len(names)} of {len(chosen)} {what} {said}: {named(names)}", count=len(names), remedy=again
        )


def check_maps(
    paths: Sequence[Path],
    *,
    allowed: set[int],
    picture_of: Callable[[Path], Path],
    remedy: str,
    where: str,
    report: Report,
    empty: set[int],
    palette: Sequence[int] | None = None,
) -> NDArray[np.int64] | None:
    """Look at mode, values and size of a sample of label maps; the histogram of their values, None if all are unfit.

    `palette` (r, g, b of every number) is the one that the originals have: a picture program that saves a map numbers
    its colours anew, and every number it then holds is still a label. `empty` are the numbers that mark no object.
    """

    def look(path: Path) -> tuple[str, list[int], bool, Sequence[int]] | None:
        """Mode, pixels of each value, whether the size is the picture's, palette; None when it cannot be read."""
        try:
            with Image.open(path) as image:
                seen = image.mode, image.histogram(), image.size, image.getpalette() or ()
            with Image.open(picture_of(path)) as picture:
                return seen[0], seen[1], seen[2] == picture.size, seen[3]
        except (OSError, SyntaxError):
            return None

    histogram = np.zeros(256, dtype=np.int64)
    coloured, resized, unreadable, strange, renumbered, blank = [], [], [], [], [], []
    # Files without content are reported where all sizes are looked at; a picture that is not there at all is not.
    chosen = [path for path in spread(paths, SAMPLED) if size_of(path) and not _is_hollow(picture_of(path))]
    for path, seen in each(look, chosen, report):
        if seen is None:
            unreadable.append(path.name)
            continue
        mode, counts, fits, colours = seen
        if mode not in ("P", "L"):
            coloured.append(path.name)
            continue
        if not fits:
            resized.append(path.name)
        histogram += counts
        present = np.flatnonzero(counts).tolist()
        if set(present) - allowed:
            strange.append(path.name)
        elif not set(present) - empty:
            blank.append(path.name)
        elif (
            mode == "P"
            and palette is not None
            and any(colours[3 * v :][:3] != [*palette[3 * v :][:3]] for v in present)
        ):
            renumbered.append(path.name)
    # One picture without an object may be; a conversion that lost them hits many.
    blank = blank if len(blank) * 10 > len(chosen) else []
    wrong = sorted(set(np.flatnonzero(histogram).tolist()) - allowed)
    total = len(chosen)
    for names, message, mend in (
        (unreadable, "cannot be read, or have no picture", "unpack them again"),
        (coloured, "are colour pictures and no maps of numbers: their palette was turned to RGB", remedy),
        (resized, "are of another size than their picture", "take the original maps again"),
        (renumbered, "have colours that are not those of their numbers: a picture program numbered them anew", remedy),
        (blank, "mark no object, all is background or void", "take them from the originals again, or make them again"),
        (strange, f"hold numbers that are no label ({', '.join(map(str, wrong[:8]))})", remedy),
    ):
        if names:
            report.error(
                where,
                f"{len(names)} of {total} sampled maps {message}, {names[0]} the first",
                count=len(names),
                remedy=mend,
            )
    if chosen and not (unreadable or coloured or resized or strange or renumbered or blank):
        labels = ", ".join(map(str, np.flatnonzero(histogram).tolist()))
        report.fine(where, f"labels {labels} in {total} sampled maps", count=total)
    return histogram if len(coloured) + len(unreadable) < total else None


def _is_hollow(path: Path) -> bool:
    return size_of(path) == 0 or (path.is_symlink() and not path.exists())


def each(
    look: Callable[[Path], Found], paths: Sequence[Path], report: Report, *, counted: bool = True
) -> Iterator[tuple[Path, Found]]:
    """`look` at every path, in order, several at a time: decoding a picture leaves Python's lock to others.

    Most files are `counted` where they are listed; progress then gets a sign of life alone.
    """
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), AHEAD):
            part = paths[start : start + AHEAD]
            for path, found in zip(part, pool.map(look, part), strict=True):
                report.bar.advance(0 if counted else 1)
                yield path, found


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly over their order."""
    if len(items) <= count:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int)]
