"""The targets as data: where each writes, what it cannot hold, and the functions that write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twist.contracts.weights import Backbone
from twist.converters.targets import detectron2, mmseg, safetensors_writer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Target:
    """One target. `refuse` gives the reason why it has no network of this kind, or None."""

    name: str
    title: str
    weights: str
    names: Callable[[Backbone], dict[str, str]]
    write: Callable[[Path, Mapping[str, Tensor], Backbone], None]
    refuse: Callable[[Backbone], str | None] = lambda _: None
    overlay_name: Callable[[Backbone], str] | None = None
    overlay_text: Callable[[Backbone], str] | None = None


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "detectron2",
            "Detectron2",
            detectron2.WEIGHTS,
            detectron2.names,
            detectron2.write,
            detectron2.refuse,
            detectron2.overlay_name,
            detectron2.overlay_text,
        ),
        Target(
            "mmseg",
            "MMSegmentation",
            mmseg.WEIGHTS,
            mmseg.names,
            mmseg.write,
            mmseg.refuse,
            mmseg.overlay_name,
            mmseg.overlay_text,
        ),
        Target(
            "torchvision",
            "the artefact (torchvision's names, timm's for ViTs)",
            "backbone.safetensors",
            safetensors_writer.names,
            safetensors_writer.write_artefact,
        ),
        Target(
            "timm",
            "timm",
            "model.safetensors",
            safetensors_writer.names,
            safetensors_writer.write_timm,
            safetensors_writer.refuse_timm,
        ),
    )
}
