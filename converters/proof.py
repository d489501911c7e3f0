"""The numeric proof: the target's own network, with its own preprocessing of image files, computes our features.

One side is the reference network with the artefact's tensors (`contracts.networks`); the other is the written file and
settings in the framework's loader, image reader, normalisation and network (`targets/`). Where the framework is not
installed, the file is read back into the reference network. The measure is max|Δ| / max|feature| of a stage, because a
trained network's features reach into the hundreds, where 1e-5 absolute is below float32's own step.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twist.contracts.errors import UserError
from twist.contracts.shapes import tensors_of
from twist.contracts.weights import Backbone, difference
from twist.converters.find import state_dicts
from twist.converters.open import as_torch, read_contents

if TYPE_CHECKING:
    from torch import Tensor, nn

    from twist.converters.targets import ProofRun, Stages, Target

Kind = Literal["framework", "manifest", "none"]
TOLERANCE = 1e-5
# Height and width of the proof's images: multiples of 32, since Detectron2 pads its batches to that.
SIZES = ((96, 128), (128, 64))
# Patches of a ViT's second image, not square, so that the position table is resized.
GRID = (20, 12)


class ProofError(UserError):
    """The target does not compute the source's features, or not all of its tensors were filled."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The proof does not hold: {reason}; nothing was written.")


@dataclass(frozen=True)
class Difference:
    """One stage: the largest |Δ|, the largest |feature|, and their ratio (the measure)."""

    stage: str
    absolute: float
    feature: float

    @property
    def relative(self) -> float:
        return self.absolute / self.feature if self.feature else self.absolute


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


