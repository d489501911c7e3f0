"""States that a run goes on from: a file, and beside it a JSON manifest that vouches for it and for itself.

The manifest has the file's size and SHA-256, what its writer notes, and a SHA-256 over all these fields; both are
checked before a byte of the state is read.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file, sha256_json

# The field of a manifest that is the SHA-256 of all others.
SEAL = "manifest_sha256"
FORMAT_VERSION = 1
Check = Callable[[dict[str, Any], bool], str | None]


def manifest_of(path: Path) -> Path:
    return path.with_suffix(".json")


def before(path: Path) -> Path:
    """Where `save` keeps the state that `path` held last."""
    return path.with_stem(f"{path.stem}_before")


def description(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_manifest(path: Path, fields: Mapping[str, Any]) -> None:
    files.write_json(path, {**fields, SEAL: sha256_json(fields)})


def read_manifest(path: Path) -> tuple[dict[str, Any], bool]:
    """The fields of the manifest `path`, and whether it is sealed (earlier versions' are not); `ValueError` where it is
    no JSON object, or not as it was written."""
    fields = files.read_json(path)
    seal = fields.pop(SEAL, None)
    if seal is not None and seal != sha256_json(fields):
        raise ValueError("its digest is of other fields")
    return fields, seal is not None


def seal(path: Path) -> None:
    """Write the manifest of the state `path`, which somebody else has written."""
    write_manifest(manifest_of(path), {"format_version": FORMAT_VERSION, **description(path)})


def damage(path: Path, fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the state `path` beside the `fields` of its manifest; None where nothing is."""
    if not path.exists():
        return "the file is gone"
    if path.stat().st_size != fields["bytes"] or sha256_file(path) != fields["sha256"]:
        return "size or SHA-256 differ from its manifest"
    return None


def damage_of(
    path: Path, check: Check = lambda _, sealed: None if sealed else "its manifest has no digest"
) -> str | None:
    """What is wrong with the state `path` by the manifest beside it, which `check` looks at, too; None: nothing."""
    if not manifest_of(path).exists():
        return "it has no manifest"
    try:
        fields, sealed = read_manifest(manifest_of(path))
        return check(fields, sealed) or damage(path, fields)
    except (ValueError, KeyError):
        return "its manifest is damaged"


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the state `path`, with its manifest; the state that was there is kept as `before(path)`. At each
    moment `newest` finds one: the old one is moved behind its manifest, the new one appears behind its own."""
    with files.atomic_path(path) as temporary:
        write(temporary)
        fields = {"format_version": FORMAT_VERSION, **description(temporary)}
        if path.exists() and (_is_older(path) or damage_of(path) is None):  # a damaged one replaces no good one
            write_manifest(manifest_of(before(path)), {"format_version": FORMAT_VERSION, **description(path)})
            os.replace(path, before(path))
        write_manifest(manifest_of(path), fields)


def newest(path: Path, *, say: Callable[[str], None]) -> Path | None:
    """The state at `path` when it is as it was written, else the one before (`first_whole`); None where neither was
    ever written. A state without any manifest beside it is an earlier version's: it is taken."""
    if _is_older(path):
        return path
    written = [one for one in (path, before(path)) if one.exists() or (one == path and manifest_of(one).exists())]
    return first_whole(written, say=say) if any(one.exists() for one in written) else None


def first_whole(paths: Iterable[Path], *, say: Callable[[str], None], **check: Check) -> Path | None:
    """The first of `paths`, newest first, that is as it was written (`damage_of`); `say` names those that are not.
    `UserError` where none of several is."""
    damaged: list[str] = []
    for one in paths:
        wrong = damage_of(one, **check)
        if wrong is None:
            for sentence in damaged:
                say(f"{sentence} The run goes on from the state before, {one.name}.")
            return one
        damaged.append(f"The state {one} is not valid ({wrong}).")
    if damaged:
        raise UserError(f"{' '.join(damaged)} Start again in another folder (--output), or put a good copy back.")
    return None


def _is_older(path: Path) -> bool:
    """Whether the state `path` is of a version that wrote no manifests."""
    return path.exists() and not any(manifest_of(one).exists() for one in (path, before(path)))
