"""Start from a full checkpoint of the published TWIST code: backbone, head and, when the recipe has one, teacher.

The file (published code, commit 796d36e, `train.py`) holds the state dicts `model` and `teacher`. `args` is an
argparse.Namespace, the one global that torch's safe unpickler is allowed here.
"""

import argparse
import os
from pathlib import Path

from twist.contracts.errors import UserError
from twist.contracts.networks import own_names
from twist.contracts.pickles import read_state
from twist.contracts.rename import RenameError
from twist.contracts.weights import difference
from twist.pretrain.model import Twist


def warm_start(path: str | os.PathLike[str], student: Twist, teacher: Twist | None) -> None:
    """Load the checkpoint at `path` into `student`, and its teacher into `teacher` when there is one.

    Raises:
        UserError: the file is absent or not such a checkpoint, it has no teacher where one is wanted, or a tensor has
            no counterpart or another shape.
    """
    path = Path(path)
    remedy = f"a warm start needs the full checkpoint of a TWIST run; `twist inspect {path}` shows what this file holds"
    values = read_state(path, remedy=remedy, allowed=[argparse.Namespace])
    for network, key in ((student, "model"), (teacher, "teacher")):
        if network is None:
            continue
        if not isinstance(values.get(key), dict):
            raise UserError(
                f"{path} has no `{key}` (it has {', '.join(map(str, values))}): a warm start needs a full TWIST "
                "checkpoint" + ("; set model.teacher = false to do without a teacher." if key == "teacher" else ".")
            )
        try:
            state = own_names(values[key])
            reason = difference(network.state_dict(), state, values=False)
        except RenameError as error:
            state, reason = {}, str(error).rstrip(".")
        if reason is not None:
            raise UserError(
                f"{path}, {key}: does not fit this config's network: {reason}; check model.backbone, model.classes "
                "and model.hidden_dim."
            )
        network.load_state_dict(state)
