"""Our side of a proof: the reference network with the artefact's tensors, on image files that are drawn for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from twist.contracts.images import read_image
from twist.contracts.networks import network_of, normalise, stage_features
from twist.contracts.weights import Backbone
from twist.converters.stages import Difference, Stages, compare


def reference(
    target: str, backbone: Backbone, tensors: Mapping[str, Tensor], files: list[Path]
) -> tuple[list[Stages], tuple[Difference, ...], tuple[str, ...]]:
    """Our features as the target can compute them, the drift from the network as trained, and what to say about it."""

    def run(header: Backbone, class_token: bool = True) -> list[Stages]:
        network = reference_network(header, tensors)
        return [features(network, pixels_of(file, header), class_token) for file in files]

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


def reference_network(header: Backbone, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The reference network around `tensors` themselves: no random initialisation, no second copy."""
    with torch.device("meta"):
        network = network_of(header)
    network.load_state_dict(dict(tensors), strict=True, assign=True)
    return network.eval()


def pixels_of(file: Path, backbone: Backbone) -> Tensor:
    """(1, 3, H, W): an image file as the backbone wants it."""
    return normalise(read_image(file)[None], backbone)


def features(network: nn.Module, images: Tensor, class_token: bool) -> Stages:
    """The stages of normalised `images` (N, 3, H, W); `class_token` says whether a ViT runs with its own."""
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
