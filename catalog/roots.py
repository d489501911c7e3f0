"""Where a data set lies under a data root, and what a sample says of itself.

ROOT is the tree that `DETECTRON2_DATASETS` names (`coco/`, `VOC2007/`, `VOC2012/`, `cityscapes/`); VOC may lie in
`VOCdevkit/` as its archives unpack.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from twist.contracts.errors import UserError


def find_root(data: Path | None) -> Path:
    """`data`, or the folder that DETECTRON2_DATASETS names."""
    if data is None and (named := os.environ.get("DETECTRON2_DATASETS")):
        data = Path(named)
    if data is None:
        raise UserError(
            "No data root: name it (`--data ROOT` for a run) or set DETECTRON2_DATASETS; `twist data sample ROOT` "
            "makes one."
        )
    if not data.is_dir():
        raise UserError(
            f"There is no data root at {data}: check the path, or make one with `twist data sample {data}`."
        )
    return data.resolve()


def read_sample(root: Path) -> dict[str, Any] | None:
    """`ROOT/sample.json` when ROOT is a sample, else None."""
    path = root / "sample.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): make the sample again with `twist data sample`.") from None
    if not isinstance(values, dict) or not values.get("classes"):
        raise UserError(f"{path} names no classes: make the sample again with `twist data sample`.")
    return values


def voc_folder(root: Path, year: int) -> Path:
    """ROOT/VOC<year>, or ROOT/VOCdevkit/VOC<year>."""
    nested = root / "VOCdevkit" / f"VOC{year}"
    return nested if nested.is_dir() and not (root / f"VOC{year}").is_dir() else root / f"VOC{year}"


def tree_folder(root: str | os.PathLike[str]) -> Path:
    """The folder that holds train/ and val/: `root`/imagenet or `root` itself."""
    root = Path(root)
    for folder in (root / "imagenet", root):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return folder
    raise UserError(
        f"There is no ImageNet-like tree at {root}: it needs train/<class>/ and val/<class>/, directly or in "
        f"imagenet/; `twist data check folders {root}` says what is missing."
    )
