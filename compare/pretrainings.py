"""Which records started from the same weights, or from weights that came to be alike, and how to call the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from twist.contracts.files import sha256_json
from twist.contracts.record import RunRecord, WeightsProvenance


def architecture_of(record: RunRecord) -> str | None:
    if record.weights.architecture is not None:
        return record.weights.architecture
    named = record.recipe.get("architecture")
    return named if isinstance(named, str) else None


def weights_key(record: RunRecord) -> tuple[Any, ...]:
    """What agrees in runs that repeat one another: pretraining seeds of one config on the same images do, different
    files do not."""
    # Every seed draws another random initialisation; they are repeats although their bytes differ.
    kind = None if record.method == "random" else _kind(record.weights)
    return record.method, architecture_of(record), record.weights.epochs, kind


def _kind(weights: WeightsProvenance) -> str | None:
    """How weights came to be, whatever the seed. An artefact's own bytes change when it is written anew, so its file
    counts only where nothing else is known."""
    origin = weights.pretrain_config_hash or weights.source_sha256 or weights.sha256
    images = weights.pretrain_images_sha256
    # "backbone" is the branch of whatever has only one, and of records from before it was told.
    branch = None if weights.branch == "backbone" else weights.branch
    return origin if images is None and branch is None else sha256_json([origin, images, branch])


def pretraining(record: RunRecord) -> tuple[Any, ...]:
    """What agrees in runs that started from the same weights: one pretraining, or one random initialisation."""
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


def variant_names(records: Sequence[RunRecord]) -> dict[tuple[Any, ...], str]:
    """A name for each kind of weights, empty where method, architecture and epochs already tell it apart."""
    names: dict[tuple[Any, ...], str] = {}
    for record in records:
        names.setdefault(weights_key(record), record.weights.name)
    families: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for key in names:
        families[key[:-1]].append(key)
    variants = {}
    for keys in families.values():
        distinct = len({names[key] for key in keys}) == len(keys)
        for key in keys:
            name = names[key] if distinct else f"{names[key]} {str(key[-1])[:8]}"
            # "unknown" names no method: which weights they are is all that can be said.
            variants[key] = name if len(keys) > 1 or key[0] == "unknown" else ""
    return variants
