"""Names and shapes of every architecture an artefact can hold, and the way back: which architecture has these shapes.

Plain numbers, so that reading and checking a checkpoint needs neither torchvision nor timm (importing them takes
longer than the whole conversion). A test holds them against the networks of `twist.contracts.networks`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from twist.contracts.errors import UserError
from twist.contracts.weights import RESNETS, VIT_BLOCKS, VITS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """What shapes alone tell of a backbone."""

    architecture: str
    width: int = 1
    image_size: int | None = None


def shapes_of(geometry: Geometry) -> dict[str, Shape]:
    """Every tensor of the artefact, name → shape, in the order of the network's state dict."""
    if geometry.architecture in RESNETS:
        return _resnet_shapes(geometry.architecture, geometry.width)
    return _vit_shapes(VITS[geometry.architecture], geometry.image_size or 224)


def recognise(shapes: Mapping[str, Shape], *, where: str) -> Geometry:
    """The geometry whose manifest is exactly `shapes` (artefact names).

    Raises:
        UserError: no architecture has these names and shapes; the sentence says what differs first.
    """
    geometry = guess(shapes, where=where)
    expected = shapes_of(geometry)
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    misshapen = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    if misshapen:
        name = misshapen[0]
        raise UserError(
            f"{where}: {len(misshapen)} tensors have another shape than in {geometry.architecture} (first: {name} is "
            f"{shapes[name]}, expected {expected[name]}); {_variant(shapes)}convert a plain ResNet or ViT."
        )
    if missing or extra:
        raise UserError(
            f"{where}: not a whole {geometry.architecture}: {len(missing)} tensors are missing and {len(extra)} are "
            f"too many (first: {(missing or extra)[0]}); take the file as its authors published it."
        )
    return geometry


def explain_foreign(names: Mapping[str, Shape] | list[str]) -> str | None:
    """Why a state dict with these names is none of our architectures, when the reason is well known; else None."""
    for pattern, reason in _FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return reason
    return None


# First match wins. Names as the usual implementations print them.
_FOREIGN: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)(conv1\.0\.weight|stem\.0\.weight|stem\.conv1\.0\.weight)$",
        "it has the deep stem of ResNet-D / V1c (three 3×3 convolutions), which the detection and segmentation recipes "
        "of self-supervised learning do not use; take weights with the 7×7 stem",
    ),
    (
        r"(conv_stem|conv_dw|_depthwise_conv|features\.\d+\.\d+\.block|features\.\d+\.conv\.)",
        "it is an EfficientNet or MobileNet; ResNets and ViTs are converted",
    ),
    (
        r"(l_to_ab|ab_to_l|(^|\.)encoder1\.(module\.)?conv1\.)",
        "it is CMC's pair of half-width networks on L and ab channels, which no RGB framework can run; take another "
        "method",
    ),
    (
        r"^roi_heads\.res5\.",
        "it is a trained C4 detector, whose last stage lies in its heads; take a detector with FPN, or the weights it "
        "was trained from",
    ),
    (r"\.se\.fc\d|\.se_module\.", "its blocks hold squeeze-and-excitation modules; take a plain ResNet"),
    (r"\.mixing_conv\.", "it has selective kernels (sk1); of SimCLR v2 only the sk0 networks are plain ResNets"),
    (r"trunk_output\.", "it is a RegNet; ResNets and ViTs are converted"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position", "it is a Swin transformer; ResNets and ViTs are converted"),
    (r"(^|\.)stages\.\d+\.", "it is a ConvNeXt or another staged network; ResNets and ViTs are converted"),
    (
        r"blocks\.\d+\.ls1\.",
        "its blocks have layer scale (DINOv2, DeiT III); plain ViT-S/16 and ViT-B/16 are converted",
    ),
    (r"^(visual|transformer)\.", "it is a CLIP-like model; ResNets and plain ViTs are converted"),
)


def _resnet_shapes(architecture: str, width: int) -> dict[str, Shape]:
    blocks, bottleneck = RESNETS[architecture]
    expansion = 4 if bottleneck else 1
    shapes: dict[str, Shape] = {}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    into = 64 * width
    convolution("conv1", into, 3, 7)
    norm("bn1", into)
    for stage, count in enumerate(blocks):
        planes = 64 * width * 2**stage
        for block in range(count):
            here = f"layer{stage + 1}.{block}"
            # (out, kernel) of each convolution in the block.
            chain = ((planes, 1), (planes, 3), (planes * 4, 1)) if bottleneck else ((planes, 3), (planes, 3))
            channels = into
            for index, (out, kernel) in enumerate(chain, start=1):
                convolution(f"{here}.conv{index}", out, channels, kernel)
                norm(f"{here}.bn{index}", out)
                channels = out
            if block == 0 and (stage > 0 or bottleneck):
                convolution(f"{here}.downsample.0", planes * expansion, into, 1)
                norm(f"{here}.downsample.1", planes * expansion)
            into = planes * expansion
    return shapes


