"""The numeric proof: the target's own network, fed by its own preprocessing of image files, computes our features.

On our side (`reference.py`): `contracts.images.read_image` → `normalise` → the reference network with the artefact's
tensors. On the other (`detectron2_proof.py`, `mmseg_proof.py`, `plain_proof.py`): the written file, the written
overlay, the framework's loader, image reader, normalisation and network. What is compared is said in `stages.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twist.contracts.weights import Backbone
from twist.converters.stages import Difference, ProofError, Stages, compare
from twist.converters.targets.safetensors_writer import is_torchvisions

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["framework", "manifest", "none"]
TOLERANCE = 1e-5
# Height and width of the proof's images: multiples of 32, since Detectron2 pads its batches to that.
SIZES = ((96, 128), (128, 64))

# Written folder, header, image files → stages of each image.
Runner = Callable[[Path, Backbone, list[Path]], list[Stages]]


@dataclass(frozen=True)
class Proof:
    """What was proven and how; `max_difference` is the largest ratio over stages and images."""

    kind: Kind
    by: str
    stages: tuple[Difference, ...] = ()
    # Same images through the network as it was trained, where the target can only run another (padding, class token).
    drift: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def max_difference(self) -> float | None:
        return max((stage.relative for stage in self.stages), default=None)

    @property
    def max_absolute_difference(self) -> float | None:
        return max((stage.absolute for stage in self.stages), default=None)

    def to_json(self) -> dict[str, Any]:
        def rows(stages: tuple[Difference, ...]) -> list[dict[str, Any]]:
            return [{**asdict(stage), "relative": stage.relative} for stage in stages]

        return {
            "kind": self.kind,
            "by": self.by,
            "tolerance": TOLERANCE,
            "measure": "max|Δ| / max|feature| of a stage, over all images",
            "max_difference": self.max_difference,
            "stages": rows(self.stages),
            "drift": rows(self.drift),
            "notes": list(self.notes),
        }


def prove(target: str, folder: Path, backbone: Backbone, tensors: Mapping[str, Tensor]) -> Proof:
    """Prove the conversion written in `folder` (weights and overlay) against `tensors` and their header.

    Raises:
        ProofError: a tensor of the target is not filled with its source's value, features differ by more than 1e-5,
            or a stage has none to compare.
    """
    import torch

    from twist.converters.reference import reference, write_images

    with warnings.catch_warnings():
        # mmcv says at import that its compiled operators are missing; no backbone here needs one.
        warnings.simplefilter("ignore")
        kind, runner, by = _runner(target, backbone)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        # A ViT is proven at the size of its position table, where no framework resizes anything.
        side = backbone.image_size
        files = write_images(Path(scratch), SIZES if side is None else ((side, side),))
        ours, drift, notes = reference(target, backbone, tensors, files)
        theirs = runner(folder, backbone, files)
    stages = compare(ours, theirs)
    worst = max(stages, key=lambda stage: stage.relative)
    if not worst.relative <= TOLERANCE:
        raise ProofError(
            f"The proof does not hold: at {worst.stage} the features of {by} differ from the source's by "
            f"{worst.relative:.2g} of their size (|Δ| {worst.absolute:.3g}, allowed {TOLERANCE:g}); nothing was "
            "written."
        )
    silent = next((stage.stage for stage in stages if not stage.feature), None)
    if silent is not None:
        raise ProofError(
            f"There is nothing to prove: at {silent} every feature of the source is 0 or no number, so any network "
            "would agree; take another checkpoint, or --no-verify writes this one unproven. Nothing was written."
        )
    return Proof(kind, by, stages, drift, notes)


def installed(framework: str) -> bool:
    """Whether a framework can be imported, without importing it."""
    return importlib.util.find_spec(framework) is not None


def _runner(target: str, backbone: Backbone) -> tuple[Kind, Runner, str]:
    """The target's own network, or what replaces it; the last says which."""
    if target == "detectron2" and installed("detectron2"):
        from twist.converters.targets import detectron2_proof

        return "framework", detectron2_proof.run, f"Detectron2 {detectron2_proof.version()}"
    if target == "mmseg" and installed("mmseg"):
        from twist.converters.targets import mmseg_proof

        return "framework", mmseg_proof.run, f"MMSegmentation {mmseg_proof.version()}"
    from twist.converters.targets import plain_proof

    lack = f"{target} is not installed"
    if target not in ("detectron2", "mmseg"):
        if target == "timm" or backbone.is_vit:
            import timm

            return "framework", plain_proof.run_timm, f"timm {timm.__version__}"
        if is_torchvisions(backbone):
            import torchvision

            return "framework", plain_proof.run_torchvision, f"torchvision {torchvision.__version__}"
        lack = "torchvision has no such network"
    by = f"a recorded manifest of names and shapes, and our reference network ({lack})"
    return "manifest", functools.partial(plain_proof.run_manifest, target), by
