"""The two targets without a framework of their own config: the artefact itself (torchvision's names), and timm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.files import atomic_path, write_json
from twist.contracts.weights import RESNETS, VITS, Backbone, write_backbone
from twist.converters import manifest
from twist.converters.torch_file import same_bytes

if TYPE_CHECKING:
    from torch import Tensor

TIMM_NAMES = {"vit_small_patch16": "vit_small_patch16_224", "vit_base_patch16": "vit_base_patch16_224"}


def names(backbone: Backbone) -> dict[str, str]:
    """Both layouts have the artefact's names."""
    shapes = manifest.shapes_of(manifest.Geometry(backbone.architecture, backbone.width, backbone.image_size))
    return {name: name for name in shapes}


def write_artefact(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """`backbone.safetensors` with the header that every later stage reads."""
    write_backbone(path, tensors, backbone)


def is_torchvisions(backbone: Backbone) -> bool:
    """Whether torchvision itself builds this network, and not only one whose names are like its own."""
    changed = backbone.width > 1 or backbone.stride_in == "1x1" or backbone.padding == "same"
    return not (backbone.is_vit or changed or backbone.channel_order == "BGR" or backbone.architecture == "resnet200")


def refuse_timm(backbone: Backbone) -> str | None:
    """Why timm has no such network, or None."""
    if backbone.width > 1:
        return "timm has no ResNet with every width multiplied (its wide_resnet50_2 is another network)"
    if backbone.stride_in == "1x1":
        return "timm's ResNets have the stride in the 3×3 convolution"
    if backbone.channel_order == "BGR":
        return "timm reads RGB images and has no setting for BGR"
    return None


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """The `config.json` of timm's hub layout: architecture and the pixels of this source."""
    side = backbone.image_size or 224
    scale = 1 / backbone.input_range
    return {
        "architecture": TIMM_NAMES.get(backbone.architecture, backbone.architecture),
        "num_classes": 0,
        "num_features": _features(backbone.architecture),
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "mean": [value * scale for value in backbone.mean],
            "std": [value * scale for value in backbone.std],
            "num_classes": 0,
            "first_conv": "patch_embed.proj" if backbone.is_vit else "conv1",
            "classifier": "head" if backbone.is_vit else "fc",
            "license": "as the source",
        },
        "twist": json.loads(backbone.model_dump_json()),
    }


def write_timm(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """`model.safetensors` and `config.json`, as timm writes and reads them for a hub."""
    from safetensors.torch import load_file, save_file

    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})
        reread = load_file(temporary)
        if reread.keys() != plain.keys() or not all(same_bytes(reread[name], plain[name]) for name in plain):
            raise OSError(f"{path}: what was written does not read back equal; the disk may be full or failing.")
    write_json(path.parent / "config.json", timm_config(backbone))


def _features(architecture: str) -> int:
    if architecture in RESNETS:
        return 512 * (4 if RESNETS[architecture][1] else 1)
    return VITS[architecture]
