"""Resume files that are never torn: `checkpoints/step_XXXXXXXX.pt` with a manifest `.json` of the same name.

The state is written to a temporary file, synced and renamed; then its manifest, with size and SHA-256 and a SHA-256 of
its own fields, the same way. A state without a manifest is an unfinished write and is ignored. Reading verifies the
newest first and falls back to the one before. `first_stage.pt`, the end of the first stage, is never pruned: another
run can start its second stage from it (`run.warm_start`). States are tensors and plain values only, read with
`weights_only=True`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twist.contracts import files, states
from twist.contracts.errors import UserError
from twist.contracts.pickles import read_state

# 1 had no digest of the manifest's own fields.
FORMAT_VERSION = 2
FIRST_STAGE = "first_stage"
READABLE = (1, FORMAT_VERSION)


@dataclass(frozen=True)
class Position:
    """How far a run is. `steps` counts optimiser steps since its start, whatever their size.

    `samples` are those of `epoch` that all ranks together have used, so another number of ranks can go on from it.
    """

    steps: int = 0
    epoch: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Manifest:
    """What is known of a state; `bytes` and `sha256` are of its file."""

    position: Position
    images: int
    world_size: int
    bytes: int = 0
    sha256: str = ""
    format_version: int = FORMAT_VERSION
    # Which images, by names and sizes, and by names in their order; None where it is unknown, and in older ones.
    images_sha256: str | None = None
    names_sha256: str | None = None


def save(folder: Path, state: dict[str, Any], manifest: Manifest, *, keep: int) -> Path:
    """Write `state` and its manifest into `folder`, then remove all but the newest `keep`; returns the state's path."""
    path = folder / f"step_{manifest.position.steps:08d}.pt"
    with files.atomic_path(path) as temporary:
        torch.save(state, temporary)
        manifest = replace(manifest, **states.description(temporary))
    # Only now: an earlier state of this step stays valid until the new one is in its place, even when the disk is full.
    path.with_suffix(".json").unlink(missing_ok=True)
    states.write_manifest(path.with_suffix(".json"), asdict(manifest))
    for old in sorted(folder.glob("step_*.json"))[:-keep]:
        old.unlink()  # first: a state without a manifest is ignored, a manifest without a state is damage
        old.with_suffix(".pt").unlink(missing_ok=True)
    return path


def move(path: Path, position: Position) -> None:
    """Give the state at `path`, just written, another `position`: its step is also the end of an epoch."""
    manifest = path.with_suffix(".json")
    states.write_manifest(manifest, {**states.read_manifest(manifest)[0], "position": asdict(position)})


def keep_as(path: Path, name: str) -> Path:
    """Keep the state at `path`, with its manifest, as `name` for good; the same file where links are possible."""
    kept = path.with_name(f"{name}.pt")
    for source, target in ((path, kept), (path.with_suffix(".json"), kept.with_suffix(".json"))):
        with files.atomic_path(target) as temporary:
            temporary.unlink()
            try:
                os.link(source, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(source, temporary)
    return kept


def newest_valid(folder: Path, *, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest state that reads back as written, or None when the folder holds none; damaged ones are named.

    Raises:
        UserError: there are checkpoints, and none of them is valid.
    """
    manifests = sorted(folder.glob("step_*.json"), reverse=True)
    for path in manifests:
        found = _verified(path)
        if isinstance(found, Manifest):
            return path.with_suffix(".pt"), found
        say(f"Checkpoint {path.with_suffix('.pt')} is not valid ({found}).")
    if manifests:
        raise UserError(
            f"None of the {len(manifests)} checkpoint(s) in {folder} is valid; start again in another folder "
            "(--output), or put a good copy back."
        )
    return None


def load(path: Path, *, device: torch.device) -> dict[str, Any]:
    """The state at `path`, on `device`. Nothing in the file is executed."""
    return read_state(path, "model", remedy="start again in another folder (--output)", device=device)


def clean(folder: Path) -> None:
    """Remove states without a manifest, which an interrupted write left. The lock must be held."""
    for leftover in folder.glob("step_*.pt"):
        if not leftover.with_suffix(".json").exists():
            leftover.unlink()


def _verified(path: Path) -> Manifest | str:
    """The manifest at `path` when its state is as it says, or what is wrong."""
    try:
        values, sealed = states.read_manifest(path)
        manifest = Manifest(**{**values, "position": Position(**values["position"])})
        version = values["format_version"]
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    if version not in READABLE:
        return f"it has format {version}, this version reads {FORMAT_VERSION}"
    if sealed != (version > 1) or not _plausible(manifest):
        return "its manifest is damaged"
    return states.damage(path.with_suffix(".pt"), values) or manifest


def _plausible(manifest: Manifest) -> bool:
    """Whether types and ranges are those of a run's; older manifests have nothing else that vouches for them."""
    at = manifest.position
    counts = [(at.steps, 0), (at.epoch, 0), (at.samples, 0)]
    counts += [(manifest.images, 1), (manifest.world_size, 1), (manifest.bytes, 1)]
    whole = all(type(count) is int and count >= least for count, least in counts)  # `True` is no count
    return whole and all(
        digest is None or isinstance(digest, str) for digest in (manifest.images_sha256, manifest.names_sha256)
    )
