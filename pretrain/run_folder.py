"""What a pretraining's folder holds, and what makes its run this run and no other.

config.json            the resolved config          plan.txt             what the run is going to do
metrics.jsonl          one line a step              tensorboard/         the same as curves
checkpoints/           to resume from               backbone.safetensors the result, for every later stage (with
                                                    a teacher, teacher_backbone.safetensors is the one to take)
curves.png             how it went                  lock                 held by the running process
"""

from pathlib import Path
from typing import Any

from twist.contracts import files
from twist.contracts import run_folder as folders
from twist.contracts.config import identity_of, read_stored
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.pretrain import checkpoint
from twist.pretrain.config import PretrainConfig

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
CONFIG = "config.json"


def refuse_foreign(folder: Path, model: type[PretrainConfig]) -> None:
    """`UserError` where `folder` holds what a run would replace, and no config of a run."""
    folders.refuse_foreign(folder, run_file=CONFIG, written=WRITTEN)
    if (folder / CONFIG).exists():
        _stored(folder / CONFIG, model)


def prepare(folder: Path, config: PretrainConfig, *, resume: bool) -> None:
    """Make sure that `folder` is this run's, and write its config. The lock must be held.

    Raises:
        UserError: it holds another run, or a run and `resume` is not given.
    """
    before = _stored(folder / CONFIG, type(config)) if (folder / CONFIG).exists() else None
    # A start that failed before its first step left nothing to protect: a corrected config may take the folder.
    begun = (folder / "metrics.jsonl").exists() or any(folder.glob("checkpoints/step_*.json"))
    if before is not None and begun:
        folders.refuse_other_run(folder, identity(before), identity(config))
        if not resume:
            folders.refuse_second_start(folder, {})
    (folder / "checkpoints").mkdir(exist_ok=True)
    folders.remove_leftovers(folder)
    checkpoint.clean(folder / "checkpoints")
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
    return sha256_json(values)


def _stored(path: Path, model: type[PretrainConfig]) -> PretrainConfig:
    try:
        return read_stored(files.read_json(path), model)
    except (ValueError, TypeError):
        raise UserError(f"{path} is not a run's config, or not of this version: give another --output.") from None
