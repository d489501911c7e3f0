"""What must be right in the boxes of Pascal VOC, `Annotations/*.xml`: every file is read."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from twist.catalog.findings import Report
from twist.catalog.sample.looks import origin

# Of the lists in ImageSets/Main, those that models are trained on or measured with; train and val are parts of them.
PARTS = ("trainval", "test")


def check_voc_boxes(
    where: Path, names: list[str], lists: dict[str, list[str]], classes: set[str], report: Report
) -> dict[str, tuple[int, int] | None]:
    """Read the annotation of every name and report what is wrong; gives (width, height) of the pictures by name."""
    unreadable: list[str] = []
    unknown: Counter[str] = Counter()
    sizes: dict[str, tuple[int, int] | None] = {}
    objects: dict[str, int] = {}
    difficult: dict[str, int] = {}
    outside = 0
    for name in names:
        report.bar.advance(0)
        try:
            tree = ElementTree.parse(where / f"{name}.xml")
            width, height = (int(tree.findtext(f"size/{side}") or "") for side in ("width", "height"))
            nodes = list(tree.iter("object"))
            boxes = [
                [float(node.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
                for node in nodes
            ]
        except (ElementTree.ParseError, OSError, ValueError):
            unreadable.append(name)
            continue
        sizes[name], objects[name] = (width, height), len(nodes)
        difficult[name] = sum(node.findtext("difficult") == "1" for node in nodes)
        unknown.update(label for node in nodes if (label := node.findtext("name") or "") not in classes)
        outside += sum(
            not (1 <= left < right <= width and 1 <= top < bottom <= height) for left, top, right, bottom in boxes
        )
    total = sum(objects.values())
    if unreadable:
        report.error(
            where,
            f"{len(unreadable)} files are no VOC annotation, {unreadable[0]}.xml the first",
            count=len(unreadable),
            remedy=origin("voc"),
        )
    if unknown:
        label, count = unknown.most_common(1)[0]
        report.error(
            where,
            f"{unknown.total()} objects have a class that VOC does not have, most often {label!r} ({count})",
            count=unknown.total(),
            remedy=origin("voc"),
        )
    if outside:
        report.warning(
            where,
            f"{outside} of {total} boxes are empty or reach outside their image (pixels are counted from 1)",
            count=outside,
            remedy="a few are in the originals; many mean that the boxes were converted to another convention",
        )
    bare = [name for name, count in objects.items() if count == 0]
    if bare:
        report.error(
            where,
            f"{len(bare)} of {len(objects)} files have no object, {bare[0]}.xml the first",
            count=len(bare),
            remedy=f"every listed image has one in the originals: unpack Annotations again. {origin('voc')}",
        )
    for part in PARTS:
        found = [name for name in lists.get(part, ()) if objects.get(name)]
        if found and all(difficult[name] == objects[name] for name in found):
            report.error(
                where,
                f"every object of {part} is marked difficult: none of them counts in an AP",
                count=len(found),
                remedy=f"unpack Annotations again. {origin('voc')}",
            )
    report.fine(where, f"{total} objects", count=total)
    return sizes
