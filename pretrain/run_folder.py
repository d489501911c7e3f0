"""A run's folder: whose run it is, and who may write there now.

config.json            the resolved config          plan.txt             what the run is going to do
metrics.jsonl          one line a step              tensorboard/         the same as curves
checkpoints/           to resume from               backbone.safetensors the result, for every later stage (with
                                                    a teacher, teacher_backbone.safetensors is the one to take)
curves.png             how it went                  lock                 held by the running process
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.pretrain import checkpoint
from twist.pretrain.config import PretrainConfig

# What may change between two starts of one run: where the data lie, how fast they come, what is kept and said.
NOT_IDENTITY: dict[str, set[str]] = {
    "data": {"root", "workers", "bad_image_share"},
    "run": {
        "log_every_steps",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "max_nonfinite_steps",
        "on_collapse",
        "online_eval_root",
        "online_eval_every_epochs",
        "device",
    },
}


# What a run writes beside its config; where one of them lies without it, it is somebody else's.
WRITTEN = (
    "checkpoints/step_*", "metrics.jsonl", "online_eval.jsonl", "plan.txt", "tensorboard", "curves.png",
    "*backbone.safetensors",
)  # fmt: skip


def refuse_foreign(folder: Path) -> None:
    """`UserError` when `folder` holds, without a run's config, what a run there would replace. Touches nothing."""
    if (folder / "config.json").exists():
        _read_identity(folder / "config.json")
        return
    for pattern in WRITTEN:
        for found in folder.glob(pattern):
            raise UserError(
                f"{folder} holds {found.relative_to(folder)} and no config.json, so it is no run of ours that could go "
                "on: give another --output, nothing is overwritten."
            )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock goes with the process, however it dies.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # POSIX locks belong to a process: data workers that outlive a killed trainer do not hold them (flock's do).
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(
            f"Another process is training in {folder}: stop it first, or give this run its own --output."
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def prepare(folder: Path, config: PretrainConfig, *, resume: bool) -> None:
    """Make sure that `folder` is this run's, and write its config. The lock must be held.

    Raises:
        UserError: it holds another run, or a run and `resume` is not given.
    """
    existing = folder / "config.json"
    theirs = _read_identity(existing) if existing.exists() else None
    # A start that failed before its first step left nothing to protect: the mended config may take the folder.
    begun = theirs is not None and ((folder / "metrics.jsonl").exists() or any(folder.glob("checkpoints/step_*.json")))
    if theirs is not None and begun:
        _refuse_other_run(folder, theirs, config)
        if not resume:
            raise UserError(
                f"{folder} already holds this run: add --resume to go on with it, or give another --output to start "
                "anew."
            )
    (folder / "checkpoints").mkdir(exist_ok=True)
    checkpoint.clean(folder / "checkpoints")
    files.write_json(existing, config.model_dump(mode="json"))


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """The config's keys, flat, that make a run this run and no other."""
    return {
        f"{section}.{key}": value
        for section, table in values.items()
        for key, value in table.items()
        if key not in NOT_IDENTITY.get(section, set())
    }


def recipe_hash(config: PretrainConfig) -> str:
    """SHA-256 of what makes the recipe: the run's identity without its seed, so seeds of one recipe are repeats."""
    values = identity(config.model_dump(mode="json"))
    del values["run.seed"]
    return sha256_json(values)


def _read_identity(existing: Path) -> dict[str, Any]:
    try:
        values = json.loads(existing.read_text())
        if "epochs" not in values["run"]:
            raise ValueError
        return identity(values)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{existing} is not a run's config: give another --output.") from None


def _refuse_other_run(folder: Path, theirs: dict[str, Any], config: PretrainConfig) -> None:
    ours = identity(config.model_dump(mode="json"))
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        first = differing[0]
        raise UserError(
            f"{folder} holds another run: {first} is {theirs.get(first)!r} there and {ours.get(first)!r} here"
            + (f", and {len(differing) - 1} more keys differ" if len(differing) > 1 else "")
            + "; give another --output, or the config of that run."
        )
