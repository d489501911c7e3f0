"""The lists of ImageNet's subsets, read as `transfer.imagenet.dataset` reads them for a run.

That module brings torch along, which takes seconds; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
