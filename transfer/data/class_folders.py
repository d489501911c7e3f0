"""ImageNet's class folders and the lists of its subsets, read as `transfer.imagenet.dataset` reads them for a run.

That module brings torch along, which takes seconds; the tests compare the two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transfer.data.looks import size_of

# As contracts.images.EXTENSIONS.
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS


def images_below(folder: Path, *, hollow: dict[str, int | None] | None = None) -> list[str]:
    """Every image of a class at any depth, sorted, as <class>/…/<file>.

    Args:
        hollow: takes the images without content, with their size as `looks.size_of` gives it; None asks for no sizes.
    """
    found: list[str] = []
    open_folders = [(os.fspath(folder), folder.name)]
    while open_folders:
        place, prefix = open_folders.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                name = f"{prefix}/{entry.name}"
                if entry.is_dir():
                    if not entry.is_symlink():  # as os.walk: a link could lead in a circle
                        open_folders.append((entry.path, name))
                elif is_picture(entry.name):
                    found.append(name)
                    if hollow is not None and not (size := size_of(entry)):
                        hollow[name] = size
    return sorted(found)


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
