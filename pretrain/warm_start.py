"""Start from a full checkpoint of the published TWIST code: backbone, head and, when the recipe has one, teacher.

Layout (published code, commit 796d36e, `train.py`): `model` and `teacher` are state dicts with `backbone.` and
`projection_heads.` (contracts/networks.py). `args` is an argparse.Namespace, the one global that the safe unpickler is
allowed here. Every tensor of the file is accounted for, and every one of ours is filled.
"""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twist.contracts.errors import UserError
from twist.contracts.networks import PUBLISHED_NAMES
from twist.pretrain.model import Twist

# Module prefixes, theirs → ours.
PREFIXES = {"backbone.": "backbone.", **{theirs: f"head.{ours}" for theirs, ours in PUBLISHED_NAMES.items()}}


def warm_start(path: str | os.PathLike[str], student: Twist, teacher: Twist | None) -> None:
    """Load the checkpoint at `path` into `student`, and its teacher into `teacher` when there is one.

    Raises:
        UserError: the file is absent or not such a checkpoint, it has no teacher where one is wanted, or a tensor has
            no counterpart or another shape.
    """
    path = Path(path)
    values = _read(path)
    for network, key in ((student, "model"), (teacher, "teacher")):
        if network is None:
            continue
        if not isinstance(values.get(key), dict):
            raise UserError(
                f"{path} has no `{key}` (it has {', '.join(map(str, values))}): a warm start needs a full TWIST "
                "checkpoint" + ("; set model.teacher = false to do without a teacher." if key == "teacher" else ".")
            )
        network.load_state_dict(renamed(values[key], network, where=f"{path}, {key}"))


def renamed(theirs: dict[str, Tensor], network: Twist, *, where: str) -> dict[str, Tensor]:
    """`theirs` under our names; total in both directions, or `UserError`."""
    expected = network.state_dict()
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in theirs.items():
        bare = name.removeprefix("module.")
        prefix = next((p for p in PREFIXES if bare.startswith(p)), None)
        target = None if prefix is None else PREFIXES[prefix] + bare.removeprefix(prefix)
        if target is None or target not in expected or target in ours:
            unknown.append(name)
        else:
            ours[target] = tensor
    missing = sorted(expected.keys() - ours.keys())
    misshapen = sorted(name for name, tensor in ours.items() if tensor.shape != expected[name].shape)
    if unknown or missing or misshapen:
        shapes = [f"{n} is {tuple(ours[n].shape)}, not {tuple(expected[n].shape)}" for n in misshapen]
        raise UserError(
            f"{where}: does not fit this config's network: {len(unknown)} tensors unknown, {len(missing)} missing, "
            f"{len(misshapen)} of another shape (first: {[*unknown, *missing, *shapes][0]}); check model.backbone, "
            "model.classes and model.hidden_dim."
        )
    return ours


def _read(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}: check run.warm_start.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        # Not torch's own words, which advise to read the file without its safe unpickler.
        raise UserError(
            f"{path} cannot be read safely as a TWIST checkpoint ({type(error).__name__}): a warm start needs the full "
            f"checkpoint of a run; `twist inspect {path}` says what this file is."
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no dictionary: a warm start needs a full TWIST checkpoint.")
    return values
