"""Which records belong together: copies of one run, runs of one pretraining, the same weights, the same recipe."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.record import RunRecord, WeightsProvenance

Key = tuple[Any, ...]


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def architecture_of(record: RunRecord) -> str | None:
    named = record.recipe.get("architecture")
    return record.weights.architecture or (named if isinstance(named, str) else None)


def device_hours(record: RunRecord) -> float:
    """Wall hours × devices: the GPUs of all machines, else one for the processor of each."""
    gpus, nodes = (int(record.hardware.get(name) or 1) for name in ("gpus_used", "nodes"))
    return record.wall_s / 3600 * gpus * nodes


def weights_key(record: RunRecord) -> Key:
    """What runs that repeat one another agree in: pretraining seeds of one config on the same images do, different
    checkpoints do not."""
    # Every seed draws another random initialisation; they are repeats although their bytes differ.
    kind = None if record.method == "random" else _kind(record.weights)
    return record.method, architecture_of(record), record.weights.epochs, kind


def _kind(weights: WeightsProvenance) -> str | None:
    """How weights were made, whatever the seed. The bytes of an artefact change when it is written again, so its own
    hash counts only where nothing else is known."""
    origin = weights.pretrain_config_hash or weights.source_sha256 or weights.sha256
    images = weights.pretrain_images_sha256
    # "backbone" is the branch of every file that has only one, and of records that do not name theirs.
    branch = None if weights.branch == "backbone" else weights.branch
    return origin if images is None and branch is None else sha256_json([origin, images, branch])


def pretraining(record: RunRecord) -> Key:
    """What runs that started from the same weights agree in: one pretraining, or one random initialisation."""
    weights = record.weights
    if record.method == "random":
        own: str | int | None = weights.sha256 or f"seed {record.seed}"
    elif weights.pretrain_config_hash is None:
        own = None
    elif weights.pretrain_seed is not None:
        own = weights.pretrain_seed
    else:
        own = weights.source_sha256 or weights.sha256
    return (*weights_key(record), own)


def variant_names(records: Sequence[RunRecord]) -> dict[Key, str]:
    """`weights_key` → a name for these weights, empty where method, architecture and epochs identify them already."""
    names: dict[Key, str] = {}
    for record in records:
        names.setdefault(weights_key(record), record.weights.name)
    families: dict[Key, list[Key]] = defaultdict(list)
    for key in names:
        families[key[:-1]].append(key)
    variants = {}
    for keys in families.values():
        distinct = len({names[key] for key in keys}) == len(keys)
        for key in keys:
            name = names[key] if distinct else f"{names[key]} {str(key[-1])[:8]}"
            # "unknown" names no method: the name of the weights is all there is.
            variants[key] = name if len(keys) > 1 or key[0] == "unknown" else ""
    return variants


# ── Copies of one run ─────────────────────────────────────────────────────────────────────────────────────────────────


def find_copies(records: Sequence[RunRecord], paths: Sequence[Path] = ()) -> frozenset[int]:
    """The indexes of `records` that repeat an older record of the same run in every metric.

    `paths` are the records' files, where they have any.

    Raises:
        UserError: two records of one run that differ in a metric.
    """
    groups: dict[Key, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[pretraining(record), record.protocol, record.seed, record.recipe_hash, record.data].append(index)
    copies = set()
    for group in groups.values():
        # By the path where two were made in the same second: the order of reading decides nothing.
        first, *others = sorted(group, key=lambda index: (records[index].created, *map(str, paths[index : index + 1])))
        for other in others:
            one, two = records[first], records[other]
            if (one.metrics, one.scale) != (two.metrics, two.scale):
                names = sorted(name for name, _ in one.metrics.items() ^ two.metrics.items())
                places = [str(paths[i]) if paths else f"the one of {records[i].created}" for i in (first, other)]
                raise UserError(
                    f"Two records of one run ({one.method}, {one.protocol}, seed {one.seed}, recipe "
                    f"{one.recipe_hash[:8]}) differ in {names[0] if names else 'scale'}: {places[0]} and {places[1]}; "
                    "a run counts once, so remove one of the two files."
                )
        copies.update(others)
    return frozenset(copies)


# ── What may share a column ───────────────────────────────────────────────────────────────────────────────────────────


class Condition(NamedTuple):
    """What runs that may share a column agree in. `data` is None where all that name their data name the same."""

    recipe_hash: str
    scale: str
    data: str | None


def conditions_of(records: Sequence[RunRecord]) -> list[Condition]:
    # Older records do not name their data: they join those of one data set, and stand apart from those of two.
    known: dict[Key, set[str]] = defaultdict(set)
    for record in records:
        if record.data is not None:
            known[record.protocol, record.recipe_hash, record.scale].add(record.data)
    several = {key for key, names in known.items() if len(names) > 1}
    return [
        Condition(
            record.recipe_hash,
            record.scale,
            (record.data or "not said") if (record.protocol, record.recipe_hash, record.scale) in several else None,
        )
        for record in records
    ]


def place_of(record: RunRecord) -> str:
    """What a column is of: the protocol, and a user's own data where it was run on a data card."""
    return f"{record.protocol} on {record.data}" if record.scale == "own" else record.protocol


def find_mixtures(records: Sequence[RunRecord], conditions: Sequence[Condition]) -> dict[str, dict[Condition, str]]:
    """Protocol (of a user's own data, with their name) → condition → how it differs from the others there, for those
    with more than one condition. Runs on two data cards are two columns, and nobody takes them for one.
    """
    recipes: dict[str, dict[Condition, dict[str, Any]]] = defaultdict(dict)
    for record, condition in zip(records, conditions, strict=True):
        recipes[place_of(record)].setdefault(condition, record.recipe)
    return {protocol: _differences(groups) for protocol, groups in recipes.items() if len(groups) > 1}


def _differences(groups: dict[Condition, dict[str, Any]]) -> dict[Condition, str]:
    flat = {group: dict(_flatten(recipe)) for group, recipe in groups.items()}
    names = sorted({name for values in flat.values() for name in values})
    differing = [name for name in names if len({values.get(name, "absent") for values in flat.values()}) > 1]
    scales = len({group.scale for group in groups}) > 1
    texts = {}
    for group, values in flat.items():
        parts = [f"scale {group.scale}"] if scales else []
        parts += [f"data {group.data}"] if group.data is not None else []
        shown = [(name, values.get(name, "absent")) for name in differing[:3]]
        parts += [f"{name} = {text if len(text) <= 32 else text[:31] + '…'}" for name, text in shown]
        parts += [f"{len(differing) - 3} more"] if len(differing) > 3 else []
        texts[group] = ", ".join(parts) or f"recipe {group.recipe_hash[:8]}"
    return texts


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flatten(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, json.dumps(value, sort_keys=True)


def mixture_sentence(mixtures: dict[str, dict[Condition, str]]) -> str:
    protocol, groups = min(mixtures.items())
    others = f" (and {len(mixtures) - 1} more)" if len(mixtures) > 1 else ""
    described = " against ".join(f"[{text}]" for text in sorted(groups.values())[:3])
    return (
        f"The records of {protocol}{others} come from {len(groups)} recipes, scales or data, {described}: they may not "
        "share a column; choose records of one, or leave out --strict to see them in columns apart."
    )
