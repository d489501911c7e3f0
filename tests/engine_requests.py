"""What the tests of both framework engines start from: written weights, as the converter makes them, and requests.

Names: `suffix` is the overlay's, `.yaml` for Detectron2 and `.py` for MMSegmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from contracts.networks import build_backbone
from contracts.weights import Backbone
from transfer.protocols import find_protocol
from transfer.request import Request, split_overrides

Written = tuple[Path, Path, Backbone]


def weights_maker(folder: Path, writer: ModuleType, *, suffix: str) -> Callable[[str], Written]:
    """architecture → (weights.pth, overlay, header) of a seeded random network, written once by a `*_writer` module."""
    made: dict[str, Written] = {}

    def make(architecture: str) -> Written:
        if architecture not in made:
            torch.manual_seed(3)
            header = Backbone(architecture=architecture, method="twist")  # type: ignore[arg-type]
            file, overlay = folder / f"{architecture}.pth", folder / f"{architecture}{suffix}"
            writer.write(file, build_backbone(architecture).state_dict(), header)
            overlay.write_text(writer.overlay_text(header))
            made[architecture] = file, overlay, header
        return made[architecture]

    return make


def request_maker(tree: Path, weights: Callable[[str], Written], output: Path) -> Callable[..., Request]:
    """(protocol, *overrides, …) → the request that `twist transfer` would make, in the folder `output`."""

    def make(
        protocol: str, *overrides: str, architecture: str = "resnet18", method: str = "twist", **more: Any
    ) -> Request:
        controls, rest = split_overrides(overrides)
        output.mkdir(exist_ok=True)
        return Request(
            find_protocol(protocol),
            tree,
            output,
            *weights(architecture),
            method,
            overrides=rest,
            controls=controls,
            **more,
        )

    return make
