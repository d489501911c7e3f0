"""The weights artefact, `backbone.safetensors`: a backbone and everything that a later stage must know about it.

Tensors carry torchvision's names for ResNets and timm's for ViTs. The header (JSON in the safetensors metadata, key
`twist`) says what the tensors mean: architecture, where the stride sits, channel order, normalisation, origin.
Converters go source layout → artefact → target, so nobody downstream guesses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from twist.contracts.config import Config
from twist.contracts.errors import UserError
from twist.contracts.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

Architecture = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200",
    "vit_tiny_patch8", "vit_tiny_patch14", "vit_tiny_patch16", "vit_tiny_patch32",
    "vit_small_patch8", "vit_small_patch14", "vit_small_patch16", "vit_small_patch32",
    "vit_base_patch8", "vit_base_patch14", "vit_base_patch16", "vit_base_patch32",
    "vit_large_patch8", "vit_large_patch14", "vit_large_patch16", "vit_large_patch32",
    "vit_huge_patch8", "vit_huge_patch14", "vit_huge_patch16", "vit_huge_patch32",
    "vit_giant_patch8", "vit_giant_patch14", "vit_giant_patch16", "vit_giant_patch32",
]  # fmt: skip
# A network that timm builds by its name: `timm:convnext_tiny`, tensors under timm's names.
TIMM: Final = "timm:"
NetworkName = Architecture | Annotated[str, Field(pattern=rf"^{TIMM}[a-z0-9_]+$")]
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
Resize = Literal["antialias", "plain", "offset"]


class Vit(Config):
    """What a ViT's name does not say; the defaults are those of DeiT and timm.

    A bias of the keys alone changes no attention, so networks without it (BEiT, DINOv3) hold zeros there.
    """

    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_features: int = Field(gt=0)  # between the two layers; of SwiGLU, in each of its two halves
    mlp: Literal["gelu", "swiglu"] = "gelu"
    class_token: bool = True
    registers: int = Field(default=0, ge=0)
    layer_scale: bool = False
    qkv_bias: bool = True
    positions: Literal["learned", "sincos"] = "learned"  # sincos: a fixed table
    prefix_positions: bool = True  # the table has a row for the class token and each register
    pre_norm: bool = False  # a norm before the first block (CLIP); the patch embedding then has no bias
    final_norm: bool = True
    norm_eps: float = Field(default=1e-6, gt=0)
    pooling: Literal["token", "avg"] = "token"  # what the network returns: the class token, or the patches' mean
    # How the position table is interpolated (bicubic) for other image sizes: with antialiasing (timm), without (MAE,
    # MMSegmentation, Detectron2), or without and by the scale (n + 0.1) / N (DINO, iBOT, DINOv2, TWIST as published).
    resize: Resize = "antialias"
    # DINOv3: rotary positions on patch centres from -1 to 1 with this longest period, and no table.
    rope_base: float | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Descriptions without rotary positions are those of before the field, byte for byte.
        return {key: value for key, value in dump(self).items() if key != "rope_base" or value is not None}

    def timm_arguments(self) -> dict[str, Any]:
        """What the constructor of timm's VisionTransformer (of its Eva, with rotary positions) takes of it, as JSON."""
        rotary = self.rope_base is not None
        packed = self.mlp == "swiglu" and not rotary  # whose ratio counts both halves
        common = {
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.heads,
            # timm takes the integer part of ratio × dimension: the half keeps rounding away from it.
            "mlp_ratio": ((2 if packed else 1) * self.mlp_features + 0.5) / self.embed_dim,
            "qkv_bias": self.qkv_bias,
            "init_values": 1e-5 if self.layer_scale else None,  # DINOv2's (dinov2/configs/ssl_default_config.yaml)
            "class_token": self.class_token,
            "global_pool": self.pooling,
        }
        if not rotary:
            norms = {"pre_norm": self.pre_norm, "final_norm": self.final_norm, "fc_norm": False}
            return {**common, **norms, "reg_tokens": self.registers, "no_embed_class": not self.prefix_positions}
        return {
            **common,
            "num_reg_tokens": self.registers,
            "swiglu_mlp": self.mlp == "swiglu",
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_temperature": self.rope_base,
            "rope_rotate_half": True,
            "use_post_transformer_norm": self.final_norm,
            "use_fc_norm": False,
        }

    @model_validator(mode="after")
    def _consistent(self) -> Vit:
        if self.embed_dim % self.heads:
            raise ValueError(f"{self.embed_dim} features cannot be shared by {self.heads} heads")
        if self.pooling == "token" and not self.class_token:
            raise ValueError("without a class token a ViT's output is pooled: pooling is avg")
        return self