def _vit_shapes(dimension: int, image_size: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        "cls_token": (1, 1, dimension),
        "pos_embed": (1, 1 + (image_size // 16) ** 2, dimension),
        "patch_embed.proj.weight": (dimension, 3, 16, 16),
        "patch_embed.proj.bias": (dimension,),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (dimension,), (dimension,)

    for block in range(VIT_BLOCKS):
        here = f"blocks.{block}"
        norm(f"{here}.norm1")
        linear(f"{here}.attn.qkv", 3 * dimension, dimension)
        linear(f"{here}.attn.proj", dimension, dimension)
        norm(f"{here}.norm2")
        linear(f"{here}.mlp.fc1", 4 * dimension, dimension)
        linear(f"{here}.mlp.fc2", dimension, 4 * dimension)
    norm("norm")
    return shapes


def guess(shapes: Mapping[str, Shape], *, where: str) -> Geometry:
    """The geometry that the stem and the number of blocks point to; `UserError` when there is none."""
    if "patch_embed.proj.weight" in shapes:
        return _guess_vit(shapes, where)
    if len(shapes.get("conv1.weight", ())) != 4:
        raise UserError(f"{where}: there is no conv1.weight of a ResNet and no patch_embed.proj.weight of a ViT in it.")
    out, into, kernel, other = shapes["conv1.weight"]
    if (kernel, other) != (7, 7) or into != 3:
        reason = (
            "a 3×3 stem for small images (CIFAR)"
            if (kernel, other) == (3, 3)
            else f"a stem for {into}-channel images (CMC's half-width nets have such)"
            if (kernel, other) == (7, 7)
            else "another layout of its axes or another stem"
        )
        raise UserError(
            f"{where}: conv1.weight is {shapes['conv1.weight']}, expected (64·w, 3, 7, 7): this is {reason}; "
            "frameworks expect the 7×7 RGB stem."
        )
    if out not in (64, 128, 256):
        raise UserError(f"{where}: the stem has {out} channels; widths 1, 2 and 4 (64, 128, 256 channels) are known.")
    bottleneck = "layer1.0.conv3.weight" in shapes
    blocks = tuple(
        1 + max((int(n.split(".")[1]) for n in shapes if n.startswith(f"layer{stage}.")), default=-1)
        for stage in (1, 2, 3, 4)
    )
    for architecture, layout in RESNETS.items():
        if layout == (blocks, bottleneck):
            return Geometry(architecture, width=out // 64)
    raise UserError(
        f"{where}: a ResNet with {blocks} {'bottleneck' if bottleneck else 'basic'} blocks is none of "
        f"{', '.join(RESNETS)}."
    )


def _guess_vit(shapes: Mapping[str, Shape], where: str) -> Geometry:
    dimension, _, patch, _ = (*shapes["patch_embed.proj.weight"], 0, 0, 0, 0)[:4]
    architecture = next((name for name, width in VITS.items() if width == dimension), None)
    if architecture is None or patch != 16:
        raise UserError(
            f"{where}: a ViT with dimension {dimension} and patches of {patch} pixels; known are ViT-S/16 (384) and "
            "ViT-B/16 (768)."
        )
    positions = (*shapes.get("pos_embed", ()), 0, 0)[1]
    side = round(max(positions - 1, 0) ** 0.5)
    if positions < 2 or side * side != positions - 1:
        raise UserError(
            f"{where}: the position table holds {positions} positions, not one for the class token and a square grid; "
            "tables without class token or of oblong images are not converted, since a resize could not be undone."
        )
    return Geometry(architecture, image_size=16 * side)


def _variant(shapes: Mapping[str, Shape]) -> str:
    """The well-known variant behind a shape that does not fit, as the start of a clause."""
    first, stem = shapes.get("layer1.0.conv1.weight", ()), shapes.get("conv1.weight", ())
    grouped = shapes.get("layer1.0.conv2.weight", ())
    if len(grouped) == 4 and grouped[1] < grouped[0] and "layer1.0.conv3.weight" in shapes:
        return "this looks like a ResNeXt (grouped convolutions), "
    if first and stem and first[0] == 2 * stem[0]:
        return "this looks like a wide_resnet (only the inner width doubled, unlike TWIST's and SimCLR's w2), "
    if first and len(first) == 4 and first[1] != stem[0] and first[-1] == stem[0]:
        return "this looks like TensorFlow's order of axes, "
    return ""
