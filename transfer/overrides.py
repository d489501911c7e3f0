"""What a user's `key=value` overrides made of a protocol: what the record says of them, and what is refused.

A recipe leaves out what comes with the weights (pixel statistics, channel order, stride), with the data and with the
machine, so that rows of other weights meet. A key that a user overrides comes with none of them any more. So the whole
config is compared before and after: what changed and is not in the recipe anyway enters it as `overrides`, unless it
cannot change the number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.run_folder import differences
from twist.transfer.request import Controls

# A config, or the recipe made of it, as JSON has it.
Tree = dict[str, Any]


def refuse_option(override: str, key: str, options: Mapping[str, str]) -> None:
    """Raise `UsageError` when `key` (dotted) is one that an option of the command line decides; `options` by key."""
    for name, option in options.items():
        if _under(key, (name,)):
            raise UsageError(f'"{override}": a run takes {key} from {option} alone; pass {option} in its place.')


def near_keys(keys: Sequence[str], config: Tree, *, unused: Sequence[str] = ()) -> str:
    """What may have been meant by `keys`, the last of which its section of `config` does not have.

    The right word without its section, a near one of that section, or one of our own controls. Sections that are
    `unused` hold what was copied elsewhere when the config was read.
    """
    *sections, key = keys
    used = {name: section for name, section in config.items() if name not in unused}
    elsewhere = [f'"{path}"' for path in _paths_to(key, used)]
    if elsewhere and len(elsewhere) <= 3:
        return f" Did you mean {' or '.join(elsewhere)}?"
    node: Any = config
    for part in sections:
        node = node[int(part)] if isinstance(node, list) else node[part]
    known = node if isinstance(node, dict) else map(str, range(len(node))) if isinstance(node, list) else ()
    return did_you_mean(key, [*map(str, known), *(() if sections else Controls.model_fields)])


def _paths_to(key: str, node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of `key` in the sections of `node`; lists hold what belongs together by place, not by name."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if name == key:
            yield f"{prefix}{name}"
        yield from _paths_to(key, value, f"{prefix}{name}.")


def departures(before: Tree, after: Tree, *, free: Sequence[str]) -> list[str]:
    """What overrides changed, a line each; `free` names what may change (dotted, `*` as in file names).

    That is what cannot change the number, and the schedule: searching the learning rate is part of these protocols in
    the literature, and the number of images seen is compared apart.
    """
    return [
        f"changed from the protocol: {path} {was!r} → {now!r}"
        for path, was, now in differences(before, after)
        if not _under(path, free)
    ]


def recorded(before: Tree, after: Tree, *, recipe_of: Callable[[Tree], Tree], harmless: Sequence[str]) -> Tree:
    """The recipe of `after`, and under `overrides` what changed since `before` without showing in it.

    Whether a change shows is tried, by taking it back: no list of what a recipe holds can fall behind the recipe.
    Without such a change there is no `overrides`, and the recipe's hash is what it always was.
    """
    recipe = recipe_of(after)
    hidden = {
        path: now
        for path, was, now in differences(before, after)
        if not _under(path, harmless) and recipe_of(_replaced(after, path, was)) == recipe
    }
    return {**recipe, "overrides": hidden} if hidden else recipe


def _replaced(tree: Tree, path: str, value: Any) -> Tree:
    tree = copy.deepcopy(tree)
    node: Any = tree
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value
    return tree


def _under(path: str, names: Iterable[str]) -> bool:
    """Whether `path` is one of `names` or lies inside one."""
    parts = path.split(".")
    return any(
        len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))
        for wanted in (name.split(".") for name in names)
    )
