"""The targets as data: where each writes, what it cannot hold, and the functions that write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twist.contracts.weights import Backbone
from twist.converters import detectron2_writer, mmseg_writer, safetensors_writer

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
            detectron2_writer.WEIGHTS,
            detectron2_writer.names,
            detectron2_writer.write,
            detectron2_writer.refuse,
            detectron2_writer.overlay_name,
            detectron2_writer.overlay_text,
        ),
        Target(
            "mmseg",
            "MMSegmentation",
            mmseg_writer.WEIGHTS,
            mmseg_writer.names,
            mmseg_writer.write,
            mmseg_writer.refuse,
            mmseg_writer.overlay_name,
            mmseg_writer.overlay_text,
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
