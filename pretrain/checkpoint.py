"""A pretraining run's folder: whose it is, and its checkpoints, which are never torn.

config.json            the resolved config          plan.txt             what the run is going to do
metrics.jsonl          one line a step              tensorboard/         the same as curves
checkpoints/           to resume from               backbone.safetensors the result, for every later stage (with
                                                    a teacher, teacher_backbone.safetensors is the one to take)
curves.png             how it went                  lock                 held by the running process

A checkpoint is a state `step_XXXXXXXX.pt`, synced and renamed, and then its manifest (`contracts/states.py`): a state
without one is an unfinished write. `first_stage.pt`, the end of the first stage, is never pruned: another run can start
its second stage from it (`run.warm_start`).
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from twist.contracts import files, run_folder, states
from twist.contracts.config import identity_of
from twist.contracts.errors import UserError
from twist.contracts.pickles import read_state
from twist.pretrain.config import PretrainConfig

# 1 had no digest of the manifest's own fields.
FORMAT_VERSION = 2
FIRST_STAGE = "first_stage"
CONFIG = "config.json"
# What may change between two starts of one run: where the data lie, how fast they come, what is kept and shown.
NOT_IDENTITY: dict[str, set[str]] = {
    "data": {"root", "workers", "bad_image_share"},
    "run": {
        "log_every_steps", "checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints",
        "max_nonfinite_steps", "on_collapse", "online_eval_root", "online_eval_every_epochs", "device", "logger",
    },
}  # fmt: skip
# What a run writes beside its config; one of them without the config is somebody else's.
WRITTEN = (
    "checkpoints/step_*", "metrics.jsonl", "online_eval.jsonl", "plan.txt", "tensorboard", "curves.png",
    "*backbone.safetensors",
)  # fmt: skip

Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True)
class Position:
    """How far a run is: optimiser steps since its start, whatever their size, and samples of `epoch` that all ranks
    together have used, so that another number of ranks can go on from it."""

    steps: Count = 0
    epoch: Count = 0
    samples: Count = 0


@dataclass(frozen=True)
class Manifest:
    """What is known of a state; `bytes` and `sha256` are of its file."""

    position: Position
    images: Count
    world_size: Count
    bytes: Count = 0
    sha256: str = ""
    format_version: Count = FORMAT_VERSION
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
    states.manifest_of(path).unlink(missing_ok=True)
    states.write_manifest(states.manifest_of(path), asdict(manifest))
    for old in sorted(folder.glob("step_*.json"))[:-keep]:
        old.unlink()  # first: a state without a manifest is ignored, a manifest without a state is damage
        old.with_suffix(".pt").unlink(missing_ok=True)
    return path


def move(path: Path, position: Position) -> None:
    """Give the state at `path`, just written, another `position`: its step is also the end of an epoch."""
    states.write_manifest(states.manifest_of(path), asdict(replace(_manifest(path), position=position)))


def keep_as(path: Path, name: str) -> None:
    """Keep a copy of the state at `path`, with its manifest, as `name` for good."""
    for source in (path, states.manifest_of(path)):
        with files.atomic_path(source.with_stem(name)) as temporary:
            shutil.copyfile(source, temporary)


def newest_valid(folder: Path, *, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest state that reads back as written, None when the folder holds none; damaged ones are named. `UserError`
    when none of several is valid."""
    paths = [manifest.with_suffix(".pt") for manifest in sorted(folder.glob("step_*.json"), reverse=True)]
    path = states.first_whole(paths, say=say, check=_check)
    return None if path is None else (path, _manifest(path))


def _manifest(path: Path) -> Manifest:
    return Manifest(**states.read_manifest(states.manifest_of(path))[0])


def _check(fields: dict[str, Any], sealed: bool) -> str | None:
    """What is wrong with a manifest. For one of format 1 nothing but its types and ranges vouches."""
    version = fields["format_version"]
    if version not in (1, FORMAT_VERSION):
        return f"it has format {version}, this version reads {FORMAT_VERSION}"
    Manifest(**fields)
    return None if sealed == (version > 1) else "its manifest is damaged"


def load(path: Path, *, device: torch.device) -> dict[str, Any]:
    """The state at `path`, on `device`. Nothing in the file is executed."""
    return read_state(path, "model", remedy="start again in another folder (--output)", device=device)


# --- whose folder it is -----------------------------------------------------------------------------------------------


def refuse_foreign(folder: Path, model: type[PretrainConfig]) -> None:
    """`UserError` where `folder` holds what a run would replace, and no config of a run."""
    run_folder.refuse_foreign(folder, run_file=CONFIG, written=WRITTEN)
    _stored(folder, model)


def prepare(folder: Path, config: PretrainConfig, *, resume: bool) -> None:
    """Make sure that `folder` is this run's (`UserError` where it holds another, or one that is not to be resumed), and
    write its config. The lock must be held."""
    before = _stored(folder, type(config))
    # A start that failed before its first step left nothing to protect: a corrected config may take the folder.
    begun = (folder / "metrics.jsonl").exists() or any(folder.glob("checkpoints/step_*.json"))
    if before is not None and begun:
        run_folder.refuse_other_run(folder, identity(before), identity(config))
        if not resume:
            run_folder.refuse_second_start(folder, {})
    (folder / "checkpoints").mkdir(exist_ok=True)
    run_folder.remove_leftovers(folder)
    for unfinished in folder.glob("checkpoints/step_*.pt"):
        if not states.manifest_of(unfinished).exists():
            unfinished.unlink()
    files.write_json(folder / CONFIG, config.model_dump(mode="json"))


def identity(config: PretrainConfig) -> dict[str, Any]:
    """The config's keys, flat, that make a run this run and no other."""
    return {
        f"{section}.{key}": value
        for section, table in identity_of(config).items()
        for key, value in table.items()
        if key not in NOT_IDENTITY.get(section, set())
    }


def recipe_hash(config: PretrainConfig) -> str:
    """SHA-256 of the run's identity without its seed, so that seeds of one recipe are repeats."""
    values = identity(config)
    del values["run.seed"]
    return files.sha256_json(values)


def _stored(folder: Path, model: type[PretrainConfig]) -> PretrainConfig | None:
    path = folder / CONFIG
    try:
        return model.model_validate(files.read_json(path)) if path.exists() else None
    except (ValueError, TypeError):
        raise UserError(f"{path} is not a run's config, or not of this version: give another --output.") from None
