"""What a training program's settings, kept in the file beside the weights, say of the network: shapes do not say all.

Nobody promises these entries, so each answer may be None; where two of them contradict each other it is None too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from twist.converters.standins import Opaque

# A ViT-S of timm, DeiT, DINO and mmpretrain has 6 heads of 64 channels; MoCo v3's has 12 (moco-v3 vits.py,
# mmselfsup and mmpretrain `arch='mocov3-small'`). The weights have the same names and shapes.
VIT_SMALL_HEADS = 6
_MOCO_V3 = re.compile(r"moco[-_]?v3", re.IGNORECASE)
_HEADS = re.compile(r"num_heads\W{1,4}(\d+)")


def heads_of_vit_small(value: Any) -> int | None:
    """How many attention heads the settings in a checkpoint's contents give to its ViT-S."""
    said: set[int] = set()
    for name, leaf in _leaves(value):
        if isinstance(leaf, str):
            said.update(int(number) for number in _HEADS.findall(leaf))
            if _MOCO_V3.search(leaf):
                said.add(12)
        elif name == "num_heads" and type(leaf) is int:
            said.add(leaf)
    return said.pop() if len(said) == 1 else None


def text_at(value: Any, path: tuple[str, ...]) -> str | None:
    """The string at a path of entries, through dictionaries and the attributes of a Namespace."""
    for key in path:
        value = _items(value).get(key)
    return value if isinstance(value, str) else None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, int | str]]:
    if isinstance(value, (int, str)):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, name)
    else:
        for key, item in _items(value).items():
            yield from _leaves(item, str(key))


def _items(value: Any) -> dict[Any, Any]:
    state = value.state if isinstance(value, Opaque) else value
    return state if isinstance(state, dict) else {}
