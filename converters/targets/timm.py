"""timm: the artefact's tensors as `model.safetensors`, with the `config.json` that timm reads for a hub or a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.weights import METADATA_KEY, RESNETS, Backbone, usual_vit, write_safetensors
from twist.converters.targets import Stages, Target, quoted

if TYPE_CHECKING:
    from torch import Tensor

# timm's names for the usual ViTs; other ViTs are one of these with arguments.
_USUAL = (
    "vit_tiny_patch16", "vit_small_patch8", "vit_small_patch16", "vit_small_patch32", "vit_base_patch8",
    "vit_base_patch16", "vit_base_patch32", "vit_large_patch14", "vit_large_patch16", "vit_large_patch32",
    "vit_huge_patch14",
)  # fmt: skip


def refuse(backbone: Backbone) -> str | None:
    """Why timm has no such network, or None."""
    vit = backbone.transformer if backbone.is_vit else None
    if vit and not vit.rope_base and vit.norm_eps > 1e-6 and (vit.mlp == "swiglu" or vit.norm_eps != 1e-5):
        return f"timm has no name for a ViT with {vit.mlp.upper()} whose norms have an epsilon of {vit.norm_eps:g}"
    if backbone.width > 1:
        return "timm has no ResNet with every width multiplied (its wide_resnet50_2 is another network)"
    if backbone.stride_in == "1x1":
        return "timm's ResNets have the stride in the 3×3 convolution"
    if backbone.channel_order == "BGR":
        return "timm reads RGB images and has no setting for BGR"
    return None


def _changes(backbone: Backbone) -> dict[str, Any]:
    """timm resizes with antialiasing; its names have no epsilon below 1e-6 (Hugging Face's is 1e-12)."""
    vit = backbone.transformer
    return {"resize": "antialias", "norm_eps": 1e-5 if vit.rope_base else max(vit.norm_eps, 1e-6)}


def _vit_arguments(backbone: Backbone) -> tuple[str, dict[str, Any]]:
    """timm's name for the network, and the arguments that make it this one."""
    vit = backbone.transformer
    size = {"img_size": backbone.image_size}
    same = {"resize": vit.resize, "positions": vit.positions}  # no argument of timm's
    vit = vit.model_copy(update={"norm_eps": _changes(backbone)["norm_eps"]})
    if backbone.architecture in _USUAL and vit == usual_vit(backbone.architecture).model_copy(update=same):
        return f"{backbone.architecture}_224", size if backbone.image_size != 224 else {}
    # These have what no argument in a file can say: rotary positions, SwiGLU, and an epsilon of 1e-5.
    name = f"vit_base_patch16{'_clip' * (vit.norm_eps == 1e-5)}_224"
    name = "vit_giant_patch14_dinov2" if vit.mlp == "swiglu" else name
    name = "vit_small_patch16_dinov3" if vit.rope_base else name
    return name, {**size, "patch_size": backbone.patch_size, **vit.timm_arguments()}


def _config(backbone: Backbone) -> dict[str, Any]:
    """timm's hub layout with architecture and pixels, and our header for the way back."""
    name, arguments = _vit_arguments(backbone) if backbone.is_vit else (backbone.timm_name or backbone.architecture, {})
    side = backbone.image_size or 224
    mean, std = backbone.pixels(1)
    settings: dict[str, Any] = {
        "input_size": [3, side, side],
        "first_conv": "patch_embed.proj" if backbone.is_vit else "conv1",
        "classifier": "head" if backbone.is_vit else "fc",
    }
    if backbone.timm_name:
        from twist.contracts.timm_networks import outline

        network = outline(backbone.architecture)
        keys = (*settings, "fixed_input_size")
        features, settings = network.num_features, {key: network.settings.get(key) for key in keys}
    elif backbone.is_vit:
        features = backbone.transformer.embed_dim
    else:
        features = 2048 if RESNETS[backbone.architecture][1] else 512
    return {
        "architecture": name,
        **({"model_args": arguments} if arguments else {}),
        "num_classes": 0,
        "num_features": features,
        "pretrained_cfg": {**settings, "mean": mean, "std": std, "num_classes": 0, "license": "as the source"},
        METADATA_KEY: json.loads(backbone.model_dump_json()),
    }


def _settings(backbone: Backbone) -> dict[str, str]:
    text = json.dumps(_config(backbone), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return {"config.json": text + "\n"}


def _usage(folder: Path, _backbone: Backbone) -> str:
    name = quoted(folder, "local-dir:")
    return f"""\
import timm

network = timm.create_model({name}, pretrained=True, num_classes=10)  # a new classifier; 0: none
"""


def run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """The stages of each image in timm's network; a folder without `config.json` has the header's settings."""
    import timm
    import torch
    from safetensors.torch import load_file

    from twist.contracts.networks import stage_features
    from twist.contracts.timm_networks import outline

    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else _config(backbone)
    options = {**config.get("model_args", {}), **({"dynamic_img_size": True} if backbone.is_vit else {})}
    with torch.device("cpu" if backbone.computes_when_built else "meta"):  # no random initialisation
        network: Any = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **options)
    network.load_state_dict(load_file(next(folder.glob("*.safetensors"))), strict=True, assign=True)
    network.eval()
    mean, std = config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]
    images = [pil_input(file, mean, std) for file in files]
    if backbone.is_vit:
        return [stage_features(network, image) for image in images]
    if backbone.timm_name:
        return [_maps(network, outline(backbone.architecture).maps, image) for image in images]
    maps = [network.forward_intermediates(image, intermediates_only=True) for image in images]
    return [{f"res{index + 1}": maps_[index] for index in (1, 2, 3, 4)} for maps_ in maps]


def _maps(network: Any, places: Mapping[str, int], image: Tensor) -> Stages:
    maps, pooled = network.forward_intermediates(image), network(image)
    return {**{name: maps[1][place] for name, place in places.items()}, "pooled": pooled}


def pil_input(file: Path, mean: list[float], std: list[float]) -> Tensor:
    """(1, 3, H, W): an image file read as torchvision and timm do: PIL, [0, 1], mean and std."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    return transforms.normalize(transforms.to_tensor(Image.open(file).convert("RGB")), mean, std)[None]


TARGET = Target(
    name="timm",
    title="timm",
    weights="model.safetensors",
    package="timm",
    write=lambda path, tensors, _: write_safetensors(path, tensors, {"format": "pt"}),  # as timm does
    framework=lambda _: (run, "timm"),
    usage=_usage,
    refuse=refuse,
    settings=_settings,
    changes=_changes,
    library="timm",
)
