"""Detectron2: names, settings that the weights imply, and the proof in a real R-CNN. Only the proof needs Detectron2.

ResNets get `overlay.yaml`, to be merged over any R-CNN config; ViTs live in lazy configs, so they get `overlay.py`
with this suite's backbone (`twist.integrations.detectron2`), since Detectron2's own has no class token. The file's
names are `stem`, `res2` … `res5` with Detectron2's flag for matching heuristics, so the same file fills
`backbone.bottom_up.*` (FPN) and `backbone.*` with `roi_heads.res5.*` (C4).
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts import rename
from twist.contracts.errors import require
from twist.contracts.files import atomic_path
from twist.contracts.weights import METADATA_KEY, Backbone, check_written, depth_of
from twist.converters import tables
from twist.converters.proof import block_outputs, check_loaded, written_tensors
from twist.converters.targets import TIMM_ALONE, Stages, Target, own_names, quoted, write_torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights.pth"
AUTHOR = "twist-suite"


def config_file(name: str) -> str:
    """The file that a `_BASE_` means: of `…model_zoo://NAME`, as our configs write it, the installed model zoo's."""
    _, zoo, named = name.partition("model_zoo://")
    if not zoo:
        return name
    require("transfer", "detectron2")
    with warnings.catch_warnings():
        # It imports pkg_resources, which complains about itself, in every worker again.
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        from detectron2 import model_zoo
    return model_zoo.get_config_file(named)


def _refuse(backbone: Backbone) -> str | None:
    if backbone.timm_name:
        return TIMM_ALONE
    if backbone.architecture == "resnet200":
        return "Detectron2 builds ResNets of depth 18, 34, 50, 101 and 152, not 200"
    if backbone.width > 1 and backbone.architecture in ("resnet18", "resnet34"):
        return "Detectron2 builds ResNet-18 and -34 only at width 1 (modeling/backbone/resnet.py asserts 64 channels)"
    return None


def _names(backbone: Backbone) -> dict[str, str]:
    ours = own_names(backbone)
    if backbone.is_vit:
        return ours
    return {name: step.name for name, step in rename.outwards(tables.DETECTRON2, ours).items()}


def detectron2_overlay(backbone: Backbone) -> dict[str, Any]:
    """The settings as a nested dictionary: Detectron2's config keys (ResNet) or those of a lazy config (ViT)."""
    mean, std = ([round(value, 6) for value in values] for values in backbone.pixels(255))
    if backbone.is_vit:
        return {
            "backbone": {**backbone.vit_arguments, "out_blocks": (-1,)},
            "model": {"pixel_mean": mean, "pixel_std": std, "input_format": backbone.channel_order},
            "train": {"init_checkpoint": WEIGHTS},
        }
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


def _settings(backbone: Backbone) -> dict[str, str]:
    """YAML for `cfg.merge_from_file`, or a lazy config that defines the same objects."""
    overlay = detectron2_overlay(backbone)
    origin = f"{backbone.method}, {backbone.display_name}, from the layout {backbone.source_layout}"
    if backbone.is_vit:
        arguments = "".join(f"    {key}={value!r},\n" for key, value in overlay["backbone"].items())
        text = f"""\
# Settings that these weights imply ({origin}), as a lazy config. Detectron2's own
# ViT can load the same file, and computes something else: it has no class token.
from detectron2.config import LazyCall as L

from twist.integrations.detectron2 import VisionTransformer

backbone = L(VisionTransformer)(
{arguments})
model = {overlay["model"]!r}
train = {overlay["train"]!r}
"""
        return {"overlay.py": text}
    import yaml

    text = f"""\
# Settings that these weights imply ({origin}).
# Merge over any R-CNN config: cfg.merge_from_file(base); cfg.merge_from_file(this file);
# then set MODEL.WEIGHTS to the full path of the weights. Norms are the recipe's: the zoo freezes them,
# which does not go with self-supervised weights, so set MODEL.RESNETS.NORM: SyncBN.
"""
    return {"overlay.yaml": text + yaml.safe_dump(overlay, sort_keys=False)}