# Size → embedding dimension, blocks, heads, features of the MLP. Base to huge: Dosovitskiy et al. 2021, table 1; tiny
# and small: Touvron et al. 2021 (DeiT), table 1; giant: DINOv2's, with SwiGLU (dinov2/models/vision_transformer.py).
VITS: Final[dict[str, tuple[int, int, int, int]]] = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1536, 40, 24, 4096),
}
# Embedding dimension → size; the giant of Zhai et al. 2022 is narrower than DINOv2's.
VIT_SIZES: Final = {dimension: size for size, (dimension, *_) in VITS.items()} | {1408: "giant"}
ARCHITECTURES: Final[tuple[str, ...]] = get_args(Architecture)


def is_vit(architecture: str) -> bool:
    """Whether it is the name of a ViT, and not a ResNet's."""
    return architecture.startswith("vit_")


def usual_vit(architecture: str) -> Vit:
    """The ViT that a header means which says no more than the name."""
    size = architecture.split("_")[1]
    dimension, depth, heads, features = VITS[size]
    mlp: Literal["gelu", "swiglu"] = "swiglu" if size == "giant" else "gelu"
    return Vit(embed_dim=dimension, depth=depth, heads=heads, mlp_features=features, mlp=mlp)


def stem_of(architecture: str) -> Any:
    """`patch16` of `vit_small_patch16`, `conv7x7` of a ResNet, `own` of what timm builds by name."""
    if architecture.startswith(TIMM):
        return "own"
    return architecture.split("_")[2] if is_vit(architecture) else "conv7x7"


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
    architecture: NetworkName
    # Every width of a ResNet times this (TWIST's and SimCLR's "w2"; not torchvision's wide_resnet50_2).
    width: Literal[1, 2, 4] = 1
    # The 7×7 stem of the original ResNet; a ViT's patch embedding. Deep stems (ResNet-D, V1c) are not representable.
    stem: Literal["conv7x7", "patch8", "patch14", "patch16", "patch32", "own"] = "conv7x7"
    # Which convolution of a bottleneck has the stride: "3x3" is torchvision's, "1x1" is MSRA's (Caffe style).
    stride_in: Literal["3x3", "1x1"] = "3x3"
    # "same" pads as TensorFlow does (bottom and right first): DeepMind's BYOL.
    padding: Literal["symmetric", "same"] = "symmetric"
    # Side of the images whose position table a ViT holds; of timm's other networks, where theirs are made for one size.
    image_size: int | None = None
    # What the ViT is where it is not the usual one of its name (`usual_vit`); `transformer` gives either.
    vit: Vit | None = None
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
        if self.stem != stem_of(self.architecture):
            raise ValueError(f"stem {self.stem} does not belong to {self.architecture}")
        if self.is_vit and (self.width != 1 or self.image_size is None or self.image_size % self.patch_size):
            raise ValueError("a ViT has width 1 and states the image size of its position table, in whole patches")
        size = VIT_SIZES.get(self.vit.embed_dim) if self.vit else None
        if self.vit and not self.architecture.startswith(f"vit_{size}_"):
            raise ValueError(f"{self.vit.embed_dim} features are not those of {self.architecture}")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Headers of ResNets and of the usual ViTs are those of before the field, byte for byte.
        return {key: value for key, value in dump(self).items() if key != "vit" or value is not None}

    @property
    def is_vit(self) -> bool:
        return is_vit(self.architecture)

    @property
    def timm_name(self) -> str | None:
        """What timm calls the network, where its name is all that the header says of it."""
        return self.architecture.removeprefix(TIMM) if self.architecture.startswith(TIMM) else None

    @property
    def computes_when_built(self) -> bool:
        """Whether building the network computes what is in no state dict: rotary periods, relative positions."""
        return self.timm_name is not None or (self.is_vit and self.transformer.rope_base is not None)

    @property
    def transformer(self) -> Vit:
        """All of a ViT's description."""
        return self.vit or usual_vit(self.architecture)

    @property
    def patch_size(self) -> int:
        """Side of a ViT's patches in pixels."""
        return int(self.stem.removeprefix("patch"))

    @property
    def prefix_tokens(self) -> int:
        """Tokens before a ViT's patches: the class token and the registers."""
        return self.transformer.class_token + self.transformer.registers

    @property
    def vit_arguments(self) -> dict[str, Any]:
        """Arguments by which `twist.integrations` builds this ViT."""
        vit = self.vit and self.vit.model_dump()
        return {"architecture": self.architecture, "image_size": self.image_size, "vit": vit}

    def pixels(self, input_range: int) -> tuple[list[float], list[float]]:
        """Mean and std for images from 0 to `input_range`."""
        scale = input_range / self.input_range
        return [value * scale for value in self.mean], [value * scale for value in self.std]

    @property
    def display_name(self) -> str:
        """`resnet50`, `resnet50w2`, `vit_small_patch16`, `vit_small_patch16_heads12`, `vit_base_patch14_reg4`."""
        name = self.architecture + (f"w{self.width}" if self.width > 1 else "")
        if self.vit is None:
            return name
        if self.vit.rope_base:
            return name + "_rope" + (f"_reg{self.vit.registers}" if self.vit.registers else "")
        if self.vit.heads != usual_vit(name).heads:
            name += f"_heads{self.vit.heads}"
        return name + (f"_reg{self.vit.registers}" if self.vit.registers else "")


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


