"""The weights artefact, `backbone.safetensors`: a backbone and everything that a later stage must know about it.

Tensors carry torchvision's names for ResNets and timm's for ViTs. The header (JSON in the safetensors metadata, key
`twist`) says what the tensors mean: architecture, where the stride sits, channel order, normalisation, origin.
Converters go source layout → artefact → target, so nobody downstream guesses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, ValidationError, model_validator

from twist.contracts.config import Config
from twist.contracts.errors import UserError
from twist.contracts.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

Architecture = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet200",
    "vit_small_patch16",
    "vit_base_patch16",
]
# Blocks a stage, and whether a block is a bottleneck (He et al. 2015, table 1; 200: He et al. 2016, with the same
# bottleneck and not the identity mappings).
RESNETS: Final[dict[str, tuple[tuple[int, int, int, int], bool]]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
    "resnet200": ((3, 24, 36, 3), True),
}
# Name → embedding dimension; both have 12 blocks, heads of 64, an MLP of 4 × the dimension, patches of 16 pixels.
VITS: Final[dict[str, int]] = {"vit_small_patch16": 384, "vit_base_patch16": 768}
VIT_BLOCKS: Final = 12
ARCHITECTURES: Final = (*RESNETS, *VITS)


def depth_of(architecture: str) -> int:
    """50 of `resnet50`."""
    return int(architecture.removeprefix("resnet"))


FORMAT_VERSION: Final = 1
METADATA_KEY = "twist"

# ImageNet statistics on [0, 1] RGB, as torchvision prints them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(Config):
    """What the tensors of an artefact mean.

    `mean` and `std` are in the order of `channel_order` and in units of `input_range`: a network that was trained on
    [0, 1] pixels without normalisation has mean 0 and std 1 and range 1; Detectron2's MSRA weights have BGR, range 255.
    """

    format_version: Literal[1] = FORMAT_VERSION
    architecture: Architecture
    # Every width of a ResNet times this (TWIST's and SimCLR's "w2"; not torchvision's wide_resnet50_2).
    width: Literal[1, 2, 4] = 1
    # The 7×7 stem of the original ResNet; a ViT's patch embedding. Deep stems (ResNet-D, V1c) are not representable.
    stem: Literal["conv7x7", "patch16"] = "conv7x7"
    # Which convolution of a bottleneck has the stride: "3x3" is torchvision's, "1x1" is MSRA's (Caffe style).
    stride_in: Literal["3x3", "1x1"] = "3x3"
    # "same" pads as TensorFlow does (bottom and right first): DeepMind's BYOL.
    padding: Literal["symmetric", "same"] = "symmetric"
    # Side of the images whose position table a ViT holds.
    image_size: int | None = None
    channel_order: Literal["RGB", "BGR"] = "RGB"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    input_range: Literal[1, 255] = 1
    method: str
    epochs: int | None = Field(default=None, ge=0)
    # The file the tensors came from, its layout and branch (`twist` for our own runs).
    source_layout: str = "twist"
    source_branch: str = "backbone"
    source_sha256: str | None = None
    config_hash: str | None = None
    seed: int | None = None
    # Of our own runs: which images they saw (`pretrain.data.source`); the config hash leaves out where
    # the data lie.
    images_sha256: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Backbone:
        if self.is_vit != (self.stem == "patch16"):
            raise ValueError(f"stem {self.stem} does not belong to {self.architecture}")
        if self.is_vit and (self.width != 1 or self.image_size is None):
            raise ValueError("a ViT has width 1 and states the image size of its position table")
        return self

    @property
    def is_vit(self) -> bool:
        return self.architecture.startswith("vit_")

    def pixels(self, input_range: int) -> tuple[list[float], list[float]]:
        """Mean and std for images from 0 to `input_range`."""
        scale = input_range / self.input_range
        return [value * scale for value in self.mean], [value * scale for value in self.std]

    @property
    def display_name(self) -> str:
        """`resnet50`, `resnet50w2`, `vit_small_patch16`."""
        return self.architecture + (f"w{self.width}" if self.width > 1 else "")


def write_backbone(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Backbone) -> Path:
    """Write the artefact atomically, read it back, and return its path. Equal input gives equal bytes."""
    # One key: the metadata is a hash map on the writing side, and several keys would come out in any order.
    metadata = {METADATA_KEY: json.dumps(header.model_dump(mode="json"), sort_keys=True)}
    return write_safetensors(path, tensors, metadata)


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file atomically, read it back, and return its path."""
    from safetensors.torch import load_file, save_file

    path = Path(path)
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=dict(metadata))
        check_written(path, plain, load_file(temporary))
    return path


def check_written(path: Path, written: Mapping[str, Tensor], reread: Mapping[str, Tensor]) -> None:
    """`OSError` unless a file reads back as it was written."""
    if difference(written, reread) is not None:
        raise OSError(f"{path}: what was written does not read back equal; the disk may be full or failing.")


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, values: bool = True) -> str | None:
    """How two state dicts differ in names, shapes and, with `values`, bits: one clause, or None where they do not."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    misshapen = [name for name in both if found[name].shape != expected[name].shape]
    changed = [name for name in both if values and name not in misshapen and not _same(found[name], expected[name])]
    counts = {"tensors missing": missing, "extra": extra, "of another shape": misshapen, "with other values": changed}
    first = next((names[0] for names in counts.values() if names), None)
    if first is None:
        return None
    shapes = f" is {tuple(found[first].shape)}, not {tuple(expected[first].shape)}" if first in misshapen else ""
    said = ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names)
    return f"{said} (first: {first}{shapes})"


def read_header(path: str | os.PathLike[str]) -> Backbone:
    """The header alone, without reading the tensors."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"There is no weights file at {path}: check the path.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}): `twist inspect {path}` says what it is."
        ) from None
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path} has no TWIST header: run `twist convert {path} --to torchvision` to make an artefact of it."
        )
    try:
        return Backbone.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: the header is not valid ({where}: {first['msg']}): convert the file again, or update the suite."
        ) from None


def weights_file(path: str | os.PathLike[str]) -> Path:
    """`path`, or the result in it where it is a pretraining run's folder: of a run with a teacher, the teacher's."""
    path = Path(path)
    if path.is_dir():
        for name in ("teacher_backbone.safetensors", "backbone.safetensors"):
            if (path / name).is_file():
                return path / name
    return path


def read_backbone(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Backbone]:
    """Tensors and header of an artefact; `UserError` when the file is absent, torn or not ours."""
    from safetensors.torch import load_file

    header = read_header(path)
    return load_file(path), header


def _same(a: Tensor, b: Tensor) -> bool:
    # Bytes, not values: NaN must equal NaN, and -0.0 differ from 0.0.
    import torch

    if a.dtype != b.dtype:
        return False
    return torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.cpu().reshape(-1).view(torch.uint8))