def prove(target: Target, folder: Path, backbone: Backbone, tensors: Mapping[str, Tensor]) -> Proof:
    """Prove the conversion written in `folder` (weights and settings) against `tensors` and their header.

    Raises:
        ProofError: a tensor of the target is not filled with its source's value, features differ by more than 1e-5,
            or a stage has none to compare.
    """
    import torch

    kind, run, by = runner(target, backbone)
    sizes: tuple[tuple[int, int], ...] = SIZES
    if backbone.image_size is not None:  # that of its tables, and of a ViT another
        sizes = ((backbone.image_size,) * 2,)
    if backbone.is_vit and not target.fixed_size:
        sizes += ((GRID[0] * backbone.patch_size, GRID[1] * backbone.patch_size),)
    computed, notes = _computed(target, backbone)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        images = write_images(Path(scratch), sizes)
        ours = _features_of(computed, tensors, images, target)
        drift = () if computed == backbone else compare(_features_of(backbone, tensors, images, target), ours)
        with quiet():
            theirs = run(folder, backbone, images)
    stages = compare(ours, theirs)
    worst = max(stages, key=lambda stage: stage.relative)
    if not worst.relative <= TOLERANCE:
        raise ProofError(
            f"at {worst.stage} the features of {by} differ from the source's by {worst.relative:.2g} of their size "
            f"(|Δ| {worst.absolute:.3g}, allowed {TOLERANCE:g})"
        )
    empty = next((stage.stage for stage in stages if not stage.feature), None)
    if empty is not None:
        raise ProofError(
            f"at {empty} every feature of the source is 0 or NaN, so that any network would agree (take another "
            "checkpoint, or --no-verify writes this one unproven)"
        )
    return Proof(kind, by, stages, drift, notes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines and no prints: loaders warn about heads that no backbone file fills; `check_loaded` decides."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mmcv says that its compiled operators are missing; none is needed here
            yield
    finally:
        logging.disable(logging.NOTSET)


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def runner(target: Target, backbone: Backbone) -> tuple[Kind, ProofRun, str]:
    """What runs the target's side of the proof, and by whom: the framework, or the file read back into our network."""
    lack = f"{target.package} is not installed"
    if installed(target.package):
        framework = target.framework(backbone)
        if not isinstance(framework, str):
            from importlib import metadata

            run, package = framework
            distributions = metadata.packages_distributions().get(package, [package])
            return "framework", run, f"{package} {metadata.version(distributions[0])}"
        lack = framework
    by = f"a recorded manifest of names and shapes, and our reference network ({lack})"
    return "manifest", functools.partial(_read_back, target), by


def compare(ours: list[Stages], theirs: list[Stages]) -> tuple[Difference, ...]:
    """The difference of each stage over all images; equal NaNs agree, any other NaN is an infinite difference."""
    import torch

    result = []
    for stage in ours[0]:
        absolute = feature = 0.0
        for mine, other in zip(ours, theirs, strict=True):
            a, b = mine[stage], other.get(stage)
            if b is None or b.shape != a.shape:
                shape = "missing" if b is None else tuple(b.shape)
                raise ProofError(f"{stage} is {shape}, expected {tuple(a.shape)}")
            both = a.isnan() & b.isnan()
            delta = torch.where(both, torch.zeros_like(a), a - b).abs().nan_to_num(nan=float("inf"))
            absolute = max(absolute, float(delta.max()))
            feature = max(feature, float(a.nan_to_num(nan=0.0).abs().max()))
        result.append(Difference(stage, absolute, feature))
    return tuple(result)


def check_loaded(written: Mapping[str, Any], loaded: Mapping[str, Any], *, values: bool = True) -> None:
    """`ProofError` unless the network that was loaded holds exactly the written tensors, bit for bit."""
    reason = difference(written, loaded, values=values)
    if reason is not None:
        raise ProofError(f"the target's network does not hold the written tensors: {reason}")


def written_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a weights file that a target wrote."""
    return as_torch(next(arrays for _, arrays in state_dicts(read_contents(path).value)))


def block_outputs(network: nn.Module, blocks: Iterable[nn.Module], images: Tensor) -> Stages:
    """What each of `blocks` gives when `network` runs on `images`, as `block0`, `block1`, …."""
    stages: Stages = {}
    hooks = [
        block.register_forward_hook(
            lambda _module, _inputs, output, name=f"block{index}": stages.update({name: output})
        )
        for index, block in enumerate(blocks)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return stages


def write_images(folder: Path, sizes: Iterable[tuple[int, int]]) -> list[Path]:
    """Deterministic PNGs of these (height, width): smooth and sharp parts, and three channels that differ."""
    import numpy as np
    from PIL import Image

    files = []
    for index, (height, width) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width].astype(np.int64)
        # Integers only, so that every machine and version draws the same pixels.
        red = (x * 255) // max(width - 1, 1)
        green = (y * y * 7 + x * 13 + 31 * index) % 256
        blue = np.where(((x // 16) + (y // 16)) % 2 == 0, 40 + 3 * index, 220) + (x * y) % 17
        files.append(folder / f"proof{height}x{width}.png")
        Image.fromarray(np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)).save(files[-1])
    return files


# What a target does with a field of a ViT's description that it changes.
_SAYS = {
    "resize": "resizes the position table for images of other sizes in its own way, {new}",
    "norm_eps": "has layer norms with the epsilon {new}",
}


def _computed(target: Target, backbone: Backbone) -> tuple[Backbone, tuple[str, ...]]:
    """The header of the network that the target can run, and a note where that is not the one that was trained."""
    said = []
    changes: dict[str, Any] = {}
    if backbone.padding == "same" and not target.keeps_padding:
        changes["padding"] = "symmetric"
        said.append("pads symmetrically ('same' as TensorFlow in the source's code; --to torchvision keeps it)")
    if backbone.is_vit:
        old = backbone.transformer
        new = old.model_copy(update=target.changes(backbone))
        if new != old:
            changes["vit"] = new
            fields = [name for name in sorted(_SAYS) if getattr(new, name) != getattr(old, name)]
            values = {name: (getattr(new, name), getattr(old, name)) for name in fields}
            said += [
                f"{_SAYS[name].format(new=now)} ({was} in the source's code)" for name, (now, was) in values.items()
            ]
    if not said:
        return backbone, ()
    note = f"{target.title} {' and '.join(said)}: the proof compares with its network, and `drift` is how far the "
    return backbone.model_copy(update=changes), (note + "source's is away",)


def _read_back(target: Target, folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """Without the framework: names and shapes of the written file, and its tensors in our network."""
    import torch

    expected = tensors_of(backbone)
    names, written = target.names(backbone), written_tensors(folder / target.weights)
    check_loaded({new: expected[old] for old, new in names.items()}, written, values=False)
    # What the target has no place for takes no part in what is compared.
    tensors = {
        name: written[names[name]] if name in names else torch.ones(array.shape) for name, array in expected.items()
    }
    return _features_of(_computed(target, backbone)[0], tensors, files, target)


def _features_of(backbone: Backbone, tensors: Mapping[str, Tensor], files: list[Path], target: Target) -> list[Stages]:
    """The stages of each image in the reference network with `tensors`."""
    from twist.contracts.images import read_image
    from twist.contracts.networks import network_of, normalise, stage_features

    network, stages = network_of(backbone, tensors, share=True), target.stages or stage_features
    return [stages(network, normalise(read_image(file)[None], backbone)) for file in files]
