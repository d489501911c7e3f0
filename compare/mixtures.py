"""Which records may share a column: the same recipe, scale and data; what sets the others apart, in words."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from twist.contracts.record import RunRecord


class Condition(NamedTuple):
    """What runs that may share a column agree in. `data` is None where all that say theirs say the same."""

    recipe_hash: str
    scale: str
    data: str | None


def conditions_of(records: Sequence[RunRecord]) -> list[Condition]:
    # Older records do not say their data: alone with one kind they are taken for it, beside two they stand apart.
    known: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for record in records:
        if record.data is not None:
            known[record.protocol, record.recipe_hash, record.scale].add(record.data)
    return [
        Condition(
            record.recipe_hash,
            record.scale,
            (record.data or "not said") if len(known[record.protocol, record.recipe_hash, record.scale]) > 1 else None,
        )
        for record in records
    ]


def mixtures(records: Sequence[RunRecord]) -> dict[str, dict[Condition, str]]:
    """Protocol → condition → what sets it apart, for the protocols that hold more than one."""
    recipes: dict[str, dict[Condition, dict[str, Any]]] = defaultdict(dict)
    for record, condition in zip(records, conditions_of(records), strict=True):
        recipes[record.protocol].setdefault(condition, record.recipe)
    return {protocol: _set_apart(groups) for protocol, groups in recipes.items() if len(groups) > 1}


def _set_apart(groups: dict[Condition, dict[str, Any]]) -> dict[Condition, str]:
    flat = {group: dict(_flatten(recipe)) for group, recipe in groups.items()}
    names = sorted({name for values in flat.values() for name in values})
    differing = [name for name in names if len({values.get(name, "absent") for values in flat.values()}) > 1]
    scales = len({group.scale for group in groups}) > 1
    apart = {}
    for group, values in flat.items():
        parts = [f"scale {group.scale}"] if scales else []
        parts += [f"data {group.data}"] if group.data is not None else []
        parts += [f"{name} = {_short(values.get(name, 'absent'))}" for name in differing[:3]]
        parts += [f"{len(differing) - 3} more"] if len(differing) > 3 else []
        apart[group] = ", ".join(parts) or f"recipe {group.recipe_hash[:8]}"
    return apart


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flatten(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, json.dumps(value, sort_keys=True)


def _short(text: str) -> str:
    return text if len(text) <= 32 else text[:31] + "…"


def mixed_sentence(mixed: dict[str, dict[Condition, str]]) -> str:
    protocol, groups = next(iter(sorted(mixed.items())))
    more = len(mixed) - 1
    others = f" (and {more} more protocol{'s' if more > 1 else ''})" if more else ""
    described = " against ".join(f"[{text}]" for text in sorted(groups.values())[:3])
    return (
        f"The records of {protocol}{others} come from {len(groups)} recipes, scales or data, {described}: they may not "
        "share a column; choose records of one, or pass --allow-mixed to see them in columns apart."
    )
