"""How to load what a conversion wrote: the Python lines that `twist convert` prints and the documentation shows.

They are run by the tests as they stand, so a line that no longer works is found.
"""

from __future__ import annotations

from pathlib import Path

from twist.contracts.weights import Backbone
from twist.converters.targets.safetensors_writer import is_torchvisions


def usage(target: str, folder: Path, backbone: Backbone) -> str:
    """Lines that build the target's network with the weights in `folder`."""
    if target == "detectron2":
        return _detectron2_vit(folder) if backbone.is_vit else _detectron2(folder)
    if target == "mmseg":
        return _mmseg(folder)
    if target == "timm":
        return _timm(folder)
    return (_torchvision if is_torchvisions(backbone) else _ours)(folder, backbone)


def _detectron2(folder: Path) -> str:
    return f"""\
from detectron2 import model_zoo
from detectron2.config import get_cfg

cfg = get_cfg()
cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))  # or your own
cfg.merge_from_file({_text(folder / "overlay.yaml")})
cfg.MODEL.WEIGHTS = {_text(folder / "weights.pth")}
cfg.MODEL.RESNETS.NORM = "SyncBN"  # the zoo freezes its norms, which does not go with self-supervised weights
"""


def _detectron2_vit(folder: Path) -> str:
    return f"""\
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate

backbone = instantiate(LazyConfig.load({_text(folder / "overlay.py")}).backbone)
DetectionCheckpointer(backbone).load({_text(folder / "weights.pth")})
"""


def _mmseg(folder: Path) -> str:
    return f"""\
from mmengine.config import Config

config = Config.fromfile("your_config.py")
config.merge_from_dict(Config.fromfile({_text(folder / "overlay.py")}).to_dict())
config.model.backbone.init_cfg.checkpoint = {_text(folder / "weights.pth")}
"""


def _timm(folder: Path) -> str:
    return f"""\
import timm

network = timm.create_model({_text(folder, "local-dir:")}, pretrained=True, num_classes=10)  # a new classifier; 0: none
"""


def _torchvision(folder: Path, backbone: Backbone) -> str:
    name = backbone.architecture
    return f"""\
from safetensors.torch import load_file
from torchvision.models import {name}

network = {name}()
network.load_state_dict(load_file({_text(folder / "backbone.safetensors")}), strict=False)  # all but the classifier
{_pixels(backbone)}"""


def _ours(folder: Path, backbone: Backbone) -> str:
    return f"""\
from twist.contracts.networks import network_of
from twist.contracts.weights import read_backbone

tensors, header = read_backbone({_text(folder / "backbone.safetensors")})
network = network_of(header)
network.load_state_dict(tensors)
{_pixels(backbone)}"""


def _pixels(backbone: Backbone) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (backbone.mean, backbone.std))
    return f"# images: {backbone.channel_order} from 0 to {backbone.input_range}, mean {mean}, std {std}\n"


def _text(path: Path, prefix: str = "") -> str:
    return '"' + f"{prefix}{path}".replace("\\", "\\\\").replace('"', '\\"') + '"'
