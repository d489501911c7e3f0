"""A run counts once: of records of one run that agree one is kept, and records that disagree are refused."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twist.compare.pretrainings import pretraining
from twist.contracts.errors import UserError
from twist.contracts.record import RunRecord

# Files that a note names; it counts the rest.
NAMED = 3


def left_out(records: Sequence[RunRecord], paths: Sequence[Path] = ()) -> tuple[frozenset[int], tuple[str, ...]]:
    """The indexes of `records` that repeat another of the same run in every metric, and what a reader is told of them.

    The oldest is kept. `paths` are the records' files where they are known.

    Raises:
        UserError: two records of one run that differ in a metric.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[pretraining(record), record.protocol, record.seed, record.recipe_hash, record.data].append(index)
    kept: dict[int, int] = {}
    for group in groups.values():
        # By the file where two were made in the same second: the order in which they were read decides nothing.
        first, *others = sorted(group, key=lambda index: (records[index].created, *map(str, paths[index : index + 1])))
        for other in others:
            if (records[first].metrics, records[first].scale) != (records[other].metrics, records[other].scale):
                raise UserError(_refusal(records, paths, first, other))
            kept[other] = first
    return frozenset(kept), (_note(kept, paths),) if kept else ()


def _refusal(records: Sequence[RunRecord], paths: Sequence[Path], first: int, second: int) -> str:
    one, other = records[first], records[second]
    run = f"{one.method}, {one.protocol}, seed {one.seed}, recipe {one.recipe_hash[:8]}, the same pretraining"
    places = f": {paths[first]} and {paths[second]}" if paths else f", created {one.created} and {other.created}"
    differing = sorted(
        name for name in one.metrics.keys() | other.metrics.keys() if one.metrics.get(name) != other.metrics.get(name)
    )
    what = differing[0] if differing else "scale"
    return (
        f"Two records of one run ({run}) differ in {what}{places}; a run counts once, so remove one of the two files."
    )


def _note(kept: dict[int, int], paths: Sequence[Path]) -> str:
    many = len(kept) > 1
    said = (
        f"{len(kept)} record{'s' if many else ''} left out: {'each repeats' if many else 'it repeats'} an older one of "
    )
    said += "the same run in every metric"
    if not paths:
        return said + "."
    named = [_pair(paths[other], paths[first]) for other, first in sorted(kept.items())]
    more = f", and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return f"{said} ({', '.join(named[:NAMED])}{more})."


def _pair(copy: Path, kept: Path) -> str:
    """Told apart from the folder that holds both: a table may be published, and names no folder of a machine."""
    shared = os.path.commonpath([os.path.abspath(path) for path in (copy, kept)])
    return f"{os.path.relpath(copy, shared)}, kept {os.path.relpath(kept, shared)}"
