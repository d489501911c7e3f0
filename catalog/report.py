"""What a check of a data set found, and the looks it is made of: folders, lists, counts, pictures."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from twist.catalog.data_sets import read_names, spread
from twist.contracts.errors import UserError, printable
from twist.contracts.images import MAX_PIXELS, TooManyPixels, UnreadableImage, file_entries, open_picture
from twist.contracts.progress import Progress

Severity = Literal["error", "warning", "fine"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "fine")
# Pictures and masks that are opened in a split, by a check and by the quick one before a run.
SAMPLED, SAMPLED_QUICKLY = 200, 20
# Names that a finding gives, and items that are handed to threads at a time.
NAMED, AHEAD = 5, 4096
# File → bytes; None where there is nothing to read, as behind a link whose target is gone.
Sizes = dict[str, int | None]
TOO_LARGE = f"have more than {MAX_PIXELS:,} pixels, which a run does not decode"
# EXIF's tag of the orientation.
ORIENTATION = 0x0112
Item = TypeVar("Item")
Found = TypeVar("Found")


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
        self._listed: dict[Path, Sizes] = {}
        self._decoded: set[Path] = set()

    def error(self, where: Path | str, message: str, remedy: str = "") -> None:
        self.findings.append(Finding("error", str(where), message, remedy or self.origin))

    def warning(self, where: Path | str, message: str, remedy: str) -> None:
        self.findings.append(Finding("warning", str(where), message, remedy))

    def fine(self, where: Path | str, message: str) -> None:
        self.findings.append(Finding("fine", str(where), message))

    def has_folder(self, folder: Path, remedy: str = "") -> bool:
        if not folder.is_dir():
            self.error(folder, "is missing", remedy)
        return folder.is_dir()

    def files(self, folder: Path, remedy: str = "") -> Sizes:
        """Path below `folder` → bytes of every file at any depth; empty when there is no folder, which is reported.

        A folder is listed, and its files without content are reported, once.
        """
        if folder not in self._listed:
            entries = [*file_entries(folder, lambda _: True)] if self.has_folder(folder, remedy) else []
            # Sizes come over the network, perhaps: many at a time.
            parts = [entries[start : start + AHEAD] for start in range(0, len(entries), AHEAD)]
            sizes = {
                name: size
                for part, found in self.each(self._sizes_of, parts)
                for (name, _), size in zip(part, found, strict=True)
            }
            self._listed[folder] = sizes
            self.bar.advance(len(sizes))
            self._report_hollow(folder, sizes)
        return self._listed[folder]

    def _sizes_of(self, entries: Sequence[tuple[str, os.DirEntry[str]]]) -> list[int | None]:
        return [1 if self.quick else size_of(entry) for _, entry in entries]

    def _report_hollow(self, folder: Path, sizes: Sizes) -> None:
        """Report the files without content: of 0 bytes, and links whose target is not there."""
        for size, message, remedy in (
            (0, "are empty", "the disk was full or the archive torn: unpack it again"),
            (None, "are links to nothing", "what they point to was moved or is not mounted: make the links again"),
        ):
            names = sorted(name for name, found in sizes.items() if found == size)
            if names:
                self.error(folder, f"{len(names)} files {message}: {named(names)}", remedy)

    def expect(self, where: Path, what: str, found: int, expected: int | None) -> None:
        if expected is None or found == expected:
            self.fine(where, f"{found} {what}")
        else:
            reason = "something was not unpacked" if found < expected else "something else lies there too"
            self.error(where, f"{found} {what}, {expected} expected", f"{reason}. {self.origin}")

    def names(self, path: Path, remedy: str = "") -> list[str]:
        """The names in a list of images; empty, and reported, when it is missing or cannot be read."""
        try:
            names = read_names(path)
        except UserError as error:
            self.error(path, str(error) if path.exists() else "is missing", remedy)
            return []
        doubled = len(names) - len(set(names))
        if doubled:
            self.error(path, f"{doubled} names are in it twice")
        return names

    def pictures(
        self,
        folder: Path,
        paths: Sequence[Path],
        fault: Callable[[Path, Image.Image], str | None] = lambda *_: None,
        *,
        decode_all: bool = False,
    ) -> None:
        """Decode some pictures in `folder`, or all, that were not decoded before; `fault` may find more in one."""

        def look(path: Path) -> str | None:
            try:
                with open_picture(path) as image:
                    image.load()
                    return fault(path, image)
            except TooManyPixels:
                return TOO_LARGE
            except UnreadableImage:
                return "cannot be decoded"

        chosen = spread(paths, len(paths) if decode_all else self.sampled)
        chosen = [path for path in chosen if path not in self._decoded]
        self._decoded.update(chosen)
        bad: dict[str, list[str]] = {}
        for path, said in self.each(look, chosen):
            if said:
                bad.setdefault(said, []).append(path.relative_to(folder).as_posix())
        what, remedy = ("pictures", "replace them. ") if decode_all else ("sampled pictures", "unpack them again. ")
        for said, names in bad.items():
            self.error(folder, f"{len(names)} of {len(chosen)} {what} {said}: {named(names)}", remedy + self.origin)

    def each(self, look: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[Item, Found]]:
        """`look` at every item, in order, several at a time: decoding a picture releases Python's lock."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(items), AHEAD):
                part = items[start : start + AHEAD]
                for item, found in zip(part, pool.map(look, part), strict=True):
                    self.bar.advance(0)  # files are counted where they are listed; this shows that the check is alive
                    yield item, found


def size_of(file: Path | os.DirEntry[str]) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def picture_size(path: Path) -> tuple[int, int] | None:
    """(width, height), seen upright as the engines read pictures (by EXIF); None when it cannot be read.

    That is reported with the pictures themselves.
    """
    try:
        with open_picture(path) as image:
            return upright(image)
    except UnreadableImage:
        return None


def upright(image: Image.Image) -> tuple[int, int]:
    """(width, height) once EXIF's orientation is applied: 5 to 8 lie on their side."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION, 1) >= 5 else (width, height)


def named(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


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