def difference(expected: Mapping[str, Any], found: Mapping[str, Any], *, values: bool = True) -> str | None:
    """How two state dicts differ in names, shapes and, with `values`, bits: one clause, or None where they do not."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    misshapen = [name for name in both if found[name].shape != expected[name].shape]
    plain = [name for name in both if values and name not in misshapen]
    changed = [name for name in plain if _bits(found[name]) != _bits(expected[name])]
    counts = {"tensors missing": missing, "extra": extra, "of another shape": misshapen, "with other values": changed}
    first = next((names[0] for names in counts.values() if names), None)
    if first is None:
        return None
    shapes = f" is {tuple(found[first].shape)}, not {tuple(expected[first].shape)}" if first in misshapen else ""
    said = ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names)
    return f"{said} (first: {first}{shapes})"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, types, shapes and bytes."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        dtype, values = _bits(tensor)
        state.update(f"{name} {dtype} {tuple(tensor.shape)};".encode() + values)
    return state.hexdigest()


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
    """`path`, or the weights in it where it is a pretraining run's folder (a teacher's, if any) or a hub's."""
    path = Path(path)
    if path.is_dir():
        for name in ("teacher_backbone.safetensors", "backbone.safetensors", "model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
    return path


def read_backbone(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Backbone]:
    """Tensors and header of an artefact; `UserError` when the file is absent, torn or not ours."""
    from safetensors.torch import load_file

    header = read_header(path)
    return load_file(path), header


def _bits(tensor: Tensor) -> tuple[Any, bytes]:
    # Bytes, not values: NaN must equal NaN, and -0.0 differ from 0.0.
    import torch

    plain = tensor.detach().cpu().contiguous()
    return plain.dtype, plain.reshape(-1).view(torch.uint8).numpy().tobytes()
