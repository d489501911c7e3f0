"""TWIST's own head as a classifier: read from a training checkpoint, ours or the published code's.

The class of an image is the largest logit, every norm with its running statistics. An artefact holds no head, so the
training checkpoint is named as well, and must hold the very backbone that is measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.networks import Head, own_names
from twist.contracts.weights import difference
from twist.converters.find import state_at
from twist.converters.open import as_torch, read_contents

Activation = Literal["relu", "gelu"]


def read_head(path: Path, backbone: Mapping[str, Tensor], *, activation: Activation | None) -> Head:
    """The head that was trained with `backbone` (float32), from the checkpoint at `path`, in eval mode.

    Of student (`model`) and teacher the one whose backbone is equal to `backbone` counts. `activation` of the hidden
    layers is by default that of the checkpoint's own settings. `UserError` where there is no such head.
    """
    value = read_contents(path).value
    entries = value if isinstance(value, dict) else {}
    networks = [as_torch(state) for name in ("model", "teacher") if (state := state_at(entries, (name,)))]
    if not networks:
        raise UserError(
            f"{path} holds no TWIST network with its head: name a training checkpoint (checkpoints/step_….pt of "
            "our run folder, or the published full checkpoint)."
        )
    for network in networks:
        named = own_names(network)
        theirs = {name: named[f"backbone.{name}"] for name in backbone if f"backbone.{name}" in named}
        if difference(backbone, {name: t.to(backbone[name].dtype) for name, t in theirs.items()}) is None:
            head = {name.removeprefix("head."): t for name, t in named.items() if name.startswith("head.")}
            return _build(head, activation or _activation(entries, path), path)
    raise UserError(
        f"The head in {path} belongs to another backbone than the weights given: its backbone tensors differ; name "
        "the checkpoint that these weights were taken from."
    )


def _build(state: dict[str, Tensor], activation: Activation, path: Path) -> Head:
    if not state:
        raise UserError(f"{path} holds the backbone but no head: it was saved without one.")
    try:
        hidden, features = state["hidden.0.weight"].shape
        head = Head(features, hidden, len(state["output.weight"]), activation=activation)
        head.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
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
        model = files.read_json(config, remedy="add head_activation=relu or head_activation=gelu").get("model")
        found = model.get("activation") if isinstance(model, dict) else None
    if found not in ("relu", "gelu"):
        raise UserError(
            f"{path} does not say which activation its head has: add head_activation=relu (TWIST's ResNets) or "
            "head_activation=gelu (its ViTs)."
        )
    return found
