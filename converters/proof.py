"""The numeric proof: the target's own network, fed by its own preprocessing of image files, computes our features.

On our side: `contracts.images.read_image` → `normalise` → the reference network with the artefact's tensors. On the
other: the written file, the written overlay, the framework's loader, image reader, normalisation and network. What
is compared is res2 … res5 of a ResNet, or the tokens after every block of a ViT; the measure of a stage is
max|Δ| / max|feature|, because a trained network's features reach into the hundreds, where 1e-5 absolute is below
float32's own step.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from contracts.errors import UserError
from contracts.weights import Backbone
from converters import manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["framework", "manifest", "none"]
TOLERANCE = 1e-5
# Height and width of the proof's images: multiples of 32, since Detectron2 pads its batches to that.
SIZES = ((96, 128), (128, 64))

# One image: what the target computes at each stage.
Stages = dict[str, "Tensor"]
# Written folder, header, image files → stages of each image.
Runner = Callable[[Path, Backbone, list[Path]], list[Stages]]


class ProofError(UserError):
    """The target does not compute the source's features, or not all of its tensors were filled."""


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


def prove(target: str, folder: Path, backbone: Backbone, tensors: Mapping[str, Tensor]) -> Proof:
    """Prove the conversion written in `folder` (weights and overlay) against `tensors` and their header.

    Raises:
        ProofError: a tensor of the target is not filled with its source's value, features differ by more than 1e-5,
            or a stage has none to compare.
    """
    import tempfile

    import torch

    with warnings.catch_warnings():
        # mmcv says at import that its compiled operators are missing; no backbone here needs one.
        warnings.simplefilter("ignore")
        runner, by = _runner(target, backbone)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        # A ViT is proven at the size of its position table, where no framework resizes anything.
        side = backbone.image_size
        files = write_images(Path(scratch), SIZES if side is None else ((side, side),))
        ours, drift, notes = reference(target, backbone, tensors, files)
        theirs = (runner or _manifest_runner(target))(folder, backbone, files)
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
    return Proof("framework" if runner else "manifest", by, stages, drift, notes)


def compare(ours: list[Stages], theirs: list[Stages]) -> tuple[Difference, ...]:
    """The difference of each stage over all images; equal NaNs agree, any other NaN is an infinite difference."""
    import torch

    result = []
    for stage in ours[0]:
        absolute = feature = 0.0
        for mine, other in zip(ours, theirs, strict=True):
            a = mine[stage]
            if stage not in other or other[stage].shape != a.shape:
                shape = tuple(other[stage].shape) if stage in other else "missing"
                raise ProofError(
                    f"The proof does not hold: {stage} is {shape}, expected {tuple(a.shape)}; nothing was written."
                )
            b = other[stage]
            both = a.isnan() & b.isnan()
            delta = torch.where(both, torch.zeros_like(a), a - b).abs().nan_to_num(nan=float("inf"))
            absolute = max(absolute, float(delta.max()))
            feature = max(feature, float(a.nan_to_num(nan=0.0).abs().max()))
        result.append(Difference(stage, absolute, feature))
    return tuple(result)


def reference(
    target: str, backbone: Backbone, tensors: Mapping[str, Tensor], files: list[Path]
) -> tuple[list[Stages], tuple[Difference, ...], tuple[str, ...]]:
    """Our features as the target can compute them, the drift from the network as trained, and what to say about it."""

    def run(header: Backbone, class_token: bool = True) -> list[Stages]:
        network = _our_network(header, tensors)
        return [_features(network, _input(file, header), class_token) for file in files]

    trained = run(backbone)
    if backbone.padding == "same" and target != "torchvision":
        plain = run(backbone.model_copy(update={"padding": "symmetric"}))
        note = (
            "the source pads as TensorFlow ('same'), the target symmetrically: the proof compares with the symmetric "
            "network, and `drift` is how far that network is from the one that was trained; --to torchvision keeps "
            "'same'"
        )
        return plain, compare(trained, plain), (note,)
    if backbone.is_vit and target == "detectron2":
        bare = run(backbone, class_token=False)
        note = (
            "Detectron2's ViT has no class token: the proof compares patch tokens of a network without it, and "
            "`drift` is how far those are from the network with it"
        )
        patches = [{stage: value[:, 1:] for stage, value in image.items()} for image in trained]
        return bare, compare(patches, bare), (note,)
    return trained, (), ()


def write_images(folder: Path, sizes: tuple[tuple[int, int], ...]) -> list[Path]:
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
        path = folder / f"proof{height}x{width}.png"
        Image.fromarray(np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)).save(path)
        files.append(path)
    return files


def installed(framework: str) -> bool:
    """Whether a framework can be imported, without importing it."""
    return importlib.util.find_spec(framework) is not None


def _runner(target: str, backbone: Backbone) -> tuple[Runner | None, str]:
    """The target's own network, or None with what replaces it."""
    fallback = "a recorded manifest of names and shapes, and our reference network"
    if target == "detectron2" and installed("detectron2"):
        from converters.detectron2_proof import run as run_detectron2
        from converters.detectron2_proof import version as detectron2_version

        return run_detectron2, f"Detectron2 {detectron2_version()}"
    if target == "mmseg" and installed("mmseg"):
        from converters.mmseg_proof import run as run_mmseg
        from converters.mmseg_proof import version as mmseg_version

        return run_mmseg, f"MMSegmentation {mmseg_version()}"
    if target in ("detectron2", "mmseg"):
        return None, f"{fallback} ({target} is not installed)"
    if target == "timm" or backbone.is_vit:
        import timm

        return _run_timm, f"timm {timm.__version__}"
    special = backbone.width > 1 or backbone.stride_in == "1x1" or backbone.padding == "same"
    if special or backbone.channel_order == "BGR" or backbone.architecture == "resnet200":
        return None, f"{fallback} (torchvision has no such network)"
    import torchvision

    return _run_torchvision, f"torchvision {torchvision.__version__}"


