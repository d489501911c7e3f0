"""DeepMind's BYOL: haiku's nested parameters and statistics of each network, joined under plain names."""

from __future__ import annotations

from typing import Any


def joined(value: dict[str, Any]) -> dict[str, Any]:
    """The file's contents with `experiment_state` as {network: state dict}; anything else as it is."""
    experiment = value.get("experiment_state")
    if not isinstance(experiment, dict):
        return value
    networks = {}
    for network in ("online", "target"):
        parts = [experiment.get(f"{network}_{part}") for part in ("params", "state")]
        if all(isinstance(part, dict) for part in parts):
            networks[network] = {
                _haiku_name(module, leaf): tensor
                for part in parts
                for module, leaves in part.items()  # type: ignore[union-attr]
                for leaf, tensor in leaves.items()
                # `hidden` and `counter` belong to the running mean's own bookkeeping; `average` is the statistic.
                if leaf not in ("hidden", "counter")
            }
    return {**value, "experiment_state": networks}


def _haiku_name(module: str, leaf: str) -> str:
    """`res_net50/~/block_group_0/~/block_0/~/conv_0` + `w` → `block_group_0/block_0/conv_0/w`."""
    parts = [part for part in module.split("/") if part != "~"]
    starts = ("initial_", "block_group_", "projector", "predictor", "classifier")
    first = next((index for index, part in enumerate(parts) if part.startswith(starts)), 0)
    parts = [part.removesuffix("_1") if part.startswith("initial_") else part for part in parts[first:]]
    return "/".join((*parts, leaf))
