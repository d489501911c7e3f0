"""TWIST's own head as a classifier: read from a training checkpoint, ours or the published code's.

The class of an image is the largest logit, every norm with its running statistics. An artefact holds no head
(`contracts/networks.py`), so the checkpoint is named beside it, and must hold the very backbone that is measured.
`N` images, `D` features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from twist.contracts.errors import UserError
from twist.contracts.networks import PUBLISHED_NAMES, Head
from twist.converters.containers import read_contents

Activation = Literal["relu", "gelu"]
# Module prefixes in a checkpoint → the head's own names: of our run folders, and of published files.
_LAYOUTS = ({f"head.{part}.": f"{part}." for part in ("hidden", "output", "norm")}, PUBLISHED_NAMES)


def read_head(path: Path, backbone: Mapping[str, Tensor], *, activation: Activation | None) -> Head:
    """The head beside `backbone` in the checkpoint at `path`, in eval mode.

    Student (`model`) and teacher are both looked at; the one whose backbone is equal to `backbone` counts.

    Args:
        activation: of the hidden layers; None takes it from the checkpoint's own settings.

    Raises:
        UserError: no checkpoint, no head in it, another backbone, a head of another shape, or an unknown activation.
    """
    value = read_contents(path).value
    networks = {
        name: {key.removeprefix("module."): tensor for key, tensor in value[name].items()}
        for name in ("model", "teacher")
        if isinstance(value, dict) and isinstance(value.get(name), dict)
    }
    if not networks:
        raise UserError(
            f"{path} holds no TWIST network with its head: name a training checkpoint (checkpoints/step_….pt of "
            "our run folder, or the published full checkpoint)."
        )
    state = next((state for state in networks.values() if _holds(state, backbone)), None)
    if state is None:
        raise UserError(
            f"The head in {path} belongs to another backbone than the weights given: its backbone tensors differ; name "
            "the checkpoint that these weights were taken from."
        )
    for layout in _LAYOUTS:
        renamed = _renamed(state, layout)
        if renamed:
            return _build(renamed, activation or _activation(value, path), path)
    raise UserError(f"{path} holds the backbone but no head: it was saved without one.")


@torch.no_grad()
def head_classes(head: Head, features: Tensor) -> Tensor:
    """The head's class of each row of (N, D) features, (N,)."""
    return head(features).argmax(dim=1)


def _holds(state: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> bool:
    return all(
        f"backbone.{name}" in state
        and state[f"backbone.{name}"].shape == tensor.shape
        and torch.equal(state[f"backbone.{name}"].to(tensor.dtype), tensor.cpu())
        for name, tensor in backbone.items()
    )


def _renamed(state: Mapping[str, Tensor], layout: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        target + name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        for prefix, target in layout.items()
        if name.startswith(prefix)
    }


def _build(state: dict[str, Tensor], activation: Activation, path: Path) -> Head:
    try:
        hidden, features = state["hidden.0.weight"].shape
        head = Head(features, hidden, len(state["output.weight"]), activation=activation)
        head.load_state_dict(
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        )
    except (KeyError, ValueError, RuntimeError):
        raise UserError(
            f"The head in {path} is not Linear–BN–act–Linear–BN–act–Linear–BN, the only one that TWIST's recipes have."
        ) from None
    return head.eval()


def _activation(value: dict[str, Any], path: Path) -> Activation:
    """relu or gelu: the published checkpoint's `args.act`, or `model.activation` of our run folder's config.json."""
    settings = getattr(value.get("args"), "state", None)
    found = settings.get("act") if isinstance(settings, dict) else None
    config = path.resolve().parent.parent / "config.json"
    if found is None and config.is_file():
        found = json.loads(config.read_text()).get("model", {}).get("activation")
    if found not in ("relu", "gelu"):
        raise UserError(
            f"{path} does not say which activation its head has: add head_activation=relu (TWIST's ResNets) or "
            "head_activation=gelu (its ViTs)."
        )
    return found