def _run_torchvision(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    import torch
    from safetensors.torch import load_file
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    network = getattr(models, backbone.architecture)(weights=None)
    network.fc = torch.nn.Identity()
    network.load_state_dict(load_file(folder / "backbone.safetensors"), strict=True)
    stages = create_feature_extractor(network.eval(), {f"layer{index}": f"res{index + 1}" for index in (1, 2, 3, 4)})
    return [stages(_pil_input(file, backbone)) for file in files]


def _run_timm(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    import timm
    from safetensors.torch import load_file

    from converters.safetensors_writer import timm_config

    weights = next(folder.glob("*.safetensors"))
    config = timm_config(backbone)
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
    options: dict[str, Any] = {"img_size": backbone.image_size} if backbone.is_vit else {}
    network: Any = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **options)
    network.load_state_dict(load_file(weights), strict=True)
    network.eval()
    pixels = backbone.model_copy(
        update={
            "mean": tuple(config["pretrained_cfg"]["mean"]),
            "std": tuple(config["pretrained_cfg"]["std"]),
            "input_range": 1,
        }
    )
    if backbone.is_vit:
        return [_features(network, _pil_input(file, pixels), True) for file in files]
    result = []
    for file in files:
        features = network.forward_intermediates(_pil_input(file, pixels), intermediates_only=True)
        result.append({f"res{index + 1}": feature for index, feature in enumerate(features) if index > 0})
    return result


def _manifest_runner(target: str) -> Runner:
    """Without the framework: names and shapes against the manifest, then the file read back into our network."""

    def run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
        from converters.read import load_source
        from converters.targets import TARGETS

        writer = TARGETS[target]
        tensors = _written(folder / writer.weights)
        shapes = manifest.shapes_of(manifest.Geometry(backbone.architecture, backbone.width, backbone.image_size))
        expected = {new: shapes[old] for old, new in writer.names(backbone).items()}
        check_filled(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        header = backbone if target == "torchvision" else backbone.model_copy(update={"padding": "symmetric"})
        if backbone.is_vit and target == "detectron2":
            named = {old: tensors[new] for old, new in writer.names(backbone).items()}
            missing = {name: shapes[name] for name in shapes if name not in named}
            network = _our_network(header, {**named, **_neutral(missing)})
            return [_features(network, _input(file, header), False) for file in files]
        network = _our_network(header, load_source(folder / writer.weights).tensors)
        return [_features(network, _input(file, header), True) for file in files]

    return run


def check_filled(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """`ProofError` unless names and shapes are the same: every tensor of the target filled, none too many."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [name for name in expected if name in found and found[name] != expected[name]]
    if missing or extra or misshapen:
        first = (missing or misshapen or extra)[0]
        raise ProofError(
            f"The proof does not hold: of the target's {len(expected)} tensors {len(missing)} are not filled and "
            f"{len(misshapen)} have another shape, and {len(extra)} have no place in it (first: {first}); nothing was "
            "written."
        )


def check_loaded(expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """`ProofError` unless every tensor of the network that was loaded is the written one, bit for bit."""
    from converters.torch_file import same_bytes

    check_filled(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: tuple(tensor.shape) for name, tensor in loaded.items()},
    )
    other = [name for name in expected if not same_bytes(expected[name].contiguous(), loaded[name].contiguous())]
    if other:
        raise ProofError(
            f"The proof does not hold: {len(other)} tensors of the loaded network are not the written ones (first: "
            f"{other[0]}); nothing was written."
        )


def _written(path: Path) -> dict[str, Tensor]:
    from converters.containers import read_contents
    from converters.detect import state_dicts

    return dict(next(state_dicts(read_contents(path).value))[1])


def _neutral(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    # The class token and the last norm take no part in what is compared.
    import torch

    return {name: torch.ones(shape) for name, shape in shapes.items()}


def _our_network(header: Backbone, tensors: Mapping[str, Tensor]) -> torch.nn.Module:
    """The reference network around `tensors` themselves: no random initialisation, no second copy."""
    import torch

    from contracts.networks import network_of

    with torch.device("meta"):
        network = network_of(header)
    network.load_state_dict(dict(tensors), strict=True, assign=True)
    return network.eval()


def _input(file: Path, backbone: Backbone) -> Tensor:
    from contracts.images import read_image
    from contracts.networks import normalise

    return normalise(read_image(file)[None], backbone)


def _pil_input(file: Path, backbone: Backbone) -> Tensor:
    """torchvision's and timm's usual path: PIL, [0, 1], mean and std."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    scale = 1 / backbone.input_range
    image = transforms.to_tensor(Image.open(file).convert("RGB"))
    return transforms.normalize(image, [m * scale for m in backbone.mean], [s * scale for s in backbone.std])[None]


def _features(network: torch.nn.Module, images: Tensor, class_token: bool) -> Stages:
    from contracts.networks import stage_features

    if class_token:
        return stage_features(network, images)
    # timm's ViT without its class token, as Detectron2 runs it: patch positions only, every block on patches.
    x = network.patch_embed(images)  # type: ignore[operator]
    x = x.flatten(1, 2) if x.ndim == 4 else x
    x = x + network.pos_embed[:, 1:]  # type: ignore[index]
    stages = {}
    for index, block in enumerate(network.blocks):  # type: ignore[arg-type]
        x = block(x)
        stages[f"block{index}"] = x
    return stages
