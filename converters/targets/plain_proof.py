"""The proof's other side where no framework has a say: torchvision, timm, and a recorded manifest in place of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import functional as transforms

from twist.contracts.weights import Backbone
from twist.converters import manifest
from twist.converters.containers import read_contents
from twist.converters.detect import state_dicts
from twist.converters.read import load_source
from twist.converters.reference import features, pixels_of, reference_network
from twist.converters.stages import Stages, check_filled
from twist.converters.targets.registry import TARGETS
from twist.converters.targets.safetensors_writer import timm_config


def run_torchvision(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    network = getattr(models, backbone.architecture)(weights=None)
    network.fc = torch.nn.Identity()
    network.load_state_dict(load_file(folder / "backbone.safetensors"), strict=True)
    stages = create_feature_extractor(network.eval(), {f"layer{index}": f"res{index + 1}" for index in (1, 2, 3, 4)})
    return [stages(_pil_input(file, backbone)) for file in files]


def run_timm(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    import timm

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
        return [features(network, _pil_input(file, pixels), True) for file in files]
    result = []
    for file in files:
        maps = network.forward_intermediates(_pil_input(file, pixels), intermediates_only=True)
        result.append({f"res{index + 1}": feature for index, feature in enumerate(maps) if index > 0})
    return result


def run_manifest(target: str, folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """Without the framework: names and shapes against the manifest, then the file read back into our network."""
    writer = TARGETS[target]
    tensors = _written(folder / writer.weights)
    shapes = manifest.shapes_of(manifest.Geometry(backbone.architecture, backbone.width, backbone.image_size))
    expected = {new: shapes[old] for old, new in writer.names(backbone).items()}
    check_filled(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    header = backbone if target == "torchvision" else backbone.model_copy(update={"padding": "symmetric"})
    if backbone.is_vit and target == "detectron2":
        named = {old: tensors[new] for old, new in writer.names(backbone).items()}
        missing = {name: shapes[name] for name in shapes if name not in named}
        network = reference_network(header, {**named, **_neutral(missing)})
        return [features(network, pixels_of(file, header), False) for file in files]
    network = reference_network(header, load_source(folder / writer.weights).tensors)
    return [features(network, pixels_of(file, header), True) for file in files]


def _written(path: Path) -> dict[str, Tensor]:
    return dict(next(state_dicts(read_contents(path).value))[1])


def _neutral(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    # The class token and the last norm take no part in what is compared.
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def _pil_input(file: Path, backbone: Backbone) -> Tensor:
    """torchvision's and timm's usual path: PIL, [0, 1], mean and std."""
    scale = 1 / backbone.input_range
    image = transforms.to_tensor(Image.open(file).convert("RGB"))
    return transforms.normalize(image, [m * scale for m in backbone.mean], [s * scale for s in backbone.std])[None]
