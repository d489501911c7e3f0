"""Which records belong together: copies of one run, runs of one pretraining, the same weights, the same recipe."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.record import RunRecord

Key = tuple[Any, ...]


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
    weights, kind = record.weights, None
    # Every seed draws another random initialisation; they are repeats although their bytes differ.
    if record.method != "random":
        # An artefact's own hash, which changes when it is written again, counts only where nothing else is known.
        kind = weights.pretrain_config_hash or weights.source_sha256 or weights.sha256
        images = weights.pretrain_images_sha256
        # "backbone" is the branch of every file that has only one, and of records that do not name theirs.
        branch = None if weights.branch == "backbone" else weights.branch
        if images is not None or branch is not None:
            kind = sha256_json([kind, images, branch])
    return record.method, architecture_of(record), weights.epochs, kind


def pretraining(record: RunRecord) -> Key:
    """What runs that started from the same weights agree in: one pretraining, or one random initialisation."""
    weights = record.weights
    if record.method == "random":
        own: str | int | None = weights.sha256 or f"seed {record.seed}"
    elif weights.pretrain_config_hash is None:
        own = None
    else:
        own = weights.source_sha256 or weights.sha256 if weights.pretrain_seed is None else weights.pretrain_seed
    return (*weights_key(record), own)


def variant_names(records: Sequence[RunRecord]) -> dict[Key, str]:
    """`weights_key` → a name for these weights, empty where method, architecture and epochs identify them already."""
    families: dict[Key, dict[Key, str]] = defaultdict(dict)
    for record in records:
        key = weights_key(record)
        families[key[:-1]].setdefault(key, record.weights.name)
    variants = {}
    for names in families.values():
        distinct = len(set(names.values())) == len(names)
        for key, name in names.items():
            # "unknown" names no method: the name of the weights is all there is.
            shown = len(names) > 1 or key[0] == "unknown"
            variants[key] = (name if distinct else f"{name} {str(key[-1])[:8]}") if shown else ""
    return variants


def find_copies(records: Sequence[RunRecord], paths: Sequence[Path] = ()) -> frozenset[int]:
    """The indexes of `records` (with their files, where they have any) that repeat an older record of the same run in
    every metric.

    Raises:
        UserError: two records of one run that differ in a metric.
    """
    groups: dict[Key, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[pretraining(record), record.protocol, record.seed, record.recipe_hash, record.data].append(index)
    copies: set[int] = set()
    for group in groups.values():
        # By the path where two were made in the same second: the order of reading decides nothing.
        first, *others = sorted(group, key=lambda index: (records[index].created, *map(str, paths[index : index + 1])))
        for other in others:
            one, two = records[first], records[other]
            if (one.metrics, one.scale) != (two.metrics, two.scale):
                name = min((name for name, _ in one.metrics.items() ^ two.metrics.items()), default="scale")
                places = [str(paths[i]) if paths else f"the one of {records[i].created}" for i in (first, other)]
                raise UserError(
                    f"Two records of one run ({one.method}, {one.protocol}, seed {one.seed}, recipe "
                    f"{one.recipe_hash[:8]}) differ in {name}: {places[0]} and {places[1]}; a run counts once, so "
                    "remove one of the two files."
                )
        copies.update(others)
    return frozenset(copies)


def recipe_without_network(record: RunRecord) -> dict[str, Any]:
    return {name: value for name, value in record.recipe.items() if name != "architecture"}


def shared_recipes(records: Sequence[RunRecord]) -> list[str]:
    """The hash of each record's recipe; where those of one protocol differ in the architecture alone, which rows name,
    of the recipe without it: a ResNet and a ViT under one frozen protocol stand in one column."""
    shared = [(record.protocol, sha256_json(recipe_without_network(record))) for record in records]
    own: dict[Key, set[str]] = defaultdict(set)
    for key, record in zip(shared, records, strict=True):
        own[key].add(record.recipe_hash)
    return [record.recipe_hash if len(own[key]) == 1 else key[1] for key, record in zip(shared, records, strict=True)]


def recipe_differences(records: Sequence[RunRecord], *, strict: bool = False) -> list[str]:
    """How the recipe, scale or data of each record differ from the others of its protocol; empty where they agree.

    Records share a column when these agree. On a user's own data, by their card, each data set is a column by itself.

    Raises:
        UserError: with `strict`, where any differ.
    """
    # Older records do not name their data: they join those of one data set, and stand apart from those of two.
    known: dict[Key, set[str | None]] = defaultdict(set)
    recipes = shared_recipes(records)
    for recipe, record in zip(recipes, records, strict=True):
        known[record.protocol, recipe, record.scale].add(record.data)
    places: dict[Key, dict[Key, dict[str, Any]]] = defaultdict(dict)
    keys = []
    for recipe, record in zip(recipes, records, strict=True):
        several = len(known[record.protocol, recipe, record.scale] - {None}) > 1
        condition = (recipe, record.scale, (record.data or "not said") if several else None)
        keys.append(((record.protocol, record.data if record.scale == "own" else None), condition))
        places[keys[-1][0]].setdefault(condition, recipe_without_network(record))
    mixed = {place: _described(groups) for place, groups in places.items() if len(groups) > 1}
    if mixed and strict:
        (protocol, _), groups = min(mixed.items(), key=lambda item: item[0][0])
        others = f" (and {len(mixed) - 1} more)" if len(mixed) > 1 else ""
        described = " against ".join(f"[{text}]" for text in sorted(groups.values())[:3])
        raise UserError(
            f"The records of {protocol}{others} come from {len(groups)} recipes, scales or data, {described}: they may "
            "not share a column; choose records of one, or leave out --strict to see them in columns apart."
        )
    return [mixed.get(place, {}).get(condition, "") for place, condition in keys]


def _described(groups: dict[Key, dict[str, Any]]) -> dict[Key, str]:
    """`scale full, optim.lr = 0.1, 2 more` of each."""
    flat = {group: dict(_flatten(recipe)) for group, recipe in groups.items()}
    names = sorted({name for values in flat.values() for name in values})
    differing = [name for name in names if len({values.get(name, "absent") for values in flat.values()}) > 1]
    scales = len({scale for _, scale, _ in groups}) > 1
    texts = {}
    for (recipe_hash, scale, data), values in flat.items():
        parts = [f"scale {scale}"] if scales else []
        parts += [f"data {data}"] if data is not None else []
        shown = [(name, values.get(name, "absent")) for name in differing[:3]]
        parts += [f"{name} = {text if len(text) <= 32 else text[:31] + '…'}" for name, text in shown]
        parts += [f"{len(differing) - 3} more"] if len(differing) > 3 else []
        texts[recipe_hash, scale, data] = ", ".join(parts) or f"recipe {recipe_hash[:8]}"
    return texts


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flatten(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, json.dumps(value, sort_keys=True)
