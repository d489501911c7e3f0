"""Resume files that are never torn: `checkpoints/step_XXXXXXXX.pt` with a manifest `.json` of the same name.

A state is written beside its place, fsynced and renamed; then its manifest, with size and SHA-256, the same way. A
state without a manifest is a write that did not end and does not count. Reading verifies first and falls back to the
newest valid one, saying so. States are tensors and plain values only, read with `weights_only=True`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Position:
    """Where a run stands: what has been done when the state was written.

    `samples` are those of `epoch` that all ranks together have used, so another number of ranks can go on from it;
    `steps` counts optimiser steps since the start of the run, whatever their size.
    """

    steps: int = 0
    epoch: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Manifest:
    """What stands beside a state."""

    position: Position
    images: int
    world_size: int
    bytes: int
    sha256: str
    format_version: int = FORMAT_VERSION
    # Which images, by names and sizes, and by names in their order; None where that cannot be said, and in older ones.
    images_sha256: str | None = None
    names_sha256: str | None = None


def save(
    folder: Path,
    state: dict[str, Any],
    position: Position,
    *,
    images: int,
    images_sha256: str | None,
    names_sha256: str | None,
    world_size: int,
    keep: int,
) -> Path:
    """Write `state` and its manifest into `folder`, then drop all but the newest `keep`; returns the state's path."""
    path = folder / f"step_{position.steps:08d}.pt"
    manifest = path.with_suffix(".json")
    with files.atomic_path(path) as temporary:
        torch.save(state, temporary)
        digest, size = sha256_file(temporary), temporary.stat().st_size
        # Only now: a disk that is full until here costs no state. A state is valid with its own manifest alone.
        manifest.unlink(missing_ok=True)
    written = Manifest(
        position, images, world_size, size, digest, images_sha256=images_sha256, names_sha256=names_sha256
    )
    files.write_json(manifest, asdict(written))
    _prune(folder, keep=keep)
    return path


def place(path: Path, position: Position) -> None:
    """Say that the state at `path`, just written, stands at `position`: its step is also the end of an epoch."""
    manifest = path.with_suffix(".json")
    files.write_json(manifest, {**json.loads(manifest.read_text()), "position": asdict(position)})


def newest_valid(folder: Path, *, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest state that reads back as written, or None when the folder holds none.

    Every newer one that is torn or damaged is named through `say`.

    Raises:
        UserError: there are checkpoints, and none of them is valid.
    """
    manifests = sorted(folder.glob("step_*.json"), reverse=True)
    for number, manifest_path in enumerate(manifests):
        path = manifest_path.with_suffix(".pt")
        manifest = _read_manifest(manifest_path)
        problem = "its manifest is damaged" if manifest is None else _problem(path, manifest)
        if manifest is not None and problem is None:
            return path, manifest
        before = "; falling back to the one before it" if number < len(manifests) - 1 else ""
        say(f"Checkpoint {path} is not valid ({problem}){before}.")
        if number == len(manifests) - 1:
            raise UserError(
                f"None of the {len(manifests)} checkpoint(s) in {folder} is valid; start again in another folder "
                "(--output), or put a good copy back."
            )
    return None


def load(path: Path, *, device: torch.device) -> dict[str, Any]:
    """The state at `path`, on `device`. Nothing in the file is run."""
    return torch.load(path, map_location=device, weights_only=True)


def clean(folder: Path) -> None:
    """Remove what an interrupted write left: temporary files, and states without a manifest. The lock must be held."""
    for leftover in [*folder.glob(".step_*"), *folder.glob("step_*.pt")]:
        if leftover.name.startswith(".") or not leftover.with_suffix(".json").exists():
            leftover.unlink()


def _prune(folder: Path, *, keep: int) -> None:
    for manifest in sorted(folder.glob("step_*.json"))[:-keep]:
        manifest.unlink()  # first: a state without manifest does not count, a manifest without state is damage
        manifest.with_suffix(".pt").unlink(missing_ok=True)


def _read_manifest(path: Path) -> Manifest | None:
    try:
        values = json.loads(path.read_text())
        return Manifest(**{**values, "position": Position(**values["position"])})
    except (ValueError, KeyError, TypeError):
        return None


def _problem(path: Path, manifest: Manifest) -> str | None:
    if manifest.format_version != FORMAT_VERSION:
        return f"it has format {manifest.format_version}, this version reads {FORMAT_VERSION}"
    if not path.exists():
        return "the file is gone"
    if path.stat().st_size != manifest.bytes:
        return f"it has {path.stat().st_size} bytes instead of {manifest.bytes}"
    if sha256_file(path) != manifest.sha256:
        return "its SHA-256 is not the one in its manifest"
    return None
