"""MMSegmentation: names, settings that the weights imply, and the proof. Only the proof needs MMSegmentation.

`overlay.py` merges over any of its configs: it turns the usual ResNetV1c (deep stem) into the ResNet that
self-supervised weights have, clears `pretrained` (which would win over or clash with `init_cfg`), and sets this
source's pixels. Dilations, strides, norms and heads stay the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts import rename
from twist.contracts.weights import METADATA_KEY, Backbone, Vit, depth_of
from twist.converters import tables
from twist.converters.proof import block_outputs, check_loaded, written_tensors
from twist.converters.targets import TIMM_ALONE, Stages, Target, own_names, quoted, write_torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, OVERLAY, PREFIX = "weights.pth", "overlay.py", "backbone."
OURS = "TwistVisionTransformer"  # twist.integrations.mmseg


def _refuse(backbone: Backbone) -> str | None:
    if backbone.timm_name:
        return TIMM_ALONE
    if backbone.architecture == "resnet200":
        return "MMSegmentation builds ResNets of depth 18, 34, 50, 101 and 152, not 200"
    return None


def is_mmsegs(backbone: Backbone) -> bool:
    """Whether MMSegmentation's own VisionTransformer computes what this ViT does, its table resized alike."""
    vit = backbone.transformer
    says = {"embed_dim", "depth", "heads", "mlp_features", "qkv_bias", "norm_eps", "positions"}
    return vit == Vit(**vit.model_dump(include=says), resize="plain") and vit.mlp_features % vit.embed_dim == 0


def _names(backbone: Backbone) -> dict[str, str]:
    """VisionTransformer's own loader knows no prefix, so its ViTs have none."""
    ours = own_names(backbone)
    if backbone.is_vit and is_mmsegs(backbone):
        return {name: step.name for name, step in rename.outwards(tables.MMSEG_VIT, ours).items()}
    return {name: f"{PREFIX}{'network.' * backbone.is_vit}{name}" for name in ours}


def mmseg_overlay(backbone: Backbone) -> dict[str, Any]:
    """The settings as a nested dictionary for `Config.merge_from_dict`."""
    mean, std = ([round(value, 6) for value in values] for values in backbone.pixels(255))
    preprocessor = {
        "type": "SegDataPreProcessor",
        "mean": mean,
        "std": std,
        "bgr_to_rgb": backbone.channel_order == "RGB",  # its images are read as BGR
        "rgb_to_bgr": False,
    }
    # mmengine replaces the braces by the overlay's own folder when it reads it.
    init: dict[str, Any] = {"type": "Pretrained", "checkpoint": "{{ fileDirname }}/" + WEIGHTS, "prefix": PREFIX}
    settings = _resnet(backbone)
    if backbone.is_vit:
        depth = backbone.transformer.depth
        settings = {
            "_delete_": True,  # a ResNet's settings in the base would not fit a transformer's constructor
            **(_mmsegs_vit(backbone) if is_mmsegs(backbone) else {"type": OURS, **backbone.vit_arguments}),
            "out_indices": tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)),
            "final_norm": True,
        }
        if is_mmsegs(backbone):
            del init["prefix"]
    backbone_settings = {**settings, "init_cfg": init}
    return {"model": {"data_preprocessor": preprocessor, "pretrained": None, "backbone": backbone_settings}}


def _mmsegs_vit(backbone: Backbone) -> dict[str, Any]:
    vit = backbone.transformer
    return {
        "type": "VisionTransformer",
        "img_size": (backbone.image_size, backbone.image_size),
        "patch_size": backbone.patch_size,
        "patch_bias": True,
        "embed_dims": vit.embed_dim,
        "num_layers": vit.depth,
        "num_heads": vit.heads,
        "mlp_ratio": vit.mlp_features // vit.embed_dim,
        "qkv_bias": vit.qkv_bias,
        "with_cls_token": True,
        "norm_cfg": {"type": "LN", "eps": vit.norm_eps},
        "act_cfg": {"type": "GELU"},
        "interpolate_mode": "bicubic",
    }


def _resnet(backbone: Backbone) -> dict[str, Any]:
    if backbone.is_vit:
        return {}
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
    }


def _settings(backbone: Backbone) -> dict[str, str]:
    """A config file, to be merged: bases that both define `model` are refused by mmengine."""
    model = mmseg_overlay(backbone)["model"]
    ours = model["backbone"]["type"] == OURS
    imports = 'custom_imports = dict(imports=["twist.integrations.mmseg"])\n' if ours else ""
    text = (
        f"# Settings that these weights imply ({backbone.method}, {backbone.display_name}, from the layout "
        f"{backbone.source_layout}).\n# Merge over any config (config.merge_from_dict(Config.fromfile(this "
        f"file).to_dict())).\n{imports}model = {_literal(model)}\n"
    )
    return {OVERLAY: text}


def _literal(value: Any, indent: int = 0) -> str:
    if not isinstance(value, dict):
        return repr(value)
    margin = " " * (indent + 4)
    items = "".join(f"{margin}{key}={_literal(item, indent + 4)},\n" for key, item in value.items())
    return f"dict(\n{items}{' ' * indent})"


def _write(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    renamed = {new: tensors[old] for old, new in _names(backbone).items()}
    write_torch(path, renamed, entry="state_dict", extras={METADATA_KEY: backbone.model_dump_json()})


def _usage(folder: Path, _backbone: Backbone) -> str:
    return f"""\
from mmengine.config import Config

config = Config.fromfile("your_config.py")
config.merge_from_dict(Config.fromfile({quoted(folder / OVERLAY)}).to_dict())
"""


def _run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """res2 … res5 (or the tokens of every layer) of each image, by MMSegmentation's own reader and network."""
    import torch
    from mmcv.transforms import LoadImageFromFile
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.models import SegDataPreProcessor
    from mmseg.registry import MODELS

    model = Config.fromfile(str(folder / OVERLAY)).model
    arguments = {key: value for key, value in model.backbone.items() if key != "_delete_"}
    arguments["init_cfg"] = {**arguments["init_cfg"], "checkpoint": str(folder / WEIGHTS)}
    with DefaultScope.overwrite_default_scope("mmseg"):
        network = MODELS.build(arguments)
        network.init_weights()
    network.eval()
    prefix = arguments["init_cfg"].get("prefix", "")
    written = {name.removeprefix(prefix): tensor for name, tensor in written_tensors(folder / WEIGHTS).items()}
    check_loaded(written, network.state_dict())
    pixels = {key: value for key, value in model.data_preprocessor.items() if key != "type"}
    preprocessor = SegDataPreProcessor(**pixels)
    result = []
    for file in files:
        image = LoadImageFromFile()({"img_path": str(file)})["img"]  # (H, W, BGR), as OpenCV reads
        packed = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # PackSegInputs
        images = preprocessor({"inputs": [packed]})["inputs"]
        if backbone.is_vit:
            blocks = network.layers if is_mmsegs(backbone) else network.network.blocks
            result.append(block_outputs(network, blocks, images))
        else:
            result.append({f"res{index + 2}": value for index, value in enumerate(network(images))})
    return result


TARGET = Target(
    name="mmseg",
    title="MMSegmentation",
    weights=WEIGHTS,
    package="mmseg",
    names=_names,
    write=_write,
    framework=lambda _: (_run, "mmseg"),
    usage=_usage,
    refuse=_refuse,
    settings=_settings,
)
