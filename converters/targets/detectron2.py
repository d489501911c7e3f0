"""Detectron2: names, and the settings that the weights imply. Needs no Detectron2.

ResNets get `overlay.yaml`, to be merged over any R-CNN config; plain ViTs live in lazy configs, so they get
`overlay.py`. The file's names are `stem`, `res2` … `res5` with the heuristics' flag inside, so the same file fills
`backbone.bottom_up.*` (FPN) and `backbone.*` with `roi_heads.res5.*` (C4).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts import rename
from twist.contracts.files import atomic_path
from twist.contracts.weights import METADATA_KEY, VIT_BLOCKS, VITS, Backbone, depth_of
from twist.converters import manifest, tables
from twist.converters.containers import read_contents
from twist.converters.torch_file import same_bytes, write_torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights.pth"
AUTHOR = "twist-suite"
# detectron2 modeling/backbone/vit.py: the network has no class token (its position is skipped) and no last norm.
VIT_DROPPED = ("cls_token", "norm.weight", "norm.bias")


def refuse(backbone: Backbone) -> str | None:
    """Why Detectron2 has no such network, or None."""
    if backbone.architecture == "resnet200":
        return "Detectron2 builds ResNets of depth 18, 34, 50, 101 and 152, not 200"
    if backbone.width > 1 and backbone.architecture in ("resnet18", "resnet34"):
        return "Detectron2 builds ResNet-18 and -34 only at width 1 (modeling/backbone/resnet.py asserts 64 channels)"
    return None


def names(backbone: Backbone) -> dict[str, str]:
    """Artefact name → name in the file, for every tensor that Detectron2 has a place for."""
    shapes = manifest.shapes_of(manifest.Geometry(backbone.architecture, backbone.width, backbone.image_size))
    if backbone.is_vit:
        return {name: name for name in shapes if name not in VIT_DROPPED}
    return {name: step.name for name, step in rename.outwards(tables.DETECTRON2, shapes).items()}


def detectron2_overlay(backbone: Backbone) -> dict[str, Any]:
    """The settings as a nested dictionary: Detectron2's config keys (ResNet) or those of a lazy config (ViT)."""
    scale = 255 / backbone.input_range
    mean = [round(value * scale, 6) for value in backbone.mean]
    std = [round(value * scale, 6) for value in backbone.std]
    if backbone.is_vit:
        dimension = VITS[backbone.architecture]
        return {
            "backbone": {
                "img_size": backbone.image_size, "patch_size": 16, "embed_dim": dimension, "depth": VIT_BLOCKS,
                "num_heads": dimension // 64, "mlp_ratio": 4, "qkv_bias": True, "window_size": 0, "use_rel_pos": False,
                "pretrain_img_size": backbone.image_size, "pretrain_use_cls_token": True, "out_feature": "last_feat",
            },
            "model": {"pixel_mean": mean, "pixel_std": std, "input_format": backbone.channel_order},
            "train": {"init_checkpoint": WEIGHTS},
        }  # fmt: skip
    basic = backbone.architecture in ("resnet18", "resnet34")
    return {
        "MODEL": {
            "WEIGHTS": WEIGHTS,
            "PIXEL_MEAN": mean,
            "PIXEL_STD": std,
            # Self-supervised statistics come from other crops than detection's: nothing is frozen (MoCo's configs).
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {
                "DEPTH": depth_of(backbone.architecture),
                "STRIDE_IN_1X1": backbone.stride_in == "1x1",
                "NUM_GROUPS": 1,
                "WIDTH_PER_GROUP": 64 * backbone.width,
                "STEM_OUT_CHANNELS": 64 * backbone.width,
                "RES2_OUT_CHANNELS": 64 if basic else 256 * backbone.width,
            },
        },
        "INPUT": {"FORMAT": backbone.channel_order},
        "VERSION": 2,
    }


def overlay_name(backbone: Backbone) -> str:
    return "overlay.py" if backbone.is_vit else "overlay.yaml"


def overlay_text(backbone: Backbone) -> str:
    """The overlay as a file: YAML for `cfg.merge_from_file`, or a lazy config that defines the same objects."""
    overlay = detectron2_overlay(backbone)
    origin = f"{backbone.method}, {backbone.display_name}, from the layout {backbone.source_layout}"
    if not backbone.is_vit:
        return (
            f"# Settings that these weights imply ({origin}).\n# Merge over any R-CNN config: "
            "cfg.merge_from_file(base); cfg.merge_from_file(this file);\n"
            "# then set MODEL.WEIGHTS to the full path of the weights. Norms are the recipe's: the zoo freezes them,\n"
            "# which does not go with self-supervised weights, so set MODEL.RESNETS.NORM: SyncBN.\n" + _yaml(overlay)
        )
    arguments = "".join(f"    {key}={value!r},\n" for key, value in overlay["backbone"].items())
    return (
        f"# Settings that these weights imply ({origin}), as a lazy config.\nfrom functools import partial\n\nfrom "
        "detectron2.config import LazyCall as L\nfrom detectron2.modeling import ViT\nfrom torch import "
        f"nn\n\nbackbone = L(ViT)(\n{arguments}    norm_layer=partial(nn.LayerNorm, eps=1e-6),\n)\nmodel = "
        f"{overlay['model']!r}\ntrain = {overlay['train']!r}\n"
    )


def write(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """`tensors` (artefact names) as a file that DetectionCheckpointer loads, in our and its safe mode."""
    renamed = {new: tensors[old] for old, new in names(backbone).items()}
    write_torch(path, renamed, entry="model", extras=_extras(backbone))


def write_pickle(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """The same as the `.pkl` of plain numpy arrays that some tools insist on; read back by our restricted reader."""
    import torch

    arrays = {new: tensors[old].detach().cpu().contiguous().numpy() for old, new in names(backbone).items()}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            pickle.dump({"model": arrays, **_extras(backbone)}, file, protocol=4)
        reread = read_contents(temporary).value["model"]
        same = reread.keys() == arrays.keys() and all(
            same_bytes(reread[name], torch.from_numpy(array)) for name, array in arrays.items()
        )
        if not same:
            raise OSError(f"{path}: what was written does not read back equal; the disk may be full or failing.")


def _extras(backbone: Backbone) -> dict[str, Any]:
    # The author and the flag are Detectron2's; the header is ours, so that the way back is exact.
    return {"__author__": AUTHOR, "matching_heuristics": True, METADATA_KEY: backbone.model_dump_json()}


def _yaml(value: dict[str, Any], indent: int = 0) -> str:
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines.append(f"{' ' * indent}{key}:\n{_yaml(item, indent + 2)}")
        else:
            lines.append(f"{' ' * indent}{key}: {item if isinstance(item, (list, bool, int)) else repr(item)}\n")
    return "".join(lines)
