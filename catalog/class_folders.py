"""Class folders and the lists of ImageNet's subsets, read as `engines.imagenet.images` reads them for a run.

That module brings torch along, which takes seconds; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twist.catalog.findings import Report, named
from twist.catalog.sample.looks import each, report_hollow, size_of
from twist.contracts.images import image_entries


def images_by_class(
    place: Path, classes: Sequence[str], report: Report, *, counted: bool = True
) -> dict[str, list[str]]:
    """<class>/…/<file> of every image of each class in `place`, sorted; images without content are reported.

    They are `counted` here, unless all are decoded later.
    """

    def images_of(folder: Path) -> dict[str, int | None]:
        return {f"{folder.name}/{name}": size_of(entry) for name, entry in image_entries(folder)}

    found, hollow = {}, {}
    for folder, sizes in each(images_of, [place / name for name in classes], report):
        found[folder.name] = sorted(sizes)
        hollow.update({image: size for image, size in sizes.items() if not size})
        report.count(folder, len(sizes) if counted else 0)
    report_hollow(place, hollow, report)
    return found


def check_same_classes(folder: Path, train: Collection[str], val: Collection[str], report: Report) -> None:
    """An error where the two splits below `folder` do not have the same classes."""
    differing = sorted(set(train) ^ set(val))
    if differing:
        report.error(
            folder,
            f"{len(differing)} classes are in one of train and val only: {named(differing)}",
            count=len(differing),
            remedy="labels are numbered by sorted folder names, so both must have the same: complete the other one",
        )


@dataclass(frozen=True)
class Listed:
    """Lines of a list for which a run refuses it, and how many lines name an image that another one names, too."""

    absent: list[str]
    ambiguous: list[str]
    doubled: int


def find_listed(images: Iterable[str], lines: Sequence[str]) -> Listed:
    """Look for the lines of a list, <file> or <class>/<file>, among the images of a train set, <class>/…/<file>."""
    wanted = set(lines)
    found: dict[str, list[str]] = {}
    for image in images:
        for name in (image, image.rpartition("/")[2]):
            if name in wanted:
                found.setdefault(name, []).append(image)
    chosen = [found[line][0] for line in lines if line in found]
    return Listed(
        absent=[line for line in lines if line not in found],
        ambiguous=[line for line in lines if len(found.get(line, ())) > 1],
        doubled=len(chosen) - len(set(chosen)),
    )
