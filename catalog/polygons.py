"""What must be right in a Cityscapes `*_gtFine_polygons.json` before cityscapesScripts can paint it."""

from __future__ import annotations

import json
from pathlib import Path


def polygons_fault(path: Path, size: tuple[int, int] | None = None) -> str | None:
    """What is wrong with an annotation, as the inside of a sentence; None when it can be painted.

    cityscapesScripts stop in the middle, or leave Python, where this says something. A polygon of fewer than two
    points, which they cannot paint, is refused and not skipped: the map without that object would look whole. One of
    two points stays, as they paint a line for it.

    Args:
        size: (width, height) of the picture, when the annotation must say the same.
    """
    from cityscapesscripts.helpers.labels import name2label

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return f"it is no complete JSON: {error}"
    if not isinstance(content, dict):
        return "it is no JSON object"
    sides = [content.get("imgWidth"), content.get("imgHeight")]
    if not all(type(side) is int and side > 0 for side in sides):
        return "it has no imgWidth and imgHeight"
    if size is not None and sides != [*size]:
        return "it is for a picture of another size"
    objects = content.get("objects")
    if not isinstance(objects, list) or not objects:
        return "it has no objects"
    for number, item in enumerate(objects):
        if not isinstance(item, dict) or not isinstance(item.get("label"), str):
            return f"objects[{number}] has no label"
        label, points = item["label"], item.get("polygon")
        if not isinstance(points, list) or not all(_is_point(point) for point in points):
            return f"objects[{number}] has no polygon of points [x, y]"
        if item.get("deleted"):
            continue
        if label not in name2label and label.removesuffix("group") not in name2label:
            return f"objects[{number}] has a label that Cityscapes does not have, {label!r}"
        if len(points) < 2:
            return f"objects[{number}], {label!r}, has a polygon of fewer than two points"
    return None


def _is_point(point: object) -> bool:
    return isinstance(point, list) and len(point) >= 2 and all(type(value) in (int, float) for value in point[:2])