def _extras(backbone: Backbone) -> dict[str, Any]:
    # The author and the flag are Detectron2's; the header is ours, so that the way back is exact.
    return {"__author__": AUTHOR, "matching_heuristics": True, METADATA_KEY: backbone.model_dump_json()}


def _write(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """A file that DetectionCheckpointer loads, in our and its safe mode."""
    renamed = {new: tensors[old] for old, new in _names(backbone).items()}
    write_torch(path, renamed, entry="model", extras=_extras(backbone))


def _write_pickle(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """The same as the `.pkl` of plain numpy arrays that some tools insist on; read back by our restricted reader."""
    renamed = {new: tensors[old].detach().cpu().contiguous() for old, new in _names(backbone).items()}
    arrays = {name: tensor.numpy() for name, tensor in renamed.items()}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            pickle.dump({"model": arrays, **_extras(backbone)}, file, protocol=4)
        check_written(path, renamed, written_tensors(temporary))


def _usage(folder: Path, backbone: Backbone) -> str:
    if backbone.is_vit:
        return f"""\
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate

backbone = instantiate(LazyConfig.load({quoted(folder / "overlay.py")}).backbone)
DetectionCheckpointer(backbone.network).load({quoted(folder / WEIGHTS)})
"""
    return f"""\
from detectron2 import model_zoo
from detectron2.config import get_cfg

cfg = get_cfg()
cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))  # or your own
cfg.merge_from_file({quoted(folder / "overlay.yaml")})
cfg.MODEL.WEIGHTS = {quoted(folder / WEIGHTS)}
cfg.MODEL.RESNETS.NORM = "SyncBN"  # the zoo freezes its norms, which does not go with self-supervised weights
"""


def _run_resnet(folder: Path, _backbone: Backbone, files: list[Path]) -> list[Stages]:
    """res2 … res5 of each image in an R-CNN with a feature pyramid that is configured by the overlay alone."""
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
    cfg.merge_from_file(str(folder / "overlay.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / cfg.MODEL.WEIGHTS)
    cfg.MODEL.DEVICE = "cpu"
    # SyncBN, the recipes' norm, computes the same in eval mode but does not exist on a CPU.
    cfg.MODEL.RESNETS.NORM = "BN"
    # The box head takes no part; at its usual size, filling it with random numbers takes longer than the proof.
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    bottom_up = model.backbone.bottom_up
    check_loaded(written_tensors(folder / WEIGHTS), bottom_up.state_dict())
    images = [model.preprocess_image([{"image": _read(file, cfg.INPUT.FORMAT)}]).tensor for file in files]
    return [dict(bottom_up(image)) for image in images]


def _run_vit(folder: Path, _backbone: Backbone, files: list[Path]) -> list[Stages]:
    """All blocks' tokens of each image in the ViT of the lazy config."""
    import torch
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate
    from torch import nn

    config = LazyConfig.load(str(folder / "overlay.py"))
    network = instantiate(config.backbone).eval()
    # Where ViTDet's feature pyramid has it: backbone.net.
    holder = nn.ModuleDict({"backbone": nn.ModuleDict({"net": network})})
    DetectionCheckpointer(holder).load(str(folder / config.train.init_checkpoint))
    check_loaded(written_tensors(folder / WEIGHTS), network.network.state_dict())
    mean, std = (torch.tensor(list(config.model[key])).view(-1, 1, 1) for key in ("pixel_mean", "pixel_std"))
    images = [(_read(file, config.model.input_format) - mean) / std for file in files]
    return [block_outputs(network, network.network.blocks, image[None]) for image in images]


def _read(file: Path, channel_order: str) -> Tensor:
    """An image file as DatasetMapper reads it: (C, H, W) in INPUT.FORMAT's order."""
    import torch
    from detectron2.data.detection_utils import read_image

    return torch.as_tensor(read_image(str(file), format=channel_order).transpose(2, 0, 1).copy()).float()


TARGET = Target(
    name="detectron2",
    title="Detectron2",
    weights=WEIGHTS,
    package="detectron2",
    names=_names,
    write=_write,
    framework=lambda backbone: (_run_vit if backbone.is_vit else _run_resnet, "detectron2"),
    usage=_usage,
    refuse=_refuse,
    settings=_settings,
    write_pickle=_write_pickle,
)
