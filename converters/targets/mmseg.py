"""MMSegmentation: names, and the settings that the weights imply. Needs no MMSegmentation.

`overlay.py` merges over any of its configs: it turns the usual ResNetV1c (deep stem) into the ResNet that
self-supervised weights have, clears `pretrained` (which would win over or clash with `init_cfg`), and sets this
source's pixels. Dilations, strides, norms and heads stay the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts import rename
from twist.contracts.weights import METADATA_KEY, VIT_BLOCKS, VITS, Backbone, depth_of
from twist.converters import manifest, tables
from twist.converters.torch_file import write_torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights.pth"
PREFIX = "backbone."


def refuse(backbone: Backbone) -> str | None:
    """Why MMSegmentation has no such network, or None."""
    if backbone.architecture == "resnet200":
        return "MMSegmentation builds ResNets of depth 18, 34, 50, 101 and 152, not 200"
    return None


def names(backbone: Backbone) -> dict[str, str]:
    """Artefact name → name in the file. VisionTransformer's own loader knows no prefix, so a ViT has none."""
    shapes = manifest.shapes_of(manifest.Geometry(backbone.architecture, backbone.width, backbone.image_size))
    if backbone.is_vit:
        return {name: step.name for name, step in rename.outwards(tables.MMSEG_VIT, shapes).items()}
    return {name: PREFIX + name for name in shapes}


def mmseg_overlay(backbone: Backbone) -> dict[str, Any]:
    """The settings as a nested dictionary for `Config.merge_from_dict`."""
    scale = 255 / backbone.input_range
    rgb = backbone.channel_order == "RGB"  # its images are read as BGR
    preprocessor = {
        "type": "SegDataPreProcessor",
        "mean": [round(value * scale, 6) for value in backbone.mean],
        "std": [round(value * scale, 6) for value in backbone.std],
        "bgr_to_rgb": rgb,
        "rgb_to_bgr": False,
    }
    return {"model": {"data_preprocessor": preprocessor, "pretrained": None, "backbone": _backbone(backbone)}}


def overlay_name(backbone: Backbone) -> str:  # noqa: ARG001 (the same for every network; Detectron2's is not)
    return "overlay.py"


def overlay_text(backbone: Backbone) -> str:
    """The overlay as a config file, to be merged: bases that both define `model` are refused by mmengine."""
    model = mmseg_overlay(backbone)["model"]
    return (
        f"# Settings that these weights imply ({backbone.method}, {backbone.display_name}, from the layout "
        f"{backbone.source_layout}).\n# Merge over any config (config.merge_from_dict(Config.fromfile(this "
        f"file).to_dict())), and give\n# init_cfg.checkpoint the full path of the weights.\nmodel = {_literal(model)}\n"
    )


def write(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """`tensors` (artefact names) as a checkpoint that `init_cfg` loads."""
    renamed = {new: tensors[old] for old, new in names(backbone).items()}
    write_torch(path, renamed, entry="state_dict", extras={METADATA_KEY: backbone.model_dump_json()})


def _backbone(backbone: Backbone) -> dict[str, Any]:
    if backbone.is_vit:
        dimension = VITS[backbone.architecture]
        return {
            # A ResNet's settings in the base would not fit a transformer's constructor.
            "_delete_": True,
            "type": "VisionTransformer",
            "img_size": (backbone.image_size, backbone.image_size),
            "patch_size": 16,
            "patch_bias": True,
            "embed_dims": dimension,
            "num_layers": VIT_BLOCKS,
            "num_heads": dimension // 64,
            "mlp_ratio": 4,
            "out_indices": (2, 5, 8, 11),
            "qkv_bias": True,
            "with_cls_token": True,
            "final_norm": True,
            "norm_cfg": {"type": "LN", "eps": 1e-6},
            "act_cfg": {"type": "GELU"},
            "interpolate_mode": "bicubic",
            "init_cfg": {"type": "Pretrained", "checkpoint": WEIGHTS},
        }
    return {
        "type": "ResNet",
        "depth": depth_of(backbone.architecture),
        "stem_channels": 64 * backbone.width,
        "base_channels": 64 * backbone.width,
        "style": "caffe" if backbone.stride_in == "1x1" else "pytorch",
        "deep_stem": False,
        "avg_down": False,
        "frozen_stages": -1,
        "norm_eval": False,
        "init_cfg": {"type": "Pretrained", "checkpoint": WEIGHTS, "prefix": PREFIX},
    }


def _literal(value: Any, indent: int = 0) -> str:
    if not isinstance(value, dict):
        return repr(value)
    margin = " " * (indent + 4)
    items = "".join(f"{margin}{key}={_literal(item, indent + 4)},\n" for key, item in value.items())
    return f"dict(\n{items}{' ' * indent})"
