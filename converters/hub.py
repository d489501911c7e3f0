"""The `config.json` that timm and the model hubs put beside a weights file: what the tensors alone do not say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from twist.converters.sources import Pixels

# timm's names of the networks that an artefact describes; others (resnetaa50, resnet50_gn) may have the same tensors.
TIMM_NAMES = re.compile(
    r"(tv_|gluon_|ssl_|swsl_)?resnet\d+(_v1b)?|(vit|deit)_(small|base)_patch16(_\d+)?", re.IGNORECASE
)


def config_of(path: Path) -> dict[str, Any]:
    """The settings beside the file, {} when there are none."""
    if path.name not in ("model.safetensors", "pytorch_model.bin"):
        return {}
    try:
        config = json.loads((path.parent / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and "architecture" in config else {}


def pixels_of(path: Path) -> Pixels | None:
    """Mean and std that the settings name; None when they do not."""
    config = config_of(path)
    settings = config.get("pretrained_cfg", config)
    try:
        mean, std = (tuple(float(value) for value in settings[key]) for key in ("mean", "std"))
        return Pixels(mean=mean, std=std) if len(mean) == len(std) == 3 else None  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None


def other_network(path: Path, architecture: str) -> str | None:
    """Why the network that the file beside `path` names is not the one its tensors look like; None when it may be."""
    named = config_of(path).get("architecture")
    if not isinstance(named, str) or TIMM_NAMES.fullmatch(named.partition(".")[0]):
        return None
    return f"the config.json beside it calls it {named}, which is not the {architecture} it looks like"
